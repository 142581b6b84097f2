"""Evaluation of a model on images that it is not trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from pyro_flowguides.vae.training.images import derive_seed
from pyro_flowguides.vae.training.sharded_terms import ShardedTerms

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["HeldOut", "Metrics", "Pictures", "bound_metrics", "float64_device"]

#: Images evaluated at a time.
CHUNK_SIZE = 200
#: Test images that decide which latent coordinates are active.
ACTIVE_UNITS_IMAGES = 1000

#: Numbers by name: of a bound ``elbo``, ``reconstruction`` and ``kl`` in nats per image, and ``bits_per_dim``; of a
#: log-likelihood ``mean`` and ``standard_error`` over the images in nats, ``images`` and ``num_samples``.
Metrics: TypeAlias = dict[str, float]
#: Draws from the prior, test images and their reconstructions, ``(N, C, H, W)`` in [0, 1].
Pictures: TypeAlias = tuple[Tensor, Tensor, Tensor]


class HeldOut:
    """Evaluate a model on validation and test images, without mixed precision.

    Args:
        sharded_terms: the model and the scale of its pixels.
        pixels: bytes ``(N, C, H, W)`` of every split.
        fabric: of the run; its processes share the images.
        seed: seed of all draws.
    """

    def __init__(self, sharded_terms: ShardedTerms, pixels: Mapping[str, Tensor], fabric: Fabric, seed: int) -> None:
        self.sharded_terms, self.vae = sharded_terms, sharded_terms.vae
        self.pixels, self.fabric, self.seed = pixels, fabric, seed

    @torch.no_grad()
    def bound(self, split: str, num_samples: int = 1) -> Metrics:
        """Estimate the bound over a split from some draws of z per image."""
        self.vae.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=float64_device(self.fabric.device))
        for number, chunk in enumerate(self.pixels[split].split(CHUNK_SIZE)):
            if number % self.fabric.world_size == self.fabric.global_rank:
                seed = derive_seed(self.seed, split, number)
                terms = self.sharded_terms([chunk.to(self.fabric.device)], [seed], num_samples)
                parts = [terms.log_likelihood.mean(0).sum(), terms.kl.sum(-1).mean(0).sum()]
                sums += torch.stack(parts).to(sums)
        sums = torch.as_tensor(self.fabric.all_reduce(sums, reduce_op="sum")) / len(self.pixels[split])
        return bound_metrics(sums, self.pixels[split][0].numel())

    @torch.no_grad()
    def active_units_and_likelihood(self, images: int, num_samples: int) -> tuple[int, Metrics | None]:
        """Count the active latent coordinates, and estimate the importance-weighted log-likelihood of test images.

        Args:
            images: number of images for the log-likelihood; 0 leaves it out.
            num_samples: draws per image.
        """
        x = self._scaled("test")
        torch.manual_seed(derive_seed(self.seed, "finish"))
        active = int(self.vae.active_units(x[:ACTIVE_UNITS_IMAGES]).sum())
        if not images:
            return active, None
        values = self.vae.log_likelihood(x[:images], num_samples, chunk_size=10).double()
        count = len(values)
        return active, {
            "mean": values.mean().item(),
            "standard_error": (values.std() / math.sqrt(count)).item() if count > 1 else math.nan,
            "images": count,
            "num_samples": num_samples,
        }

    @torch.no_grad()
    def pictures(self, samples: int = 64, reconstructions: int = 32) -> Pictures:
        """Draw images from the prior, and reconstruct test images."""
        torch.manual_seed(derive_seed(self.seed, "pictures"))
        x, high = self._scaled("test")[:reconstructions], self.vae.likelihood.high
        drawn = self.vae.mean(self.vae.sample_prior(samples))
        return drawn / high, x / high, self.vae.reconstruct(x) / high

    def _scaled(self, split: str) -> Tensor:
        return self.sharded_terms.scale(self.pixels[split].to(self.fabric.device))


def bound_metrics(reconstruction_and_kl: Tensor, num_values: int) -> Metrics:
    """Return the bound and its parts; ``num_values`` is the number of values of an image."""
    reconstruction, kl = reconstruction_and_kl.tolist()
    elbo = reconstruction - kl
    bits_per_dim = -elbo / (num_values * math.log(2))
    return {"elbo": elbo, "reconstruction": reconstruction, "kl": kl, "bits_per_dim": bits_per_dim}


def float64_device(device: torch.device) -> torch.device:
    """Return the device, or the CPU if the device has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
