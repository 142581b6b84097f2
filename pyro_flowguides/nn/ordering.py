"""Orders of coordinates."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["as_permutation"]


def as_permutation(owner: str, size: int, order: Sequence[int] | Tensor | None) -> Tensor:
    """Return the order as a new tensor of indices; ``None`` stands for the natural order.

    Raises:
        ValueError: if the order is not a permutation of ``range(size)``. The message names the owner.
    """
    natural = torch.arange(size)
    indices = natural if order is None else torch.as_tensor(order, dtype=torch.long).clone()
    if not torch.equal(indices.sort().values, natural):
        raise ValueError(f"{owner}: order must be a permutation of 0..{size - 1}, got {indices.tolist()}")
    return indices
