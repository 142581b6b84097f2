"""PixelCNN++: whole-pixel conditioning, residual gated blocks, down- and up-sampling with short-cuts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.vae.decoders.autoregressive_network import AutoregressiveNetwork, Canvas, ContextProjection, Draw
from pyro_flowguides.vae.decoders.causal_conv import (
    CachedWindow,
    FullMap,
    PaddedConv2d,
    WeightNormMaskedConv2d,
    WeightNormPaddedConv2d,
    shift_down,
)

__all__ = ["PixelCNNPlusPlus"]

#: The features of the vertical stack after every block, by resolution, pass and number.
Seen: TypeAlias = dict[tuple[int, str, int], Tensor]
Convolution: TypeAlias = Callable[..., PaddedConv2d]
#: Deviation of what a block adds, after the data-dependent initialization.
RESIDUAL_SCALE = 0.1


def _both_signs(h: Tensor) -> Tensor:
    return F.elu(torch.cat([h, -h], 1))


def _rows_above(in_channels: int, out_channels: int, stride: int = 1, *, init_scale: float = 1.0) -> PaddedConv2d:
    """The convolution of the vertical stack, whose features see only rows strictly above theirs."""
    return WeightNormPaddedConv2d(in_channels, out_channels, 1, 1, 1, stride, init_scale=init_scale)


def _above_and_left(in_channels: int, out_channels: int, stride: int = 1, *, init_scale: float = 1.0) -> PaddedConv2d:
    """The convolution of the horizontal stack, whose features see only earlier pixels."""
    return WeightNormPaddedConv2d(in_channels, out_channels, 1, 1, 0, stride, init_scale=init_scale)


class _Block(nn.Module):
    """A residual block with two convolutions and a gate; ``sides`` channels enter through a 1×1 convolution."""

    def __init__(
        self, conv: Convolution, filters: int, sides: int, given: Callable[[int], ContextProjection], dropout: float
    ) -> None:
        super().__init__()
        self.first = conv(2 * filters, filters)
        self.second = conv(2 * filters, 2 * filters, init_scale=RESIDUAL_SCALE)
        self.side = WeightNormPaddedConv2d(2 * sides, filters) if sides else None
        self.given = given(2 * filters)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, h: Tensor, sides: Sequence[Tensor], place: FullMap | CachedWindow) -> Tensor:
        inner = place.conv(self.first, _both_signs(h))
        if self.side is not None:
            inner = inner + place.conv(self.side, _both_signs(torch.cat(list(sides), 1)))
        inner = place.conv(self.second, self.dropout(_both_signs(inner))) + place.context(self.given)
        signal, gate = inner.chunk(2, 1)
        return h + signal * gate.sigmoid()


class _Level(nn.Module):
    """One resolution of one stack: blocks, the next lower resolution, and as many blocks that read short-cuts."""

    def __init__(
        self,
        conv: Convolution,
        filters: int,
        blocks: int,
        levels: int,
        seen: int,
        given: tuple[int, int],
        dropout: float,
        depth: int = 0,
    ) -> None:
        super().__init__()
        self.depth, self.inner = depth, None

        def projection(width: int) -> ContextProjection:
            return ContextProjection(*given, width, pool=2**depth)

        self.down = nn.ModuleList(_Block(conv, filters, seen, projection, dropout) for _ in range(blocks))
        self.up = nn.ModuleList(_Block(conv, filters, seen + filters, projection, dropout) for _ in range(blocks))
        if levels > 1:
            self.shrink = conv(filters, filters, 2)
            self.inner = _Level(conv, filters, blocks, levels - 1, seen, given, dropout, depth + 1)
            self.grow = WeightNormPaddedConv2d(filters, 4 * filters)

    def forward(self, h: Tensor, read: Mapping[tuple[int, str, int], Tensor], place: FullMap | CachedWindow) -> Seen:
        """All features by name; the last ones are named ``(depth, "up", blocks - 1)``. ``read``: the other stack's."""
        seen: Seen = {}
        for number, block in enumerate(self.down):
            h = seen[self.depth, "down", number] = block(h, self._sides(read, "down", number, place), place)
        if self.inner is not None:
            h = h + self._lower(h, read, place, seen)
        for number, block in enumerate(self.up):
            shortcut = seen[self.depth, "down", len(self.down) - 1 - number]
            sides = [*self._sides(read, "up", number, place), shortcut]
            h = seen[self.depth, "up", number] = block(h, sides, place)
        return seen

    def _sides(self, read: Mapping, phase: str, number: int, place: FullMap | CachedWindow) -> list[Tensor]:
        key = (self.depth, phase, number)
        return [place.crop(read[key])] if key in read else []

    def _lower(self, h: Tensor, read: Mapping, place: FullMap | CachedWindow, seen: Seen) -> Tensor:
        """What the lower resolution gives back, computed where it has a new pixel and remembered elsewhere."""
        assert self.inner is not None
        fine, low = None, place.shrink(self.shrink, h)
        if low is not None:
            coarse = place.coarse
            seen.update(self.inner(low, read, coarse))
            fine = F.pixel_shuffle(coarse.conv(self.grow, seen[self.inner.name_of_last()]), 2)
        return place.grown(self.grow, fine)

    def name_of_last(self) -> tuple[int, str, int]:
        return self.depth, "up", len(self.up) - 1


