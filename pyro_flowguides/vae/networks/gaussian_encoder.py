"""The Gaussian head that turns the features of an encoder into an amortized posterior."""

from __future__ import annotations

import math
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GaussianEncoder", "positive_scale"]


def positive_scale(raw: Tensor) -> Tensor:
    """Map real numbers to positive scales, and 0 to 1, by softplus(raw) / log 2."""
    return F.softplus(raw) / math.log(2)


class GaussianEncoder(nn.Module):
    r"""The encoder of an amortized posterior: location, scale and context as functions of the data.

    .. math:: h = f(x), \qquad \mu = W_\mu h + b_\mu, \qquad
        \sigma = \operatorname{softplus}(W_\sigma h + b_\sigma) / \log 2

    The features h are the context; each layer of a flow applies its own projection to them. The scale starts near 1.

    Args:
        network: from data to features; its attribute ``features`` is their number.
        latent_dim: width of z.

    Shapes:
        ``(..., *data_shape)`` -> loc ``(..., latent_dim)``, scale ``(..., latent_dim)``, context ``(..., features)``.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import DenseEncoder, GaussianEncoder
        >>> loc, scale, context = GaussianEncoder(DenseEncoder((8,), [32]), latent_dim=2)(torch.rand(5, 8))
        >>> loc.shape, context.shape
        (torch.Size([5, 2]), torch.Size([5, 32]))
    """

    def __init__(self, network: nn.Module, latent_dim: int) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"GaussianEncoder: latent_dim must be at least 1, got {latent_dim}")
        self.latent_dim, self.context_dim = latent_dim, cast("int", network.features)
        self.network = network
        self.head = nn.Linear(self.context_dim, 2 * latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        context = self.network(x)
        loc, raw = self.head(context).chunk(2, -1)
        return loc, positive_scale(raw), context
