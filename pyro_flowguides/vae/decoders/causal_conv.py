"""Masked convolutions, and their evaluation on a whole map at once or, from caches, at one row or pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.vae.networks.weight_norm import _WeightNorm

__all__ = [
    "CachedWindow",
    "FullMap",
    "MaskedConv2d",
    "PaddedConv2d",
    "WeightNormMaskedConv2d",
    "WeightNormPaddedConv2d",
    "shift_down",
    "spread",
]


def spread(reach: int, depth: int) -> list[int]:
    """A total reach shared out over layers as evenly as possible, the first layers getting more.

    Example:
        >>> from pyro_flowguides.vae.decoders.causal_conv import spread
        >>> spread(6, 10), spread(8, 3)
        ([1, 1, 1, 1, 1, 1, 0, 0, 0, 0], [3, 3, 2])
    """
    if reach < 1 or depth < 1:
        raise ValueError(f"reach and depth must be at least 1, got reach {reach}, depth {depth}")
    return [reach // depth + (layer < reach % depth) for layer in range(depth)]


def shift_down(x: Tensor) -> Tensor:
    """Every row replaced by the row above it, the first by zeros."""
    return F.pad(x, (0, 0, 1, -1))


class PaddedConv2d(nn.Conv2d):
    """A convolution of the rows from ``above`` to the current one and the columns from ``left`` to ``right`` of it.

    Causal on features that see only rows strictly above theirs (all columns may then be read), or with ``right=0`` on
    features that see only earlier pixels.

    Args:
        in_channels, out_channels: numbers of channels.
        above, left, right: rows above and columns to the left and the right that are read, besides the current.
        stride: of the output, in both directions.

    Shapes:
        ``(B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride))``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, above: int = 0, left: int = 0, right: int = 0, stride: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, (above + 1, left + 1 + right), stride=stride)
        self.above, self.left, self.right = above, left, right

    def folded(self) -> Tensor:
        """The weight, ready for use."""
        return self.weight

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer for the given weight and bias."""
        padded = F.pad(x, (self.left, self.right, self.above, 0))
        return F.conv2d(padded, weight, bias, self.stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_weight(x, self.folded(), self.bias)


class MaskedConv2d(PaddedConv2d):
    r"""A convolution that reads earlier pixels in raster order and, of the current one, what its mask lets through.

    Rows above are read from ``left`` to ``right``, the current row from ``left`` up to the current pixel. Channel k
    belongs to group :math:`k \bmod G`; at the current pixel an output of group g reads inputs of

    .. math:: \text{groups} < g \ \text{(strict: mask A)} \qquad \text{or} \qquad \text{groups} \le g \ \text{(mask B)}

    With one group, strict means that the current pixel is not read, the other that it is.

    Args:
        in_channels, out_channels: numbers of channels.
        above, left, right: what is read, as in :class:`PaddedConv2d`.
        groups: G, 1 or the number of channels of the image.
        strict: mask A, for the layer that reads the image itself.

    Shapes:
        ``(B, in_channels, H, W) -> (B, out_channels, H, W)``.

    References:
        A. van den Oord, N. Kalchbrenner, K. Kavukcuoglu (2016). Pixel recurrent neural networks. arXiv:1601.06759.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.decoders import MaskedConv2d
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
        readers, read = torch.arange(out_channels)[:, None] % groups, torch.arange(in_channels) % groups
        mask[:, :, -1, left] = read < readers if strict else read <= readers
        mask[:, :, -1, left + 1 :] = False
        self.register_buffer("mask", mask)

    def folded(self) -> Tensor:
        return self.weight * self.mask


