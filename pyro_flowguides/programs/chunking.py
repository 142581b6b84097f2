"""Many draws a part at a time, so that what is computed of them does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

_CHUNK_NUMBERS = 2**22


def per_chunk(numbers: int) -> int:
    """How many items of so many numbers each are treated together: what holds 16 MiB in single precision, or one."""
    return max(1, _CHUNK_NUMBERS // max(numbers, 1))


def chunks(total: int, size: int) -> Iterator[slice]:
    """Slices that cover so many items, each of at most the given size."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def gather(parts: Iterable[dict[str, Tensor]], total: int) -> dict[str, Tensor]:
    """Put parts one behind the other, each as it comes: no part is kept, and nothing is held twice.

    Args:
        parts: named tensors, each ``(size of the part, ...)``.
        total: sum of their sizes.
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
