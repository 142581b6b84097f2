"""Priors over the latent vector of a VAE: fixed, a learned flow, a mixture of posteriors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_flowguides.flows import Builder, get_flow
from pyro_flowguides.guides.normal_density import normal_log_prob
from pyro_flowguides.transforms import Flow

__all__ = ["FlowPrior", "Posterior", "StandardNormal", "VampPrior"]

#: From data to the posterior over their latent vectors.
Posterior: TypeAlias = Callable[[Tensor], Any]


class _Prior(nn.Module):
    """A distribution over ``(latent_dim,)``, made anew for every step from what it may need of the VAE."""

    zeros: Tensor
    ones: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"{type(self).__name__}: latent_dim must be at least 1, got {latent_dim}")
        self.latent_dim = latent_dim
        self.register_buffer("zeros", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("ones", torch.ones(latent_dim), persistent=False)

    def _standard_normal(self) -> dist.Distribution:
        return dist.Normal(self.zeros, self.ones, validate_args=False).to_event(1)

    def initialize(self, x: Tensor) -> None:
        """Use some training data to start from."""

    def forward(self, posterior: Posterior) -> Any:
        """The prior as a distribution with event shape ``(latent_dim,)``."""
        raise NotImplementedError

    def log_prob(self, z: Tensor, posterior: Posterior) -> Tensor:
        """The log density of ``z (..., latent_dim)``, for loops of plain torch."""
        log_prob: Tensor = self(posterior).log_prob(z)
        return log_prob


class StandardNormal(_Prior):
    r"""The fixed prior :math:`N(0, I)`.

    Args:
        latent_dim: D.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import StandardNormal
        >>> StandardNormal(3)(None).sample((5,)).shape
        torch.Size([5, 3])
    """

    def forward(self, posterior: Posterior) -> Any:
        return self._standard_normal()

    def log_prob(self, z: Tensor, posterior: Posterior) -> Tensor:
        return normal_log_prob(z)


class FlowPrior(_Prior):
    r"""A learned prior: a standard normal pushed through a flow, in the direction in which its density is cheap.

    .. math:: \log p(z) = \log N(\varepsilon) + \log\left|\det \frac{\partial \varepsilon}{\partial z}\right|

    Training scores posterior draws and never draws from the prior, so :math:`z \mapsto \varepsilon` is the pass to make
    cheap: it is the forward pass f of the flow, and :math:`f^{-1}` only for a flow that is fast in no other direction
    (``"maf"``).

    Cost: density one pass, cheap for every flow; a draw is one pass in the other direction, at most D sequential steps.

    Args:
        latent_dim: D.
        flow: a name in :data:`~pyro_flowguides.flows.FLOWS`, or a builder.
        **flow_options: passed to the builder.

    References:
        X. Chen et al. (2017). Variational lossy autoencoder. arXiv:1611.02731.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import FlowPrior
        >>> FlowPrior(3, "maf", depth=2)(None).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(self, latent_dim: int, flow: str | Builder = "maf", **flow_options: Any) -> None:
        super().__init__(latent_dim)
        built = get_flow(flow)(latent_dim, **flow_options)
        if not isinstance(built, Flow):
            raise ValueError(f"FlowPrior: the builder must return an unconditional Flow, got {type(built).__name__}")
        self.flow: Flow = built

    def forward(self, posterior: Posterior) -> Any:
        transform = self.flow if self.flow.fast == "inverse" else self.flow.inv
        return dist.TransformedDistribution(self._standard_normal(), [transform], validate_args=False)

    def log_prob(self, z: Tensor, posterior: Posterior) -> Tensor:
        if self.flow.fast == "inverse":
            noise, ladj = self.flow.inverse_and_ladj(z)
            return normal_log_prob(noise) - ladj
        noise, ladj = self.flow.forward_and_ladj(z)
        return normal_log_prob(noise) + ladj


class VampPrior(_Prior):
    r"""A mixture of the model's own posteriors at K learned pseudo-inputs.

    .. math:: p(z) = \frac{1}{K} \sum_{k=1}^{K} q_\phi(z \mid u_k)

    The pseudo-inputs start at random, or at training data (:meth:`initialize`), and stay within the range of the data.

    Cost: a density evaluates K posteriors at every point; with a flow posterior that means K inversions of the flow,
    cheap for couplings, O(K D) network passes in the worst case for ``"iaf"``.

    Args:
        latent_dim: D.
        data_shape: shape of one datum.
        low, high: range of the data.
        components: K.

    References:
        J. Tomczak, M. Welling (2018). VAE with a VampPrior. arXiv:1705.07120.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import MODELS
        >>> vae = MODELS["vae"]((8,), latent_dim=2, posterior="normal", prior="vamp", prior_options={"components": 5})
        >>> vae.prior_distribution().log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    def __init__(
        self,
        latent_dim: int,
        data_shape: tuple[int, ...],
        low: float = 0.0,
        high: float = 1.0,
        components: int = 500,
    ) -> None:
        super().__init__(latent_dim)
        if components < 1:
            raise ValueError(f"VampPrior: components must be at least 1, got {components}")
        self.low, self.high = low, high
        self.raw = nn.Parameter(torch.randn(components, *data_shape))

    @property
    def pseudo_inputs(self) -> Tensor:
        """``(K, *data_shape)``, within the range of the data."""
        return self.low + (self.high - self.low) * self.raw.sigmoid()

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Start the pseudo-inputs at data, drawn with replacement where there are fewer than K."""
        count = len(self.raw)
        chosen = torch.randperm(len(x))[:count] if len(x) >= count else torch.randint(len(x), (count,))
        fraction = (x[chosen.to(x.device)].to(self.raw) - self.low) / (self.high - self.low)
        self.raw.copy_(fraction.clamp(0.02, 0.98).logit())

    def forward(self, posterior: Posterior) -> Any:
        return _Mixture(posterior, self.pseudo_inputs)


class _Mixture(TorchDistribution):
    """The even mixture of the posteriors at given inputs ``(K, *data_shape)``."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, posterior: Posterior, inputs: Tensor, batch_shape: torch.Size = torch.Size()) -> None:  # noqa: B008
        self.posterior, self.inputs = posterior, inputs
        self.components = posterior(inputs)
        super().__init__(batch_shape, self.components.event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Mixture:
        new = self._get_checked_instance(_Mixture, _instance)
        new.posterior, new.inputs, new.components = self.posterior, self.inputs, self.components
        super(_Mixture, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        log_probs: Tensor = self.components.log_prob(value[..., None, :])
        return log_probs.logsumexp(-1) - math.log(len(self.inputs))

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  torch's own default
        shape = torch.Size(sample_shape) + self.batch_shape
        chosen = torch.randint(len(self.inputs), (shape.numel(),), device=self.inputs.device)
        draws: Tensor = self.posterior(self.inputs[chosen]).sample()
        return draws.reshape(shape + self.event_shape)
