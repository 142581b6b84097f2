"""The contract of an objective: how it is evaluated at one step, and what an evaluation holds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

__all__ = ["Evaluation", "Objective", "Route", "RouteKind", "StepOptions"]

RouteKind: TypeAlias = Literal["compiled", "recorded", "batched", "traced", "sequential"]

_DESCRIPTIONS: dict[RouteKind, str] = {
    "compiled": "compiled steps",
    "recorded": "recorded steps",
    "batched": "steps that run the model on a batch of particles",
    "traced": "Pyro's traces, all particles in one run",
    "sequential": "Pyro's traces, one particle at a time",
}


@dataclass(frozen=True)
class Route:
    """How the steps of a fit evaluate the bound.

    Attributes:
        kind: the kind of evaluation, from the fastest to the slowest: ``"compiled"``, the tensor operations of a step
            and its update as one compiled function; ``"recorded"``, the same operations replayed without the Python
            code of the model; ``"batched"``, the model run anew at every step on a batch of particles; ``"traced"``,
            Pyro's traces of guide and model with all particles in one run; ``"sequential"``, Pyro's traces of one
            particle after the other.
        reason: why no faster kind is used; may be empty.
    """

    kind: RouteKind
    reason: str = ""

    def __str__(self) -> str:
        return _DESCRIPTIONS[self.kind] + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class StepOptions:
    """How to evaluate an objective at one step.

    Attributes:
        num_particles: number of draws.
        path_gradient: follow the path gradient where the guide offers it.
        power: exponent of the target density; below 1 it tempers the target.
        importance: 1 for the ELBO; K for the importance-weighted bound of groups of K particles.
    """

    num_particles: int
    path_gradient: bool = True
    power: float = 1.0
    importance: int = 1

    @property
    def recording_key(self) -> tuple[int, bool]:
        """Identify the tensor operations of the step: options with the same key share a recording."""
        return self.num_particles, self.path_gradient


class Evaluation(NamedTuple):
    """One estimate of the bound.

    Attributes:
        loss_or_gradient: the loss to differentiate; where its gradient has been computed already, the gradient, as one
            vector for each group of parameters.
        elbo: the estimate; NaN if no particle was finite.
        num_dropped: number of particles left out because they were not finite.
        gap: half the variance of the log weights, which for a nearly exact guide is the gap between the bound and the
            log evidence; NaN if unknown.
    """

    loss_or_gradient: Tensor | Sequence[Tensor]
    elbo: float
    num_dropped: int
    gap: float = math.nan


class Objective(Protocol):
    """A bound to maximize by stochastic gradients.

    Attributes:
        parameters: the unconstrained parameters of guide and model, by name.
    """

    parameters: dict[str, Tensor]

    @property
    def route(self) -> Route:
        """How the bound is evaluated."""

    def __call__(self, options: StepOptions, generator: torch.Generator) -> Evaluation:
        """Estimate the bound.

        Args:
            options: how to evaluate it.
            generator: source of the noise, for objectives that draw it themselves.
        """
