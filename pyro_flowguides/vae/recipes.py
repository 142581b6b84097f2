"""Recipes: one builder per kind of VAE, all with one signature, and their registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from pyro_flowguides.flows import FLOWS
from pyro_flowguides.guides import FlowPosterior
from pyro_flowguides.nn import (
    DenseDecoder,
    DenseEncoder,
    GatedConvDecoder,
    GatedConvEncoder,
    GaussianEncoder,
    ResNetDecoder,
    ResNetEncoder,
)
from pyro_flowguides.vae.base import IAFVAE, VAE
from pyro_flowguides.vae.hierarchical import HierarchicalVAE
from pyro_flowguides.vae.likelihoods import Likelihood, get_likelihood
from pyro_flowguides.vae.posteriors import NormalPosterior
from pyro_flowguides.vae.priors import FlowPrior, StandardNormal, VampPrior

__all__ = ["MODELS", "NETWORKS", "get_network", "make_posterior", "make_prior"]

Options: TypeAlias = Mapping[str, Any]


class Networks(NamedTuple):
    """An encoder ``(data_shape, hidden)`` and a decoder ``(latent_dim, data_shape, parameters, hidden)``."""

    encoder: Callable[..., nn.Module]
    decoder: Callable[..., nn.Module]


def _gated_decoder(
    latent_dim: int, data_shape: Sequence[int], parameters: int, hidden: int | None = None
) -> GatedConvDecoder:
    """The gated decoder, whose first layer reads z itself: the number of the encoder's features is no size of it."""
    return GatedConvDecoder(latent_dim, data_shape, parameters)


#: The networks of a VAE by name.
NETWORKS: dict[str, Networks] = {
    "mlp": Networks(DenseEncoder, DenseDecoder),
    "gated": Networks(GatedConvEncoder, _gated_decoder),
    "resnet": Networks(ResNetEncoder, ResNetDecoder),
}


def get_network(network: str) -> Networks:
    """The encoder and decoder of a registered name.

    Raises:
        ValueError: for an unknown name.
    """
    if network not in NETWORKS:
        raise ValueError(f"unknown network {network!r}: known are {', '.join(NETWORKS)}")
    return NETWORKS[network]


def make_posterior(posterior: str, latent_dim: int, context_dim: int, options: Options | None = None) -> nn.Module:
    """The posterior of a name: ``"normal"`` or one of :data:`~pyro_flowguides.flows.FLOWS`.

    Raises:
        ValueError: for an unknown name, or options that a Gaussian does not have.
    """
    if posterior == "normal":
        _check_no_options("normal posterior", options)
        return NormalPosterior()
    _check_name("posterior", posterior, ["normal"])
    return FlowPosterior(latent_dim, context_dim, posterior, **(options or {}))


def make_prior(
    prior: str, latent_dim: int, data_shape: Sequence[int], likelihood: Likelihood, options: Options | None = None
) -> nn.Module:
    """The prior of a name: ``"normal"``, ``"vamp"`` or one of :data:`~pyro_flowguides.flows.FLOWS`.

    Raises:
        ValueError: for an unknown name, or options that a Gaussian does not have.
    """
    if prior == "normal":
        _check_no_options("normal prior", options)
        return StandardNormal(latent_dim)
    if prior == "vamp":
        return VampPrior(latent_dim, tuple(data_shape), likelihood.low, likelihood.high, **(options or {}))
    _check_name("prior", prior, ["normal", "vamp"])
    return FlowPrior(latent_dim, prior, **(options or {}))


def _check_name(what: str, name: str, others: Sequence[str]) -> None:
    if name not in FLOWS:
        raise ValueError(f"unknown {what} {name!r}: known are {', '.join([*others, *FLOWS])}")


def _check_no_options(what: str, options: Options | None) -> None:
    if options:
        raise ValueError(f"the {what} has no options, got {sorted(options)}")


def _parts(
    data_shape: Sequence[int], likelihood: Likelihood, latent_dim: int, network: str, hidden: int | Sequence[int] | None
) -> tuple[GaussianEncoder, nn.Module]:
    """Encoder and decoder of one family of networks, of the same size."""
    networks, size = get_network(network), {} if hidden is None else {"hidden": hidden}
    encoder = GaussianEncoder(networks.encoder(tuple(data_shape), **size), latent_dim)
    decoder = networks.decoder(latent_dim, tuple(data_shape), likelihood.parameters_per_value, **size)
    return encoder, decoder


