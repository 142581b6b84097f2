"""The posterior of the local latent variables of one datum, given its features and the global variables."""

import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyro_flowguides.guides.flow_posterior import FlowPosterior
from pyro_flowguides.nn import MLP

__all__ = ["LocalPosterior", "local_path_log_prob"]

#: Number of units in which the global variables and the features of a datum interact.
MIXING_DIM = 64


class LocalPosterior(nn.Module):
    r"""The posterior of the local variables of one datum, given its features and the global variables.

    With the features h and the deviation u of the global variables from their location,

    .. math:: c = (h,\ u,\ \operatorname{elu}(V (h, u) + v)), \qquad (\mu, s) = W c + b, \qquad
        q(z \mid h, u) = \operatorname{FlowPosterior}(\mu, \operatorname{softplus}(s), c)

    The last part of c, in which features and global variables interact, exists only if there are global variables. The
    global variables are a part of c of their own as well, so that a dependence shared by all data is learned from all
    of them, however weak it is.

    Args:
        loc, scale: initial location ``(D,)`` and scale for every datum.
        feature_dim, global_dim: widths of h and u.
        posterior: ``(latent_dim, context_dim) ->`` :class:`~pyro_flowguides.guides.FlowPosterior`.
    """

    def __init__(
        self, loc: Tensor, scale: float, feature_dim: int, global_dim: int, posterior: Callable[..., FlowPosterior]
    ) -> None:
        super().__init__()
        self.feature_dim, width = feature_dim, feature_dim + global_dim
        self.mix = nn.Linear(width, MIXING_DIM) if global_dim else None
        width += MIXING_DIM if global_dim else 0
        self.head = MLP(width, (), 2 * len(loc))
        self.flow_posterior = posterior(len(loc), width)
        self.to(loc)
        with torch.no_grad():
            self.head.biases[0].copy_(torch.cat([loc, torch.full_like(loc, math.log(math.expm1(scale)))]))

    def forward(self, context: Tensor) -> dist.TransformedDistribution:
        """Return the posterior for ``(h, u)``, ``(..., feature_dim + global_dim)``."""
        if self.mix is not None:
            context = torch.cat([context, nn.functional.elu(self.mix(context))], -1)
        loc, raw = self.head(context).chunk(2, -1)
        return self.flow_posterior.distribution(loc, nn.functional.softplus(raw), context)


class _ScoreAtBase(nn.Module):
    """The log density of a draw z whose base draw, z before the flow, is known."""

    def __init__(self, posterior: LocalPosterior) -> None:
        super().__init__()
        self.posterior = posterior

    def forward(self, context: Tensor, z: Tensor, base_draw: Tensor) -> Tensor:
        q = self.posterior(context)
        base, ladj = q.transforms[0].inverse_at(z, base_draw)
        log_prob: Tensor = q.base_dist.log_prob(base) - ladj
        return log_prob


def local_path_log_prob(posterior: LocalPosterior, context: Tensor, z: Tensor, base_draw: Tensor) -> Tensor:
    """Return log q(z | h, u) with derivatives by z and the context, global draws in it included, and no parameter."""
    score = _ScoreAtBase(posterior)
    constants = {name: parameter.detach() for name, parameter in score.named_parameters()}
    log_prob: Tensor = functional_call(score, constants, (context, z, base_draw))
    return log_prob
