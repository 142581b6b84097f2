"""Time until the ELBO is near the evidence: the targets with their known evidence, and how that time is taken."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from speed_workers import Job

#: Nats between the ELBO and the log evidence that count as near.
NEAR = 0.1
RATE = 1e-2


@dataclass(frozen=True)
class Target:
    """How peers are trained: particles of a step, steps between looks at the ELBO, draws behind a look."""

    particles: int = 32
    chunk: int = 100
    draws: int = 2000


def log_evidence(target: str, dim: int) -> float:
    r"""Of observations y evenly spaced in [-1, 1], D - 1 = n of them.

    "location", :math:`y \sim N(0, \tfrac54 I + 11^\top)`: by its determinant and inverse, where y sums to 0. "scale",
    :math:`y_i \mid s \sim N(0, e^{2s} + \tfrac14), s \sim N(0, 1)`: by the trapezium rule over s.
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
    most = max(values)
    return most + math.log(width * sum(math.exp(value - most) for value in values))


def until_near(
    chunk: Callable[[], None], elbo: Callable[[], float], evidence: float, seconds: float, spent: float = 0.0
) -> Job:
    """Chunks of steps until the ELBO is near, or so many wall seconds are over; looking is not counted.

    Args:
        spent: seconds that were used before, to be counted.
    """
    facts: dict[str, Any] = {}

    def call() -> None:
        used, chunks, near = 0.0, 0, False
        while not near and used < seconds:
            begin = time.perf_counter()
            chunk()
            used, chunks = used + time.perf_counter() - begin, chunks + 1
            gap = evidence - elbo()
            near = gap < NEAR
        facts.update(near=near, seconds=spent + used, steps=chunks * Target.chunk, gap=gap)

    return Job(call, warm_up=0, facts=lambda: facts)
