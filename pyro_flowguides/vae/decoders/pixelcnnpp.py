"""PixelCNN++: whole-pixel conditioning, gated residual blocks, and several resolutions with shortcuts."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.vae.decoders.autoregressive_decoder import ContextProjection
from pyro_flowguides.vae.decoders.causal_conv import WeightNormMaskedConv2d, WeightNormPaddedConv2d, shift_down
from pyro_flowguides.vae.decoders.image_networks import MapRegion, TwoStackNetwork
from pyro_flowguides.vae.networks.resnet import RESIDUAL_SCALE

__all__ = ["PixelCNNPlusPlus"]

#: Names the features after a block: level, "down" or "up", number of the block.
BlockName: TypeAlias = tuple[int, str, int]
#: The features of a stack after every block.
StackFeatures: TypeAlias = dict[BlockName, Tensor]
#: From channels in and out, and options, to the convolution of a stack.
MakeConv: TypeAlias = Callable[..., WeightNormPaddedConv2d]


def _both_signs(h: Tensor) -> Tensor:
    return F.elu(torch.cat([h, -h], 1))


class _Block(nn.Module):
    """A gated residual block of two convolutions; ``side_channels`` more channels enter through a 1×1 convolution."""

    def __init__(
        self, make_conv: MakeConv, filters: int, context: tuple[int, int], dropout: float, side_channels: int, pool: int
    ) -> None:
        super().__init__()
        self.first = make_conv(2 * filters, filters)
        self.second = make_conv(2 * filters, 2 * filters, init_scale=RESIDUAL_SCALE)
        self.side = WeightNormPaddedConv2d(2 * side_channels, filters) if side_channels else None
        self.context_projection = ContextProjection(*context, 2 * filters, pool=pool)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, h: Tensor, sides: Sequence[Tensor], region: MapRegion) -> Tensor:
        inner = region.apply(self.first, _both_signs(h))
        if self.side is not None:
            inner = inner + region.apply(self.side, _both_signs(torch.cat(list(sides), 1)))
        inner = region.apply(self.second, self.dropout(_both_signs(inner))) + region.context(self.context_projection)
        signal, gate = inner.chunk(2, 1)
        return h + signal * gate.sigmoid()


class _Level(nn.Module):
    """One resolution of one stack: blocks, the next lower resolution, and the same number of blocks with shortcuts."""

    def __init__(
        self,
        make_conv: MakeConv,
        make_block: Callable[[int, int], _Block],
        filters: int,
        blocks: int,
        levels: int,
        side_channels: int,
        level: int = 0,
    ) -> None:
        super().__init__()
        self.level, self.inner = level, None
        self.down = nn.ModuleList(make_block(side_channels, 2**level) for _ in range(blocks))
        self.up = nn.ModuleList(make_block(side_channels + filters, 2**level) for _ in range(blocks))
        if levels > 1:
            self.shrink = make_conv(filters, filters, stride=2)
            self.inner = _Level(make_conv, make_block, filters, blocks, levels - 1, side_channels, level + 1)
            self.grow = WeightNormPaddedConv2d(filters, 4 * filters)

    def forward(self, h: Tensor, region: MapRegion, own: StackFeatures, other: StackFeatures) -> Tensor:
        """Return the features after the last block, and write those after every block to ``own``.

        ``other`` holds the features of the stack that this one reads, if any.
        """

        def run(block: nn.Module, name: BlockName, h: Tensor, *shortcuts: Tensor) -> Tensor:
            sides = [region.crop(other[name])] if name in other else []
            own[name] = block(h, [*sides, *shortcuts], region)
            return own[name]

        for number, block in enumerate(self.down):
            h = run(block, (self.level, "down", number), h)
        if self.inner is not None:
            inner = partial(self.inner, own=own, other=other)
            h = h + region.at_half_resolution(self.shrink, self.grow, h, inner)
        for number, block in enumerate(self.up):
            h = run(block, (self.level, "up", number), h, own[self.level, "down", len(self.down) - 1 - number])
        return h


class PixelCNNPlusPlus(TwoStackNetwork[StackFeatures]):
    r"""PixelCNN++: gated residual blocks in two stacks, at several resolutions.

    The vertical stack reads the rows above; the horizontal stack reads earlier pixels and, in every block, the vertical
    stack. A block adds :math:`a \odot \sigma(b)` to its input, where (a, b) come from two convolutions of
    :math:`\mathrm{elu}([h, -h])` with dropout between them, and from the context. At every resolution half of the
    blocks come before the lower resolution and half after it; the latter read the features of the former through
    shortcuts. Downsampling is a convolution of stride 2 whose output is at the pixels (2i, 2j). Upsampling is a linear
    map from every low-resolution pixel to four pixels, added to the features at that resolution.

    All channels of a pixel are drawn from the same parameters (whole-pixel conditioning); use it with
    :class:`~pyro_flowguides.vae.PixelLogisticMixture`. Convolutions are weight-normalized: within
    :func:`data_dependent_initialization`, a pass over data gives their outputs mean 0 and standard deviation 1, or 0.1
    for the residual of a block.

    With one level a pixel reads the rows from i − 3 − 4 ``blocks`` to i; every further level adds more at half the
    resolution.

    Cost: that of :class:`AutoregressiveNetwork`. :meth:`generate` evaluates the vertical stack once per row, the
    horizontal stack once per pixel, and a resolution 2^k times lower only at every 2^k-th row and pixel.

    Args:
        shape: ``(channels, height, width)``; height and width divisible by ``2**(levels - 1)``.
        filters: channels of the hidden layers.
        blocks: number of blocks before, and again after, the lower resolutions.
        levels: number of resolutions.
        dropout: probability of dropping a channel inside a block in training.

    The arguments ``features``, ``maps`` and the shapes are those of :class:`AutoregressiveNetwork`. Lower resolutions
    read averages of the maps.

    References:
        T. Salimans, A. Karpathy, X. Chen, D. Kingma (2017). PixelCNN++. arXiv:1701.05517.
        T. Salimans, D. Kingma (2016). Weight normalization. arXiv:1602.07868.
        P. Ramachandran et al. (2017). Fast generation for convolutional autoregressive models. arXiv:1704.06001.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import PixelCNNPlusPlus
        >>> net = PixelCNNPlusPlus((3, 8, 8), outputs=20, filters=8, blocks=1, levels=2, features=5)
        >>> net(torch.zeros(2, 3, 8, 8), features=torch.randn(2, 5)).shape
        torch.Size([2, 20, 8, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        *,
        filters: int = 64,
        blocks: int = 2,
        levels: int = 3,
        dropout: float = 0.5,
        **options: int,
    ) -> None:
        super().__init__(shape, outputs, groups=1, **options)
        if blocks < 1 or levels < 1 or any(side % 2 ** (levels - 1) for side in shape[1:]):
            raise ValueError(
                f"PixelCNNPlusPlus: need blocks, levels >= 1 and sides divisible by 2**(levels - 1), "
                f"got {blocks} blocks, {levels} levels for an image of {tuple(shape[1:])}"
            )
        # Features of the vertical stack depend only on rows strictly above, so that its kernels may reach to the right.
        vertical_conv = partial(WeightNormPaddedConv2d, above=1, left=1, right=1)
        horizontal_conv = partial(WeightNormPaddedConv2d, above=1, left=1)
        self.first_above = WeightNormPaddedConv2d(shape[0], filters, 1, 1, 1)
        self.first_left = WeightNormMaskedConv2d(shape[0], filters, 1, 1, 1, strict=True)
        block, sizes = (filters, (self.features, self.maps), dropout), (filters, blocks, levels)
        self.vertical_stack = _Level(vertical_conv, partial(_Block, vertical_conv, *block), *sizes, 0)
        self.horizontal_stack = _Level(horizontal_conv, partial(_Block, horizontal_conv, *block), *sizes, filters)
        self.last = WeightNormPaddedConv2d(filters, outputs)

    def vertical(self, x: Tensor, region: MapRegion) -> StackFeatures:
        features: StackFeatures = {}
        self.vertical_stack(region.apply_to_map(self.first_above, shift_down(x)), region, features, {})
        return features

    def horizontal(self, x: Tensor, above: StackFeatures, region: MapRegion) -> Tensor:
        h = self.horizontal_stack(region.apply_to_map(self.first_left, x), region, {}, above)
        return region.apply(self.last, F.elu(h))
