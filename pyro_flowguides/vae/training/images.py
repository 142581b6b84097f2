"""Images to train on, in three splits, and the seeds of random numbers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SPLITS", "Images", "derive_seed", "draw_binary"]

SPLITS = ("train", "valid", "test")
#: Selects the random numbers of :meth:`Images.binarized`. Published results depend on them: never change it.
BINARIZATION_STREAM = "binarised"


def derive_seed(*parts: int | str) -> int:
    """Return a seed that depends only on its parts, such as the seed of a run, a purpose and a step.

    Example:
        >>> from pyro_flowguides.vae import derive_seed
        >>> derive_seed(0, "noise", 3) == derive_seed(0, "noise", 3) != derive_seed(0, "noise", 4)
        True
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class Images:
    """Three splits of one data set.

    Attributes:
        train, valid, test: pixels ``(N, channels, height, width)``, unsigned bytes in ``0 … levels - 1``.
        levels: number of grey levels of a pixel, 2 for binary images.
        name: name or path of the data set, for messages.

    Raises:
        ValueError: if a split is empty, or the splits have images of different shapes.
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    levels: int
    name: str

    def __post_init__(self) -> None:
        for split in SPLITS:
            pixels = getattr(self, split)
            if not len(pixels):
                raise ValueError(f"{self.name}: the split {split!r} is empty")
            if pixels.shape[1:] != self.train.shape[1:]:
                raise ValueError(
                    f"{self.name}: the images of {split!r} have shape {tuple(pixels.shape[1:])}, those of 'train' "
                    f"{self.shape}: all splits must have one shape"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """``(channels, height, width)``."""
        return tuple(self.train.shape[1:])

    @property
    def fingerprint(self) -> str:
        """A short hash of all pixels, which tells whether a run continues on the same data."""
        digest = hashlib.sha256(f"{self.levels} {self.shape}".encode())
        for split in SPLITS:
            digest.update(getattr(self, split).numpy().tobytes())
        return digest.hexdigest()[:16]

    def binarized(self) -> Images:
        """Draw every pixel once as 0 or 1, its grey value being the probability of a 1; the draw is always the same."""
        train, valid, test = (self._binarize(split) for split in SPLITS)
        return Images(train, valid, test, levels=2, name=self.name)

    def _binarize(self, split: str) -> Tensor:
        pixels: Tensor = getattr(self, split)
        generator = torch.Generator().manual_seed(derive_seed(BINARIZATION_STREAM, split))
        return draw_binary(pixels, self.levels, torch.rand(pixels.shape, generator=generator))


def draw_binary(pixels: Tensor, levels: int, uniform: Tensor) -> Tensor:
    """Return 1 where a uniform draw lies below the grey value scaled to [0, 1], else 0; binary pixels do not change."""
    return (uniform * (levels - 1) < pixels).to(torch.uint8)
