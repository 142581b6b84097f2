"""The variational autoencoder: with any parts, and with inverse autoregressive steps as its posterior."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn

from pyro_flowguides.guides import FlowPosterior
from pyro_flowguides.guides.param_names import Owner, claim_names
from pyro_flowguides.nn.arguments import check_count, check_tensor
from pyro_flowguides.nn.precision import at_least_float32
from pyro_flowguides.vae.decoders.likelihoods import Likelihood
from pyro_flowguides.vae.models.latents import Prior
from pyro_flowguides.vae.networks import data_dependent_initialization

__all__ = ["IAFVAE", "VAE", "ContextEncoder", "Decoder", "Encoder", "Posterior", "Terms"]

#: The attribute of a model in the names of its parameters in Pyro's store.
STORE_ATTRIBUTE = "vae"


class Terms(NamedTuple):
    """The parts of an evidence lower bound, for S draws, B data and G groups of latent variables."""

    #: log p(x | z), ``(S, B)``.
    log_likelihood: Tensor
    #: log q(z | x) - log p(z) at the draws, by group, ``(S, B, G)``.
    kl: Tensor
    #: The draws, ``(S, B, latent_dim)``.
    z: Tensor

    @property
    def elbo(self) -> Tensor:
        """log p(x, z) - log q(z | x), ``(S, B)``; its mean over the draws estimates the bound."""
        return self.log_likelihood - self.kl.sum(-1)


#: A network from ``z (..., latent_dim)`` to the parameters of a likelihood.
Decoder: TypeAlias = Callable[[Tensor], Tensor]


class Encoder(Protocol):
    """A network from data ``(..., *data_shape)`` to location, scale and context of a posterior."""

    latent_dim: int

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


class ContextEncoder(Encoder, Protocol):
    """An encoder that states the width of its context."""

    context_dim: int


class Posterior(Protocol):
    """A family of posteriors, whose members an encoder chooses by location, scale and context."""

    def __call__(self, loc: Tensor, scale: Tensor, context: Tensor) -> dist.TorchDistribution: ...

    def rsample_and_log_prob(
        self, loc: Tensor, scale: Tensor, context: Tensor, sample_shape: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]: ...


class VAE(nn.Module):
    r"""A variational autoencoder with any posterior and any prior.

    .. math::
        \log p(x) \ge E_{q(z \mid x)}\left[\log p(x \mid z) + \log p(z) - \log q(z \mid x)\right]

    :meth:`terms` returns the parts of the bound from one pass in plain torch, for a training loop of your own.
    :meth:`model` and :meth:`guide` are the same model as Pyro programs, for SVI with any ELBO and with vectorized
    particles.

    Args:
        encoder: ``x (..., *data_shape) -> loc, scale (..., latent_dim), context (..., context_dim)``, with an attribute
            ``latent_dim``, such as :class:`~pyro_flowguides.vae.GaussianEncoder`.
        decoder: ``z (..., latent_dim) -> (..., *data_shape, likelihood.parameters_per_value)``.
        likelihood: the distribution that the decoder's output parametrizes; it also scales the data for the encoder.
        posterior: ``(loc, scale, context) -> distribution``, with a method ``rsample_and_log_prob``: a
            :class:`~pyro_flowguides.guides.FlowPosterior` or a :class:`NormalPosterior`.
        prior: a :class:`StandardNormal`, :class:`FlowPrior` or :class:`VampPrior`.
        data_shape: shape of one datum.

    Shapes:
        ``x``: ``(B, *data_shape)`` of any dtype, numbers in [0, 1] for a Bernoulli likelihood and whole numbers 0..255
        for the others. Every method checks the shape. Only :meth:`initialize` and :meth:`log_likelihood` check the
        values, since a check in every training step would stall a GPU.

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

    encoder: Encoder
    decoder: Decoder
    posterior: Posterior
    prior: Prior
    _dtype_reference: Tensor

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        likelihood: Likelihood,
        posterior: Posterior,
        prior: Prior,
        *,
        data_shape: Sequence[int],
    ) -> None:
        super().__init__()
        self.data_shape = torch.Size(data_shape)
        self.latent_dim = encoder.latent_dim
        self.encoder, self.decoder, self.likelihood = encoder, decoder, likelihood
        self.posterior, self.prior = posterior, prior
        self._data_dims = tuple(range(-len(self.data_shape), 0))
        self._register = _StoreRegistration(self)
        self.register_buffer("_dtype_reference", torch.empty(0), persistent=False)  # follows .to(dtype)

    def posterior_at(self, x: Tensor) -> dist.TorchDistribution:
        """Return q(z | x), a distribution with batch shape ``(B,)`` and event shape ``(latent_dim,)``."""
        return self.posterior(*self._encode(x))

    def prior_distribution(self) -> dist.TorchDistribution:
        """Return p(z), a distribution with event shape ``(latent_dim,)``."""
        return self.prior(self.posterior_at)

    def decode(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """Return the parameters of the likelihood, ``(..., *data_shape, P)``, for ``z (..., latent_dim)``."""
        return at_least_float32(self.decoder(z))

    def conditional_log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        """Return log p(x | z), ``(...)``, for ``z (..., latent_dim)`` and ``x (B, *data_shape)``."""
        return self.likelihood.log_prob(self.decode(z, x), x).sum(self._data_dims)

    def observation(self, z: Tensor, x: Tensor) -> dist.TorchDistribution:
        """Return p(x | z), a distribution with event shape ``data_shape``."""
        return self.likelihood.distribution(self.decode(z, x)).to_event(len(self.data_shape))

    def generate(self, z: Tensor) -> Tensor:
        """Draw data given latent vectors, ``(..., *data_shape)``."""
        return self.likelihood.sample(self.decode(z))

    def mean(self, z: Tensor) -> Tensor:
        """Return the expected data given latent vectors, ``(..., *data_shape)``, in the units of the data."""
        return self.likelihood.mean(self.decode(z))

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return location, scale and context of the posterior."""
        loc, scale, context = self.encoder(self._standardize(x))
        return at_least_float32(loc), at_least_float32(scale), at_least_float32(context)

    def _standardize(self, x: Tensor) -> Tensor:
        return self.likelihood.standardize(x.to(self._dtype_reference.dtype))

    def _check_draws(self, x: Tensor, num_samples: int) -> None:
        check_count(type(self).__name__, "num_samples", num_samples)
        self._check_shape(x)

    def _check_shape(self, x: Tensor) -> None:
        check_tensor(type(self).__name__, "x", x)
        if x.shape[1:] != self.data_shape or x.dim() == len(self.data_shape):
            raise ValueError(
                f"{type(self).__name__}: expected data of shape (B, {', '.join(map(str, self.data_shape))}), got "
                f"{tuple(x.shape)}: reshape the data, or build the model with data_shape={tuple(x.shape[1:])}"
            )

    def terms(self, x: Tensor, num_samples: int = 1) -> Terms:
        """Return the parts of the bound at reparametrized draws of the posterior, without Pyro's traces.

        Args:
            x: ``(B, *data_shape)``.
            num_samples: S.
        """
        self._check_draws(x, num_samples)
        sample_shape = (num_samples,) if num_samples > 1 else ()  # a single draw needs no broadcasting
        z, log_q = self.posterior.rsample_and_log_prob(*self._encode(x), sample_shape)
        kl = log_q - self.prior.log_prob(z, self.posterior_at)
        terms = Terms(self.conditional_log_prob(z, x), kl.unsqueeze(-1), z)
        return terms if sample_shape else Terms(*(part.unsqueeze(0) for part in terms))

    def model(self, x: Tensor) -> None:
        """Run the generative model as a Pyro program: sites ``"z"`` and ``"x"`` in a plate ``"data"`` at dim -1."""
        self._check_shape(x)
        self._register()
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior_distribution())
            pyro.sample("x", self.observation(z, x), obs=x)

    def guide(self, x: Tensor) -> None:
        """Run the posterior as a Pyro program."""
        self._check_shape(x)
        self._register()
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.posterior_at(x))

    @torch.no_grad()
    def log_likelihood(self, x: Tensor, num_samples: int = 1000, chunk_size: int = 100) -> Tensor:
        r"""Return the importance-weighted estimate of :math:`\log p(x)` for each datum.

        .. math:: \log \frac{1}{S} \sum_{s=1}^{S} \frac{p(x, z_s)}{q(z_s \mid x)}, \qquad z_s \sim q(z \mid x)

        In expectation it is a lower bound, which more draws tighten.

        Args:
            x: ``(B, *data_shape)``.
            num_samples: S.
            chunk_size: draws held in memory at a time.

        Returns:
            ``(B,)``.

        Raises:
            ValueError: if the data do not fit the model, or an argument is not positive.

        References:
            Y. Burda, R. Grosse, R. Salakhutdinov (2016). Importance weighted autoencoders. arXiv:1509.00519.
        """
        if num_samples < 1 or chunk_size < 1:
            raise ValueError(f"num_samples and chunk_size must be at least 1, got {num_samples} and {chunk_size}")
        self.likelihood.check(x)
        chunks = [min(chunk_size, num_samples - done) for done in range(0, num_samples, chunk_size)]
        sums = [self.terms(x, count).elbo.logsumexp(0) for count in chunks]
        return torch.stack(sums).logsumexp(0) - math.log(num_samples)

    @torch.no_grad()
    def sample_posterior(self, x: Tensor, num_samples: int = 1) -> Tensor:
        """Draw latent vectors from the posterior of each datum, ``(num_samples, B, latent_dim)``."""
        self._check_draws(x, num_samples)
        return self.posterior_at(x).sample((num_samples,))

    @torch.no_grad()
    def sample_prior(self, num_samples: int) -> Tensor:
        """Draw latent vectors from the prior, ``(num_samples, latent_dim)``."""
        check_count(type(self).__name__, "num_samples", num_samples)
        return self.prior_distribution().sample((num_samples,))

    @torch.no_grad()
    def sample(self, num_samples: int) -> Tensor:
        """Draw data, ``(num_samples, *data_shape)``; for expected data, use ``vae.mean(vae.sample_prior(n))``."""
        return self.generate(self.sample_prior(num_samples))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the expected data at one posterior draw for each datum, shaped like ``x``."""
        return self.mean(self.sample_posterior(x)[0])

    @torch.no_grad()
    def traverse(self, x: Tensor, dims: Sequence[int], values: Sequence[float] | Tensor) -> Tensor:
        """Return the expected data as one latent coordinate varies and the others keep their posterior mean.

        Args:
            x: ``(B, *data_shape)``.
            dims: coordinates to vary, one at a time.
            values: V values that each of them takes.

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
        r"""Find the latent coordinates with :math:`\operatorname{Var}_x(E[z_i \mid x])` above the threshold.

        The covariance of two independent estimates of the posterior mean estimates the variance over the data without
        bias, so that noise of the draws activates no unit.

        Args:
            x: ``(B, *data_shape)``, at least 2 data.
            threshold: 0.01 in the paper.
            num_samples: draws per datum.

        Returns:
            booleans ``(latent_dim,)``.

        Raises:
            ValueError: if there are fewer than 2 data.

        References:
            Y. Burda, R. Grosse, R. Salakhutdinov (2016). Importance weighted autoencoders. arXiv:1509.00519.
        """
        if len(x) < 2:
            raise ValueError(f"active_units: the variance over the data needs at least 2 data, got {len(x)}")
        first, second = (self.sample_posterior(x, num_samples // 2 + 1).mean(0) for _ in range(2))
        covariance = ((first - first.mean(0)) * (second - second.mean(0))).sum(0) / (len(x) - 1)
        return covariance > threshold

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Check the values of a batch of training data, and initialize whatever depends on data.

        That is weight-normalized layers and the pseudo-inputs of a :class:`VampPrior`. Call it before training.

        Args:
            x: ``(B, *data_shape)``.

        Raises:
            ValueError: if the shape or a value does not fit the model.
        """
        self._check_shape(x)
        self.likelihood.check(x)
        self.prior.initialize(x)
        with data_dependent_initialization(self):
            self.terms(x)


class IAFVAE(VAE):
    r"""A VAE whose posterior is a chain of inverse autoregressive steps that read the encoder's features.

    The steps are gated, and every other one takes the coordinates in reversed order. The gate is normalized so that
    every step starts at the identity. Whatever the number of steps, the posterior thus starts with the standard
    deviation that the encoder gives it.

    Args:
        encoder, decoder, likelihood, prior, data_shape: as for :class:`VAE`; the encoder also has ``context_dim``.
        update: the map of one coordinate, "gated", "affine" or "shift".
        path_gradient: follow the path gradient, see :class:`~pyro_flowguides.guides.FlowPosterior`.
        **flow_options: other options of :func:`~pyro_flowguides.flows.iaf`, such as ``depth`` and ``hidden_dims``.

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
        encoder: ContextEncoder,
        decoder: Decoder,
        likelihood: Likelihood,
        prior: Prior,
        *,
        data_shape: Sequence[int],
        update: str = "gated",
        path_gradient: bool = False,
        **flow_options: object,
    ) -> None:
        posterior = FlowPosterior(
            encoder.latent_dim, encoder.context_dim, "iaf", path_gradient=path_gradient, update=update, **flow_options
        )
        super().__init__(encoder, decoder, likelihood, posterior, prior, data_shape=data_shape)


class _StoreRegistration:
    """Register the parameters of a module in Pyro's parameter store, like :func:`pyro.module`.

    Unlike there, several modules of one class and copies of a module have parameters of their own, frozen parameters
    are left out, and values of a loaded store are copied into the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._pyro_name = type(module).__name__
        self._modules: dict[str, nn.Module | None] = {STORE_ATTRIBUTE: module}
        self._owner = Owner()

    def __call__(self) -> None:
        with pyro.settings.context(module_local_params=False):  # only a PyroModule has a store of its own
            claim_names(self, STORE_ATTRIBUTE, self._owner)
        for name, parameter in cast("nn.Module", self._modules[STORE_ATTRIBUTE]).named_parameters():
            if parameter.requires_grad:
                pyro.param(param_with_module_name(f"{self._pyro_name}.{STORE_ATTRIBUTE}", name), parameter)
