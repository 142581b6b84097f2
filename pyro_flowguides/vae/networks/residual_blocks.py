"""Residual blocks of weight-normalized convolutions."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.vae.networks.weight_norm import WeightNormConv2d

__all__ = ["RESIDUAL_SCALE", "ResidualBlock", "UpsampleConv2d"]

#: Factor on the residual of a block, so that a deep network starts close to its skip connections.
RESIDUAL_SCALE = 0.1


class UpsampleConv2d(nn.Module):
    """A convolution to four times the channels, rearranged into an image of twice the size and cropped.

    Args:
        in_channels, out_channels: numbers of channels.
        size: height and width of the output: each twice that of the input, or one less.

    Shapes:
        ``(N, in_channels, H, W) -> (N, out_channels, *size)``.

    References:
        W. Shi et al. (2016). Real-time single image and video super-resolution using an efficient sub-pixel
        convolutional neural network. arXiv:1609.05158.
    """

    def __init__(self, in_channels: int, out_channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.convolution = WeightNormConv2d(in_channels, 4 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.convolution(x), 2)[..., : self.size[0], : self.size[1]]


class ResidualBlock(nn.Module):
    r"""A residual block of two 3 × 3 convolutions, each preceded by an ELU: :math:`s(x) + 0.1\, f(x)`.

    Args:
        first: the first convolution, which may change the size and the number of channels.
        skip: the skip connection, with outputs of the same shape.
        channels: number of channels of the output.

    References:
        K. He, X. Zhang, S. Ren, J. Sun (2016). Identity mappings in deep residual networks. arXiv:1603.05027.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.networks.residual_blocks import ResidualBlock
        >>> ResidualBlock.downsampling(3, 8)(torch.randn(2, 3, 7, 8)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, first: nn.Module, skip: nn.Module, channels: int) -> None:
        super().__init__()
        self.first, self.skip = first, skip
        self.second = WeightNormConv2d(channels, channels)

    @classmethod
    def same_size(cls, channels: int) -> ResidualBlock:
        """Return a block that keeps size and channels, with an identity as its skip connection."""
        return cls(WeightNormConv2d(channels, channels), nn.Identity(), channels)

    @classmethod
    def downsampling(cls, inputs: int, outputs: int) -> ResidualBlock:
        """Return a block that halves height and width, rounded up."""
        first, skip = (WeightNormConv2d(inputs, outputs, stride=2) for _ in range(2))
        return cls(first, skip, outputs)

    @classmethod
    def upsampling(cls, inputs: int, outputs: int, size: tuple[int, int]) -> ResidualBlock:
        """Return a block that doubles height and width, cropped to ``size``."""
        first, skip = (UpsampleConv2d(inputs, outputs, size) for _ in range(2))
        return cls(first, skip, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(F.elu(self.first(F.elu(x))))
        return self.skip(x) + RESIDUAL_SCALE * h
