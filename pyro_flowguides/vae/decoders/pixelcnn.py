"""A small PixelCNN: masked convolutions in residual blocks, for decoders that may see a small window only."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.vae.decoders.autoregressive_network import AutoregressiveNetwork, Canvas, ContextProjection, Draw
from pyro_flowguides.vae.decoders.causal_conv import CachedWindow, FullMap, MaskedConv2d, spread

__all__ = ["PixelCNN"]


class _Block(nn.Module):
    def __init__(self, filters: int, reach: int, groups: int) -> None:
        super().__init__()
        self.conv = MaskedConv2d(filters, filters, reach, reach, reach, groups=groups)
        self.mix = MaskedConv2d(filters, filters, groups=groups)

    def forward(self, h: Tensor, place: FullMap | CachedWindow) -> Tensor:
        return h + place.conv(self.mix, F.elu(place.conv(self.conv, F.elu(h))))


class PixelCNN(AutoregressiveNetwork):
    r"""Masked convolutions in residual blocks: the decoder of the variational lossy autoencoder.

    .. math::
        h_1 = A(x) + C(c), \qquad h_{l+1} = h_l + B'_l\, \mathrm{elu}(B_l\, \mathrm{elu}(h_l)), \qquad
        \theta = B\, \mathrm{elu}(h_L)

    with mask A in the first layer, mask B in the others, and the context c = (features, maps) read in the first layer,
    the maps by a convolution as wide as that of the image, as if they were concatenated with it.

    ``reach`` is shared out over ``depth`` layers: with the default, six masked 3×3 convolutions followed by four 1×1
    blocks. A pixel (i, j) sees, of row i, the columns j − reach … j − 1, and of row i − d the columns
    j − reach … j + d, for d = 1 … reach; what lies further to the right is the blind spot of masked convolutions (see
    :class:`GatedPixelCNN` for none).

    Cost: one pass for the density. :meth:`generate` visits every pixel once (once per channel with ``groups``) and
    evaluates every kernel there from cached maps: a few small matrix products per layer and pixel, about the arithmetic
    of one pass for a whole image, and O(depth · filters · H · W) memory per image.

    Args:
        shape: ``(channels, height, width)``.
        outputs: numbers per pixel.
        filters: channels of the hidden layers, a multiple of ``groups``.
        reach: total reach, in pixels.
        depth: number of layers.
        features, maps, groups: see :class:`AutoregressiveNetwork`.

    Shapes:
        x ``(B, *shape)`` -> ``(B, outputs, height, width)``.

    References:
        X. Chen et al. (2017). Variational lossy autoencoder. arXiv:1611.02731.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.decoders import PixelCNN
        >>> net = PixelCNN((1, 8, 8), outputs=1, reach=2, depth=3, maps=4)
        >>> net(torch.zeros(5, 1, 8, 8), maps=torch.randn(5, 4, 8, 8)).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        *,
        filters: int = 12,
        reach: int = 6,
        depth: int = 10,
        features: int = 0,
        maps: int = 0,
        groups: int = 1,
    ) -> None:
        super().__init__(shape, outputs, features, maps, groups)
        first, *others = spread(reach, depth)
        self.reach = reach
        self.first = MaskedConv2d(shape[0], filters, first, first, first, groups=groups, strict=True)
        self.given = ContextProjection(features, maps, filters, reach=first)
        self.blocks = nn.ModuleList(_Block(filters, each, groups) for each in others)
        self.last = MaskedConv2d(filters, outputs, groups=groups)

    def _at(self, x: Tensor, place: FullMap | CachedWindow) -> Tensor:
        h = place.read(self.first, x) + place.context(self.given)
        for block in self.blocks:
            h = block(h, place)
        return place.conv(self.last, F.elu(h))

    def evaluate(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Tensor:
        return self._at(x, FullMap(contexts))

    def _fill(self, canvas: Canvas, draw: Draw, contexts: dict[nn.Module, Tensor]) -> None:
        _, height, width = self.shape
        pixel = CachedWindow(len(canvas.values), height, width, contexts)
        for step in self.steps():
            _, (row, column) = step
            pixel.move(row, column, column + 1)
            canvas.put(step, draw(self._at(canvas.inputs, pixel)[..., 0, 0]))
