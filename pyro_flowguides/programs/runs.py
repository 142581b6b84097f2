"""Runs over many draws: under a plate when that gives the right numbers, else mapped over them, else one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_flowguides.programs.chunking import chunks, gather
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.trace_density import joint_log_prob, marginal_log_prob
from pyro_flowguides.programs.traces import Layout, NotVectorizedError, Values, trace_guide, trace_program
from pyro_flowguides.programs.widening import Widen

_CHECKED_DRAWS = 4
_DENSITY, _RATIO = " density", " ratio"  # names that no site has

Collect = Callable[[Trace, Layout], Values]


# --- the guide ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GuideDraws:
    """Draws of a guide.

    Attributes:
        values: values of the sites that the model has too, each (S, *shape).
        log_q: their log density, (S,).
        log_ratio: log density of the widened guide, less that of the guide itself, (S,).
        note: why the guide was run draw by draw; empty if it was not.
    """

    values: Values
    log_q: Tensor
    log_ratio: Tensor
    note: str


def sample_guide(program: Program, num_samples: int, chunk_size: int, *, wide: bool = False) -> GuideDraws:
    """Draw from the guide.

    Args:
        program: the program.
        num_samples: number of draws S.
        chunk_size: number of draws that are run together.
        wide: draw from the widened guide; ``log_q`` is the density of the guide itself in both cases.
    """
    widen = Widen(program.widening, active=wide, only=program.widenable)
    note = ""
    try:
        together = _sample_together(program, num_samples, chunk_size, widen)
        out = gather(_kept(program, together), num_samples)
    except Exception as error:  # whatever a program raises under a plate it was not written for
        note = f"the guide was run draw by draw ({_describe(error)})"
        alone = (_sample_alone(program, {}, widen) for _ in range(num_samples))
        out = gather(_kept(program, alone), num_samples)
    log_density, log_ratio = out.pop(_DENSITY), out.pop(_RATIO)
    return GuideDraws(out, log_density - log_ratio if wide else log_density, log_ratio, note)


def _collect_guide(program: Program, trace: Trace, layout: Layout, widen: Widen) -> Values:
    ratio = torch.zeros(layout.num_draws, dtype=torch.float64)
    for log_ratio in widen.log_ratios.values():
        ratio = ratio + layout.total(log_ratio)
    out = {_DENSITY: joint_log_prob(trace, layout), _RATIO: ratio}
    for name, info in program.guide_sites.items():
        if name not in trace.nodes:
            raise ValueError(f"the guide's structure changes from run to run: site '{name}' is missing")
        out[name] = layout.split(_value(trace, name), info.shape)
    return out


def _kept(program: Program, parts: Iterable[Values]) -> Iterator[Values]:
    """What of each part is kept: densities, and the sites that the model has too."""
    names = (_DENSITY, _RATIO, *program.latents)
    return ({name: part[name] for name in names} for part in parts)


def _sample_together(program: Program, num_samples: int, chunk_size: int, widen: Widen) -> Iterator[Values]:
    # Pyro's AutoContinuous computes one density for one latent vector: nothing in it can broadcast wrongly, and its
    # flows often cannot score a draw a second time.
    is_trusted = isinstance(poutine.unwrap(program.guide), AutoContinuous)
    for chunk in chunks(num_samples, chunk_size):
        layout = Layout(chunk.stop - chunk.start, program.nesting)
        trace = trace_guide(program.guide, program.arguments, layout, handlers=[widen])
        part = _collect_guide(program, trace, layout, widen)
        if not is_trusted:
            for index in _some(part[_DENSITY]):
                _compare(program, part, _sample_alone(program, _free_values(program, part, index), widen), index)
        yield part


def _sample_alone(program: Program, values: Values, widen: Widen) -> Values:
    layout = Layout(None, program.nesting)
    trace = trace_guide(program.guide, program.arguments, layout, values, handlers=[widen])
    return _collect_guide(program, trace, layout, widen)


def _free_values(program: Program, part: Values, index: int) -> Values:
    """A draw's values at the sites that are not point masses; those follow from the others."""
    return {name: part[name][index] for name, info in program.guide_sites.items() if not info.is_point_mass}


# --- the model ------------------------------------------------------------------------------------------------------

#: How a model runs on many draws: under a plate of them, mapped over them, or on each by itself.
TOGETHER, MAPPED, ALONE = "together", "mapped", "draw by draw"


class Scores(NamedTuple):
    """The model's log density at given draws.

    Attributes:
        log_p: with enumerated sites summed out and −inf outside the support, (S,).
        how: how the model was run: "together", under a plate of draws, "mapped" or "draw by draw".
        note: why it was not run together; empty if it was.
    """

    log_p: Tensor
    how: str
    note: str


