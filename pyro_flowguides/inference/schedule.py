"""The course of a fit: its step size, its number of particles and its end."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

__all__ = ["Schedule"]


@dataclass
class Schedule:
    """Explore at a constant step size until there is nothing more to gain, then refine with a falling one.

    The distance of the guide from the posterior is estimated by half the variance of its log weights, which near the
    posterior is the gap between the bound and the log evidence. Exploring ends

    - when the guide is nearly exact: the mean gap over a window of steps is below 0.3 nats;
    - when the ELBO no longer rises: twice in a row, its mean over the last quarter of the steps so far exceeds that of
      the quarter before by less than ``tolerance`` nats or two standard errors, which shrink as the quarters grow;
    - at the latest after half of the steps.

    Refining takes half of the steps; for a guide that is nearly exact, as many as exploring took, but not fewer than a
    minimum. Its step size falls along a cosine to a hundredth, and its number of particles doubles in up to three
    stages. A guide that starts nearly exact is only refined, at a lower step size, because exploring could only lead
    away from the posterior.

    Args:
        steps: most steps in all.
        lr: step size while exploring, reached after a short warm-up.
        num_particles: particles while exploring.
        tolerance: smallest gain in nats that counts as a rise of the ELBO.

    Attributes:
        step: number of steps taken.
        lr_factor: factor on the step size; below 1 for a guide that started nearly exact.
        refining_since: the step at which refining began; ``None`` while exploring.
        refine_steps: number of steps of the refinement.
        reason: why exploring ended.
        num_stalls: number of looks in a row that found no rise of the ELBO.
        elbos, gaps: the finite estimates while exploring.
    """

    steps: int
    lr: float
    num_particles: int
    tolerance: float
    step: int = 0
    lr_factor: float = 1.0
    refining_since: int | None = None
    refine_steps: int = 0
    reason: str = ""
    num_stalls: int = 0
    elbos: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    WARM_UP: ClassVar[int] = 50
    WINDOW: ClassVar[int] = 50
    EXPLORE_SHARE: ClassVar[float] = 0.5
    MIN_REFINE_STEPS: ClassVar[int] = 300
    NEAR_GAP: ClassVar[float] = 0.3
    NEAR_LR_FACTOR: ClassVar[float] = 0.3
    PARTICLE_GROWTH: ClassVar[float] = 2.0
    MAX_STAGES: ClassVar[int] = 3
    MIN_STAGE_STEPS: ClassVar[int] = 200
    FINAL_LR_FRACTION: ClassVar[float] = 0.01

    @property
    def max_explore_steps(self) -> int:
        """The number of steps after which exploring ends whatever the bound does."""
        return round(self.EXPLORE_SHARE * self.steps)

    @property
    def is_refining(self) -> bool:
        """Whether the next step belongs to the refinement."""
        return self.refining_since is not None

    @property
    def is_done(self) -> bool:
        """Whether all steps have been taken."""
        return self.refining_since is not None and self.step >= min(self.steps, self.refining_since + self.refine_steps)

    @property
    def is_averaging(self) -> bool:
        """Whether the iterate counts in the average of the last iterates: in the second half of the refinement."""
        return self._progress(self.step) > 0.5

    @property
    def current_num_particles(self) -> int:
        """The number of particles of the next step."""
        if self.refining_since is None:
            return self.num_particles
        growth = self._stage / (self._num_stages - 1) if self._num_stages > 1 else 1.0
        return round(self.num_particles * self.PARTICLE_GROWTH ** min(1.0, growth))

    @property
    def stage_end(self) -> int:
        """The step before which the kind of gradient and the number of particles do not change."""
        if self.refining_since is None:
            return self.max_explore_steps
        return self.refining_since + math.ceil(self.refine_steps * (self._stage + 1) / self._num_stages)

    @property
    def next_decision(self) -> int:
        """The step before which nothing but the step size can change, whatever the bound does."""
        if self.refining_since is None:
            end = min(self.step + self.WINDOW - self.step % self.WINDOW, self.stage_end)
        else:
            end = min(self.stage_end, self.refining_since + self.refine_steps // 2)
        return max(end, self.step + 1)

    def lr_at(self, step: int) -> float:
        """Return the step size of a step up to the next decision."""
        falling = 0.5 * (1 + math.cos(math.pi * self._progress(step)))
        warm_up = min(1.0, (step + 1) / self.WARM_UP)
        fraction = self.FINAL_LR_FRACTION + (1 - self.FINAL_LR_FRACTION) * falling
        return self.lr * self.lr_factor * warm_up * fraction

    def _progress(self, step: int) -> float:
        """Return the share of the refinement that is done before a step; 0 while exploring."""
        return 0.0 if self.refining_since is None else (step - self.refining_since) / self.refine_steps

    @property
    def _num_stages(self) -> int:
        """Number of stages of the refinement: fewer where they would be too short to repay their recordings."""
        return max(1, min(self.MAX_STAGES, self.refine_steps // self.MIN_STAGE_STEPS))

    @property
    def _stage(self) -> int:
        return math.floor(self._num_stages * self._progress(self.step))

    def start(self, gap: float) -> None:
        """Take account of the gap at the start (NaN if unknown)."""
        if gap < self.NEAR_GAP:
            self.lr_factor = self.NEAR_LR_FACTOR
            self._refine(self.MIN_REFINE_STEPS, f"the start was within {self.NEAR_GAP:g} nats of the evidence")

    def extend(self, steps: int) -> None:
        """Allow more steps; a refinement that was cut short by their number, or takes half of them, grows with it."""
        if self.refining_since is not None:
            if self.refining_since + self.refine_steps == self.steps:
                self.refine_steps = steps - self.refining_since
                self.reason = self.reason.replace(f"all {self.steps} steps", f"all {steps} steps")
            elif self.num_stalls >= 2:
                self.refine_steps = min(steps - self.refining_since, steps - round(self.EXPLORE_SHARE * steps))
        self.steps = steps

    def advance(self, elbo: float, gap: float = math.nan) -> None:
        """Take account of one step: its ELBO and half the variance of its log weights (NaN where there is none)."""
        self.step += 1
        if self.is_refining:
            return
        if math.isfinite(elbo):
            self.elbos.append(elbo)
        if math.isfinite(gap):
            self.gaps.append(gap)
        if self.step % self.WINDOW == 0 and self.step > self.WARM_UP:
            self._look_back()
        if not self.is_refining and self.step >= self.max_explore_steps:
            self._refine(self.steps, f"all {self.steps} steps used")

    def _look_back(self) -> None:
        """End exploring if the guide is nearly exact or the ELBO no longer rises."""
        gaps = self.gaps[-self.WINDOW :]
        if len(gaps) == self.WINDOW and sum(gaps) / self.WINDOW < self.NEAR_GAP:
            refine_steps = max(self.step, self.MIN_REFINE_STEPS)
            self._refine(refine_steps, f"the bound came within {self.NEAR_GAP:g} nats of the evidence")
            return
        quarter = len(self.elbos) // 4
        if quarter < 2 * self.WINDOW:
            return
        mean_before, variance_before = _moments(self.elbos[-2 * quarter : -quarter])
        mean, variance = _moments(self.elbos[-quarter:])
        two_errors = 2 * math.sqrt((variance_before + variance) / quarter)
        self.num_stalls = self.num_stalls + 1 if mean - mean_before < max(self.tolerance, two_errors) else 0
        if self.num_stalls >= 2:
            reason = f"the ELBO gained less than {self.tolerance:g} nats or its noise in {quarter} steps"
            self._refine(self.steps - self.max_explore_steps, reason)

    def _refine(self, steps: int, reason: str) -> None:
        self.refining_since, self.reason = self.step, reason
        self.refine_steps = max(1, min(self.steps - self.step, steps))


def _moments(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, sum((value - mean) ** 2 for value in values) / (len(values) - 1)
