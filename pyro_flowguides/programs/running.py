"""Run a model or a guide on given values of its latent sites, for one draw or under a plate of draws."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ParamSpec, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

from pyro_flowguides.programs.batched_run import Layout, MissingSiteError
from pyro_flowguides.programs.sites import is_data
from pyro_flowguides.programs.types import Args, Guide, Kwargs, Model, Site, Values

__all__ = [
    "DRAWS_PLATE",
    "PYRO_LOCK",
    "SampleObserved",
    "evaluation",
    "exclusive",
    "isolated",
    "run_scored",
    "trace_guide",
    "trace_program",
    "unvalidated",
]

P = ParamSpec("P")
T = TypeVar("T")

#: Held while programs run. Pyro keeps handlers, settings and parameters once for all threads, so that two threads would
#: disturb each other; with the lock, one waits for the other.
PYRO_LOCK = threading.RLock()
#: Name of the plate of draws.
DRAWS_PLATE = "_pyro_flowguides_draws"


def exclusive(function: Callable[P, T]) -> Callable[P, T]:
    """Let only one thread at a time run the decorated functions."""

    @functools.wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> T:
        with PYRO_LOCK:
            return function(*args, **kwargs)

    return locked


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Run a program without outer plates and traces, without gradients, and without using up random numbers."""
    outer = list(_PYRO_STACK)
    _PYRO_STACK.clear()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _empty_plates():
            yield
    finally:
        _PYRO_STACK[:] = outer


@contextlib.contextmanager
def _empty_plates() -> Iterator[None]:
    """Say what Pyro's error on a plate without members means."""
    try:
        yield
    except ZeroDivisionError as error:
        if str(error) != "size cannot be zero":
            raise
        raise ValueError("a plate of the program has size zero: its data are empty") from error


@contextlib.contextmanager
def evaluation() -> Iterator[None]:
    """Compute no gradients, and return densities that are zero or undefined as such instead of raising."""
    with torch.no_grad(), pyro.validation_enabled(False):
        yield


@contextlib.contextmanager
def unvalidated(*distributions: Distribution) -> Iterator[None]:
    """Switch off the validation of distributions and their parts, which keep the setting of when they were expanded."""
    parts = list(distributions)
    for part in parts:
        parts += [value for value in vars(part).values() if isinstance(value, Distribution)]
    validating = [part for part in parts if part.__dict__.get("_validate_args")]
    for part in validating:
        part._validate_args = False
    try:
        yield
    finally:
        for part in validating:
            part._validate_args = True


class _Substitute(Messenger):
    """Give latent sites the values of a dictionary."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class _Score(_Substitute):
    """Give every latent site its value and add up the log densities of all sites, recording nothing else."""

    def __init__(self, values: Mapping[str, Tensor], layout: Layout) -> None:
        super().__init__(values)
        self.layout = layout
        self.log_density: Tensor | float = 0.0

    def _pyro_sample(self, msg: Site) -> None:
        super()._pyro_sample(msg)
        if not (msg["is_observed"] or msg["name"] in self.values or site_is_subsample(msg)):  # type: ignore[arg-type]
            raise MissingSiteError(f"site {msg['name']!r} is latent in the model and not in the guide")

    def _pyro_post_sample(self, msg: Site) -> None:
        if site_is_subsample(msg):  # type: ignore[arg-type]
            return
        with unvalidated(msg["fn"]):
            log_prob = scale_and_mask(msg["fn"].log_prob(msg["value"]), msg["scale"], msg["mask"])
        self.log_density = self.log_density + (
            self.layout.total(log_prob) if isinstance(log_prob, Tensor) else log_prob
        )


class SampleObserved(UnconditionMessenger):
    """Draw the observed sites anew; deterministic sites and factors stay as they are."""

    def _pyro_sample(self, msg: Site) -> None:  # type: ignore[override]
        if is_data(msg):
            super()._pyro_sample(msg)  # type: ignore[arg-type]


@contextlib.contextmanager
def _draws_plate(layout: Layout) -> Iterator[None]:
    if layout.size is None:
        yield
    else:
        with pyro.plate(DRAWS_PLATE, layout.size, dim=-1 - layout.nesting):
            yield


def run_scored(model: Model, args: Args, kwargs: Kwargs, layout: Layout, values: Values) -> Tensor | float:
    """Run a model and return its joint log density at given values of all its latent sites, shape (S,).

    Args:
        model, args, kwargs: the model and its arguments.
        layout: number and place of the draws.
        values: values of the latent sites, shaped as they stand in the trace.

    Raises:
        MissingSiteError: if a latent site has no value.
        NotVectorizedError: if a log density does not have the draws in their dimension.
    """
    score = _Score(values, layout)
    with pyro.validation_enabled(False), score, _draws_plate(layout):
        model(*args, **kwargs)
    return score.log_density


def trace_program(
    program: Model | Guide,
    args: Args,
    kwargs: Kwargs,
    layout: Layout,
    values: Mapping[str, Tensor] | None = None,
    *,
    enumerate_sites: bool = False,
    handlers: Sequence[Messenger] = (),
) -> Trace:
    """Run a Pyro program and record it.

    Args:
        program, args, kwargs: model or guide, and its arguments.
        layout: number and place of the draws.
        values: values of latent sites, shaped as they stand in the trace; the others are drawn.
        enumerate_sites: enumerate the sites that are marked for parallel enumeration and have no given value.
        handlers: further handlers, which act inside the given values and outside the plate of draws.
    """
    with contextlib.ExitStack() as stack:
        tracer = stack.enter_context(TraceMessenger())
        if enumerate_sites:
            first_free = -1 - layout.nesting - (layout.size is not None)
            stack.enter_context(poutine.enum(first_available_dim=first_free))
        stack.enter_context(_Substitute(values or {}))
        for handler in handlers:
            stack.enter_context(handler)
        stack.enter_context(_draws_plate(layout))
        stack.enter_context(_empty_plates())
        program(*args, **kwargs)
    return tracer.trace if layout.size is None else prune_subsample_sites(tracer.trace)


def trace_guide(
    guide: Guide,
    args: Args,
    kwargs: Kwargs,
    layout: Layout,
    values: Mapping[str, Tensor] | None = None,
    *,
    handlers: Sequence[Messenger] = (),
) -> Trace:
    """Run and record a guide, also an effect-based one (``GuideMessenger``); arguments as for :func:`trace_program`."""
    trace = trace_program(guide, args, kwargs, layout, values, handlers=handlers)
    unwrapped = poutine.unwrap(guide)
    return unwrapped.get_traces()[1] if isinstance(unwrapped, GuideMessenger) else trace
