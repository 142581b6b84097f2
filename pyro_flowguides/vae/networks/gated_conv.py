"""Gated convolutions: encoder and decoder of van den Berg et al. (2018)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pyro_flowguides.vae.networks.batching import flatten_batch

__all__ = ["GatedConvDecoder", "GatedConvEncoder"]


class _Gated(nn.Module):
    """A convolution whose first half of the channels is gated by the sigmoid of the second half.

    The weights of the values start with a deviation of :math:`2 / \\sqrt{\\text{fan in}}`, which keeps the size of the
    signal through gates that start half open: with torch's own start hardly anything of z reaches the image.

    Args:
        convolution: with twice the channels of the output.
        fan_in: how many products make one output.
    """

    def __init__(self, convolution: nn.Conv2d | nn.ConvTranspose2d, fan_in: float) -> None:
        super().__init__()
        self.convolution = convolution
        with torch.no_grad():
            values = convolution.weight.chunk(2, 1 if convolution.transposed else 0)[0]
            values.normal_(std=2 / math.sqrt(fan_in))
            nn.init.zeros_(cast("Tensor", convolution.bias))

    def forward(self, x: Tensor) -> Tensor:
        values, gates = self.convolution(x).chunk(2, -3)
        gated: Tensor = values * gates.sigmoid()
        return gated


def _down(inputs: int, outputs: int, stride: int) -> _Gated:
    return _Gated(nn.Conv2d(inputs, 2 * outputs, 5, stride, 2), 25 * inputs)


def _contract(inputs: int, outputs: int, size: tuple[int, int]) -> _Gated:
    """One kernel over the whole image."""
    return _Gated(nn.Conv2d(inputs, 2 * outputs, size), inputs * size[0] * size[1])


def _up(inputs: int, outputs: int, stride: int, size: tuple[int, int]) -> _Gated:
    padding = (stride - 1) * (1 - size[0] % 2), (stride - 1) * (1 - size[1] % 2)  # to arrive at this size
    return _Gated(nn.ConvTranspose2d(inputs, 2 * outputs, 5, stride, 2, padding), 25 * inputs / stride**2)


def _expand(inputs: int, outputs: int, size: tuple[int, int]) -> _Gated:
    """From one pixel to a whole image."""
    return _Gated(nn.ConvTranspose2d(inputs, 2 * outputs, size), inputs)


def image_size(owner: str, data_shape: Sequence[int]) -> tuple[int, int, int]:
    """Channels, height and width.

    Raises:
        ValueError: if the data are not images, or smaller than 4 × 4.
    """
    if len(data_shape) != 3 or min(data_shape[1:]) < 4:
        raise ValueError(
            f"{owner}: data_shape must be (channels, height, width) with at least 4 × 4 pixels, got "
            f"{tuple(data_shape)}: reshape the images, or use the dense networks"
        )
    channels, height, width = data_shape
    return channels, height, width


def halved(size: tuple[int, int], times: int) -> tuple[int, int]:
    """Height and width after convolutions of stride 2."""
    height, width = (math.ceil(side / 2**times) for side in size)
    return height, width


class GatedConvEncoder(nn.Module):
    r"""Six gated convolutions from an image to features.

    .. math:: h \leftarrow (W h + b) \odot \sigma(V h + c)

    5 × 5 kernels with 32, 32 (stride 2), 64, 64 (stride 2) and 64 channels, then one kernel as large as what is left
    (7 × 7 for images of 28 × 28) with ``hidden`` channels.

    Args:
        data_shape: ``(channels, height, width)``, any size from 4 × 4.
        hidden: number of features.

    Shapes:
        ``(..., channels, height, width) -> (..., hidden)``.

    Raises:
        ValueError: if the data are not images.

    References:
        R. van den Berg, L. Hasenclever, J. Tomczak, M. Welling (2018). Sylvester normalizing flows for variational
        inference. arXiv:1803.05649.
        Y. Dauphin, A. Fan, M. Auli, D. Grangier (2017). Language modeling with gated convolutional networks.
        arXiv:1612.08083.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.networks import GatedConvEncoder
        >>> GatedConvEncoder((1, 28, 20))(torch.rand(2, 1, 28, 20)).shape
        torch.Size([2, 256])
    """

    def __init__(self, data_shape: Sequence[int], hidden: int = 256) -> None:
        super().__init__()
        channels, height, width = image_size("GatedConvEncoder", data_shape)
        self.features = hidden
        self.network = nn.Sequential(
            _down(channels, 32, 1),
            _down(32, 32, 2),
            _down(32, 64, 1),
            _down(64, 64, 2),
            _down(64, 64, 1),
            _contract(64, hidden, halved((height, width), 2)),
            nn.Flatten(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return flatten_batch(self.network, x, 3)


class GatedConvDecoder(nn.Module):
    r"""The mirror image of :class:`GatedConvEncoder`: six gated transposed convolutions, then a 1 × 1 convolution.

    Args:
        latent_dim: width of z.
        data_shape: ``(channels, height, width)``, any size from 4 × 4.
        parameters: numbers per value of the data.

    Shapes:
        ``(..., latent_dim) -> (..., channels, height, width, parameters)``.

    References:
        R. van den Berg, L. Hasenclever, J. Tomczak, M. Welling (2018). arXiv:1803.05649.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.networks import GatedConvDecoder
        >>> GatedConvDecoder(16, (1, 8, 8), parameters=2)(torch.randn(3, 2, 16)).shape
        torch.Size([3, 2, 1, 8, 8, 2])
    """

    def __init__(self, latent_dim: int, data_shape: Sequence[int], parameters: int) -> None:
        super().__init__()
        channels, height, width = image_size("GatedConvDecoder", data_shape)
        full, half, quarter = (halved((height, width), times) for times in range(3))
        self.channels, self.parameters_per_value = channels, parameters
        self.network = nn.Sequential(
            nn.Unflatten(-1, (latent_dim, 1, 1)),
            _expand(latent_dim, 64, quarter),
            _up(64, 64, 1, quarter),
            _up(64, 32, 2, half),
            _up(32, 32, 1, half),
            _up(32, 32, 2, full),
            _up(32, 32, 1, full),
            nn.Conv2d(32, channels * parameters, 1),
        )

    def forward(self, z: Tensor) -> Tensor:
        return flatten_batch(self.network, z, 1).unflatten(-3, (self.channels, -1)).movedim(-3, -1)
