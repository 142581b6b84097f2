"""Minibatches that depend only on a seed and a step."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flowguides.vae.training.images import Images, derive_seed, draw_binary

__all__ = ["Minibatches"]


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
        >>> minibatches = Minibatches(load_images("digits"), batch_size=100, shards=2, dynamic=True, seed=0)
        >>> minibatches.shard(step=7, number=1).shape
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
        return draw_binary(pixels, self.levels, torch.rand(pixels.shape, generator=generator, device=self.device))

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
