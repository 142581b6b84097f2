"""The log density of a model as a function of the unconstrained latent vector."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_flowguides.nn.arguments import check_tensor, describe
from pyro_flowguides.programs.batched_run import DENSITY, BatchedRun, DensityRun, Layout
from pyro_flowguides.programs.running import run_scored
from pyro_flowguides.programs.types import Values

if TYPE_CHECKING:
    from pyro_flowguides.programs.program import Program

__all__ = ["LogDensity"]

_LATENT = "latent vector"


class LogDensity:
    r"""The model's joint log density of unconstrained latent vectors, Jacobians included, for a batch of particles.

    .. math:: \log p(z) = \log p(x, \theta(z)) + \log|\det \partial \theta / \partial z|

    The model runs once per call, and only densities are collected. It runs under a plate of particles until
    :meth:`check` finds that it does not broadcast; then it is mapped over the particles by ``torch.func.vmap``. At a
    particle at which the model raises an error the density is NaN.

    Args:
        program: a model and an autoguide of it over one unconstrained vector.

    Shapes:
        ``z (S, D) -> (S,)``.

    Raises:
        NotVectorizedError: by :meth:`check`, if the model can take several particles in neither way.
        ValueError: if a latent site of the model is not in the guide.
    """

    def __init__(self, program: Program) -> None:
        if not hasattr(getattr(program, "guide", None), "_unpack_latent"):
            raise TypeError(
                "LogDensity: needs a program whose guide is an autoguide over one latent vector, such as AutoIAF or "
                f"AutoMultivariateNormal, got {describe(program)}"
            )
        self.program = program
        self._density = DensityRun(BatchedRun(partial(_run, program), program.nesting, {_LATENT: 0}, randomness="same"))

    def __call__(self, z: Tensor) -> Tensor:
        self._check(z)
        return self._density({_LATENT: z}, self.program.mode)

    def at_once(self, z: Tensor) -> Tensor:
        """Evaluate all particles in one run; an error at one of them is raised."""
        return self._density.at_once({_LATENT: z}, self.program.mode)

    def constrain(self, z: Tensor) -> Values:
        r"""Map unconstrained latent vectors (S, D) to values of the model's sites, each (S, \*site)."""
        self._check(z)
        layout = Layout(len(z), self.program.nesting)
        sites, _ = _constrain(self.program, layout.place(z, 0), layout)
        return {name: layout.split(value, self.program.latents[name].shape) for name, value in sites.items()}

    @torch.no_grad()
    def check(self, z: Tensor) -> None:
        """Find the fastest way to run the model on these particles that gives what each gives by itself."""
        tolerance = torch.finfo(z.dtype).eps ** 0.5
        self.program.in_fastest_mode(lambda mode: self._density.checked({_LATENT: z}, mode, tolerance))

    def _check(self, z: Tensor) -> None:
        dim = self.program.guide.latent_dim  # type: ignore[attr-defined]
        check_tensor("LogDensity", "z", z)
        if z.dim() != 2 or z.shape[-1] != dim:
            raise ValueError(f"LogDensity: z must have shape (S, {dim}), one row per particle, got {tuple(z.shape)}")


def _run(program: Program, layout: Layout, values: Values) -> Values:
    sites, ladj = _constrain(program, values[_LATENT], layout)
    return {DENSITY: ladj + run_scored(program.model, program.args, program.kwargs, layout, sites)}


def _constrain(program: Program, latent: Tensor, layout: Layout) -> tuple[Values, Tensor]:
    """Map latent vectors to values of the sites, and return the log-Jacobian, shape (S,)."""
    values, total = {}, latent.new_zeros(layout.num_samples)
    for site, unconstrained in program.guide._unpack_latent(latent):  # type: ignore[attr-defined]
        transform = biject_to(site["fn"].support)
        value = values[site["name"]] = transform(unconstrained)
        ladj = transform.log_abs_det_jacobian(unconstrained, value)
        total = total + ladj.reshape(layout.num_samples, -1).sum(-1)
    return values, total
