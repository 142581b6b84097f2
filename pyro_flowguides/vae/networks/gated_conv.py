"""Gated convolutions: the encoder and decoder of van den Berg et al. (2018)."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pyro_flowguides.vae.networks.image_shapes import as_image_shape, flatten_batch, halve_size, params_last

__all__ = ["GatedConvDecoder", "GatedConvEncoder"]


class _GatedConv(nn.Module):
    """A convolution whose first half of the channels is multiplied by the sigmoid of the second half.

    The weights of the first half start with standard deviation :math:`2 / \\sqrt{n}`, where n = ``fan_in`` is the
    number of products that are summed into one output. This preserves the scale of the signal, since the gates start
    half open. With PyTorch's default, z hardly affects the image.
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
        return values * gates.sigmoid()


def _gated_conv(inputs: int, outputs: int, stride: int) -> _GatedConv:
    return _GatedConv(nn.Conv2d(inputs, 2 * outputs, 5, stride, 2), 25 * inputs)


def _gated_transposed_conv(inputs: int, outputs: int, stride: int, size: tuple[int, int]) -> _GatedConv:
    """Return a gated transposed convolution with outputs of the given height and width."""
    padding = (stride - 1) * (1 - size[0] % 2), (stride - 1) * (1 - size[1] % 2)
    return _GatedConv(nn.ConvTranspose2d(inputs, 2 * outputs, 5, stride, 2, padding), 25 * inputs / stride**2)


class GatedConvEncoder(nn.Module):
    r"""Six gated convolutions from an image to features.

    .. math:: h \leftarrow (W h + b) \odot \sigma(V h + c)

    Five layers have 5 × 5 kernels and 32, 32 (stride 2), 64, 64 (stride 2) and 64 channels. The last one has ``hidden``
    channels and a kernel as large as the remaining image: 7 × 7 for images of 28 × 28.

    Args:
        data_shape: ``(channels, height, width)``, any size from 4 × 4.
        hidden: number of features.

    Shapes:
        ``(..., channels, height, width) -> (..., hidden)``.

    References:
        R. van den Berg, L. Hasenclever, J. Tomczak, M. Welling (2018). Sylvester normalizing flows for variational
        inference. arXiv:1803.05649.
        Y. Dauphin, A. Fan, M. Auli, D. Grangier (2017). Language modeling with gated convolutional networks.
        arXiv:1612.08083.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import GatedConvEncoder
        >>> GatedConvEncoder((1, 28, 20))(torch.rand(2, 1, 28, 20)).shape
        torch.Size([2, 256])
    """

    def __init__(self, data_shape: Sequence[int], hidden: int = 256) -> None:
        super().__init__()
        channels, *full = as_image_shape("GatedConvEncoder", data_shape)
        last = halve_size(full, 2)
        self.features = hidden
        self.network = nn.Sequential(
            _gated_conv(channels, 32, 1),
            _gated_conv(32, 32, 2),
            _gated_conv(32, 64, 1),
            _gated_conv(64, 64, 2),
            _gated_conv(64, 64, 1),
            _GatedConv(nn.Conv2d(64, 2 * hidden, last), 64 * math.prod(last)),  # the kernel is as large as the image
            nn.Flatten(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return flatten_batch(self.network, x, 3)


class GatedConvDecoder(nn.Module):
    r"""The mirror image of :class:`GatedConvEncoder`: six gated transposed convolutions, then a 1 × 1 convolution.

    Arguments and shapes are those of :class:`DenseDecoder`, for images of any size from 4 × 4.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import GatedConvDecoder
        >>> GatedConvDecoder(16, (1, 8, 8), parameters_per_value=2)(torch.randn(3, 2, 16)).shape
        torch.Size([3, 2, 1, 8, 8, 2])
    """

    def __init__(self, latent_dim: int, data_shape: Sequence[int], parameters_per_value: int) -> None:
        super().__init__()
        self.channels, *size = as_image_shape("GatedConvDecoder", data_shape)
        full, half, quarter = (halve_size(size, times) for times in range(3))
        self.network = nn.Sequential(
            nn.Unflatten(-1, (latent_dim, 1, 1)),
            _GatedConv(nn.ConvTranspose2d(latent_dim, 128, quarter), latent_dim),
            _gated_transposed_conv(64, 64, 1, quarter),
            _gated_transposed_conv(64, 32, 2, half),
            _gated_transposed_conv(32, 32, 1, half),
            _gated_transposed_conv(32, 32, 2, full),
            _gated_transposed_conv(32, 32, 1, full),
            nn.Conv2d(32, self.channels * parameters_per_value, 1),
        )

    def forward(self, z: Tensor) -> Tensor:
        return params_last(flatten_batch(self.network, z, 1), self.channels)
