"""Distributions of the latent vector of a VAE: its priors, and the Gaussian posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_flowguides.flows import Builder, check_options, get_flow
from pyro_flowguides.guides.distributions import draw_normal, normal_log_prob
from pyro_flowguides.nn.arguments import check_count
from pyro_flowguides.transforms import Flow

__all__ = ["FlowPrior", "NormalPosterior", "PosteriorAt", "Prior", "StandardNormal", "VampPrior"]

#: A function from data to the posterior over their latent vectors.
PosteriorAt: TypeAlias = Callable[[Tensor], dist.TorchDistribution]


class Prior(nn.Module):
    """A distribution over the latent vector of a VAE.

    The distribution is made anew at every step, from the parameters of the prior and, if it needs it, the posterior.

    Args:
        latent_dim: D.

    Raises:
        ValueError: if ``latent_dim`` is not positive.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        check_count(type(self).__name__, "latent_dim", latent_dim)
        self.latent_dim = latent_dim

    def initialize(self, x: Tensor) -> None:
        """Choose initial parameters from training data; by default they do not depend on data."""

    def forward(self, posterior_at: PosteriorAt) -> dist.TorchDistribution:
        """Return the prior, a distribution with event shape ``(latent_dim,)``."""
        raise NotImplementedError

    def log_prob(self, z: Tensor, posterior_at: PosteriorAt) -> Tensor:
        """Return the log density of ``z (..., latent_dim)``, for training loops of plain torch."""
        return self(posterior_at).log_prob(z)


class StandardNormal(Prior):
    r"""The fixed prior :math:`N(0, I)`.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import StandardNormal
        >>> StandardNormal(3)(None).sample((5,)).shape
        torch.Size([5, 3])
    """

    zeros: Tensor
    ones: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.register_buffer("zeros", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("ones", torch.ones(latent_dim), persistent=False)

    def forward(self, posterior_at: PosteriorAt) -> dist.TorchDistribution:
        return dist.Normal(self.zeros, self.ones, validate_args=False).to_event(1)

    def log_prob(self, z: Tensor, posterior_at: PosteriorAt) -> Tensor:
        return normal_log_prob(z)


class FlowPrior(Prior):
    r"""A learned prior: a flow of a standard normal, in the direction in which its density is cheap.

    .. math:: \log p(z) = \log N(\varepsilon) + \log\left|\det \frac{\partial \varepsilon}{\partial z}\right|

    Training scores draws of the posterior and never draws from the prior. So :math:`z \mapsto \varepsilon` is the cheap
    direction of the flow: forward, or inverse for ``"maf"``.

    Cost: a density takes one pass in the cheap direction, a draw one pass in the other. For ``"iaf"`` and ``"maf"`` the
    other pass solves for one coordinate after another, with the arithmetic of two to three cheap passes in many small
    steps. Planar, radial and Sylvester flows solve scalar equations there; couplings cost the same in both directions.

    Args:
        latent_dim: D.
        flow: a name in :data:`~pyro_flowguides.flows.FLOWS`, or a builder.
        **flow_options: options of the builder.

    Raises:
        ValueError: if the name is unknown, or the builder returns no unconditional flow.

    References:
        X. Chen et al. (2017). Variational lossy autoencoder. arXiv:1611.02731.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import FlowPrior
        >>> FlowPrior(3, "maf", depth=2)(None).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(self, latent_dim: int, flow: str | Builder = "maf", **flow_options: object) -> None:
        super().__init__(latent_dim)
        builder = get_flow(flow)
        check_options("FlowPrior", builder, flow_options)
        built = builder(latent_dim, **flow_options)
        if not isinstance(built, Flow):
            raise ValueError(f"FlowPrior: the builder must return an unconditional Flow, got {type(built).__name__}")
        self.flow: Flow = built
        self.base = StandardNormal(latent_dim)

    def forward(self, posterior_at: PosteriorAt) -> dist.TorchDistribution:
        transform = self.flow if self.flow.cheap_direction == "inverse" else self.flow.inv
        return dist.TransformedDistribution(self.base(posterior_at), [transform], validate_args=False)

    def log_prob(self, z: Tensor, posterior_at: PosteriorAt) -> Tensor:
        if self.flow.cheap_direction == "inverse":
            noise, ladj = self.flow.inverse_and_ladj(z)
            return normal_log_prob(noise) - ladj
        noise, ladj = self.flow.forward_and_ladj(z)
        return normal_log_prob(noise) + ladj


class VampPrior(Prior):
    r"""A mixture of the model's own posteriors at K learned pseudo-inputs.

    .. math:: p(z) = \frac{1}{K} \sum_{k=1}^{K} q_\phi(z \mid u_k)

    The pseudo-inputs start at random, or at training data (:meth:`initialize`), and stay within the range of the data.

    Cost: a density evaluates K posteriors at every point, which inverts a flow posterior K times per point. An inverse
    costs a pass for couplings, and the arithmetic of two to three passes in many small steps for ``"iaf"``.

    Args:
        latent_dim: D.
        data_shape: shape of one datum.
        low, high: range of the data.
        components: K.

    Raises:
        ValueError: if an argument is not positive.

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
        self, latent_dim: int, data_shape: tuple[int, ...], low: float = 0.0, high: float = 1.0, components: int = 500
    ) -> None:
        super().__init__(latent_dim)
        check_count("VampPrior", "components", components)
        self.low, self.high = low, high
        self.raw = nn.Parameter(torch.randn(components, *data_shape))

    @property
    def pseudo_inputs(self) -> Tensor:
        """``(K, *data_shape)``, within the range of the data."""
        return self.low + (self.high - self.low) * self.raw.sigmoid()

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set the pseudo-inputs to data, drawn with replacement if there are fewer than K."""
        count = len(self.raw)
        chosen = torch.randperm(len(x))[:count] if len(x) >= count else torch.randint(len(x), (count,))
        fraction = (x[chosen.to(x.device)].to(self.raw) - self.low) / (self.high - self.low)
        self.raw.copy_(fraction.clamp(0.02, 0.98).logit())

    def forward(self, posterior_at: PosteriorAt) -> dist.TorchDistribution:
        return _PosteriorMixture(posterior_at, self.pseudo_inputs)


class _PosteriorMixture(TorchDistribution):
    """The mixture with equal weights of the posteriors at given inputs ``(K, *data_shape)``."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, posterior_at: PosteriorAt, inputs: Tensor, batch_shape: Sequence[int] = ()) -> None:
        self.posterior_at, self.inputs = posterior_at, inputs
        self.components = posterior_at(inputs)
        super().__init__(torch.Size(batch_shape), self.components.event_shape, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: _PosteriorMixture | None = None) -> _PosteriorMixture:
        new = self._get_checked_instance(_PosteriorMixture, _instance)
        new.posterior_at, new.inputs, new.components = self.posterior_at, self.inputs, self.components
        super(_PosteriorMixture, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        return self.components.log_prob(value[..., None, :]).logsumexp(-1) - math.log(len(self.inputs))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        chosen = torch.randint(len(self.inputs), (shape.numel(),), device=self.inputs.device)
        return self.posterior_at(self.inputs[chosen]).sample().reshape(shape + self.event_shape)


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
