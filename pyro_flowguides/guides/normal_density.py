"""Draws of a diagonal Gaussian and their density, without the checks and objects of a distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["draw_normal", "normal_log_prob"]


def draw_normal(loc: Tensor, scale: Tensor, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Return a draw ``(*sample_shape, ..., D)`` and its standard normal noise; locations and scales broadcast."""
    shape = loc.shape if loc.shape == scale.shape else torch.broadcast_shapes(loc.shape, scale.shape)
    noise = torch.randn((*sample_shape, *shape), dtype=loc.dtype, device=loc.device)
    return loc + scale * noise, noise


def normal_log_prob(noise: Tensor, scale: Tensor | None = None) -> Tensor:
    r"""Return :math:`-\frac{1}{2} \lVert \varepsilon \rVert^2 - \sum_i \log \sigma_i - \frac{D}{2} \log 2\pi`.

    Args:
        noise: :math:`\varepsilon = (z - \mu) / \sigma` of the points z, ``(..., D)``.
        scale: :math:`\sigma` (default 1).

    Example:
        >>> import torch
        >>> from pyro_flowguides.guides.normal_density import normal_log_prob
        >>> normal_log_prob(torch.zeros(5, 2), torch.tensor([1.0, 2.0])).shape
        torch.Size([5])
    """
    constant = -0.5 * noise.shape[-1] * math.log(2 * math.pi)
    if scale is None:
        return torch.rsub(noise.square().sum(-1), constant, alpha=0.5)
    return constant - torch.addcmul(scale.log(), noise, noise, value=0.5).sum(-1)
