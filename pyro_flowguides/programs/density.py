"""The log density of a model as a function of the unconstrained latent vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, biject_to

__all__ = ["LogDensity", "NotVectorizedError"]

PARTICLES = "_flowguides_particles"


class NotVectorizedError(ValueError):
    """The model gives other densities for a batch of particles than for one particle after the other."""


class _Score(Messenger):
    """Gives latent sites their values and adds up log densities, recording nothing else; per particle, if there are."""

    def __init__(self, values: Mapping[str, Tensor], particles: int | None = None) -> None:
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
        if not site_is_subsample(msg):
            with _unvalidated(msg["fn"]):
                log_prob = scale_and_mask(msg["fn"].log_prob(msg["value"]), msg["scale"], msg["mask"])
            self.total = self.total + (self._sum(msg["name"], log_prob) if isinstance(log_prob, Tensor) else log_prob)

    def _sum(self, name: str, log_prob: Tensor) -> Tensor:
        if self.particles is None:
            return log_prob.sum()
        if log_prob.dim() == 0 or log_prob.shape[0] != self.particles:
            raise NotVectorizedError(
                f"site {name!r} has log densities of shape {tuple(log_prob.shape)} for {self.particles} particles"
            )
        return log_prob.reshape(self.particles, -1).sum(-1)


@contextmanager
def _unvalidated(fn: Distribution) -> Iterator[None]:
    """No validation by a distribution and its parts, which keep the setting that there was when they were expanded."""
    parts = [fn]
    for part in parts:
        parts += [value for value in vars(part).values() if isinstance(value, Distribution)]
    validating = [part for part in parts if part.__dict__.get("_validate_args")]
    for part in validating:
        part._validate_args = False
    try:
        yield
    finally:
        for part in validating:
            part._validate_args = True


class LogDensity:
    r"""The model's joint log density of unconstrained latent vectors, Jacobians included, for a batch of particles.

    .. math:: \log p(z) = \log p(x, \theta(z)) + \log|\det \partial \theta / \partial z|

    The model runs once per call, inside an outermost plate of particles; only densities are collected. A model that was
    written for one particle, for which :meth:`check` finds that it does not broadcast, runs as it is and is mapped over
    the particles, each operation taking all of them (``torch.func.vmap``). A particle at which a matrix cannot be
    factorized has the density NaN.

    Args:
        model: a Pyro model.
        guide: an autoguide of it over one unconstrained vector, set up.
        args, kwargs: the model's arguments.

    Shapes:
        ``z (S, D) -> (S,)``.

    Raises:
        NotVectorizedError: by :meth:`check`, if the model can take several particles in neither way.
        ValueError: if a latent site of the model is not in the guide.
    """

    def __init__(
        self, model: Callable[..., Any], guide: AutoContinuous, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.guide: Any = guide
        prototype: Any = guide.prototype_trace
        values = {name: site["value"] for name, site in prototype.iter_stochastic_nodes()}
        trace: Any = poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs)
        frames = [
            frame
            for node in (*trace.nodes.values(), *prototype.nodes.values())
            if node["type"] == "sample"
            for frame in node["cond_indep_stack"]
        ]
        self.nesting = max((-frame.dim for frame in frames if frame.vectorized), default=0)
        #: All particles at once, whatever happens to one of them.
        self.together: Callable[[Tensor], Tensor] = self._in_plate

    def __call__(self, z: Tensor) -> Tensor:
        return _by_halves(self.together, z)

    def _constrain(self, latent: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """``(..., D)`` -> site values ``(..., batch, event)`` and their log-Jacobians."""
        values, ladjs = {}, []
        for site, unconstrained in self.guide._unpack_latent(latent):
            transform = biject_to(site["fn"].support)
            values[site["name"]] = transform(unconstrained)
            ladjs.append(transform.log_abs_det_jacobian(unconstrained, values[site["name"]]))
        return values, ladjs

    def _in_plate(self, z: Tensor) -> Tensor:
        particles = z.shape[0]
        values, ladjs = self._constrain(z.reshape(particles, *(1,) * self.nesting, z.shape[-1]))
        score = _Score(values, particles)
        with pyro.validation_enabled(False), score, pyro.plate(PARTICLES, particles, dim=-1 - self.nesting):
            self.model(*self.args, **self.kwargs)
        return sum((ladj.reshape(particles, -1).sum(-1) for ladj in ladjs), z.new_zeros(particles)) + score.total

    def _mapped(self, z: Tensor) -> Tensor:
        mapped: Tensor = torch.func.vmap(self._alone, randomness="same")(z)
        return mapped

    def _alone(self, z: Tensor) -> Tensor:
        """Of one latent vector ``(D,)``, the model being run as Pyro runs it."""
        values, ladjs = self._constrain(z)
        score = _Score(values)
        with pyro.validation_enabled(False), score:
            self.model(*self.args, **self.kwargs)
        return sum((ladj.sum() for ladj in ladjs), z.new_zeros(())) + score.total

    @torch.no_grad()
    def check(self, z: Tensor) -> None:
        """Compare a batch of particles with the same particles one at a time."""
        alone = torch.cat([_seeded(lambda row: self._alone(row[0])[None], row[None]) for row in z])
        reasons = []
        for together in (self._in_plate, self._mapped):
            reason = _difference(together, z, alone)
            if not reason:
                self.together = together
                return
            reasons.append(reason)
        raise NotVectorizedError(reasons[0])


def _difference(together: Callable[[Tensor], Tensor], z: Tensor, alone: Tensor) -> str:
    """Why a function does not do for a batch of particles; nothing if it does."""
    try:
        found = _seeded(together, z)
    except NotVectorizedError as error:
        return str(error)
    except Exception as error:  # a program may fail in any way under a plate it was not written for
        return f"the model cannot run on a batch of particles: {(str(error).splitlines() or [''])[0]}"
    tolerance = torch.finfo(z.dtype).eps ** 0.5  # sums of large terms lose many digits, wrong sums all of them
    if torch.allclose(found, alone, rtol=tolerance, atol=tolerance, equal_nan=True):
        return ""
    return (
        f"the model's log density of a batch of particles differs from that of single particles by "
        f"{(found - alone).abs().max():.3g}: it does not broadcast over a leftmost dimension"
    )


def _seeded(density: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """With the same random numbers, those of subsampling, at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _by_halves(density, z)


def _by_halves(density: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Of a batch that one particle's matrix takes down, NaN for that particle alone."""
    try:
        return density(z)
    except torch.linalg.LinAlgError:
        if z.shape[0] == 1:
            return z.new_full((1,), math.nan)
        return torch.cat([_by_halves(density, half) for half in z.chunk(2)])
