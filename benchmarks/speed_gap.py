"""Time until the ELBO is near the evidence: targets with known evidence, and the clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from speed_workers import Job

#: The ELBO is near the log evidence if it is at most this many nats below.
NEAR = 0.1
LR = 1e-2


@dataclass(frozen=True)
class Target:
    """The training of the peers: particles of a step, steps between checks of the ELBO, draws for a check."""

    num_particles: int = 32
    check_every: int = 100
    num_samples: int = 2000


def log_evidence(target: str, dim: int) -> float:
    r"""Return the log evidence of n = D - 1 observations y, evenly spaced in [-1, 1].

    For "location", :math:`y \sim N(0, \tfrac54 I + 11^\top)`, from its determinant and inverse, where y sums to 0. For
    "scale", :math:`y_i \mid s \sim N(0, e^{2s} + \tfrac14), s \sim N(0, 1)`, by the trapezoidal rule over s.
    """
    n = dim - 1
    squares = sum((-1 + 2 * i / (n - 1)) ** 2 for i in range(n)) if n > 1 else 1.0
    if target == "location":
        if n == 1:
            return -0.5 * (math.log(2 * math.pi * 2.25) + squares / 2.25)
        return -0.5 * (n * math.log(2 * math.pi) + (n - 1) * math.log(1.25) + math.log(1.25 + n) + squares / 1.25)

    def log_density(s: float) -> float:
        variance = math.exp(2 * s) + 0.25
        return -0.5 * (s * s + math.log(2 * math.pi) + n * math.log(2 * math.pi * variance) + squares / variance)

    width = 0.005
    values = [log_density(width * k) for k in range(-2000, 2001)]
    largest = max(values)
    return largest + math.log(width * sum(math.exp(value - largest) for value in values))


def until_near(
    train: Callable[[], None], elbo: Callable[[], float], evidence: float, seconds: float, spent: float = 0.0
) -> Job:
    """Return a job that trains in stretches until the ELBO is near, or its wall seconds are over. Checks are not timed.

    Args:
        train: takes the steps between two checks.
        elbo: estimates the ELBO.
        evidence: the log evidence.
        seconds: wall seconds after which the training is stopped.
        spent: seconds that were spent before, to be added.
    """
    facts: dict[str, Any] = {}

    def call() -> None:
        used, stretches, gap, near = 0.0, 0, math.nan, False
        while not near and used < seconds:
            begin = time.perf_counter()
            train()
            used, stretches = used + time.perf_counter() - begin, stretches + 1
            gap = evidence - elbo()
            near = gap < NEAR
        facts.update(near=near, seconds=spent + used, steps=stretches * Target.check_every, gap=gap)

    return Job(call, warm_up=0, facts=lambda: facts)
