"""The bound over many draws, without its gradient."""

import math
from collections.abc import Sequence

import torch

from pyro_flowguides.inference.density_objective import DensityObjective
from pyro_flowguides.inference.objective import Evaluation, Objective, StepOptions
from pyro_flowguides.programs.batched_run import chunks, per_chunk

__all__ = ["evaluate", "pool"]

#: The CPU's generator makes normal numbers in blocks of this size. Chunks of whole blocks hold the numbers of one draw.
BLOCK_SIZE = 16
#: Copies of the latent vector that an evaluation holds: noise, draws, values of the sites.
NUM_COPIES = 3


@torch.no_grad()
def evaluate(
    objective: Objective, num_samples: int, importance: int = 1, *, chunk_size: int | None = None
) -> Evaluation:
    """Estimate the bound of the current parameters with random numbers that are the same at every call.

    Args:
        objective: the bound.
        num_samples: number of draws, rounded down to whole groups.
        importance: draws per group of the importance-weighted bound.
        chunk_size: most draws that a :class:`DensityObjective` evaluates together, rounded to whole blocks of random
            numbers; chosen by the number of latent variables if not given.
    """
    total = max(1, num_samples // importance) * importance
    size = total
    if isinstance(objective, DensityObjective):
        unit = math.lcm(BLOCK_SIZE, importance)
        size = max(1, (chunk_size or per_chunk(NUM_COPIES * objective.latent_dim)) // unit) * unit
    sizes = [chunk.stop - chunk.start for chunk in chunks(total, size)]
    with torch.random.fork_rng(devices=[]):
        generator = torch.Generator().manual_seed(0)
        evaluations = [
            objective(StepOptions(size, path_gradient=False, importance=importance), generator) for size in sizes
        ]
    return pool(sizes, evaluations)


def pool(sizes: Sequence[int], evaluations: Sequence[Evaluation]) -> Evaluation:
    """Combine evaluations of several chunks of particles, weighted by their numbers of finite particles."""
    counts = [size - evaluation.num_dropped for size, evaluation in zip(sizes, evaluations, strict=True)]
    total, num_dropped = sum(counts), sum(evaluation.num_dropped for evaluation in evaluations)
    if len(evaluations) == 1 or not total:
        return evaluations[0]._replace(num_dropped=num_dropped)
    finite = [(count, evaluation) for count, evaluation in zip(counts, evaluations, strict=True) if count]
    elbo = sum(count * evaluation.elbo for count, evaluation in finite) / total
    within = sum(2 * evaluation.gap * (count - 1) for count, evaluation in finite if count > 1)
    between = sum(count * (evaluation.elbo - elbo) ** 2 for count, evaluation in finite)
    return Evaluation((), elbo, num_dropped, (within + between) / (2 * (total - 1)) if total > 1 else math.nan)
