"""An objective over many draws, without gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pyro_flowguides.inference.density_objective import DensityObjective
from pyro_flowguides.inference.steps import Objective, Request, Step
from pyro_flowguides.programs.chunking import chunks, per_chunk

__all__ = ["evaluate", "pooled"]

#: Normal numbers come from the CPU's generator in blocks of so many: parts of whole blocks hold the same numbers as one
#: draw of all.
BLOCK = 16
#: Noise, draws and values of the sites.
COPIES = 3


@torch.no_grad()
def evaluate(objective: Objective, particles: int, importance: int = 1) -> Step:
    """The objective of the guide as it is, over random numbers that are the same at every call.

    Densities of many latent variables are evaluated a part of the particles at a time.

    Args:
        objective: the bound.
        particles: number of draws, rounded down to whole groups.
        importance: particles per group of the importance-weighted bound.
    """
    total = max(1, particles // importance) * importance
    size = total
    if isinstance(objective, DensityObjective):
        unit = math.lcm(BLOCK, importance)
        size = max(1, per_chunk(COPIES * objective.guide.latent_dim) // unit) * unit
    sizes = [part.stop - part.start for part in chunks(total, size)]
    with torch.random.fork_rng(devices=[]):
        generator = torch.Generator().manual_seed(0)
        steps = [objective(Request(part, path=False, importance=importance), generator) for part in sizes]
    return pooled(sizes, steps)


def pooled(sizes: Sequence[int], steps: Sequence[Step]) -> Step:
    """Evaluations of several lots of particles as one of all of them; each counts by its particles that are finite."""
    counts = [size - step.dropped for size, step in zip(sizes, steps, strict=True)]
    total, dropped = sum(counts), sum(step.dropped for step in steps)
    if len(steps) == 1 or not total:
        return steps[0]._replace(dropped=dropped)
    kept = [(count, step) for count, step in zip(counts, steps, strict=True) if count]
    elbo = sum(count * step.elbo for count, step in kept) / total
    within = sum(2 * step.gap * (count - 1) for count, step in kept if count > 1)
    between = sum(count * (step.elbo - elbo) ** 2 for count, step in kept)
    return Step((), elbo, dropped, (within + between) / (2 * (total - 1)) if total > 1 else math.nan)
