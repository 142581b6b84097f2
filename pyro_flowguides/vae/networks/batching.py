"""Networks for single batches, on inputs with any leading dimensions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["flatten_batch"]


def flatten_batch(network: Callable[[Tensor], Tensor], x: Tensor, event_dim: int) -> Tensor:
    """Run a network that takes one batch dimension on an input with any number of them.

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
    leading = x.shape[: x.dim() - event_dim]
    if len(leading) == 1:
        return network(x)
    y = network(x.reshape(leading.numel(), *x.shape[x.dim() - event_dim :]))
    return y.reshape(*leading, *y.shape[1:])
