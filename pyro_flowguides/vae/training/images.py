"""Images to train on: three splits, and minibatches that depend only on a seed and a step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flowguides.nn.arguments import check_count, describe

__all__ = ["SPLITS", "Images", "Minibatches", "derive_seed"]

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
        drawn = {}
        for split in SPLITS:
            pixels: Tensor = getattr(self, split)
            generator = torch.Generator().manual_seed(derive_seed(BINARIZATION_STREAM, split))
            drawn[split] = _draw_binary(pixels, self.levels, torch.rand(pixels.shape, generator=generator))
        return Images(**drawn, levels=2, name=self.name)


def _draw_binary(pixels: Tensor, levels: int, uniform: Tensor) -> Tensor:
    """Return 1 where a uniform draw lies below the grey value in [0, 1], else 0; binary pixels do not change."""
    return (uniform * (levels - 1) < pixels).to(torch.uint8)


class Minibatches:
    """Minibatches of training images, each divided into equal shards.

    Every epoch takes the training images in a new order and leaves out the last incomplete batch. The images of a
    shard, and the binarization of their pixels, depend only on the seed, the step and the number of the shard. They do
    not depend on the process that asks for the shard, or on earlier requests.

    Args:
        images: the data.
        batch_size: images per step, over all processes.
        shards: shards per batch.
        dynamic: binarize the pixels anew at every step.
        seed: seed of the order and of the binarization.
        device: device of the batches. If the training images take less than a quarter of its free memory they stay
            there; otherwise they are copied batch by batch.

    Raises:
        ValueError: if the batch size exceeds the number of training images, or is not a multiple of ``shards``.

    Example:
        >>> from pyro_flowguides.vae import Minibatches, load_images
        >>> Minibatches(load_images("digits"), batch_size=100, shards=2).shard(step=7, number=1).shape
        torch.Size([50, 1, 8, 8])
    """

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        shards: int = 1,
        dynamic: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not isinstance(images, Images):
            raise TypeError(f"Minibatches: images must be what load_images returns, got {describe(images)}")
        check_count("Minibatches", "batch_size", batch_size, 0)
        check_count("Minibatches", "shards", shards, 0)
        if not 1 <= batch_size <= len(images.train):
            raise ValueError(f"the batch size must lie in 1 … {len(images.train)} (training images), got {batch_size}")
        if shards < 1 or batch_size % shards:
            raise ValueError(f"a batch of {batch_size} images cannot be split into {shards} equal shards")
        self.device = torch.device(device)
        self.levels, self.dynamic, self.seed = images.levels, dynamic, seed
        self.batch_size, self.shards = batch_size, shards
        self.pixels = _keep_near(images.train, self.device)
        self._epoch, self._epoch_order = -1, torch.empty(0, dtype=torch.long)

    @property
    def steps_per_epoch(self) -> int:
        """Number of complete batches in the training images."""
        return len(self.pixels) // self.batch_size

    def shard(self, step: int, number: int) -> Tensor:
        """Return shard ``number`` of the batch of a step: bytes ``(batch_size / shards, C, H, W)`` on the device."""
        size = self.batch_size // self.shards
        begin = (step % self.steps_per_epoch) * self.batch_size + number * size
        index = self._order(step // self.steps_per_epoch)[begin : begin + size]
        pixels = self.pixels[index.to(self.pixels.device)].to(self.device, non_blocking=True)
        if not self.dynamic:
            return pixels
        generator = torch.Generator(self.device).manual_seed(derive_seed(self.seed, "pixels", step, number))
        return _draw_binary(pixels, self.levels, torch.rand(pixels.shape, generator=generator, device=self.device))

    def _order(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            self._epoch, self._epoch_order = epoch, torch.randperm(len(self.pixels), generator=generator)
        return self._epoch_order


def _keep_near(pixels: Tensor, device: torch.device) -> Tensor:
    """Put the pixels on the device if they take less than a quarter of its free memory, else into pinned memory."""
    if device.type != "cuda":
        return pixels.to(device)
    free, _ = torch.cuda.mem_get_info(device)
    return pixels.to(device) if pixels.nbytes < free / 4 else pixels.pin_memory()
