"""The log density of a model as a function of the unconstrained latent vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

__all__ = ["LogDensity", "NotVectorisedError"]

PARTICLES = "_flowguides_particles"


class NotVectorisedError(ValueError):
    """The model gives other densities for a batch of particles than for one particle after the other."""


class _Score(Messenger):
    """Gives latent sites their values and adds up log densities per particle, recording nothing else."""

    def __init__(self, values: Mapping[str, Tensor], particles: int) -> None:
        super().__init__()
        self.values, self.particles = values, particles
        self.total: Tensor | float = 0.0

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        if msg["name"] not in self.values:
            raise ValueError(f"site {msg['name']!r} is latent in the model and not in the guide")
        msg["value"], msg["done"] = self.values[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        log_prob = scale_and_mask(msg["fn"].log_prob(msg["value"]), msg["scale"], msg["mask"])
        if isinstance(log_prob, Tensor):
            if log_prob.dim() == 0 or log_prob.shape[0] != self.particles:
                raise NotVectorisedError(
                    f"site {msg['name']!r} has log densities of shape {tuple(log_prob.shape)} for {self.particles} "
                    f"particles"
                )
            log_prob = log_prob.reshape(self.particles, -1).sum(-1)
        self.total = self.total + log_prob


class LogDensity:
    r"""The model's joint log density of unconstrained latent vectors, Jacobians included, for a batch of particles.

    .. math:: \log p(z) = \log p(x, \theta(z)) + \log|\det \partial \theta / \partial z|

    The model runs once per call, inside an outermost plate of particles; only densities are collected. A particle at
    which a matrix cannot be factorised has the density NaN.

    Args:
        model: a Pyro model.
        guide: an autoguide of it over one unconstrained vector, set up.
        args, kwargs: the model's arguments.

    Shapes:
        ``z (S, D) -> (S,)``.

    Raises:
        NotVectorisedError: by :meth:`check`, if the model does not broadcast over particles.
        ValueError: if a latent site of the model is not in the guide.
    """

    def __init__(
        self, model: Callable[..., Any], guide: AutoContinuous, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.guide: Any = guide
        prototype: Any = guide.prototype_trace
        trace: Any = poutine.trace(self._alone()).get_trace()
        frames = [
            frame
            for node in (*trace.nodes.values(), *prototype.nodes.values())
            if node["type"] == "sample"
            for frame in node["cond_indep_stack"]
        ]
        self.nesting = max((-frame.dim for frame in frames if frame.vectorized), default=0)

    def _alone(self) -> Callable[[], Any]:
        values = {name: site["value"] for name, site in self.guide.prototype_trace.iter_stochastic_nodes()}
        return lambda: poutine.condition(self.model, data=values)(*self.args, **self.kwargs)

    def constrain(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """``z (S, D)`` -> site values ``(S, 1, ..., batch, event)`` and the summed log-Jacobian ``(S,)``."""
        latent = z.reshape(z.shape[0], *(1,) * self.nesting, z.shape[-1])
        values, ladj = {}, z.new_zeros(z.shape[0])
        for site, unconstrained in self.guide._unpack_latent(latent):
            transform = biject_to(site["fn"].support)
            value = transform(unconstrained)
            log_jacobian = transform.log_abs_det_jacobian(unconstrained, value)
            values[site["name"]] = value
            ladj = ladj + log_jacobian.reshape(z.shape[0], -1).sum(-1)
        return values, ladj

    def __call__(self, z: Tensor) -> Tensor:
        try:
            return self.together(z)
        except torch.linalg.LinAlgError:  # one particle's matrix takes the whole batch down
            if z.shape[0] == 1:
                return z.new_full((1,), math.nan)
            return torch.cat([self(half) for half in z.chunk(2)])

    def together(self, z: Tensor) -> Tensor:
        """All particles at once, whatever happens to one of them."""
        values, ladj = self.constrain(z)
        score = _Score(values, z.shape[0])
        with pyro.validation_enabled(False), score, pyro.plate(PARTICLES, z.shape[0], dim=-1 - self.nesting):
            self.model(*self.args, **self.kwargs)
        return ladj + score.total

    @torch.no_grad()
    def check(self, z: Tensor) -> None:
        """Compare a batch of particles with the same particles one at a time."""
        try:
            together, alone = self._seeded(z), torch.cat([self._seeded(row[None]) for row in z])
        except NotVectorisedError:
            raise
        except Exception as error:  # a program may fail in any way under a plate it was not written for
            first = (str(error).splitlines() or [""])[0]
            raise NotVectorisedError(f"the model cannot run on a batch of particles: {first}") from error
        tolerance = torch.finfo(z.dtype).eps ** 0.5  # sums of large terms lose many digits, wrong sums all of them
        if not torch.allclose(together, alone, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise NotVectorisedError(
                f"the model's log density of a batch of particles differs from that of single particles by "
                f"{(together - alone).abs().max():.3g}: it does not broadcast over a leftmost dimension"
            )

    def _seeded(self, z: Tensor) -> Tensor:
        """The density with the same random numbers, those of subsampling, at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self(z)
