"""When to do what: the step size, the number of particles and the end of a fit."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Schedule"]


@dataclass
class Schedule:
    """Explore at a constant step size until there is nothing more to gain, then refine with a falling one.

    How far the guide is from the posterior is read from half the variance of its log weights, which near the posterior
    is the gap between the bound and the evidence. Exploring ends

    - when the guide is nearly exact: the mean of the gap over a window of steps is below 0.3 nats;
    - when the ELBO stands still: twice in a row its mean over the last quarter of the steps so far is not above that of
      the quarter before by more than ``tolerance`` nats or two standard errors, which shrink as the quarters grow;
    - at the latest after half of the steps.

    Refining takes half of the steps, or for a guide that is nearly exact as many as exploring took and not fewer than a
    minimum. Its step size falls along a cosine to a hundredth, and its number of particles doubles, in up to three
    stairs. A guide that starts nearly exact is not explored from, which could only lead away: it is refined at a lower
    step size.

    Args:
        steps: most steps in all.
        lr: step size while exploring, reached after a short warm-up.
        num_particles: particles while exploring.
        tolerance: gain in nats that is not worth going on for.
    """

    steps: int
    lr: float
    num_particles: int
    tolerance: float
    step: int = 0
    caution: float = 1.0
    refining_since: int | None = None
    refine_steps: int = 0
    reason: str = ""
    standstills: int = 0
    elbos: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    WARM_UP = 50
    WINDOW = 50
    EXPLORE_SHARE = 0.5
    LEAST_REFINING = 300
    NEAR = 0.3
    CAUTION = 0.3
    GROWTH = 2.0
    STAIRS = 3
    LEAST_STAIR = 200
    LAST_FRACTION = 0.01

    @property
    def most_exploring(self) -> int:
        """The number of steps after which exploring ends whatever the bound does."""
        return round(self.EXPLORE_SHARE * self.steps)

    @property
    def done(self) -> bool:
        return self.refining_since is not None and self.step >= min(self.steps, self.refining_since + self.refine_steps)

    @property
    def progress(self) -> float:
        """How much of the refinement is done: 0 while exploring."""
        return self._progress(self.step)

    @property
    def averaging(self) -> bool:
        """Whether the iterate belongs to those whose average is tried in the end."""
        return self.progress > 0.5

    @property
    def rate(self) -> float:
        """The step size of the coming step."""
        return self._rate(self.step)

    def rates(self, most: int) -> list[float]:
        """The step sizes of the coming steps, at most that many, up to the next at which anything else may change."""
        if self.refining_since is None:
            end = min(self.step + self.WINDOW - self.step % self.WINDOW, self.most_exploring)
        else:
            end = min(self.step + self.remaining, self.refining_since + self.refine_steps // 2)
        return [self._rate(step) for step in range(self.step, min(self.step + most, max(end, self.step + 1)))]

    def _progress(self, step: int) -> float:
        return 0.0 if self.refining_since is None else (step - self.refining_since) / self.refine_steps

    def _rate(self, step: int) -> float:
        falling = 0.5 * (1 + math.cos(math.pi * self._progress(step)))
        warm = min(1.0, (step + 1) / self.WARM_UP)
        return self.lr * self.caution * warm * (self.LAST_FRACTION + (1 - self.LAST_FRACTION) * falling)

    @property
    def current_particles(self) -> int:
        """The number of particles of the coming step: it grows in a few stairs, each of which is recorded once."""
        if self.refining_since is None:
            return self.num_particles
        stair = math.floor(self._stairs * self.progress)
        return round(
            self.num_particles * self.GROWTH ** min(1.0, stair / (self._stairs - 1) if self._stairs > 1 else 1.0)
        )

    @property
    def remaining(self) -> int:
        """At most so many more steps are like the coming one: of its kind and with as many particles."""
        if self.refining_since is None:
            return self.most_exploring - self.step
        stair = math.floor(self._stairs * self.progress) + 1
        return self.refining_since + math.ceil(self.refine_steps * stair / self._stairs) - self.step

    @property
    def _stairs(self) -> int:
        """Fewer where they would be too short to repay their recordings; a single one is the highest."""
        return max(1, min(self.STAIRS, self.refine_steps // self.LEAST_STAIR))

    def begin(self, gap: float) -> None:
        """Take note of the gap at the start (NaN if it is not known)."""
        if gap < self.NEAR:
            self.caution = self.CAUTION
            self._refine(self.LEAST_REFINING, f"the start was within {self.NEAR:g} nats of the evidence")

    def advance(self, elbo: float, gap: float = math.nan) -> None:
        """Take note of one step's ELBO and of half the variance of its log weights (NaN where there is none)."""
        self.step += 1
        if self.refining_since is not None:
            return
        if math.isfinite(elbo):
            self.elbos.append(elbo)
        if math.isfinite(gap):
            self.gaps.append(gap)
        if self.step % self.WINDOW == 0 and self.step > self.WARM_UP:
            self._look_back()
        if self.refining_since is None and self.step >= self.most_exploring:
            self._refine(self.steps, f"all {self.steps} steps used")

    def _look_back(self) -> None:
        near = self.gaps[-self.WINDOW :]
        if len(near) == self.WINDOW and sum(near) / self.WINDOW < self.NEAR:
            short = max(self.step, self.LEAST_REFINING)
            self._refine(short, f"the bound came within {self.NEAR:g} nats of the evidence")
            return
        quarter = len(self.elbos) // 4
        if quarter < 2 * self.WINDOW:
            return
        before, now = self.elbos[-2 * quarter : -quarter], self.elbos[-quarter:]
        (a, var_a), (b, var_b) = _moments(before), _moments(now)
        noise = 2 * math.sqrt((var_a + var_b) / quarter)
        self.standstills = self.standstills + 1 if b - a < max(self.tolerance, noise) else 0
        if self.standstills >= 2:
            reason = f"the ELBO gained less than {self.tolerance:g} nats or its noise in {quarter} steps"
            self._refine(self.steps - self.most_exploring, reason)

    def _refine(self, steps: int, reason: str) -> None:
        self.refining_since, self.reason = self.step, reason
        self.refine_steps = max(1, min(self.steps - self.step, steps))

    def state(self) -> dict[str, Any]:
        return asdict(self)


def _moments(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, sum((value - mean) ** 2 for value in values) / (len(values) - 1)
