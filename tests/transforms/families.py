"""The families of the package, discovered: every property in this folder is tested for a new family by itself.

A *case* is a family as it is built by default, or with all options that it shares with others changed (``[options]``):
a random order, a bottleneck below D, more reflections, the gated update.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyro_flowguides import transforms
from pyro_flowguides.transforms import AmortizedFlow, Compose, ConditionalCompose, ConditionalFlow, ContextFlow, Flow

#: Classes of the package that are not families.
BASES = {AmortizedFlow, Compose, ConditionalCompose, ConditionalFlow, ContextFlow, Flow}
CONTEXT_DIM = 3

#: Options that families share, by name, each with a value other than the default.
OPTIONS: dict[str, Callable[[int], Any]] = {
    "order": torch.randperm,
    "permutation": torch.randperm,
    "bottleneck": lambda dim: (dim + 1) // 2,
    "rank": lambda dim: (dim + 1) // 2,
    "reflections": lambda dim: 6,
    "update": lambda dim: "gated",
}


@dataclass(frozen=True)
class Case:
    """A family and how to build it for any dimension."""

    family: type[Flow] | type[ConditionalFlow]
    options: dict[str, Callable[[int], Any]] = field(default_factory=dict)

    @property
    def conditional(self) -> bool:
        return issubclass(self.family, ConditionalFlow)

    @property
    def formula(self) -> type[Flow]:
        """The unconditional class that holds the formula."""
        return self.family.family if self.conditional else self.family

    def build(self, dim: int, scale: float | None = None, *, seed: int = 0, **extra: Any) -> Flow | ConditionalFlow:
        """Build the module; with a scale, draw all its parameters from N(0, scale²)."""
        with seeded(seed):
            options = {name: value(dim) for name, value in self.options.items()}
            takes_dim = "input_dim" in inspect.signature(self.formula).parameters
            size = dim if takes_dim else torch.randperm(dim)
            module = self.family(*((size, CONTEXT_DIM) if self.conditional else (size,)), **options, **extra)
            return module if scale is None else randomize(module, scale)

    def flow(
        self, dim: int, scale: float | None = None, batch: tuple[int, ...] = (), *, seed: int = 0, **extra: Any
    ) -> Flow:
        """Build a flow; condition a conditional one on a random context with this batch shape."""
        return at_context(self.build(dim, scale, seed=seed, **extra), batch, seed=seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Make draws inside depend on the seed alone, and leave draws outside as they were."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def at_context(module: Flow | ConditionalFlow, batch: tuple[int, ...] = (), *, seed: int = 0) -> Flow:
    """Return the flow, or condition the module on a random context with this batch shape."""
    if isinstance(module, Flow):
        return module
    with seeded(seed + 1):
        return module.condition(torch.randn(*batch, CONTEXT_DIM))


def randomize(module: nn.Module, scale: float) -> Any:
    """Draw every parameter, those of hypernetworks included, from N(0, scale²)."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, scale)
    return module


def _discover() -> Iterator[Case]:
    for name in transforms.__all__:
        family = getattr(transforms, name)
        if not inspect.isclass(family) or family.__name__ != name or family in BASES:
            continue
        case = Case(family)
        yield case
        accepted = inspect.signature(case.formula).parameters
        options = {option: value for option, value in OPTIONS.items() if option in accepted}
        if options and "input_dim" in accepted:
            yield Case(family, options)


def name(case: Case) -> str:
    return case.family.__name__ + ("[options]" if case.options else "")


CASES = list(_discover())
PLAIN = [case for case in CASES if not case.conditional]
CONDITIONAL = [case for case in CASES if case.conditional]
DEFAULT = [case for case in CASES if not case.options]
PARAMETRIC = [case for case in CASES if next(case.build(2).parameters(), None) is not None]
DIMS = [1, 2, 3, 8, 32]
SCALES = [0.01, 0.3, 1.0, 3.0]


def as_under_tracing(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call a function as compilers and functorch do: its control flow must not depend on values."""
    return torch.func.vjp(function, x)[0]


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Compute the Jacobian ``(B, D, D)`` at points ``(B, D)`` by autograd, in one pass over D copies of them."""
    dim = x.shape[-1]
    copies = x.detach().expand(dim, *x.shape).clone().requires_grad_()
    (rows,) = torch.autograd.grad(function(copies).diagonal(dim1=0, dim2=-1).sum(), copies)
    return rows.movedim(0, -2)
