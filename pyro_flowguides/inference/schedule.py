"""When to do what: the step size, the number of particles and the end of a fit."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Schedule"]


@dataclass
class Schedule:
    """Explore at a constant step size until the ELBO stands still, then refine with a falling one and more particles.

    The ELBO stands still when, twice in a row, the mean of a window of steps is not above that of the one before by
    more than ``tolerance`` nats or two standard errors. Exploring ends at the latest after its share of the steps;
    refining takes a fixed share, its step size falls along a cosine to a hundredth, and its number of particles grows
    fourfold.

    Args:
        steps: most steps in all.
        learning_rate: step size while exploring, reached after a short warm-up.
        particles: particles while exploring.
        tolerance: gain per window, in nats, that is not worth going on for.
    """

    steps: int
    learning_rate: float
    particles: int
    tolerance: float
    step: int = 0
    refining_since: int | None = None
    reason: str = ""
    standstills: int = 0
    window: list[float] = field(default_factory=list)
    previous: list[float] = field(default_factory=list)

    WARM_UP = 50
    WINDOW = 100
    REFINE_SHARE = 0.25
    GROWTH = 4.0
    LAST_FRACTION = 0.01

    @property
    def refine_steps(self) -> int:
        return max(1, round(self.REFINE_SHARE * self.steps))

    @property
    def done(self) -> bool:
        return self.refining_since is not None and self.step >= min(self.steps, self.refining_since + self.refine_steps)

    @property
    def progress(self) -> float:
        """How much of the refinement is done: 0 while exploring."""
        return 0.0 if self.refining_since is None else (self.step - self.refining_since) / self.refine_steps

    @property
    def rate(self) -> float:
        """The step size of the coming step."""
        falling = 0.5 * (1 + math.cos(math.pi * self.progress))
        warm = min(1.0, (self.step + 1) / self.WARM_UP)
        return self.learning_rate * warm * (self.LAST_FRACTION + (1 - self.LAST_FRACTION) * falling)

    @property
    def batch(self) -> int:
        """The number of particles of the coming step."""
        return round(self.particles * self.GROWTH**self.progress)

    def advance(self, elbo: float) -> None:
        """Take note of one step's ELBO (NaN for a step without one)."""
        self.step += 1
        if self.refining_since is not None:
            return
        if math.isfinite(elbo):
            self.window.append(elbo)
        if len(self.window) >= self.WINDOW:
            self._compare_windows()
        if self.refining_since is None and self.step >= self.steps - self.refine_steps:
            self._refine(f"all {self.steps} steps used")

    def _compare_windows(self) -> None:
        if self.previous:
            (a, var_a), (b, var_b) = _moments(self.previous), _moments(self.window)
            noise = 2 * math.sqrt((var_a + var_b) / self.WINDOW)
            self.standstills = self.standstills + 1 if b - a < max(self.tolerance, noise) else 0
        self.previous, self.window = self.window, []
        if self.standstills >= 2:
            self._refine(f"the ELBO gained less than {self.tolerance:g} nats or its noise in {2 * self.WINDOW} steps")

    def _refine(self, reason: str) -> None:
        self.refining_since, self.reason = self.step, reason

    def state(self) -> dict[str, Any]:
        return asdict(self)


def _moments(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, sum((value - mean) ** 2 for value in values) / (len(values) - 1)
