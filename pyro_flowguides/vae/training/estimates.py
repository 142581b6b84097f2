"""Estimates of the bound: its terms for a batch in shards, and results on held-out images."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from pyro_flowguides.programs.batched_run import first_line
from pyro_flowguides.vae.models.vae import VAE, Terms
from pyro_flowguides.vae.training.images import derive_seed

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["HeldOut", "Metrics", "Pictures", "ShardedTerms", "bound_metrics", "float64_device"]

#: Images evaluated at a time.
CHUNK_SIZE = 200
#: Test images that decide which latent coordinates are active.
ACTIVE_UNITS_IMAGES = 1000

#: Numbers by name: of a bound ``elbo``, ``reconstruction`` and ``kl`` in nats per image, and ``bits_per_dim``; of a
#: log-likelihood ``mean`` and ``standard_error`` over the images in nats, ``images`` and ``num_samples``.
Metrics: TypeAlias = dict[str, float]
#: Draws from the prior, test images and their reconstructions, ``(N, C, H, W)`` in [0, 1].
Pictures: TypeAlias = tuple[Tensor, Tensor, Tensor]


class ShardedTerms(nn.Module):
    """Compute the terms of the bound for some shards of a batch, each shard with random numbers of its own.

    Pixels arrive as bytes, which mixed precision does not round, and are scaled to the range of the likelihood here.
    The terms of S draws for shards ``(B, C, H, W)`` are those of all shards, one after another.
    """

    def __init__(self, vae: VAE, levels: int, compiled: bool = False) -> None:
        super().__init__()
        self.vae = vae
        self.unit = vae.likelihood.high / (levels - 1)
        self.compiled_terms: Callable[[Tensor, int], Terms] | None = torch.compile(vae.terms) if compiled else None

    def scale(self, pixels: Tensor) -> Tensor:
        """Convert bytes to the units of the likelihood: numbers in [0, 1], or whole numbers up to 255."""
        x = pixels.to(next(self.vae.parameters()).dtype) * self.unit
        return x if self.vae.likelihood.high == 1 else x.round()

    def forward(self, shards: list[Tensor], seeds: list[int], num_samples: int) -> Terms:
        parts = []
        for pixels, seed in zip(shards, seeds, strict=True):
            torch.manual_seed(seed)
            parts.append(self._terms(self.scale(pixels), num_samples))
        return Terms(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))

    def _terms(self, x: Tensor, num_samples: int) -> Terms:
        if self.compiled_terms is not None:
            try:
                return self.compiled_terms(x, num_samples)
            except Exception as error:  # a compiler may raise anything; an error of the model is raised again below
                self.compiled_terms = None
                warnings.warn(f"train: continues without compiling: {first_line(error)}", stacklevel=2)
        return self.vae.terms(x, num_samples)


class HeldOut:
    """Evaluate a model on the pixels of validation and test images, without mixed precision.

    The processes of the run share the images.
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
                sums += torch.stack([terms.log_likelihood.mean(0).sum(), terms.kl.sum(-1).mean(0).sum()]).to(sums)
        sums = torch.as_tensor(self.fabric.all_reduce(sums, reduce_op="sum")) / len(self.pixels[split])
        return bound_metrics(sums, self.pixels[split][0].numel())

    @torch.no_grad()
    def active_units_and_likelihood(self, images: int, num_samples: int) -> tuple[int, Metrics | None]:
        """Count the active latent coordinates, and estimate the log-likelihood of some test images, if any."""
        x = self._scaled_test_images()
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
        x, high = self._scaled_test_images()[:reconstructions], self.vae.likelihood.high
        drawn = self.vae.mean(self.vae.sample_prior(samples))
        return drawn / high, x / high, self.vae.reconstruct(x) / high

    def _scaled_test_images(self) -> Tensor:
        return self.sharded_terms.scale(self.pixels["test"].to(self.fabric.device))


def bound_metrics(reconstruction_and_kl: Tensor, num_values: int) -> Metrics:
    """Return the bound and its parts; ``num_values`` is the number of values of an image."""
    reconstruction, kl = reconstruction_and_kl.tolist()
    bits_per_dim = (kl - reconstruction) / (num_values * math.log(2))
    return {"elbo": reconstruction - kl, "reconstruction": reconstruction, "kl": kl, "bits_per_dim": bits_per_dim}


def float64_device(device: torch.device) -> torch.device:
    """Return the device, or the CPU if the device has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
