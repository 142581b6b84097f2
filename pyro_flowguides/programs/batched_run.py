"""Run a program on many draws: under a plate of draws, mapped over them, or one by one, with one check for all."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypeVar

import torch
from torch import Tensor

from pyro_flowguides.programs.types import Values

__all__ = [
    "DENSITY",
    "NEVER_OF_A_DRAW",
    "BatchedRun",
    "DensityRun",
    "Layout",
    "MissingSiteError",
    "NotVectorizedError",
    "RunMode",
    "check_against_single_runs",
    "chunks",
    "first_line",
    "gather",
    "per_chunk",
    "select",
]

#: Name of a log density among named tensors; no site has it.
DENSITY = " log density"
#: Numbers in a chunk: 16 MiB in single precision.
CHUNK_NUMBERS = 2**22
#: Draws of each batch that are also run by themselves, besides the two with the extreme log densities.
CHECKED_DRAWS = 4

T = TypeVar("T")


def per_chunk(numbers: int) -> int:
    """Return how many items of a given number of numbers fit into a chunk, at least one."""
    return max(1, CHUNK_NUMBERS // max(numbers, 1))


def chunks(total: int, size: int) -> Iterator[slice]:
    """Yield slices of at most a given size that cover all items."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def select(values: Values, part: slice | int | Tensor) -> Values:
    """Return some of the draws, or one without its dimension of draws."""
    return {name: value[part] for name, value in values.items()}


def gather(parts: Iterable[Values], total: int) -> Values:
    """Concatenate parts as they come, without keeping them or holding anything twice.

    Args:
        parts: named tensors, each ``(size of the part, ...)``.
        total: sum of the parts' sizes.
    """
    whole: dict[str, Tensor] = {}
    start = 0
    for part in parts:
        stop = start
        for name, value in part.items():
            if name not in whole:
                whole[name] = value.new_empty((total, *value.shape[1:]))
            stop = start + value.shape[0]
            whole[name][start:stop] = value
        start = stop
    return whole


class NotVectorizedError(ValueError):
    """A program gives other shapes or other numbers for many draws at once than for one draw after the other."""


class MissingSiteError(ValueError):
    """A latent site of the model has no value."""


#: Errors that do not come from the values of a draw.
NEVER_OF_A_DRAW = (NotVectorizedError, MissingSiteError, MemoryError, torch.cuda.OutOfMemoryError)


