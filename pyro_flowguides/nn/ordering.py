"""Orders of coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["as_permutation"]


def as_permutation(owner: str, size: int, order: Sequence[int] | Tensor | None) -> Tensor:
    """The order as a tensor of indices, the natural one for ``None``.

    Raises:
        ValueError: if it is not a permutation of ``range(size)``; the message names the owner.
    """
    natural = torch.arange(size)
    indices = natural if order is None else torch.as_tensor(order, dtype=torch.long).clone()
    if not torch.equal(indices.sort().values, natural):
        raise ValueError(f"{owner}: order must be a permutation of 0..{size - 1}, got {indices.tolist()}")
    return indices
