"""Shapes of images, feature maps and their batches in convolutional networks."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from pyro_flowguides.nn.arguments import check_widths

__all__ = ["as_image_shape", "flatten_batch", "halve_size", "params_last"]


def as_image_shape(owner: str, data_shape: Sequence[int]) -> tuple[int, int, int]:
    """Return channels, height and width of images with at least 4 × 4 pixels; raise an error for other data."""
    data_shape = check_widths(owner, "data_shape", data_shape)
    if len(data_shape) != 3 or min(data_shape[1:]) < 4:
        raise ValueError(
            f"{owner}: data_shape must be (channels, height, width) with at least 4 × 4 pixels, got "
            f"{tuple(data_shape)}: reshape the images, or use the dense networks"
        )
    channels, height, width = data_shape
    return channels, height, width


def halve_size(size: Sequence[int], times: int) -> tuple[int, int]:
    """Return height and width after ``times`` convolutions of stride 2."""
    height, width = (math.ceil(side / 2**times) for side in size)
    return height, width


def params_last(maps: Tensor, channels: int) -> Tensor:
    """Move the P parameters of every value to the last dimension: ``(..., C * P, H, W) -> (..., C, H, W, P)``."""
    return maps.unflatten(-3, (channels, -1)).movedim(-3, -1)


def flatten_batch(network: Callable[[Tensor], Tensor], x: Tensor, event_dim: int) -> Tensor:
    """Apply a network ``(N, *event) -> (N, *out)`` to ``(..., *event)``, with any number of batch dimensions."""
    batch, event = x.shape[: x.dim() - event_dim], x.shape[x.dim() - event_dim :]
    if len(batch) == 1:
        return network(x)
    y = network(x.reshape(batch.numel(), *event))
    return y.reshape(*batch, *y.shape[1:])
