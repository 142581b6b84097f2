"""The distribution of a flow guide that follows the path gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import detach
from pyro.ops.provenance import detach_provenance
from torch import Tensor

from pyro_flowguides.transforms import Flow
from pyro_flowguides.transforms.tracing import is_tracing

__all__ = ["PathDistribution"]


class PathDistribution(dist.TransformedDistribution):
    r"""A base distribution pushed through one flow, whose own draws are scored with the path gradient.

    Pyro's ELBOs differentiate :math:`\log q_\phi(z)` of a draw :math:`z = f_\phi(\varepsilon)` through
    ``score_parts().entropy_term``. Here that term has the derivative along the draw only,

    .. math:: \frac{\partial \log q_{\bar\phi}(z)}{\partial z} \frac{\partial z}{\partial \phi},

    without :math:`\partial \log q_\phi(z) / \partial \phi` at fixed z, whose expectation is zero. The gradient is
    unbiased, and zero in every sample when q equals the target. Values are unchanged. Draws from another distribution
    and programs under tracing get the total gradient.

    Where the parameters of the distribution depend on other draws, as those of local variables depend on global ones,
    the path runs through these draws too. :attr:`path_log_prob` then computes the term.

    Cost: one pass of the flow without gradient and the derivatives of one inverse pass per scored draw.

    References:
        G. Roeder, Y. Wu, D. Duvenaud (2017). Sticking the landing. arXiv:1703.09194.
        L. Vaitl, K. Nicoli, S. Nakajima, P. Kessel (2022). Gradients should stay on path. arXiv:2207.08219.
    """

    #: ``(x, flow's input at x) -> log q(x)``, with derivatives by all draws that it depends on, and by no parameter.
    path_log_prob: Callable[[Tensor, Tensor], Tensor] | None = None

    def expand(self, batch_shape: Sequence[int], _instance: PathDistribution | None = None) -> PathDistribution:
        new: PathDistribution = super().expand(batch_shape, _instance)
        new.path_log_prob = self.path_log_prob
        return new

    def score_parts(self, x: Tensor, *args: object, **kwargs: object) -> ScoreParts:
        log_prob, zero = self.log_prob(x, *args, **kwargs), cast("Tensor", 0)  # 0 is Pyro's convention for "no term"
        if not (torch.is_grad_enabled() and x.requires_grad) or is_tracing(x):
            return ScoreParts(log_prob, zero, log_prob)
        x = detach_provenance(x)  # TraceGraph_ELBO wraps values, but the flow's cache recognizes its draws by identity
        (flow,) = self.transforms
        assert isinstance(flow, Flow)
        if self.path_log_prob is not None:
            return ScoreParts(log_prob, zero, self.path_log_prob(x, flow.inv(x)))
        base, ladj = flow.inverse_at(x, flow.inv(x), detach_parameters=True)
        return ScoreParts(log_prob, zero, detach(self.base_dist).log_prob(base) - ladj)
