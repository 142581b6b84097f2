"""The posterior of the local latent variables of one datum, given its features and the global variables."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyro_flowguides.guides.flow_posterior import FlowPosterior
from pyro_flowguides.nn import MLP

__all__ = ["Conditional", "log_prob_on_path"]

#: Units in which the global variables and the features of a datum interact.
MIXING_DIM = 64


class Conditional(nn.Module):
    r"""The posterior of the local variables of one datum, given its features and the global variables.

    With the features h and the deviation u of the global variables from their location,

    .. math:: c = (h,\ u,\ \operatorname{elu}(V (h, u) + v)), \qquad (\mu, s) = W c + b, \qquad
        q(z \mid h, u) = \operatorname{FlowPosterior}(\mu, \operatorname{softplus}(s), c)

    The last part, in which features and global variables interact, is there only if there are global variables. They
    also stand in c on their own: a dependence that is the same for all data, however weak, is then learned from many.

    Args:
        loc, scale: where every datum starts.
        features, global_dim: widths of h and u.
        posterior: ``(latent_dim, context_dim) ->`` :class:`~pyro_flowguides.guides.FlowPosterior`.
    """

    def __init__(
        self, loc: Tensor, scale: float, features: int, global_dim: int, posterior: Callable[[int, int], FlowPosterior]
    ) -> None:
        super().__init__()
        self.features, width = features, features + global_dim
        self.mix = nn.Linear(width, MIXING_DIM) if global_dim else None
        width += MIXING_DIM if global_dim else 0
        self.head = MLP(width, (), 2 * len(loc))
        self.posterior = posterior(len(loc), width)
        self.to(loc)
        with torch.no_grad():
            self.head.biases[0].copy_(torch.cat([loc, torch.full_like(loc, math.log(math.expm1(scale)))]))

    def forward(self, context: Tensor) -> Any:
        if self.mix is not None:
            context = torch.cat([context, nn.functional.elu(self.mix(context))], -1)
        loc, raw = self.head(context).chunk(2, -1)
        return self.posterior.distribution(loc, nn.functional.softplus(raw), context)


class _OnPath(nn.Module):
    """log q(z | h, u) of a draw z whose origin in the base distribution is known."""

    def __init__(self, conditional: Conditional) -> None:
        super().__init__()
        self.conditional = conditional

    def forward(self, context: Tensor, value: Tensor, origin: Tensor) -> Tensor:
        posterior = self.conditional(context)
        base, ladj = posterior.transforms[0].inverse_at(value, origin)
        log_prob: Tensor = posterior.base_dist.log_prob(base) - ladj
        return log_prob


def log_prob_on_path(conditional: Conditional, context: Tensor, value: Tensor, origin: Tensor) -> Tensor:
    """The same as a function of the draws, global ones in the context included, and not of the parameters."""
    scored = _OnPath(conditional)
    frozen = {name: parameter.detach() for name, parameter in scored.named_parameters()}
    log_prob: Tensor = functional_call(scored, frozen, (context, value, origin))
    return log_prob
