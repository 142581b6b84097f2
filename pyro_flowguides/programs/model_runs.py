"""Run a model on many draws of its latent sites: score them, or collect something of each run."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_flowguides.programs.batched_run import DENSITY, BatchedRun, DensityRun, RunMode
from pyro_flowguides.programs.chunking import chunks, gather
from pyro_flowguides.programs.layout import Layout, NotVectorizedError
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.running import trace_program
from pyro_flowguides.programs.trace_density import joint_log_prob, marginal_log_prob
from pyro_flowguides.programs.types import Values

__all__ = ["Collect", "Scores", "run_model", "score_model"]

#: From a trace and its layout to named tensors (S, ...).
Collect: TypeAlias = Callable[[Trace, Layout], Values]

#: Draws on which a mode is tried first: all by all of many draws would not fit in memory.
TRIED_DRAWS = 4


class Scores(NamedTuple):
    """The model's log density at given draws.

    Attributes:
        log_p: with enumerated sites summed out, and −inf outside the support, (S,).
        mode: how the model ran.
        note: why it did not run under a plate of draws; empty if it did.
    """

    log_p: Tensor
    mode: RunMode
    note: str


def score_model(program: Program, values: Values, chunk_size: int) -> Scores:
    """Return the model's log density at given draws, NaN where a matrix cannot be factorized.

    Args:
        program: the program.
        values: value of each latent site, (S, *shape).
        chunk_size: number of draws that run together.
    """
    num_samples = next(iter(values.values())).shape[0]
    reduce = marginal_log_prob if program.enumerated else joint_log_prob
    runs = _runs(
        program, lambda trace, layout: {DENSITY: reduce(trace, layout)}, enumerate_sites=bool(program.enumerated)
    )
    density = DensityRun(runs, torch.float64)

    def score(mode: RunMode, part: slice) -> Values:
        chosen, count = {name: value[part] for name, value in values.items()}, part.stop - part.start
        if mode is RunMode.SINGLE:
            return {DENSITY: density(chosen, count, mode)}
        return {DENSITY: density.checked(chosen, count, mode, program.tolerance)}

    def score_all(mode: RunMode, size: int) -> Tensor:
        return gather((score(mode, chunk) for chunk in chunks(num_samples, size)), num_samples)[DENSITY]

    def try_and_score_all(mode: RunMode) -> Tensor:
        score(mode, slice(0, min(TRIED_DRAWS, num_samples)))
        return score_all(mode, chunk_size)

    try:
        log_p = program.in_fastest_mode(try_and_score_all)
    except NotVectorizedError:
        log_p = score_all(RunMode.SINGLE, 1)
    mode = program.mode or RunMode.SINGLE
    return Scores(log_p, mode, f"the model ran {mode.value} ({program.why_slower})" if program.refused else "")


def run_model(
    program: Program,
    values: Values,
    num_samples: int,
    collect: Collect,
    chunk_size: int,
    *,
    mode: RunMode,
    handlers: Sequence[Messenger] = (),
) -> Values:
    """Run the model on given draws and return what ``collect`` returns for them, each (S, ...).

    Args:
        program: the program.
        values: values of latent sites, (S, *shape); other sites are drawn.
        num_samples: number of draws S.
        collect: maps a trace and its layout to named tensors whose first dimension is that of the draws.
        chunk_size: number of draws that run together.
        mode: how the model runs, as :func:`score_model` has found.
        handlers: handlers that act on the model.
    """
    runs = _runs(program, collect, handlers=handlers)

    def batches() -> Iterator[Values]:
        for chunk in chunks(num_samples, chunk_size):
            chosen = {name: value[chunk] for name, value in values.items()}
            yield runs(chosen, chunk.stop - chunk.start, mode)

    return gather(batches(), num_samples)


def _runs(
    program: Program, collect: Collect, *, enumerate_sites: bool = False, handlers: Sequence[Messenger] = ()
) -> BatchedRun:
    def run(layout: Layout, values: Values) -> Values:
        trace = trace_program(
            program.model,
            program.args,
            program.kwargs,
            layout,
            values,
            enumerate_sites=enumerate_sites,
            handlers=handlers,
        )
        return collect(trace, layout)

    return BatchedRun(run, program.nesting, {name: len(site.batch_shape) for name, site in program.latents.items()})
