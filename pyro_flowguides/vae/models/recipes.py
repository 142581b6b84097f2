"""Recipes: one builder per kind of VAE, all with one signature, and their registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from pyro_flowguides.flows import FLOWS
from pyro_flowguides.guides import FlowPosterior
from pyro_flowguides.vae.decoders import AutoregressiveNetwork
from pyro_flowguides.vae.decoders.autoregressive_distribution import PixelLikelihood
from pyro_flowguides.vae.decoders.likelihoods import Likelihood, get_likelihood
from pyro_flowguides.vae.models.base import IAFVAE, VAE
from pyro_flowguides.vae.models.hierarchical import HierarchicalVAE
from pyro_flowguides.vae.models.normal_posterior import NormalPosterior
from pyro_flowguides.vae.models.priors import FlowPrior, StandardNormal, VampPrior
from pyro_flowguides.vae.models.vlae import VLAE, make_decoder
from pyro_flowguides.vae.networks import (
    DenseDecoder,
    DenseEncoder,
    GatedConvDecoder,
    GatedConvEncoder,
    GaussianEncoder,
    ResNetDecoder,
    ResNetEncoder,
    SpatialDecoder,
    SpatialEncoder,
)

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


#: The prior of the variational lossy autoencoder: four mean-only steps with MADEs of three layers of 640 ReLU units.
VLAE_PRIOR: Options = {"depth": 4, "hidden_dims": (640,) * 3, "update": "shift", "activation": torch.nn.functional.relu}


def vlae(
    data_shape: Sequence[int],
    *,
    likelihood: str | Likelihood = "bernoulli",
    latent_dim: int = 64,
    posterior: str = "normal",
    posterior_options: Options | None = None,
    prior: str = "maf",
    prior_options: Options | None = None,
    network: str = "resnet",
    hidden: int | Sequence[int] | None = None,
    decoder: str = "pixelcnn",
    decoder_options: Options | None = None,
    maps: int = 4,
) -> VLAE:
    """A variational lossy autoencoder (Chen et al. 2017); by default as published for binary images.

    The decoder's maps are read beside the image by a :class:`~pyro_flowguides.nn.PixelCNN` of six masked 3×3
    convolutions with 12 filters and four 1×1 blocks; the prior is an autoregressive flow of four mean-only steps.
    Train it with free bits of 0.01 nat per value of the data, Adamax at 2e-3 and an average of the weights (0.998).

    Args:
        data_shape: ``(channels, height, width)``; ``(channels, length)`` for the networks that read z itself.
        likelihood, latent_dim, posterior, posterior_options, network, hidden: as for :func:`vae`.
        prior: as for :func:`vae`; "maf" has the published options unless ``prior_options`` say otherwise.
        prior_options: passed to the prior.
        decoder: a name in :data:`~pyro_flowguides.vae.DECODERS`.
        decoder_options: passed to its network, such as ``reach``, the size of the window.
        maps: maps that the network reads beside the image; 0 for an autoregressive model that ignores z.

    Raises:
        ValueError: for an unknown name or a size that is not positive.

    Example:
        >>> from pyro_flowguides.vae import MODELS
        >>> vae = MODELS["vlae"]((1, 8, 8), latent_dim=4, decoder="gated_pixelcnn", decoder_options={"reach": 2})
        >>> vae.network.reach
        2
    """
    built, pixels = make_decoder(decoder, data_shape, likelihood, latent_dim, maps, decoder_options)
    size = {} if hidden is None else {"hidden": hidden}
    networks = get_network(network)
    encoder = GaussianEncoder(networks.encoder(tuple(data_shape), **size), latent_dim)
    makes_maps = networks.decoder(latent_dim, (built.maps, *data_shape[1:]), 1, **size) if built.maps else None
    return _vlae(encoder, makes_maps, built, pixels, data_shape, posterior, posterior_options, prior, prior_options)


def spatial_vlae(
    data_shape: Sequence[int],
    *,
    likelihood: str | Likelihood = "logistic_mixture",
    latent_dim: int,
    posterior: str = "normal",
    posterior_options: Options | None = None,
    prior: str = "maf",
    prior_options: Options | None = None,
    network: str = "resnet",
    hidden: int = 32,
    decoder: str = "pixelcnn++",
    decoder_options: Options | None = None,
    maps: int = 8,
) -> VLAE:
    """A variational lossy autoencoder for grey and color images, whose z is an image of a quarter of the size.

    The decoder is by default a :class:`~pyro_flowguides.nn.PixelCNNPlusPlus` of one resolution and one block, which
    sees a window of seven rows, with a mixture of logistics over whole pixels.

    Args:
        data_shape: ``(channels, height, width)``.
        latent_dim: a multiple of the number of pixels of the latent image.
        hidden: feature maps of encoder and decoder.
        network: "resnet", the only one with a latent image.
        likelihood, posterior, posterior_options, prior, prior_options, decoder, decoder_options, maps: as for
            :func:`vlae`.

    Raises:
        ValueError: for an unknown name, or a ``latent_dim`` that does not fit the image.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import MODELS
        >>> vae = MODELS["spatial_vlae"]((3, 8, 8), latent_dim=8, hidden=8, prior_options={"hidden_dims": [16]})
        >>> vae.terms(torch.randint(0, 256, (2, 3, 8, 8))).z.shape
        torch.Size([1, 2, 8])
    """
    if network != "resnet":
        raise ValueError(
            f'spatial_vlae: the network is "resnet", got {network!r}: use the model "vlae" for another one'
        )
    options = {"filters": 32, "blocks": 1, "levels": 1, "dropout": 0.0} if decoder == "pixelcnn++" else {}
    options |= decoder_options or {}
    built, pixels = make_decoder(decoder, data_shape, likelihood, latent_dim, maps, options)
    encoder = SpatialEncoder(data_shape, latent_dim, hidden)
    makes_maps = SpatialDecoder(latent_dim, (built.maps, *data_shape[1:]), 1, hidden) if built.maps else None
    return _vlae(encoder, makes_maps, built, pixels, data_shape, posterior, posterior_options, prior, prior_options)


def _vlae(
    encoder: GaussianEncoder | SpatialEncoder,
    decoder: nn.Module | None,
    network: AutoregressiveNetwork,
    pixels: PixelLikelihood,
    data_shape: Sequence[int],
    posterior: str,
    posterior_options: Options | None,
    prior: str,
    prior_options: Options | None,
) -> VLAE:
    options = {**VLAE_PRIOR, **(prior_options or {})} if prior == "maf" else prior_options
    return VLAE(
        encoder,
        decoder,
        network,
        pixels,
        make_posterior(posterior, encoder.latent_dim, encoder.context_dim, posterior_options),
        make_prior(prior, encoder.latent_dim, data_shape, pixels.values, options),
        data_shape=data_shape,
    )


#: Every kind of VAE by name: what the training program, the tests and the benchmarks iterate over.
MODELS: dict[str, Callable[..., VAE]] = {
    "vae": vae,
    "iafvae": iafvae,
    "hierarchical": hierarchical,
    "vlae": vlae,
    "spatial_vlae": spatial_vlae,
}
