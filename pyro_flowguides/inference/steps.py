"""What is asked of an objective at one step, what it answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_flowguides.inference.flat_adam import Descent

__all__ = ["Objective", "Request", "Step", "Taken"]


class Step(NamedTuple):
    """One evaluation.

    Attributes:
        loss: what is to be differentiated, or its gradients by the parameters, flat, where they came with it.
        elbo: the bound's estimate.
        dropped: how many particles were not finite.
        gap: half the variance of the log weights, which for a guide that is nearly exact is the gap between the bound
            and the evidence.
    """

    loss: Tensor | Sequence[Tensor]
    elbo: float
    dropped: int
    gap: float = math.nan


@dataclass(frozen=True)
class Request:
    """How to evaluate an objective at one step.

    Attributes:
        particles: number of draws.
        path: follow the path gradient where the guide offers it.
        power: exponent of the target density, below 1 to temper it.
        importance: 1 for the ELBO; K for the importance-weighted bound of groups of K particles.
        remaining: how many more steps of this kind are to be expected.
    """

    particles: int
    path: bool = True
    power: float = 1.0
    importance: int = 1
    remaining: int = 0

    @property
    def key(self) -> tuple[int, bool]:
        """What decides which operations are recorded."""
        return self.particles, self.path


class Taken(NamedTuple):
    """A step down: what was found, and whether it was followed."""

    step: Step
    followed: bool


class Objective(Protocol):
    """Something to minimize by stochastic gradients."""

    parameters: dict[str, Tensor]

    @property
    def route(self) -> str: ...

    def __call__(self, request: Request, generator: torch.Generator) -> Step: ...

    def descend(
        self, request: Request, generator: torch.Generator, descent: Descent, rates: Sequence[float]
    ) -> list[Taken]:
        """Evaluate and take a step down, at least one, and as many more as go together.

        Args:
            request: what all of them have in common.
            generator: of the noise.
            descent: of all parameters.
            rates: step sizes of the coming steps.
        """
