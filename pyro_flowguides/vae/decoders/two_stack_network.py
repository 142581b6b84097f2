"""Image networks with a vertical and a horizontal stack."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor, nn

from pyro_flowguides.vae.decoders.autoregressive_network import AutoregressiveNetwork
from pyro_flowguides.vae.decoders.generation import DrawChannels, GeneratedBatch
from pyro_flowguides.vae.decoders.map_regions import CachedWindow, FullMap, MapRegion

__all__ = ["TwoStackNetwork"]

#: The features of the vertical stack that the horizontal stack reads.
Above = TypeVar("Above")


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
        region = FullMap(contexts)
        return self.horizontal(x, self.vertical(x, region), region)

    def fill(self, batch: GeneratedBatch, draw: DrawChannels, contexts: dict[nn.Module, Tensor]) -> None:
        _, height, width = self.shape
        whole_row, pixel = (CachedWindow(len(batch), height, width, contexts) for _ in range(2))
        for row in range(height):
            above = self.vertical(batch.inputs, whole_row.move_to_row(row))
            for column in range(width):
                pixel.move_to_pixel(row, column)
                for step in self.steps_at((row, column)):
                    batch.write(step, draw(self.horizontal(batch.inputs, above, pixel)[..., 0, 0]))