def score_model(program: Program, values: Values, chunk_size: int) -> Scores:
    """The model's log density at given draws.

    Args:
        program: the program.
        values: value of each latent site, (S, *shape).
        chunk_size: number of draws that are run together.
    """
    num_draws = next(iter(values.values())).shape[0]
    reduce = marginal_log_prob if program.enumerated else joint_log_prob
    enumerate_sites = bool(program.enumerated)

    def collect(trace: Trace, layout: Layout) -> Values:
        return {_DENSITY: reduce(trace, layout)}

    def checked(how: str, chunk: slice) -> Values:
        chosen = {name: value[chunk] for name, value in values.items()}
        part = _RUNS[how](program, chosen, chunk.stop - chunk.start, collect, enumerate_sites=enumerate_sites)
        for index in _some(part[_DENSITY]):
            alone = _run_alone(program, chosen, index, collect, enumerate_sites=enumerate_sites)
            _compare(program, part, alone, index)
        return part

    why = ""
    for how in _RUNS:
        try:
            checked(how, slice(0, min(_CHECKED_DRAWS, num_draws)))  # all by all of many draws would not fit in memory
            log_p = gather((checked(how, chunk) for chunk in chunks(num_draws, chunk_size)), num_draws)[_DENSITY]
            return Scores(log_p, how, why and f"the model was mapped over the draws ({why})")
        except Exception as error:  # whatever a program raises where it was not written for many draws
            why = why or _describe(error)
    runs = (_run_alone(program, values, index, collect, enumerate_sites=enumerate_sites) for index in range(num_draws))
    return Scores(gather(runs, num_draws)[_DENSITY], ALONE, f"the model was run draw by draw ({why})")


def run_model(
    program: Program,
    values: Values,
    num_draws: int,
    collect: Collect,
    chunk_size: int,
    *,
    how: str,
    handlers: Sequence[Messenger] = (),
) -> Values:
    """Run the model on given draws and collect something of each run.

    Args:
        program: the program.
        values: values of latent sites, (S, *shape); other sites are drawn.
        num_draws: number of draws S.
        collect: maps a trace and its layout to named tensors whose first dimension is that of the draws.
        chunk_size: number of draws that are run together.
        how: how the model is to be run, as ``score_model`` has found.
        handlers: handlers that act on the model.

    Returns:
        The named tensors, each (S, ...).
    """

    def at_once() -> Iterator[Values]:
        for chunk in chunks(num_draws, chunk_size):
            chosen = {name: value[chunk] for name, value in values.items()}
            yield _RUNS[how](program, chosen, chunk.stop - chunk.start, collect, handlers=handlers)

    alone = (_run_alone(program, values, index, collect, handlers=handlers) for index in range(num_draws))
    return gather(at_once() if how in _RUNS else alone, num_draws)


def _run_together(
    program: Program,
    values: Values,
    num_draws: int,
    collect: Collect,
    *,
    enumerate_sites: bool = False,
    handlers: Sequence[Messenger] = (),
) -> Values:
    layout = Layout(num_draws, program.nesting)
    wide = {name: layout.widen(value, len(program.latents[name].batch_shape)) for name, value in values.items()}
    trace = trace_program(
        program.model,
        program.arguments,
        layout,
        wide,
        enumerate_sites=enumerate_sites,
        handlers=handlers,
    )
    return collect(trace, layout)


def _run_mapped(
    program: Program,
    values: Values,
    num_draws: int,
    collect: Collect,
    *,
    enumerate_sites: bool = False,
    handlers: Sequence[Messenger] = (),
) -> Values:
    """The model as it is for one draw, each of its operations taking all of them."""
    run = partial(_run_single, program, collect=collect, enumerate_sites=enumerate_sites, handlers=handlers)

    def mapped(_: Tensor, chosen: Values) -> Values:
        return {name: value[0] for name, value in run(chosen).items()}

    found: Values = torch.func.vmap(mapped, randomness="different")(torch.arange(num_draws), values)
    return found


def _run_alone(program: Program, values: Values, index: int, collect: Collect, **options: Any) -> Values:
    return _run_single(program, {name: value[index] for name, value in values.items()}, collect, **options)


def _run_single(
    program: Program,
    values: Values,
    collect: Collect,
    *,
    enumerate_sites: bool = False,
    handlers: Sequence[Messenger] = (),
) -> Values:
    layout = Layout(None, program.nesting)
    trace = trace_program(
        program.model, program.arguments, layout, values, enumerate_sites=enumerate_sites, handlers=handlers
    )
    return collect(trace, layout)


_RUNS: dict[str, Callable[..., Values]] = {TOGETHER: _run_together, MAPPED: _run_mapped}


# --- comparisons ----------------------------------------------------------------------------------------------------


def _value(trace: Trace, name: str) -> Tensor:
    value = trace.nodes[name]["value"]
    if not isinstance(value, Tensor):
        raise TypeError(f"site '{name}' has a value that is not a tensor: {type(value).__name__}")
    return value


def _some(scores: Tensor) -> list[int]:
    """A few draws to look at: spread over the chunk, and those with the smallest and the largest finite score."""
    size = scores.shape[0]
    step = max(1, size // _CHECKED_DRAWS)
    chosen = set(range(step - 1, size, step)[:_CHECKED_DRAWS])
    finite = torch.where(scores.isfinite())[0]
    if len(finite):
        chosen |= {int(finite[scores[finite].argmin()]), int(finite[scores[finite].argmax()])}
    return sorted(chosen)


def _compare(program: Program, together: Values, alone: Values, index: int) -> None:
    tolerance = _tolerance(program)
    for name, value in alone.items():
        a, b = together[name][index].cpu().double(), value[0].cpu().double()
        if a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True):
            continue
        what = f"site '{name}'" if name in program.guide_sites else "the log density"
        raise NotVectorizedError(f"{what} of one draw changes with the draws that are run beside it")


def _tolerance(program: Program) -> float:
    """Relative accuracy to expect of the least precise floating-point type in the program."""
    sites = [*program.guide_sites.values(), *program.observed.values()]
    kinds = [site.value.dtype for site in sites if site.value.is_floating_point()]
    eps = max([torch.finfo(kind).eps for kind in kinds] or [torch.finfo(torch.get_default_dtype()).eps])
    return max(100 * eps, 1e-8)


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