def vae(
    data_shape: Sequence[int],
    *,
    likelihood: str | Likelihood = "bernoulli",
    latent_dim: int = 32,
    posterior: str = "iaf",
    posterior_options: Options | None = None,
    prior: str = "normal",
    prior_options: Options | None = None,
    network: str = "mlp",
    hidden: int | Sequence[int] | None = None,
) -> VAE:
    """A VAE with the posterior and the prior of a name.

    Args:
        data_shape: shape of one datum; ``(channels, height, width)`` for the convolutional networks.
        likelihood: a name in :data:`~pyro_flowguides.vae.LIKELIHOODS`, or a likelihood.
        latent_dim: width of z.
        posterior: "normal" or a name in :data:`~pyro_flowguides.flows.FLOWS`.
        posterior_options: passed to the flow's builder.
        prior: "normal", "vamp" or a name in :data:`~pyro_flowguides.flows.FLOWS`.
        prior_options: passed to the flow's builder, or to :class:`~pyro_flowguides.vae.VampPrior`.
        network: a name in :data:`~pyro_flowguides.vae.NETWORKS`.
        hidden: the size of the networks, as their documentation says; by default that of the paper.

    Raises:
        ValueError: for an unknown name or a size that is not positive.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import MODELS
        >>> vae = MODELS["vae"]((1, 8, 8), posterior="planar", prior="maf", latent_dim=4, hidden=[32])
        >>> vae.terms(torch.rand(5, 1, 8, 8), num_samples=2).kl.shape
        torch.Size([2, 5, 1])
    """
    likelihood = get_likelihood(likelihood)
    encoder, decoder = _parts(data_shape, likelihood, latent_dim, network, hidden)
    return VAE(
        encoder,
        decoder,
        likelihood,
        make_posterior(posterior, latent_dim, encoder.context_dim, posterior_options),
        make_prior(prior, latent_dim, data_shape, likelihood, prior_options),
        data_shape=data_shape,
    )


def iafvae(
    data_shape: Sequence[int],
    *,
    likelihood: str | Likelihood = "bernoulli",
    latent_dim: int = 32,
    posterior: str = "iaf",
    posterior_options: Options | None = None,
    prior: str = "normal",
    prior_options: Options | None = None,
    network: str = "mlp",
    hidden: int | Sequence[int] | None = None,
) -> IAFVAE:
    """A VAE with gated inverse autoregressive steps as its posterior (Kingma et al. 2016).

    Arguments as for :func:`vae`.

    Raises:
        ValueError: if ``posterior`` is not "iaf".

    Example:
        >>> from pyro_flowguides.vae import MODELS
        >>> MODELS["iafvae"]((8,), latent_dim=4, posterior_options={"depth": 4}).latent_dim
        4
    """
    if posterior != "iaf":
        raise ValueError(f'iafvae: the posterior is "iaf", got {posterior!r}: use the model "vae" for another one')
    likelihood = get_likelihood(likelihood)
    encoder, decoder = _parts(data_shape, likelihood, latent_dim, network, hidden)
    return IAFVAE(
        encoder,
        decoder,
        likelihood,
        make_prior(prior, latent_dim, data_shape, likelihood, prior_options),
        data_shape=data_shape,
        **(posterior_options or {}),
    )


def hierarchical(
    data_shape: Sequence[int],
    *,
    likelihood: str | Likelihood = "logistic",
    latent_dim: int = 32,
    posterior: str = "iaf",
    posterior_options: Options | None = None,
    prior: str = "normal",
    prior_options: Options | None = None,
    network: str = "resnet",
    hidden: int | None = None,
    **options: Any,
) -> HierarchicalVAE:
    """The hierarchical bidirectional ResNet-IAF (Kingma et al. 2016), whose network and prior are its own.

    Args:
        data_shape: ``(channels, height, width)``.
        likelihood: as for :func:`vae`.
        latent_dim: channels of each layer's latent map.
        posterior: "iaf" or "normal".
        posterior_options: for "iaf": ``steps`` per layer (1) and their ``step_width``.
        prior: "normal", which each layer shifts and scales.
        prior_options: none.
        network: "resnet".
        hidden: channels of the deterministic features (64).
        **options: ``scales`` and ``layers`` of :class:`~pyro_flowguides.vae.HierarchicalVAE`.

    Raises:
        ValueError: for another posterior, prior or network.

    Example:
        >>> from pyro_flowguides.vae import MODELS
        >>> MODELS["hierarchical"]((1, 8, 8), latent_dim=2, hidden=8, scales=1, layers=2).latent_dim
        64
    """
    for what, name, known in (
        ("posterior", posterior, ["iaf", "normal"]),
        ("prior", prior, ["normal"]),
        ("network", network, ["resnet"]),
    ):
        if name not in known:
            raise ValueError(f"hierarchical: the {what} must be {' or '.join(map(repr, known))}, got {name!r}")
    _check_no_options("normal prior", prior_options)
    if posterior == "normal":
        _check_no_options("normal posterior", posterior_options)
        options["steps"] = 0
    return HierarchicalVAE(
        data_shape,
        get_likelihood(likelihood),
        channels=latent_dim,
        width=64 if hidden is None else hidden,
        **(posterior_options or {}),
        **options,
    )


#: Every kind of VAE by name: what the training program, the tests and the benchmarks iterate over.
MODELS: dict[str, Callable[..., VAE]] = {
    "vae": vae,
    "iafvae": iafvae,
    "hierarchical": hierarchical,
}
