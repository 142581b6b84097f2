"""Distributions of flow guides: with the path gradient, of a value given the latent vector, and plain Gaussians."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import detach
from pyro.ops.provenance import detach_provenance
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import register_kl

from pyro_flowguides.programs.types import Site
from pyro_flowguides.transforms import Flow
from pyro_flowguides.transforms.tracing import is_tracing

__all__ = ["DensityDelta", "DensityDeltaMessenger", "PathDistribution", "draw_normal", "normal_log_prob"]


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


class DensityDelta(dist.Delta):
    """A ``Delta`` whose log density is that of the map from the latent vector to the value.

    Pyro's KL divergence of a ``Delta`` leaves its log density out, and ``TraceMeanField_ELBO`` would therefore miss the
    Jacobian of every constrained site. The divergence registered here keeps it.
    """


@register_kl(DensityDelta, dist.Distribution)
def _kl_density_delta(p: DensityDelta, q: dist.Distribution) -> Tensor:
    divergence: Tensor = p.log_density - q.log_prob(p.v)
    return divergence


class DensityDeltaMessenger(Messenger):
    """Replace the ``Delta`` of every site of an autoguide by a :class:`DensityDelta`."""

    def _pyro_sample(self, msg: Site) -> None:
        fn = msg["fn"]
        if type(fn) is dist.Delta:
            msg["fn"] = DensityDelta(fn.v, fn.log_density, fn.event_dim)


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
        >>> from pyro_flowguides.guides.distributions import normal_log_prob
        >>> normal_log_prob(torch.zeros(5, 2), torch.tensor([1.0, 2.0])).shape
        torch.Size([5])
    """
    constant = -0.5 * noise.shape[-1] * math.log(2 * math.pi)
    if scale is None:
        return torch.rsub(noise.square().sum(-1), constant, alpha=0.5)
    return constant - torch.addcmul(scale.log(), noise, noise, value=0.5).sum(-1)
