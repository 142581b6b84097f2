"""Run the guide and the model of a program on many draws: draw, score the draws, or collect something of each run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_flowguides.programs.batched_run import (
    DENSITY,
    BatchedRun,
    DensityRun,
    Layout,
    NotVectorizedError,
    RunMode,
    check_against_single_runs,
    chunks,
    first_line,
    gather,
    select,
)
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.running import trace_guide, trace_program
from pyro_flowguides.programs.trace_density import joint_log_prob, marginal_log_prob
from pyro_flowguides.programs.types import Values

__all__ = ["Collect", "GuideDraws", "run_model", "sample_guide", "score_model"]

#: From a trace and its layout to named tensors (S, ...).
Collect: TypeAlias = Callable[[Trace, Layout], Values]

#: Draws on which a mode is tried first: all by all of many draws would not fit in memory.
TRIED_DRAWS = 4


@dataclass(frozen=True)
class GuideDraws:
    """Draws of a guide.

    Attributes:
        values: values of the sites that the model has too, each (S, *shape).
        log_density: log density of all sites under the distributions they were drawn from, (S,).
        extras: what ``collect`` returned, each (S, ...).
        note: why the guide ran draw by draw; empty if it did not.
    """

    values: Values
    log_density: Tensor
    extras: Values
    note: str


def sample_guide(
    program: Program,
    num_samples: int,
    chunk_size: int,
    *,
    handlers: Sequence[Messenger] = (),
    collect: Callable[[Layout], Values] | None = None,
) -> GuideDraws:
    """Draw from the guide: all draws under a plate where that is right, else one by one.

    Args:
        program: the program.
        num_samples: number of draws S.
        chunk_size: number of draws that run together.
        handlers: handlers that act on the guide.
        collect: called after each run with its layout, returns further named tensors (S, ...).
    """

    def run(layout: Layout, values: Values) -> Values:
        trace = trace_guide(program.guide, program.args, program.kwargs, layout, values, handlers=handlers)
        collected = {DENSITY: joint_log_prob(trace, layout), **(collect(layout) if collect else {})}
        for name, site in program.guide_sites.items():
            collected[name] = layout.split(_value(trace, name), site.shape)
        return collected

    def without_auxiliaries(batch: Values) -> Values:
        return {name: batch[name] for name in batch if name not in program.guide_sites or name in program.latents}

    runs, note = BatchedRun(run, program.nesting, {}), ""
    batches = (runs({}, chunk.stop - chunk.start, RunMode.PLATE) for chunk in chunks(num_samples, chunk_size))
    # AutoContinuous computes one density for one latent vector: nothing in it can broadcast wrongly, and Pyro's flows
    # often cannot score a draw a second time.
    if not isinstance(poutine.unwrap(program.guide), AutoContinuous):
        batches = (_checked(program, runs, batch) for batch in batches)
    try:
        drawn = gather(map(without_auxiliaries, batches), num_samples)
    except Exception as error:  # a program may fail in any way under a plate it was not written for
        note = f"the guide was run draw by draw ({first_line(error)})"
        drawn = gather((without_auxiliaries(runs.single({})) for _ in range(num_samples)), num_samples)
    values = {name: drawn.pop(name) for name in program.latents}
    return GuideDraws(values, drawn.pop(DENSITY), drawn, note)


def _checked(program: Program, runs: BatchedRun, batch: Values) -> Values:
    """Return a batch of the guide's draws after comparing some of them with runs by themselves."""
    # Point masses follow from the other sites.
    free = {name: batch[name] for name, site in program.guide_sites.items() if not site.is_point_mass}
    check_against_single_runs(batch, lambda index: runs.single(select(free, index)), program.tolerance)
    return batch


def _value(trace: Trace, name: str) -> Tensor:
    if name not in trace.nodes:
        raise ValueError(f"the guide's structure changes from run to run: site {name!r} is missing")
    value = trace.nodes[name]["value"]
    if not isinstance(value, Tensor):
        raise TypeError(f"site {name!r} has a value that is not a tensor: {type(value).__name__}")
    return value


def score_model(program: Program, values: Values, chunk_size: int) -> Tensor:
    """Score draws by the model, in the fastest mode that gives the right numbers.

    Args:
        program: the program; its ``mode`` and ``mode_note`` tell afterwards how the model ran.
        values: value of each latent site, (S, *shape).
        chunk_size: number of draws that run together.

    Returns:
        the model's log density, (S,), with enumerated sites summed out: −inf outside the support, NaN where the model
        raises an error.
    """
    num_samples = len(next(iter(values.values())))
    reduce = marginal_log_prob if program.enumerated else joint_log_prob

    def collect(trace: Trace, layout: Layout) -> Values:
        return {DENSITY: reduce(trace, layout)}

    density = DensityRun(_model_run(program, collect, enumerate_sites=bool(program.enumerated)), torch.float64)

    def score_all(mode: RunMode) -> Tensor:
        density.checked(select(values, slice(TRIED_DRAWS)), mode, program.tolerance)
        parts = (select(values, chunk) for chunk in chunks(num_samples, chunk_size))
        scores = ({DENSITY: density.checked(part, mode, program.tolerance)} for part in parts)
        return gather(scores, num_samples)[DENSITY]

    try:
        return program.in_fastest_mode(score_all)
    except NotVectorizedError:
        singles = (select(values, chunk) for chunk in chunks(num_samples, 1))
        return gather(({DENSITY: density(single, RunMode.SINGLE)} for single in singles), num_samples)[DENSITY]


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
    runs, parts = _model_run(program, collect, handlers=handlers), chunks(num_samples, chunk_size)
    return gather((runs(select(values, part), part.stop - part.start, mode) for part in parts), num_samples)


def _model_run(
    program: Program, collect: Collect, *, enumerate_sites: bool = False, handlers: Sequence[Messenger] = ()
) -> BatchedRun:
    def run(layout: Layout, values: Values) -> Values:
        call = program.model, program.args, program.kwargs
        return collect(trace_program(*call, layout, values, enumerate_sites=enumerate_sites, handlers=handlers), layout)

    return BatchedRun(run, program.nesting, {name: len(site.batch_shape) for name, site in program.latents.items()})
