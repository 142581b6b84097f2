"""Variational autoencoders: one class for any encoder, decoder, likelihood, posterior and prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn

from pyro_flowguides.guides import FlowPosterior
from pyro_flowguides.nn.precision import at_least_float32
from pyro_flowguides.vae.decoders.likelihoods import Likelihood
from pyro_flowguides.vae.models.registration import Registration
from pyro_flowguides.vae.networks import data_dependent_initialization

__all__ = ["IAFVAE", "VAE", "Terms"]


class Terms(NamedTuple):
    """The parts of an evidence lower bound, for S draws of B data and G groups of latent variables."""

    #: log p(x | z), ``(S, B)``.
    log_likelihood: Tensor
    #: log q(z | x) - log p(z) at the draws, by group, ``(S, B, G)``.
    kl: Tensor
    #: The draws, ``(S, B, latent_dim)``.
    z: Tensor

    @property
    def elbo(self) -> Tensor:
        """log p(x, z) - log q(z | x), ``(S, B)``: its mean over S estimates the bound, see also :meth:`VAE.terms`."""
        return self.log_likelihood - self.kl.sum(-1)


class VAE(nn.Module):
    r"""A variational autoencoder with any posterior and any prior.

    .. math::
        \log p(x) \ge E_{q(z \mid x)}\left[\log p(x \mid z) + \log p(z) - \log q(z \mid x)\right]

    :meth:`terms` gives the parts of the bound in one direct pass, for a training loop of plain torch; :meth:`model` and
    :meth:`guide` are the same as Pyro programs, for SVI with any ELBO, vectorized particles included.

    Args:
        encoder: ``x (..., *data_shape) -> loc, scale (..., latent_dim), context (..., context_dim)``, with an attribute
            ``latent_dim``, such as :class:`~pyro_flowguides.nn.GaussianEncoder`.
        decoder: ``z (..., latent_dim) -> (..., *data_shape, likelihood.parameters_per_value)``, any leading dimensions.
        likelihood: what the decoder's numbers mean; it also says how data are scaled for the encoder.
        posterior: ``(loc, scale, context) -> distribution``: a :class:`~pyro_flowguides.guides.FlowPosterior` or a
            :class:`NormalPosterior`; the direct pass uses its ``rsample_and_log_prob``.
        prior: one of :class:`StandardNormal`, :class:`FlowPrior`, :class:`VampPrior`; the direct pass uses its
            ``log_prob``.
        data_shape: shape of one datum.

    Shapes:
        ``x``: ``(B, *data_shape)`` of any dtype, numbers in [0, 1] for a Bernoulli likelihood and whole numbers 0..255
        for the others. Shapes are always checked, values by :meth:`initialize` and :meth:`log_likelihood` only
        (looking at every value would stall a GPU in every training step).

    References:
        D. Kingma, M. Welling (2014). Auto-encoding variational Bayes. arXiv:1312.6114.
        D. Rezende, S. Mohamed, D. Wierstra (2014). Stochastic backpropagation. arXiv:1401.4082.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import MODELS
        >>> vae = MODELS["vae"]((1, 8, 8), latent_dim=4, hidden=[32])
        >>> x = torch.rand(5, 1, 8, 8)
        >>> loss = -vae.terms(x).elbo.mean()
        >>> vae.sample(3).shape
        torch.Size([3, 1, 8, 8])
    """

    encoder: Any
    decoder: Any
    posterior: Any
    prior: Any
    _like: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        posterior: Callable[..., Any],
        prior: nn.Module,
        *,
        data_shape: Sequence[int],
    ) -> None:
        super().__init__()
        self.data_shape = torch.Size(data_shape)
        self.latent_dim = int(encoder.latent_dim)  # type: ignore[arg-type]
        self.encoder, self.decoder, self.likelihood = encoder, decoder, likelihood
        self.posterior, self.prior = posterior, prior
        self._data_dims = tuple(range(-len(self.data_shape), 0))
        self._register = Registration(self)
        self.register_buffer("_like", torch.empty(0), persistent=False)  # its dtype is that of the parameters

    # -- the parts -----------------------------------------------------------------------------------------------------

    def posterior_at(self, x: Tensor) -> Any:
        """q(z | x) as a distribution with batch shape ``(B,)`` and event shape ``(latent_dim,)``."""
        return self.posterior(*self._moments(x))

    def prior_distribution(self) -> Any:
        """p(z) as a distribution with event shape ``(latent_dim,)``."""
        return self.prior(self.posterior_at)

    def decode(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """The parameters of the likelihood, ``(..., *data_shape, P)``, for ``z (..., latent_dim)``.

        A model whose decoder also sees the data (an autoregressive one) overrides this, and :meth:`generate`.
        """
        return at_least_float32(self.decoder(z))

    def conditional_log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        """log p(x | z), ``(...)``, for ``z (..., latent_dim)`` and ``x (B, *data_shape)``."""
        values = self.likelihood.log_prob(self.decode(z, x), x)
        return values.sum(self._data_dims)

    def observation(self, z: Tensor, x: Tensor) -> Any:
        """p(x | z) as a distribution with event shape ``data_shape``."""
        return self.likelihood.distribution(self.decode(z, x)).to_event(len(self.data_shape))

    def generate(self, z: Tensor) -> Tensor:
        """A draw of the data for given latent vectors, ``(..., *data_shape)``."""
        return self.likelihood.sample(self.decode(z))

    def mean(self, z: Tensor) -> Tensor:
        """The expected data for given latent vectors, ``(..., *data_shape)``, in the units of the data."""
        return self.likelihood.mean(self.decode(z))

    def _moments(self, x: Tensor) -> list[Tensor]:
        """Location, scale and context of the posterior."""
        return [at_least_float32(part) for part in self.encoder(self._inputs(x))]

    def _inputs(self, x: Tensor) -> Tensor:
        return self.likelihood.standardize(x.to(self._like.dtype))

    def _check(self, x: Tensor) -> None:
        if x.shape[1:] != self.data_shape or x.dim() == len(self.data_shape):
            raise ValueError(
                f"{type(self).__name__}: expected data of shape (B, {', '.join(map(str, self.data_shape))}), got "
                f"{tuple(x.shape)}: reshape the data, or build the model with data_shape={tuple(x.shape[1:])}"
            )

    # -- the bound -----------------------------------------------------------------------------------------------------

    def terms(self, x: Tensor, num_samples: int = 1) -> Terms:
        """The parts of the bound at reparametrized draws of the posterior, in one pass without Pyro's traces.

        Args:
            x: ``(B, *data_shape)``.
            num_samples: S.
        """
        self._check(x)
        shape = (num_samples,) if num_samples > 1 else ()  # one draw needs no broadcasting
        z, log_q = self.posterior.rsample_and_log_prob(*self._moments(x), shape)
        kl = log_q - self.prior.log_prob(z, self.posterior_at)
        terms = Terms(self.conditional_log_prob(z, x), kl.unsqueeze(-1), z)
        return terms if shape else Terms(*(part.unsqueeze(0) for part in terms))

    def model(self, x: Tensor) -> None:
        """The generative model as a Pyro program: sites ``"z"`` and ``"x"`` in a plate ``"data"`` of dimension -1."""
        self._check(x)
        self._register()
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior_distribution())
            pyro.sample("x", self.observation(z, x), obs=x)

    def guide(self, x: Tensor) -> None:
        """The posterior as a Pyro program."""
        self._check(x)
        self._register()
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.posterior_at(x))

    @torch.no_grad()
    def log_likelihood(self, x: Tensor, num_samples: int = 1000, chunk_size: int = 100) -> Tensor:
        r"""The importance-weighted estimate of :math:`\log p(x)` of each datum.

        .. math:: \log \frac{1}{S} \sum_{s=1}^{S} \frac{p(x, z_s)}{q(z_s \mid x)}, \qquad z_s \sim q(z \mid x)

        a lower bound in expectation, tighter the more draws there are.

        Args:
            x: ``(B, *data_shape)``.
            num_samples: S.
            chunk_size: draws held in memory at a time.

        Returns:
            ``(B,)``.

        References:
            Y. Burda, R. Grosse, R. Salakhutdinov (2016). Importance weighted autoencoders. arXiv:1509.00519.
        """
        if num_samples < 1 or chunk_size < 1:
            raise ValueError(f"num_samples and chunk_size must be at least 1, got {num_samples} and {chunk_size}")
        self.likelihood.check(x)
        chunks = [min(chunk_size, num_samples - done) for done in range(0, num_samples, chunk_size)]
        sums = [self.terms(x, count).elbo.logsumexp(0) for count in chunks]
        return torch.stack(sums).logsumexp(0) - math.log(num_samples)

    # -- looking at a model --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_posterior(self, x: Tensor, num_samples: int = 1) -> Tensor:
        """Latent vectors of data, ``(num_samples, B, latent_dim)``."""
        self._check(x)
        draws: Tensor = self.posterior_at(x).sample((num_samples,))
        return draws

    @torch.no_grad()
    def sample_prior(self, count: int) -> Tensor:
        """Latent vectors from the prior, ``(count, latent_dim)``."""
        draws: Tensor = self.prior_distribution().sample((count,))
        return draws

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """Draws of the data, ``(count, *data_shape)``; for expectations use ``vae.mean(vae.sample_prior(count))``."""
        return self.generate(self.sample_prior(count))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The expected data at one posterior draw for each datum, shaped like ``x``."""
        return self.mean(self.sample_posterior(x)[0])

    @torch.no_grad()
    def traverse(self, x: Tensor, dims: Sequence[int], values: Sequence[float] | Tensor) -> Tensor:
        """What one latent coordinate does: the expected data as it takes each value, the others as in the posterior.

        Args:
            x: ``(B, *data_shape)``.
            dims: coordinates to move, one at a time.
            values: V values to give them.

        Returns:
            ``(B, len(dims), V, *data_shape)``.
        """
        z = self.sample_posterior(x, 64).mean(0)
        grid = z[:, None, None].repeat(1, len(dims), len(values), 1)
        for row, dim in enumerate(dims):
            grid[:, row, :, dim] = torch.as_tensor(values, dtype=z.dtype, device=z.device)
        return self.mean(grid)

    @torch.no_grad()
    def active_units(self, x: Tensor, threshold: float = 0.01, num_samples: int = 64) -> Tensor:
        r"""Which latent coordinates carry information: :math:`\operatorname{Var}_x(E[z_i \mid x])` above the threshold.

        The variance over the data is estimated without bias by the covariance of two independent estimates of the
        posterior mean, so that the noise of the draws activates no unit.

        Args:
            x: ``(B, *data_shape)``, at least 2 data.
            threshold: 0.01 as in the paper.
            num_samples: draws per datum.

        Returns:
            booleans ``(latent_dim,)``.

        References:
            Y. Burda, R. Grosse, R. Salakhutdinov (2016). Importance weighted autoencoders. arXiv:1509.00519.
        """
        if len(x) < 2:
            raise ValueError(f"active_units: a variance over the data needs at least 2 of them, got {len(x)}")
        first, second = (self.sample_posterior(x, num_samples // 2 + 1).mean(0) for _ in range(2))
        covariance = ((first - first.mean(0)) * (second - second.mean(0))).sum(0) / (len(x) - 1)
        return covariance > threshold

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Look at a batch of training data before training: check its values, start what starts from data.

        Weight-normalized layers and the pseudo-inputs of a :class:`VampPrior` do; elsewhere nothing happens.

        Args:
            x: ``(B, *data_shape)``.

        Raises:
            ValueError: if the shape or a value does not fit the model.
        """
        self._check(x)
        self.likelihood.check(x)
        if hasattr(self.prior, "initialize"):
            self.prior.initialize(x)
        with data_dependent_initialization(self):
            self.terms(x)


class IAFVAE(VAE):
    r"""A VAE whose posterior is a chain of inverse autoregressive steps that read the encoder's features.

    Gated steps, the order reversed between them; the gate is normalized so that every step starts at the identity: at
    initialization the posterior has the standard deviation that the encoder gives it, however many steps there are.

    Args:
        encoder, decoder, likelihood, prior, data_shape: as for :class:`VAE`; the encoder also has ``context_dim``.
        **flow_options: those of :func:`~pyro_flowguides.flows.iaf`: ``depth``, ``hidden_dims``, ``update``, …

    References:
        D. Kingma, T. Salimans, R. Jozefowicz, X. Chen, I. Sutskever, M. Welling (2016). Improving variational inference
        with inverse autoregressive flow. arXiv:1606.04934.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import MODELS
        >>> vae = MODELS["iafvae"]((8,), latent_dim=4, hidden=[32], posterior_options={"depth": 2})
        >>> vae.terms(torch.rand(5, 8)).z.shape
        torch.Size([1, 5, 4])
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        prior: nn.Module,
        *,
        data_shape: Sequence[int],
        **flow_options: Any,
    ) -> None:
        options = {"update": "gated", **flow_options}
        posterior = FlowPosterior(int(encoder.latent_dim), int(encoder.context_dim), "iaf", **options)  # type: ignore[arg-type]
        super().__init__(encoder, decoder, likelihood, posterior, prior, data_shape=data_shape)
