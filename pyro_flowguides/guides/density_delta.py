"""A point mass with a density: the distribution of a site's value given the latent vector behind it."""

from __future__ import annotations

import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import register_kl

from pyro_flowguides.programs.types import Site

__all__ = ["DensityDelta", "DensityDeltaMessenger"]


class DensityDelta(dist.Delta):
    """A ``Delta`` whose log density is that of the map from the latent vector to the value.

    Pyro's KL divergence of a ``Delta`` leaves its log density out, and ``TraceMeanField_ELBO`` would therefore miss the
    Jacobian of every constrained site. The divergence registered here keeps it.
    """


@register_kl(DensityDelta, dist.Distribution)
def _kl_density_delta(p: DensityDelta, q: dist.Distribution) -> Tensor:
    divergence: Tensor = p.log_density - q.log_prob(p.v)
    return divergence


class DensityDeltaMessenger(Messenger):
    """Replace the ``Delta`` of every site of an autoguide by a :class:`DensityDelta`."""

    def _pyro_sample(self, msg: Site) -> None:
        fn = msg["fn"]
        if type(fn) is dist.Delta:
            msg["fn"] = DensityDelta(fn.v, fn.log_density, fn.event_dim)
