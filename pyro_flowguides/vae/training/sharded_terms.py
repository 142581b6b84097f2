"""The terms of the bound for a batch in shards."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_flowguides.programs.batched_run import first_line
from pyro_flowguides.vae.models.vae import VAE, Terms

__all__ = ["ShardedTerms"]


class ShardedTerms(nn.Module):
    """Compute the terms of the bound for some shards of a batch, each shard with random numbers of its own.

    Pixels arrive as bytes, which mixed precision does not round, and are scaled to the range of the likelihood here.

    Args:
        vae: the model.
        levels: number of grey levels of the pixels.
        compiled: compile the model; if the compiler fails, warn and continue without it.

    Shapes:
        ``(shards, seeds, num_samples) -> terms``: a list of pixels ``(B, C, H, W)``, the seed of each, and the number S
        of draws; the terms are those of all shards, one after another.
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
