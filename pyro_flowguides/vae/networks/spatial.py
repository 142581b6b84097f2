"""Encoder and decoder of a latent image: residual networks that keep where things are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.vae.networks.batching import flatten_batch
from pyro_flowguides.vae.networks.gated_conv import halved, image_size
from pyro_flowguides.vae.networks.resnet import RESIDUAL_SCALE, _down, _plain, _up
from pyro_flowguides.vae.networks.weight_norm import WeightNormConv2d

__all__ = ["SpatialDecoder", "SpatialEncoder"]

#: How often the image is halved on the way to the latent image.
HALVINGS = 2


def latent_shape(owner: str, latent_dim: int, data_shape: Sequence[int]) -> tuple[int, int, int]:
    """Channels, height and width of the latent image.

    Raises:
        ValueError: if ``latent_dim`` is not a multiple of its pixels.
    """
    _, *size = image_size(owner, data_shape)
    height, width = halved((size[0], size[1]), HALVINGS)
    if latent_dim < 1 or latent_dim % (height * width):
        raise ValueError(
            f"{owner}: for images of {size[0]}×{size[1]} the latent image has {height}×{width} pixels: latent_dim must "
            f"be a multiple of {height * width}, got {latent_dim}"
        )
    return latent_dim // (height * width), height, width


class SpatialEncoder(nn.Module):
    r"""Location, scale and context of a latent image of a quarter of the height and width.

    Residual blocks with 3 × 3 convolutions, two of them with stride 2, and a 3 × 3 convolution to
    :math:`(\mu, \operatorname{softplus}^{-1} \sigma)`. The latent image is handed out flat; the features are the
    context.

    Args:
        data_shape: ``(channels, height, width)``.
        latent_dim: c·h·w with h, w = height / 4, width / 4, rounded up.
        hidden: feature maps.

    Shapes:
        ``(..., *data_shape)`` -> loc ``(..., latent_dim)``, scale ``(..., latent_dim)``, context
        ``(..., hidden * h * w)``.

    Raises:
        ValueError: if ``latent_dim`` is not a multiple of h·w.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.networks import SpatialEncoder
        >>> loc, scale, context = SpatialEncoder((3, 16, 16), latent_dim=32, hidden=8)(torch.rand(5, 3, 16, 16))
        >>> loc.shape, context.shape
        (torch.Size([5, 32]), torch.Size([5, 128]))
    """

    def __init__(self, data_shape: Sequence[int], latent_dim: int, hidden: int = 32) -> None:
        super().__init__()
        channels, height, width = latent_shape("SpatialEncoder", latent_dim, data_shape)
        self.latent_dim, self.context_dim = latent_dim, hidden * height * width
        layers: list[nn.Module] = [WeightNormConv2d(data_shape[0], hidden), _plain(hidden)]
        for _ in range(HALVINGS):
            layers += [_down(hidden, hidden), _plain(hidden)]
        self.network = nn.Sequential(*layers, nn.ELU())
        self.head = WeightNormConv2d(hidden, 2 * channels, init_scale=RESIDUAL_SCALE)

    def _flat(self, x: Tensor) -> Tensor:
        """Location, raw scale and context behind one another."""
        features = self.network(x)
        return torch.cat([self.head(features).flatten(1), features.flatten(1)], 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = flatten_batch(self._flat, x, 3)
        loc, raw, context = flat.split([self.latent_dim, self.latent_dim, self.context_dim], -1)
        return loc, F.softplus(raw) / math.log(2), context


class SpatialDecoder(nn.Module):
    """The mirror image of :class:`SpatialEncoder`: from a latent image to numbers for every value.

    Args:
        latent_dim: c·h·w, as for the encoder.
        data_shape: ``(channels, height, width)``.
        parameters: numbers per value of the data.
        hidden: feature maps.

    Shapes:
        ``(..., latent_dim) -> (..., *data_shape, parameters)``.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.networks import SpatialDecoder
        >>> SpatialDecoder(32, (3, 16, 16), parameters=2, hidden=8)(torch.randn(5, 32)).shape
        torch.Size([5, 3, 16, 16, 2])
    """

    def __init__(self, latent_dim: int, data_shape: Sequence[int], parameters: int, hidden: int = 32) -> None:
        super().__init__()
        shape = latent_shape("SpatialDecoder", latent_dim, data_shape)
        self.channels, height, width = data_shape
        layers: list[nn.Module] = [nn.Unflatten(-1, shape), WeightNormConv2d(shape[0], hidden)]
        for times in reversed(range(HALVINGS)):
            layers += [_plain(hidden), _up(hidden, hidden, halved((height, width), times))]
        last = WeightNormConv2d(hidden, self.channels * parameters, init_scale=RESIDUAL_SCALE)
        self.network = nn.Sequential(*layers, _plain(hidden), nn.ELU(), last)

    def forward(self, z: Tensor) -> Tensor:
        return flatten_batch(self.network, z, 1).unflatten(-3, (self.channels, -1)).movedim(-3, -1)
