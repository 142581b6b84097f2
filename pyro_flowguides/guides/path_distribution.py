"""The distribution of a flow guide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import detach
from pyro.ops.provenance import detach_provenance
from torch import Tensor

from pyro_flowguides.transforms import Flow
from pyro_flowguides.transforms.solvers import tracing

__all__ = ["PathDistribution"]


class PathDistribution(dist.TransformedDistribution):
    r"""A base distribution pushed through one flow, whose own draws are scored with the path gradient.

    Pyro's ELBOs differentiate :math:`\log q_\phi(z)` of a draw :math:`z = f_\phi(\varepsilon)` through
    ``score_parts().entropy_term``. Here that term has the derivative along the draw only,

    .. math:: \frac{\partial \log q_{\bar\phi}(z)}{\partial z} \frac{\partial z}{\partial \phi},

    without :math:`\partial \log q_\phi(z) / \partial \phi` at fixed z, whose expectation is zero: the gradient is
    unbiased, and zero in every sample when q equals the target. Values are unchanged. Draws of somebody else, and
    programs that are being traced, get the total gradient.

    Where the distribution's own parameters depend on other draws, as those of local variables on global ones, the path
    runs through these too: whoever builds it sets :attr:`on_path`.

    Cost: one pass of the flow without gradient and the derivatives of one inverse pass per scored draw.

    References:
        G. Roeder, Y. Wu, D. Duvenaud (2017). Sticking the landing. arXiv:1703.09194.
        L. Vaitl, K. Nicoli, S. Nakajima, P. Kessel (2022). Gradients should stay on path. arXiv:2207.08219.
    """

    #: ``(x, flow's input at x) -> log q(x)`` with derivatives along all draws and none with respect to parameters.
    on_path: Callable[[Tensor, Tensor], Tensor] | None = None

    def expand(self, batch_shape: Any, _instance: Any = None) -> PathDistribution:
        new: PathDistribution = super().expand(batch_shape, _instance)
        new.on_path = self.on_path
        return new

    def score_parts(self, x: Tensor, *args: object, **kwargs: object) -> ScoreParts:
        log_prob, zero = self.log_prob(x, *args, **kwargs), cast("Tensor", 0)  # Pyro's own convention for "none"
        if not (torch.is_grad_enabled() and x.requires_grad) or tracing(x):
            return ScoreParts(log_prob, zero, log_prob)
        x = detach_provenance(x)  # TraceGraph_ELBO wraps values, and the flow knows its own draws by identity
        (flow,) = self.transforms
        assert isinstance(flow, Flow)
        if self.on_path is not None:
            return ScoreParts(log_prob, zero, self.on_path(x, flow.inv(x)))
        base, ladj = flow.inverse_on_path(x, flow.inv(x))
        return ScoreParts(log_prob, zero, detach(self.base_dist).log_prob(base) - ladj)
