"""The diagonal Gaussian posterior, with the call of :class:`~pyro_flowguides.guides.FlowPosterior`."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn

__all__ = ["NormalPosterior"]


class NormalPosterior(nn.Module):
    r"""The diagonal Gaussian :math:`q(z \mid x) = N(\mu, \operatorname{diag} \sigma^2)`; the context is not used.

    Shapes:
        loc, scale ``(..., latent_dim)``; batch shape ``(...)``.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import NormalPosterior
        >>> NormalPosterior()(torch.zeros(5, 3), torch.ones(5, 3)).rsample((2,)).shape
        torch.Size([2, 5, 3])
    """

    def forward(self, loc: Tensor, scale: Tensor, context: Tensor | None = None) -> dist.Distribution:
        return dist.Normal(loc, scale, validate_args=False).to_event(1)
