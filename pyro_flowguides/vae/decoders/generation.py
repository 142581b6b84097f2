"""Ancestral generation: its steps, and the batch that they fill."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor

__all__ = ["DrawChannels", "GeneratedBatch", "GenerationStep"]

#: From the parameters at one position, ``(B, outputs)``, to a draw of its channels, ``(B, channels)``.
DrawChannels: TypeAlias = Callable[[Tensor], Tensor]


class GenerationStep(NamedTuple):
    """The channels that are drawn together, and their position."""

    channels: slice
    position: tuple[int, ...]


class GeneratedBatch:
    """A partly generated batch: the values drawn so far, and the same values standardized for the network.

    Args:
        values: zeros, ``(B, channels, *space)``.
        standardize: from values to network inputs, elementwise.
    """

    def __init__(self, values: Tensor, standardize: Callable[[Tensor], Tensor]) -> None:
        self.values, self.standardize = values, standardize
        self.inputs = standardize(values).clone()

    def __len__(self) -> int:
        return len(self.values)

    def write(self, step: GenerationStep, drawn: Tensor) -> None:
        """Write the channels of a step, given a draw ``(B, channels)`` of all channels."""
        index: tuple[slice | int, ...] = (slice(None), step.channels, *step.position)
        self.values[index] = drawn[:, step.channels]
        self.inputs[index] = self.standardize(self.values[index])
