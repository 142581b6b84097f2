"""Gated PixelCNN: a vertical and a horizontal stack, without blind spot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.vae.decoders.autoregressive_network import AutoregressiveNetwork, Canvas, ContextProjection, Draw
from pyro_flowguides.vae.decoders.causal_conv import (
    CachedWindow,
    FullMap,
    MaskedConv2d,
    PaddedConv2d,
    shift_down,
    spread,
)

__all__ = ["GatedPixelCNN"]


def _gate(h: Tensor) -> Tensor:
    signal, gate = h.chunk(2, 1)
    return signal.tanh() * gate.sigmoid()


class _Layer(nn.Module):
    """One gated layer of both stacks; the first reads the image, the others features."""

    def __init__(
        self, channels: int, filters: int, reach: int, features: int, maps: int, groups: int, *, first: bool
    ) -> None:
        super().__init__()
        # The first layer sees the image shifted down by one row: of its rows, one less is above.
        self.down = PaddedConv2d(channels, 2 * filters, reach - first, reach, reach)
        self.across = MaskedConv2d(channels, 2 * filters, 0, reach, groups=groups, strict=first)
        self.between = nn.Conv2d(2 * filters, 2 * filters, 1)
        self.mix = MaskedConv2d(filters, filters, groups=groups)
        self.given_above = None if first else ContextProjection(features, maps, 2 * channels)
        self.given = ContextProjection(features, maps, 2 * filters)

    def vertical(self, v: Tensor, place: FullMap | CachedWindow) -> Tensor:
        """The vertical stack after this layer, before its gate; the first layer reads the image itself."""
        if self.given_above is None:
            return place.read(self.down, v)
        return place.conv(self.down, _gate(v + place.context(self.given_above)))

    def horizontal(self, h: Tensor, seen: Tensor, place: FullMap | CachedWindow) -> Tensor:
        """The residual of the horizontal stack."""
        across = (place.read if self.given_above is None else place.conv)(self.across, h)
        return place.conv(self.mix, _gate(across + place.crop(seen) + place.context(self.given)))


class GatedPixelCNN(AutoregressiveNetwork):
    r"""Gated PixelCNN: convolutions with multiplicative gates in two stacks.

    .. math::
        y = \tanh(W_f * x + V_f c) \odot \sigma(W_g * x + V_g c)

    The vertical stack v sees the rows strictly above and all their columns, the horizontal stack h the current row to
    the left and, through a 1×1 convolution in every layer, v: together all earlier pixels in reach. h is residual.

    A pixel (i, j) sees exactly the rows i − reach … i − 1 at the columns j − reach … j + reach, and j − reach … j − 1
    of row i: no blind spot. ``reach`` is shared out over ``depth`` layers as evenly as possible.

    Cost: one pass for the density. :meth:`generate` evaluates the vertical stack once per row, for the whole row, and
    the horizontal stack once per pixel (once per channel with ``groups``) from cached maps: about the arithmetic of one
    pass for a whole image.

    Args:
        shape: ``(channels, height, width)``.
        outputs: numbers per pixel.
        filters: channels of the hidden layers, a multiple of ``groups``.
        reach: how far a pixel sees.
        depth: number of gated layers.
        features: global features, read by every layer.
        maps: maps as large as the image, read by every layer.
        groups: see :class:`AutoregressiveNetwork`.

    Shapes:
        x ``(B, *shape)`` -> ``(B, outputs, height, width)``.

    References:
        A. van den Oord, N. Kalchbrenner, O. Vinyals, L. Espeholt, A. Graves, K. Kavukcuoglu (2016). Conditional image
        generation with PixelCNN decoders. arXiv:1606.05328.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.decoders import GatedPixelCNN
        >>> net = GatedPixelCNN((3, 8, 8), outputs=3 * 256, filters=12, reach=3, depth=2, features=5, groups=3)
        >>> net(torch.zeros(2, 3, 8, 8), features=torch.randn(2, 5)).shape
        torch.Size([2, 768, 8, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        *,
        filters: int = 36,
        reach: int = 6,
        depth: int = 6,
        features: int = 0,
        maps: int = 0,
        groups: int = 1,
    ) -> None:
        super().__init__(shape, outputs, features, maps, groups)
        self._check_width("filters", filters)
        self.reach = reach
        self.layers: Any = nn.ModuleList(
            _Layer(shape[0] if i == 0 else filters, filters, each, features, maps, groups, first=i == 0)
            for i, each in enumerate(spread(reach, depth))
        )
        self.hidden = MaskedConv2d(filters, filters, groups=groups)
        self.last = MaskedConv2d(filters, outputs, groups=groups)

    def _vertical(self, x: Tensor, place: FullMap | CachedWindow) -> list[Tensor]:
        """What the horizontal stack reads of the vertical one, by layer."""
        v, seen = shift_down(x), []
        for layer in self.layers:
            v = layer.vertical(v, place)
            seen.append(layer.between(v))
        return seen

    def _horizontal(self, x: Tensor, seen: list[Tensor], place: FullMap | CachedWindow) -> Tensor:
        h = self.layers[0].horizontal(x, seen[0], place)
        for layer, read in zip(list(self.layers)[1:], seen[1:], strict=True):
            h = h + layer.horizontal(h, read, place)
        return place.conv(self.last, F.relu(place.conv(self.hidden, F.relu(h))))

    def evaluate(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Tensor:
        everywhere = FullMap(contexts)
        return self._horizontal(x, self._vertical(x, everywhere), everywhere)

    def _fill(self, canvas: Canvas, draw: Draw, contexts: dict[nn.Module, Tensor]) -> None:
        size, (height, width) = len(canvas.values), self.shape[1:]
        whole_row, pixel = CachedWindow(size, height, width, contexts), CachedWindow(size, height, width, contexts)
        for row in range(height):
            seen = self._vertical(canvas.inputs, whole_row.move(row, 0, width))
            for column in range(width):
                pixel.move(row, column, column + 1)
                for step in self.steps_at((row, column)):
                    canvas.put(step, draw(self._horizontal(canvas.inputs, seen, pixel)[..., 0, 0]))
