"""The diagonal Gaussian posterior, with the interface of :class:`~pyro_flowguides.guides.FlowPosterior`."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_flowguides.guides.distributions import draw_normal, normal_log_prob

__all__ = ["NormalPosterior"]


class NormalPosterior(nn.Module):
    r"""The diagonal Gaussian :math:`q(z \mid x) = N(\mu, \operatorname{diag} \sigma^2)`; it ignores the context.

    Shapes:
        loc, scale ``(..., latent_dim)``; the distribution has batch shape ``(...)`` and event shape ``(latent_dim,)``.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import NormalPosterior
        >>> NormalPosterior()(torch.zeros(5, 3), torch.ones(5, 3)).rsample((2,)).shape
        torch.Size([2, 5, 3])
    """

    def forward(self, loc: Tensor, scale: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        return dist.Normal(loc, scale, validate_args=False).to_event(1)

    def rsample_and_log_prob(
        self, loc: Tensor, scale: Tensor, context: Tensor | None = None, sample_shape: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Draw and return the draw with its log density, like :meth:`FlowPosterior.rsample_and_log_prob
        <pyro_flowguides.guides.FlowPosterior.rsample_and_log_prob>`."""
        z, noise = draw_normal(loc, scale, sample_shape)
        return z, normal_log_prob(noise, scale)
