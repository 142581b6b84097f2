"""Orders of coordinates."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flowguides.nn.arguments import describe

__all__ = ["as_permutation"]


def as_permutation(owner: str, size: int, order: Sequence[int] | Tensor | None, name: str = "order") -> Tensor:
    """Return the order as a new tensor of indices; ``None`` stands for the natural order.

    Args:
        owner, name: what has the order, and the name of its argument, for the message.
        size: number of coordinates.
        order: the order.

    Raises:
        ValueError: if the order is not a permutation of ``range(size)``.
    """
    natural = torch.arange(size)
    if order is None:
        return natural
    try:
        values = torch.as_tensor(order)
        indices = values.long().clone()
        is_permutation = torch.equal(indices, values) and torch.equal(indices.sort().values, natural)
    except (TypeError, ValueError, RuntimeError):  # torch cannot make a tensor of it
        is_permutation = False
    if not is_permutation:
        got = order.tolist() if isinstance(order, Tensor) else order
        raise ValueError(f"{owner}: {name} must be a permutation of 0..{size - 1}, got {describe(got)}")
    return indices
