"""Traces of many draws: where the draws stand, and how a program is run on given values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import prune_subsample_sites, site_is_factor, site_is_subsample
from torch import Tensor

DRAWS_PLATE = "_pyro_flowguides_draws"

Site = dict[str, Any]
Values = dict[str, Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class NotVectorizedError(Exception):
    """A program gave other shapes or other numbers under an outermost plate than it gives draw by draw."""


@dataclass(frozen=True)
class Layout:
    """Where the draws stand in a trace.

    Attributes:
        size: number of draws in the trace; ``None`` for a trace of a single draw, which has no plate of draws.
        nesting: number of batch dimensions to the right of the plate of draws.
    """

    size: int | None
    nesting: int

    @property
    def num_draws(self) -> int:
        """Number of draws in the trace."""
        return 1 if self.size is None else self.size

    def split(self, value: Tensor, shape: torch.Size) -> Tensor:
        """Bring the draws of a site to the front: (S, 1, ..., batch, event) → (S, *shape).

        Raises:
            NotVectorizedError: if the value does not hold one array of that shape for each draw.
        """
        if self.size is None:
            return value.reshape((1, *shape))
        if value.shape == shape:  # the same for all draws
            return value.expand((self.size, *shape))
        if value.numel() != self.size * shape.numel() or value.shape[0] != self.size:
            raise NotVectorizedError(f"a value of shape {tuple(value.shape)} for {self.size} draws of {tuple(shape)}")
        return value.reshape((self.size, *shape))

    def widen(self, value: Tensor, batch_dim: int) -> Tensor:
        """The inverse of ``split``: (S, batch, event) → (S, 1, ..., batch, event), for ``batch_dim`` batch axes."""
        if self.size is None:
            return value[0]
        ones = (1,) * (self.nesting - batch_dim)
        return value.reshape(value.shape[:1] + ones + value.shape[1:])

    def total(self, log_prob: Tensor) -> Tensor:
        """Sum a log density over everything but the draws, in double precision: shape (S,), on the CPU.

        Raises:
            NotVectorizedError: if the draws do not stand in their dimension.
        """
        log_prob = log_prob.cpu().double() if log_prob.device.type == "mps" else log_prob.double()
        if self.size is None:
            return log_prob.sum().reshape(1).cpu()
        if log_prob.dim() != self.nesting + 1 or log_prob.shape[0] != self.size:
            raise NotVectorizedError(f"a log density of shape {tuple(log_prob.shape)} for {self.size} draws")
        return log_prob.reshape(self.size, -1).sum(-1).cpu()


def is_deterministic(site: Site) -> bool:
    """Whether a site comes from ``pyro.deterministic``."""
    return bool(site["infer"].get("_deterministic", False))


def is_data(site: Site) -> bool:
    """Whether a site is an observation: neither a factor nor a deterministic site."""
    return bool(site["is_observed"]) and not is_deterministic(site) and not site_is_factor(site)  # type: ignore[arg-type]


def innermost(fn: Any) -> Any:
    """A distribution without masks, expansions and reinterpreted dimensions around it."""
    while isinstance(fn, (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)):
        fn = fn.base_dist
    return fn


def sample_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """The sample sites of a trace, without those that only choose the subsample of a plate."""
    nodes: Mapping[str, Any] = trace.nodes
    for name, site in nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site):
            yield name, site


class _Substitute(Messenger):
    """Gives latent sites the values of a dictionary."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


class SampleObserved(UnconditionMessenger):
    """Draws the observed sites anew; deterministic sites and factors stay as they are."""

    def _pyro_sample(self, msg: Any) -> None:
        if is_data(msg):
            super()._pyro_sample(msg)


@contextlib.contextmanager
def evaluation() -> Iterator[None]:
    """No gradients, and densities that are zero or undefined come back as such instead of raising."""
    with torch.no_grad(), pyro.validation_enabled(False):
        yield


@contextlib.contextmanager
def _draws_plate(layout: Layout) -> Iterator[None]:
    if layout.size is None:
        yield
    else:
        with pyro.plate(DRAWS_PLATE, layout.size, dim=-1 - layout.nesting):
            yield


def trace_program(
    program: Callable[..., Any],
    arguments: Arguments,
    layout: Layout,
    values: Mapping[str, Tensor] | None = None,
    *,
    enumerate_sites: bool = False,
    handlers: Sequence[Messenger] = (),
) -> Trace:
    """Run a Pyro program and record it.

    Args:
        program: model or guide.
        arguments: positional and keyword arguments.
        layout: number and place of the draws.
        values: values of latent sites, shaped as they stand in the trace.
        enumerate_sites: enumerate the sites that are marked for parallel enumeration and have no given value.
        handlers: further handlers, to act inside the given values and outside the plate of draws.
    """
    args, kwargs = arguments
    with contextlib.ExitStack() as stack:
        tracer = stack.enter_context(TraceMessenger())
        if enumerate_sites:
            first_free = -1 - layout.nesting - (layout.size is not None)
            stack.enter_context(poutine.enum(first_available_dim=first_free))
        stack.enter_context(_Substitute(values or {}))
        for handler in handlers:
            stack.enter_context(handler)
        stack.enter_context(_draws_plate(layout))
        program(*args, **kwargs)
    return tracer.trace if layout.size is None else prune_subsample_sites(tracer.trace)


def trace_guide(
    guide: Callable[..., Any],
    arguments: Arguments,
    layout: Layout,
    values: Mapping[str, Tensor] | None = None,
    *,
    handlers: Sequence[Messenger] = (),
) -> Trace:
    """As ``trace_program``, for a guide, which may also be one of Pyro's effect-based guides (``GuideMessenger``)."""
    trace = trace_program(guide, arguments, layout, values, handlers=handlers)
    unwrapped = poutine.unwrap(guide)
    return unwrapped.get_traces()[1] if isinstance(unwrapped, GuideMessenger) else trace
