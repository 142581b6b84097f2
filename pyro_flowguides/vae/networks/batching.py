"""Batches of any shape for networks that take a single batch dimension."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["flatten_batch"]


def flatten_batch(network: Callable[[Tensor], Tensor], x: Tensor, event_dim: int) -> Tensor:
    """Apply a network that takes one batch dimension to an input with any number of them.

    Args:
        network: ``(N, *event) -> (N, *out)``.
        x: ``(..., *event)``.
        event_dim: number of dimensions of ``event``.

    Returns:
        ``(..., *out)``.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.networks.batching import flatten_batch
        >>> flatten_batch(torch.nn.Conv2d(1, 2, 3), torch.randn(5, 7, 1, 8, 8), 3).shape
        torch.Size([5, 7, 2, 6, 6])
    """
    batch, event = x.shape[: x.dim() - event_dim], x.shape[x.dim() - event_dim :]
    if len(batch) == 1:
        return network(x)
    y = network(x.reshape(batch.numel(), *event))
    return y.reshape(*batch, *y.shape[1:])