@dataclass(frozen=True)
class Layout:
    """The place of the draws in a trace.

    Attributes:
        size: number of draws in the trace; ``None`` for a single draw without a dimension of its own.
        nesting: number of batch dimensions to the right of the dimension of the draws.
    """

    size: int | None
    nesting: int

    @property
    def num_samples(self) -> int:
        """Number of draws in the trace."""
        return 1 if self.size is None else self.size

    def split(self, value: Tensor, shape: torch.Size) -> Tensor:
        """Bring the draws of a site to the front: (S, 1, ..., batch, event) -> (S, \\*shape).

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

    def place(self, value: Tensor, batch_dim: int) -> Tensor:
        """Invert :meth:`split`: (S, batch, event) -> (S, 1, ..., batch, event), for ``batch_dim`` batch axes."""
        if self.size is None:
            return value[0]
        return value.reshape(value.shape[:1] + (1,) * (self.nesting - batch_dim) + value.shape[1:])

    def total(self, log_prob: Tensor) -> Tensor:
        """Sum a log density over everything but the draws, shape (S,).

        Raises:
            NotVectorizedError: if the draws do not stand in their dimension.
        """
        if self.size is None:
            return log_prob.sum().reshape(1)
        if log_prob.dim() != self.nesting + 1 or log_prob.shape[0] != self.size:
            raise NotVectorizedError(f"a log density of shape {tuple(log_prob.shape)} for {self.size} draws")
        return log_prob.reshape(self.size, -1).sum(-1)


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
            placed = {name: layout.place(value, self.batch_dims[name]) for name, value in values.items()}
            return self.run(layout, placed)
        if mode is RunMode.MAPPED:
            return self._mapped(values, num_samples)
        return gather((self.single(select(values, index)) for index in range(num_samples)), num_samples)

    def single(self, values: Values) -> Values:
        """Run on one draw, whose values have no dimension of draws, and return the named tensors, each (1, ...)."""
        return self.run(Layout(None, self.nesting), values)

    def _mapped(self, values: Values, num_samples: int) -> Values:
        """Run the program as it is for one draw, each of its operations taking all draws."""

        def at_one_draw(_: Tensor, values: Values) -> Values:
            return select(self.single(values), 0)

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
    """A run of a program that gives a log density (S,), NaN at draws at which the program raises an error.

    Attributes:
        runs: the run; it gives the log density alone, under the name :data:`DENSITY`.
        dtype: type of the log density, on the CPU; ``None`` for type and device of the values.
    """

    runs: BatchedRun
    dtype: torch.dtype | None = None

    def __call__(self, values: Values, mode: RunMode) -> Tensor:
        """Return the log densities at given values (S, ...) of latent sites."""
        return self._isolate_errors(values, mode, None)

    def _isolate_errors(self, values: Values, mode: RunMode, errors: list[Exception] | None) -> Tensor:
        """Return the log densities, and note the errors of single draws; with a list for them, raise any other."""
        try:
            return self.at_once(values, mode)
        except NEVER_OF_A_DRAW:
            raise
        except Exception as error:  # a model may fail in any way where it is not defined
            first = next(iter(values.values()))
            if len(first) == 1:
                if errors is not None:
                    self._check_fails_by_itself(values, error)
                    errors.append(error)
                undefined = first.new_full((1,), torch.nan)
                return undefined if self.dtype is None else undefined.to("cpu", self.dtype)
            middle = len(first) // 2
            halves = (select(values, part) for part in (slice(middle), slice(middle, None)))
            log_density = torch.cat([self._isolate_errors(half, mode, errors) for half in halves])
            if errors is not None and not _is_of_matrix(error) and not bool(log_density.isnan().any()):
                raise  # because the draws run together
            return log_density

    def _check_fails_by_itself(self, draw: Values, error: Exception) -> None:
        try:
            self.at_once(draw, RunMode.SINGLE)
        except Exception:  # as above
            return
        raise error

    def at_once(self, values: Values, mode: RunMode) -> Tensor:
        """Return the log densities; an error at one of the draws is raised."""
        return self.runs(values, len(next(iter(values.values()))), mode)[DENSITY]

    def checked(self, values: Values, mode: RunMode, tolerance: float) -> Tensor:
        """Return the log densities after comparing some of them with runs of single draws.

        Raises:
            NotVectorizedError: if they differ by more than the relative and absolute tolerance.
            Exception: the program's, if it fails where its runs of single draws do not, or at all draws.
        """

        def single(index: int) -> Values:
            draw = select(values, slice(index, index + 1))
            return {DENSITY: _seeded(lambda: self(draw, RunMode.SINGLE))}

        errors: list[Exception] = []
        log_density = _seeded(lambda: self._isolate_errors(values, mode, errors))
        if len(errors) == len(log_density) and not all(map(_is_of_matrix, errors)):
            raise errors[0]
        check_against_single_runs({DENSITY: log_density}, single, tolerance)
        return log_density


def _is_of_matrix(error: Exception) -> bool:
    """Tell whether a matrix could not be factorized, which many matrices together report as one does."""
    return isinstance(error, torch.linalg.LinAlgError)


def _seeded(run: Callable[[], T]) -> T:
    """Run with the same random numbers, such as those of subsampling, at every call."""
    with torch.random.fork_rng(devices=[]):
        if torch.cuda.is_initialized() or torch.backends.mps.is_available():
            torch.manual_seed(0)
        else:
            torch.default_generator.manual_seed(0)  # torch.manual_seed formats the call stack for each idle device
        return run()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, after the error's type where that says more than the message."""
    lines = str(error).strip().splitlines()
    if isinstance(error, NotVectorizedError) and lines:
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
