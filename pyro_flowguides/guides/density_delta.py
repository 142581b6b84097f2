"""The distribution of a site's value, given the latent vector that it is the image of."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import register_kl

__all__ = ["DensityDelta", "WithDensityDeltas"]


class DensityDelta(dist.Delta):
    """A value with the density that the map to its support gives it.

    Pyro's KL divergence from a ``Delta`` leaves that density out, and with it ``TraceMeanField_ELBO`` the Jacobian of
    every constrained site.
    """


@register_kl(DensityDelta, dist.Distribution)
def _kl_image(p: DensityDelta, q: dist.Distribution) -> Tensor:
    divergence: Tensor = p.log_density - q.log_prob(p.v)
    return divergence


class WithDensityDeltas(Messenger):
    """Makes images of the ``Delta`` sites of an autoguide."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = msg["fn"]
        if type(fn) is dist.Delta:
            msg["fn"] = DensityDelta(fn.v, fn.log_density, fn.event_dim)
