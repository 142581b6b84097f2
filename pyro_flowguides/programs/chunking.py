"""Process many draws in chunks, so that memory does not grow with their number."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from pyro_flowguides.programs.types import Values

__all__ = ["chunks", "gather", "per_chunk"]

#: Numbers in a chunk: 16 MiB in single precision.
CHUNK_NUMBERS = 2**22


def per_chunk(numbers: int) -> int:
    """Return how many items of a given number of numbers fit into a chunk, at least one."""
    return max(1, CHUNK_NUMBERS // max(numbers, 1))


def chunks(total: int, size: int) -> Iterator[slice]:
    """Yield slices of at most a given size that cover all items."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


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