class PixelCNNPlusPlus(AutoregressiveNetwork):
    r"""PixelCNN++: residual gated blocks in two stacks, at several resolutions.

    The vertical stack sees the rows above, the horizontal one earlier pixels and, in every block, the vertical stack.
    A block adds :math:`a \odot \sigma(b)` to its input, with (a, b) from two convolutions of
    :math:`\mathrm{elu}([h, -h])`, dropout between them, and the context. At every resolution half of the blocks come
    before the lower resolution and half after; the latter read the features of the former through short-cuts.
    Down-sampling is a convolution of stride 2, which a causal pixel (2i, 2j) feeds; up-sampling gives every low pixel
    four high ones by a linear map, added to what was there before.

    All channels of a pixel come from the same numbers (whole-pixel conditioning):
    :class:`~pyro_flowguides.vae.PixelLogisticMixture` is the likelihood that goes with it. Convolutions are weight
    normalized: within :func:`data_dependent_initialization` a pass over data starts their outputs at mean 0 and
    deviation 1, or 0.1 for what a block adds.

    With one level a pixel sees the rows from i − 3 − 4 ``blocks`` to i; every further level adds more at half the
    resolution.

    Cost: one pass for the density. :meth:`generate` evaluates the vertical stack once per row, the horizontal one once
    per pixel from cached maps, and a resolution 2^k times lower only at every 2^k-th row and pixel: about the
    arithmetic of one pass for a whole image.

    Args:
        shape: ``(channels, height, width)``; height and width divisible by ``2**(levels - 1)``.
        outputs: numbers per pixel.
        filters: channels of the hidden layers.
        blocks: blocks before, and again after, the lower resolutions.
        levels: number of resolutions.
        dropout: probability with which a channel inside a block is dropped in training.
        features: global features, read by every block.
        maps: maps as large as the image, read by every block (averaged at lower resolutions).

    Shapes:
        x ``(B, *shape)`` -> ``(B, outputs, height, width)``.

    Raises:
        ValueError: if the image cannot be halved ``levels - 1`` times.

    References:
        T. Salimans, A. Karpathy, X. Chen, D. Kingma (2017). PixelCNN++. arXiv:1701.05517.
        T. Salimans, D. Kingma (2016). Weight normalization. arXiv:1602.07868.
        P. Ramachandran et al. (2017). Fast generation for convolutional autoregressive models. arXiv:1704.06001.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.decoders import PixelCNNPlusPlus
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
        features: int = 0,
        maps: int = 0,
    ) -> None:
        super().__init__(shape, outputs, features, maps, groups=1)
        if blocks < 1 or levels < 1 or any(side % 2 ** (levels - 1) for side in shape[1:]):
            raise ValueError(
                f"PixelCNNPlusPlus: need blocks, levels >= 1 and sides divisible by 2**(levels - 1), "
                f"got {blocks} blocks, {levels} levels for an image of {tuple(shape[1:])}"
            )
        sizes, given = (filters, blocks, levels), (features, maps)
        self.first_above = WeightNormPaddedConv2d(shape[0], filters, 1, 1, 1)
        self.first_left = WeightNormMaskedConv2d(shape[0], filters, 1, 1, 1, strict=True)
        self.vertical = _Level(_rows_above, *sizes, 0, given, dropout)
        self.horizontal = _Level(_above_and_left, *sizes, filters, given, dropout)
        self.last = WeightNormPaddedConv2d(filters, outputs)

    def _across(self, x: Tensor, seen: Seen, place: FullMap | CachedWindow) -> Tensor:
        features = self.horizontal(place.read(self.first_left, x), seen, place)
        return place.conv(self.last, F.elu(features[self.horizontal.name_of_last()]))

    def _above(self, x: Tensor, place: FullMap | CachedWindow) -> Seen:
        return self.vertical(place.read(self.first_above, shift_down(x)), {}, place)

    def evaluate(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Tensor:
        everywhere = FullMap(contexts)
        return self._across(x, self._above(x, everywhere), everywhere)

    def _fill(self, canvas: Canvas, draw: Draw, contexts: dict[nn.Module, Tensor]) -> None:
        size, (height, width) = len(canvas.values), self.shape[1:]
        whole_row, pixel = CachedWindow(size, height, width, contexts), CachedWindow(size, height, width, contexts)
        for row in range(height):
            seen = self._above(canvas.inputs, whole_row.move(row, 0, width))
            for column in range(width):
                numbers = self._across(canvas.inputs, seen, pixel.move(row, column, column + 1))
                canvas.put((slice(None), (row, column)), draw(numbers[..., 0, 0]))
