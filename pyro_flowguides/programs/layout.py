"""Say where the draws stand in a trace, and bring them there and back."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Layout", "NotVectorizedError"]


class NotVectorizedError(ValueError):
    """A program gives other shapes or other numbers for many draws at once than for one draw after the other."""


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
