"""Run a program on many draws: under a plate of draws, mapped over them, or one by one, with one check for all."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypeVar

import torch
from torch import Tensor

from pyro_flowguides.programs.chunking import gather
from pyro_flowguides.programs.layout import Layout, NotVectorizedError
from pyro_flowguides.programs.types import Values

__all__ = ["DENSITY", "BatchedRun", "DensityRun", "RunMode", "check_against_single_runs", "first_line"]

#: Name of a log density among named tensors; no site has it.
DENSITY = " log density"

T = TypeVar("T")

#: Draws of each batch that are also run by themselves, besides the two with the extreme log densities.
CHECKED_DRAWS = 4


class RunMode(Enum):
    """How a program runs on many draws, the fastest way first."""

    PLATE = "under a plate of draws"
    MAPPED = "mapped over the draws"
    SINGLE = "one draw at a time"


@dataclass(frozen=True)
class BatchedRun:
    """A run of a program as a function of many draws.

    Attributes:
        run: from a layout and values shaped as they stand in a trace to named tensors (S, ...).
        nesting: number of batch dimensions to the right of the dimension of the draws.
        batch_dims: number of batch dimensions of each value.
        randomness: whether random numbers drawn by a mapped run are the same for all draws.
    """

    run: Callable[[Layout, Values], Values]
    nesting: int
    batch_dims: Mapping[str, int]
    randomness: Literal["same", "different"] = "different"

    def __call__(self, values: Values, num_samples: int, mode: RunMode) -> Values:
        """Run on given values (S, ...) of latent sites and return the named tensors, each (S, ...)."""
        if mode is RunMode.PLATE:
            layout = Layout(num_samples, self.nesting)
            return self.run(
                layout, {name: layout.place(value, self.batch_dims[name]) for name, value in values.items()}
            )
        if mode is RunMode.MAPPED:
            return self._mapped(values, num_samples)
        return gather((self.single(values, index) for index in range(num_samples)), num_samples)

    def single(self, values: Values, index: int) -> Values:
        """Run on one of the draws and return the named tensors, each (1, ...)."""
        return self._at({name: value[index] for name, value in values.items()})

    def _at(self, values: Values) -> Values:
        return self.run(Layout(None, self.nesting), values)

    def _mapped(self, values: Values, num_samples: int) -> Values:
        """Run the program as it is for one draw, each of its operations taking all draws."""

        def at_one_draw(_: Tensor, values: Values) -> Values:
            return {name: value[0] for name, value in self._at(values).items()}

        mapped: Values = torch.func.vmap(at_one_draw, randomness=self.randomness)(torch.arange(num_samples), values)
        return mapped


def check_against_single_runs(batch: Values, single: Callable[[int], Values], tolerance: float) -> None:
    """Compare some of many draws with what each gives by itself.

    Args:
        batch: named tensors of many draws, (S, ...), their log density (S,) among them.
        single: from the index of a draw to the same tensors for that draw, (1, ...).
        tolerance: relative and absolute tolerance: sums of large terms lose many digits, wrong sums all of them.

    Raises:
        NotVectorizedError: if they differ.
    """
    for index in _representative(batch[DENSITY]):
        for name, value in single(index).items():
            a, b = batch[name][index].detach().cpu().double(), value[0].detach().cpu().double()
            if a.shape != b.shape:
                raise NotVectorizedError(f"{_subject(name)} has shape {tuple(a.shape)} instead of {tuple(b.shape)}")
            if not torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True):
                raise NotVectorizedError(
                    f"{_subject(name)} of a draw changes by {float((a - b).abs().max()):.3g} when other draws "
                    "are run beside it"
                )


def _subject(name: str) -> str:
    return "the log density" if name == DENSITY else f"site {name!r}"


def _representative(log_density: Tensor) -> list[int]:
    """Return the indices of a few draws: spread over all, and those of the smallest and largest finite log density."""
    size = log_density.shape[0]
    step = max(1, size // CHECKED_DRAWS)
    chosen = set(range(step - 1, size, step)[:CHECKED_DRAWS])
    finite = torch.where(log_density.isfinite())[0]
    if len(finite):
        chosen |= {int(finite[log_density[finite].argmin()]), int(finite[log_density[finite].argmax()])}
    return sorted(chosen)


@dataclass(frozen=True)
class DensityRun:
    """A run of a program that gives a log density (S,), NaN at draws at which a matrix cannot be factorized.

    Attributes:
        runs: the run; it gives the log density alone, under the name :data:`DENSITY`.
        dtype: type of the log density; ``None`` for that of the values.
    """

    runs: BatchedRun
    dtype: torch.dtype | None = None

    def __call__(self, values: Values, num_samples: int, mode: RunMode) -> Tensor:
        """Return the log densities at given values (S, ...) of latent sites."""
        try:
            return self.at_once(values, num_samples, mode)
        except torch.linalg.LinAlgError:
            if num_samples == 1:
                return self._nan(values)
            return torch.cat([self(*half, mode) for half in _halves(values, num_samples)])

    def at_once(self, values: Values, num_samples: int, mode: RunMode) -> Tensor:
        """Return the log densities; an error at one of the draws is raised."""
        return self.runs(values, num_samples, mode)[DENSITY]

    def checked(self, values: Values, num_samples: int, mode: RunMode, tolerance: float) -> Tensor:
        """Return the log densities after comparing some of them with runs of single draws.

        Raises:
            NotVectorizedError: if they differ by more than the relative and absolute tolerance.
        """

        def single(index: int) -> Values:
            draw = {name: value[index : index + 1] for name, value in values.items()}
            return {DENSITY: _seeded(lambda: self(draw, 1, RunMode.SINGLE))}

        log_density = _seeded(lambda: self(values, num_samples, mode))
        check_against_single_runs({DENSITY: log_density}, single, tolerance)
        return log_density

    def _nan(self, values: Values) -> Tensor:
        if self.dtype is not None:
            return torch.full((1,), torch.nan, dtype=self.dtype)
        return next(iter(values.values())).new_full((1,), torch.nan)


def _halves(values: Values, num_samples: int) -> Iterator[tuple[Values, int]]:
    middle = num_samples // 2
    for part in (slice(0, middle), slice(middle, num_samples)):
        yield {name: value[part] for name, value in values.items()}, part.stop - part.start


def _seeded(run: Callable[[], T]) -> T:
    """Run with the same random numbers, such as those of subsampling, at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return run()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, after the error's type where that says more than the message."""
    lines = str(error).strip().splitlines()
    if isinstance(error, NotVectorizedError) and lines:
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
