"""Causal convolutions, masked or padded, with and without weight normalization."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.nn.arguments import check_count
from pyro_flowguides.vae.networks.weight_norm import WeightNorm

__all__ = ["MaskedConv2d", "PaddedConv2d", "WeightNormMaskedConv2d", "WeightNormPaddedConv2d"]
__all__ += ["shift_down", "split_reach"]


def split_reach(owner: str, reach: int, depth: int) -> list[int]:
    """Split a total reach over the layers as evenly as possible, with the larger shares first.

    Example:
        >>> from pyro_flowguides.vae.decoders.causal_conv import split_reach
        >>> split_reach("PixelCNN", 6, 10), split_reach("PixelCNN", 8, 3)
        ([1, 1, 1, 1, 1, 1, 0, 0, 0, 0], [3, 3, 2])
    """
    check_count(owner, "reach", reach, 0)
    check_count(owner, "depth", depth, 0)
    if reach < 1 or depth < 1:
        raise ValueError(f"{owner}: reach and depth must be at least 1, got reach {reach}, depth {depth}")
    return [reach // depth + (layer < reach % depth) for layer in range(depth)]


def shift_down(x: Tensor) -> Tensor:
    """Replace every row by the row above it, and the first row by zeros."""
    return F.pad(x, (0, 0, 1, -1))


class PaddedConv2d(nn.Conv2d):
    """A convolution that reads the current row and those above it, and columns to the left and the right.

    It is causal in two cases: on features that depend only on rows strictly above their own, where it may read all
    columns; and with ``right=0`` on features that depend only on earlier pixels.

    Args:
        in_channels, out_channels: numbers of channels.
        above, left, right: numbers of rows above the current pixel, and of columns to its left and right, that the
            kernel covers.
        stride: of the output, in both directions.

    Shapes:
        ``(B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride))``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, above: int = 0, left: int = 0, right: int = 0, stride: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, (above + 1, left + 1 + right), stride=stride)
        self.above, self.left, self.right = above, left, right

    def effective_weight(self) -> Tensor:
        """Return the weight that the layer applies."""
        return self.weight

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the layer with the given weight and bias."""
        padded = F.pad(x, (self.left, self.right, self.above, 0))
        return F.conv2d(padded, weight, bias, self.stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_weight(x, self.effective_weight(), self.bias)


class MaskedConv2d(PaddedConv2d):
    r"""A convolution that reads only earlier pixels in raster order and, at the current pixel, the channels of a mask.

    It reads the rows above from ``left`` to ``right``, and the current row from ``left`` up to the current pixel.
    Channel k belongs to group :math:`k \bmod G`. At the current pixel an output of group g reads inputs of

    .. math:: \text{groups} < g \ \text{(strict: mask A)} \qquad \text{or} \qquad \text{groups} \le g \ \text{(mask B)}

    With one group, mask A excludes the current pixel and mask B includes it.

    Args:
        in_channels, out_channels: numbers of channels.
        above, left, right: the size of the kernel, as for :class:`PaddedConv2d`.
        groups: G, either 1 or the number of channels of the image.
        strict: use mask A, for the layer that reads the image itself.

    Shapes:
        ``(B, in_channels, H, W) -> (B, out_channels, H, W)``.

    References:
        A. van den Oord, N. Kalchbrenner, K. Kavukcuoglu (2016). Pixel recurrent neural networks. arXiv:1601.06759.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import MaskedConv2d
        >>> layer = MaskedConv2d(1, 1, above=1, left=1, right=1, strict=True)
        >>> layer.mask[0, 0].int()
        tensor([[1, 1, 1],
                [1, 0, 0]], dtype=torch.int32)
    """

    mask: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        above: int = 0,
        left: int = 0,
        right: int = 0,
        *,
        groups: int = 1,
        strict: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, above, left, right)
        mask = torch.ones_like(self.weight, dtype=torch.bool)
        output_groups = torch.arange(out_channels)[:, None] % groups
        input_groups = torch.arange(in_channels) % groups
        mask[:, :, -1, left] = input_groups < output_groups if strict else input_groups <= output_groups
        mask[:, :, -1, left + 1 :] = False
        self.register_buffer("mask", mask)

    def effective_weight(self) -> Tensor:
        return self.weight * self.mask


class WeightNormPaddedConv2d(WeightNorm, PaddedConv2d):
    """:class:`PaddedConv2d` with weight normalization."""

    bias: nn.Parameter


class WeightNormMaskedConv2d(WeightNorm, MaskedConv2d):
    """:class:`MaskedConv2d` with weight normalization of the masked filters."""

    bias: nn.Parameter
    unnormalized_weight = MaskedConv2d.effective_weight
