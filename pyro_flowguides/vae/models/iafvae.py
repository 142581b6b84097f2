"""A VAE with gated inverse autoregressive steps as its posterior (Kingma et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from pyro_flowguides.guides import FlowPosterior
from pyro_flowguides.vae.decoders.likelihoods import Likelihood
from pyro_flowguides.vae.models.priors import Prior
from pyro_flowguides.vae.models.vae import VAE, Decoder, Encoder

__all__ = ["IAFVAE"]


class ContextEncoder(Encoder, Protocol):
    """An encoder that states the width of its context."""

    context_dim: int


class IAFVAE(VAE):
    r"""A VAE whose posterior is a chain of inverse autoregressive steps that read the encoder's features.

    The steps are gated, and every other one takes the coordinates in reversed order. The gate is normalized so that
    every step starts at the identity. Whatever the number of steps, the posterior thus starts with the standard
    deviation that the encoder gives it.

    Args:
        encoder, decoder, likelihood, prior, data_shape: as for :class:`VAE`; the encoder also has ``context_dim``.
        depth: number of steps.
        hidden_dims: hidden widths of each step's MADE (default 64, 64).
        update: the map of one coordinate, "gated", "affine" or "shift".
        activation: elementwise nonlinearity of the MADEs (default SiLU).
        lowest_degree: lowest degree of a hidden unit; units of degree 0 read only the context (default 0).
        path_gradient: follow the path gradient, see :class:`~pyro_flowguides.guides.FlowPosterior`.

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
        depth: int = 3,
        hidden_dims: Sequence[int] | None = None,
        update: str = "gated",
        activation: Callable[[Tensor], Tensor] | None = None,
        lowest_degree: int | None = None,
        path_gradient: bool = False,
    ) -> None:
        posterior = FlowPosterior(
            encoder.latent_dim,
            encoder.context_dim,
            "iaf",
            depth=depth,
            hidden_dims=hidden_dims,
            update=update,
            activation=activation,
            lowest_degree=lowest_degree,
            path_gradient=path_gradient,
        )
        super().__init__(encoder, decoder, likelihood, posterior, prior, data_shape=data_shape)
