"""The projection through which the context enters a layer of an autoregressive network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ContextProjection"]


class ContextProjection(nn.Module):
    """The term that the context adds to the pre-activation of a layer: a linear function of global features plus a
    convolution of maps.

    Args:
        features: number of global features, 0 for none.
        maps: number of maps of the size of the data, 0 for none.
        width: number of channels of the result.
        spatial_dims: 2 for images, 1 for sequences.
        reach: reach of the convolution of the maps in every direction; 0 for a 1×1 convolution.
        pool: factor by which maps are first averaged, for layers at a lower resolution.

    Shapes:
        features ``(B, features)``, maps ``(B, maps, *space)``; result ``(B, width, *space)`` or, without maps, a tensor
        that broadcasts to this shape.
    """

    def __init__(
        self, features: int, maps: int, width: int, spatial_dims: int = 2, *, reach: int = 0, pool: int = 1
    ) -> None:
        super().__init__()
        convolution: Callable[..., nn.Module] = (nn.Conv1d, nn.Conv2d)[spatial_dims - 1]
        self.spatial_dims, self.pool = spatial_dims, pool
        self.features = nn.Linear(features, width) if features else None
        self.maps = convolution(maps, width, 2 * reach + 1, padding=reach) if maps else None
        self.register_buffer("zero", torch.zeros((1, 1) + (1,) * spatial_dims), persistent=False)

    def forward(self, features: Tensor | None, maps: Tensor | None) -> Tensor:
        total = self.get_buffer("zero")
        if self.features is not None:
            projected = self.features(features)
            total = total + projected.reshape(*projected.shape, *(1,) * self.spatial_dims)
        if self.maps is not None:
            assert maps is not None
            total = total + self.maps(F.avg_pool2d(maps, self.pool) if self.pool > 1 else maps)
        return total