class _Normalized(_WeightNorm):
    """Weight normalization of the filters that a causal convolution applies, after its mask.

    Args:
        *args, **options: those of the convolution.
        init_scale: standard deviation of the outputs after the data-dependent initialization.
    """

    def __init__(self, *args: Any, init_scale: float = 1.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self._add_gain(init_scale)

    def _direction(self) -> Tensor:
        return super().folded()  # type: ignore[misc]  # that of the convolution

    def folded(self) -> Tensor:
        return self.normalized_weight()

    def _over_all_but_channels(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y.mean((0, 2, 3)), y.std((0, 2, 3))


class WeightNormPaddedConv2d(_Normalized, PaddedConv2d):
    """:class:`PaddedConv2d` with weight normalization."""


class WeightNormMaskedConv2d(_Normalized, MaskedConv2d):
    """:class:`MaskedConv2d` with weight normalization."""


class FullMap:
    """Layers evaluated on whole maps.

    :class:`CachedWindow` has the same methods and evaluates the same layers at one place, so that a network is written once.

    Args:
        contexts: what each :class:`~pyro_flowguides.vae.decoders.autoregressive_network.ContextProjection` gave.
    """

    def __init__(self, contexts: Mapping[nn.Module, Tensor]) -> None:
        self.contexts = contexts

    @property
    def coarse(self) -> FullMap:
        """The same for maps of half the resolution."""
        return self

    def context(self, projection: nn.Module) -> Tensor:
        return self.contexts[projection]

    def crop(self, h: Tensor) -> Tensor:
        """The part of a known map."""
        return h

    def read(self, layer: PaddedConv2d, x: Tensor) -> Tensor:
        """A layer on a map that is known as far as the layer reads it."""
        return layer(x)

    def conv(self, layer: PaddedConv2d, h: Tensor) -> Tensor:
        """A layer on features."""
        return layer(h)

    def shrink(self, layer: PaddedConv2d, h: Tensor) -> Tensor | None:
        """A layer of stride 2 on features."""
        return layer(h)

    def grown(self, layer: nn.Module, fine: Tensor | None) -> Tensor:
        """The features that came back from half the resolution."""
        assert fine is not None
        return fine


class CachedWindow:
    """Layers evaluated at one row, or one pixel of it, everything before having been visited.

    Each layer's input is kept as a map, one place is added per visit, and the layer is evaluated there only: the work
    per pixel is one application of every kernel, whatever the size of the image. Between two visits of
    :meth:`shrink`'s half resolution its features are kept.

    Args:
        size: B.
        height, width: of the maps.
        contexts: as for :class:`FullMap`, whole maps.
    """

    def __init__(self, size: int, height: int, width: int, contexts: Mapping[nn.Module, Tensor]) -> None:
        self.size, self.height, self.width, self.contexts = size, height, width, contexts
        self.maps: dict[nn.Module, Tensor] = {}
        self.weights: dict[nn.Module, Tensor] = {}
        self._coarse: CachedWindow | None = None
        self.move(0, 0, width)

    def move(self, row: int, start: int, stop: int) -> CachedWindow:
        """Go to a row and its columns ``start`` up to ``stop``."""
        self.row, self.start, self.stop = row, start, stop
        return self

    @property
    def coarse(self) -> CachedWindow:
        if self._coarse is None:
            self._coarse = CachedWindow(self.size, self.height // 2, self.width // 2, self.contexts)
        return self._coarse.move(self.row // 2, self.start // 2, (self.stop + 1) // 2)

    def context(self, projection: nn.Module) -> Tensor:
        return self.crop(self.contexts[projection])

    def crop(self, h: Tensor) -> Tensor:
        """The part of a known map; a map of one row or one column stands for all of them."""
        rows = slice(self.row, self.row + 1) if h.shape[-2] > 1 else slice(None)
        columns = slice(self.start, self.stop) if h.shape[-1] > 1 else slice(None)
        return h[..., rows, columns]

    def read(self, layer: PaddedConv2d, x: Tensor) -> Tensor:
        top, left, right = self.row - layer.above, self.start - layer.left, self.stop + layer.right
        piece = x[:, :, max(top, 0) : self.row + 1, max(left, 0) : right]
        margins = (max(-left, 0), max(right - self.width, 0), max(-top, 0), 0)
        return self._apply(layer, F.pad(piece, margins) if any(margins) else piece)

    def _apply(self, layer: PaddedConv2d, piece: Tensor) -> Tensor:
        """A layer on just what it reads."""
        if layer not in self.weights:
            self.weights[layer] = layer.folded()
        weight = self.weights[layer]
        if self.stop - self.start > 1:
            return F.conv2d(piece, weight, layer.bias, layer.stride)
        return F.linear(piece.flatten(1), weight.flatten(1), layer.bias)[..., None, None]

    def _keep(self, layer: nn.Module, h: Tensor) -> Tensor:
        """The map of what was seen at all visits, with these rows and columns added."""
        if layer not in self.maps:
            self.maps[layer] = h.new_zeros(self.size, h.shape[1], self.height, self.width)
        rows, columns = slice(self.row, self.row + h.shape[-2]), slice(self.start, self.start + h.shape[-1])
        self.maps[layer][:, :, rows, columns] = h
        return self.maps[layer]

    def conv(self, layer: PaddedConv2d, h: Tensor) -> Tensor:
        pointwise = layer.kernel_size == (1, 1)
        return self._apply(layer, h) if pointwise else self.read(layer, self._keep(layer, h))

    def shrink(self, layer: PaddedConv2d, h: Tensor) -> Tensor | None:
        """The features at half the resolution, where there is a new place of them: at even rows and columns."""
        known = self._keep(layer, h)
        return None if self.row % 2 or self.start % 2 else self.read(layer, known)

    def grown(self, layer: nn.Module, fine: Tensor | None) -> Tensor:
        """The features that came back from half the resolution, now or at an earlier visit."""
        known = self.maps[layer] if fine is None else self._keep(layer, fine)
        return known[:, :, self.row : self.row + 1, self.start : self.stop]
