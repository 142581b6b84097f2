"""Image networks, evaluated on whole feature maps or, from caches, on a single row or pixel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.vae.decoders.autoregressive_decoder import AutoregressiveNetwork, GenerationStep
from pyro_flowguides.vae.decoders.causal_conv import PaddedConv2d

__all__ = ["CachedWindow", "MapRegion", "TwoStackNetwork"]

#: The features of the vertical stack that the horizontal stack reads.
Above = TypeVar("Above")


class MapRegion:
    """A region of the feature maps: the whole maps or, in :class:`CachedWindow`, a row or a pixel of them.

    One definition of a network thus serves both the density and generation.

    Args:
        contexts: the projected context of every layer, for whole maps.
    """

    def __init__(self, contexts: Mapping[nn.Module, Tensor]) -> None:
        self.contexts = contexts

    def context(self, projection: nn.Module) -> Tensor:
        """Return the projected context in this region."""
        return self.crop(self.contexts[projection])

    def crop(self, complete: Tensor) -> Tensor:
        """Return the part of a complete map in this region."""
        return complete

    def apply_to_map(self, layer: PaddedConv2d, complete: Tensor) -> Tensor:
        """Apply a layer to a map that is complete as far as the layer reads it."""
        return layer(complete)

    def apply(self, layer: PaddedConv2d, features: Tensor) -> Tensor:
        """Apply a layer to the features of this region."""
        return layer(features)

    def at_half_resolution(
        self, shrink: PaddedConv2d, grow: PaddedConv2d, features: Tensor, inner: Callable[[Tensor, MapRegion], Tensor]
    ) -> Tensor:
        """Shrink features to half the resolution, apply a function there, and return its upsampled result."""
        return F.pixel_shuffle(grow(inner(shrink(features), self)), 2)


class CachedWindow(MapRegion):
    """One row of the feature maps, or one pixel of it; all earlier rows and pixels must have been visited before.

    The input of every layer is cached as a map. A visit adds the features of the window to the map and evaluates the
    layer there only, so that a pixel costs one application of every kernel, whatever the size of the image.

    Args:
        size: B.
        space: height and width of the maps.
        contexts: as for :class:`MapRegion`.
    """

    def __init__(self, size: int, space: Sequence[int], contexts: Mapping[nn.Module, Tensor]) -> None:
        super().__init__(contexts)
        self.size = size
        self.height, self.width = space
        self._maps: dict[nn.Module, Tensor] = {}
        self._weights: dict[nn.Module, Tensor] = {}
        self._half: CachedWindow | None = None
        self.move_to_row(0)

    def move_to_row(self, row: int) -> CachedWindow:
        """Move the window to all columns of a row."""
        return self._move(row, 0, self.width)

    def move_to_pixel(self, row: int, column: int) -> CachedWindow:
        """Move the window to one pixel."""
        return self._move(row, column, column + 1)

    def _move(self, row: int, start: int, stop: int) -> CachedWindow:
        self.row, self.start, self.stop = row, start, stop
        return self

    def crop(self, complete: Tensor) -> Tensor:
        """Return the part of a complete map in the window; a map of one row or column is constant over the others."""
        rows = slice(self.row, self.row + 1) if complete.shape[-2] > 1 else slice(None)
        columns = slice(self.start, self.stop) if complete.shape[-1] > 1 else slice(None)
        return complete[..., rows, columns]

    def apply_to_map(self, layer: PaddedConv2d, complete: Tensor) -> Tensor:
        top, left, right = self.row - layer.above, self.start - layer.left, self.stop + layer.right
        patch = complete[:, :, max(top, 0) : self.row + 1, max(left, 0) : right]
        margins = (max(-left, 0), max(right - self.width, 0), max(-top, 0), 0)
        return self._apply_to_patch(layer, F.pad(patch, margins) if any(margins) else patch)

    def _apply_to_patch(self, layer: PaddedConv2d, patch: Tensor) -> Tensor:
        """Apply a layer to exactly the inputs that it reads for this window."""
        if layer not in self._weights:
            self._weights[layer] = layer.effective_weight()
        weight = self._weights[layer]
        if self.stop - self.start > 1:
            return F.conv2d(patch, weight, layer.bias, layer.stride)
        return F.linear(patch.flatten(1), weight.flatten(1), layer.bias)[..., None, None]

    def _store(self, layer: nn.Module, features: Tensor) -> Tensor:
        """Add features to the cached map of a layer, starting at the window's first pixel, and return the map."""
        if layer not in self._maps:
            self._maps[layer] = features.new_zeros(self.size, features.shape[1], self.height, self.width)
        rows = slice(self.row, self.row + features.shape[-2])
        columns = slice(self.start, self.start + features.shape[-1])
        self._maps[layer][:, :, rows, columns] = features
        return self._maps[layer]

    def apply(self, layer: PaddedConv2d, features: Tensor) -> Tensor:
        if layer.kernel_size == (1, 1):
            return self._apply_to_patch(layer, features)
        return self.apply_to_map(layer, self._store(layer, features))

    def at_half_resolution(
        self, shrink: PaddedConv2d, grow: PaddedConv2d, features: Tensor, inner: Callable[[Tensor, MapRegion], Tensor]
    ) -> Tensor:
        """Compute the result at even rows and columns, where the lower resolution has a new pixel, and keep it."""
        complete = self._store(shrink, features)
        if self.row % 2 == 0 and self.start % 2 == 0:
            if self._half is None:
                self._half = CachedWindow(self.size, (self.height // 2, self.width // 2), self.contexts)
            half = self._half._move(self.row // 2, self.start // 2, (self.stop + 1) // 2)
            low = inner(self.apply_to_map(shrink, complete), half)
            self._store(grow, F.pixel_shuffle(half.apply(grow, low), 2))
        return self.crop(self._maps[grow])


class TwoStackNetwork(AutoregressiveNetwork, Generic[Above]):
    """An image network whose vertical stack reads the rows above, and whose horizontal stack reads these features and
    the earlier pixels of the current row.

    Generation evaluates the vertical stack once per row and the horizontal stack once per step.
    """

    def vertical(self, x: Tensor, region: MapRegion) -> Above:
        """Return the features of the vertical stack in a region of the image."""
        raise NotImplementedError

    def horizontal(self, x: Tensor, above: Above, region: MapRegion) -> Tensor:
        """Return the outputs in a region, given the features of the vertical stack for whole rows."""
        raise NotImplementedError

    def evaluate(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Tensor:
        region = MapRegion(contexts)
        return self.horizontal(x, self.vertical(x, region), region)

    def outputs_by_step(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Iterator[tuple[GenerationStep, Tensor]]:
        whole_row, pixel = (CachedWindow(len(x), self.shape[1:], contexts) for _ in range(2))
        for row, steps in itertools.groupby(self.steps(), lambda step: step.position[0]):
            above = self.vertical(x, whole_row.move_to_row(row))
            for step in steps:
                yield step, self.horizontal(x, above, pixel.move_to_pixel(*step.position))[..., 0, 0]
