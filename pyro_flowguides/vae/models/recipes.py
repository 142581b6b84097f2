"""Recipes: one builder for each kind of VAE, and their registry.

All builders share the arguments of :func:`vae`; some have options of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from torch.nn import functional as F

from pyro_flowguides.vae.decoders import Likelihood, PixelLikelihood, make_decoder
from pyro_flowguides.vae.decoders.likelihoods import get_likelihood
from pyro_flowguides.vae.models.components import Options, check_no_options, get_networks, make_posterior, make_prior
from pyro_flowguides.vae.models.hierarchical import HierarchicalVAE
from pyro_flowguides.vae.models.iafvae import IAFVAE
from pyro_flowguides.vae.models.priors import Prior
from pyro_flowguides.vae.models.vae import VAE
from pyro_flowguides.vae.models.vlae import VLAE
from pyro_flowguides.vae.networks import GaussianEncoder, SpatialDecoder, SpatialEncoder

__all__ = ["MODELS", "hierarchical", "iafvae", "spatial_vlae", "vae", "vlae"]


def _make_networks(
    data_shape: Sequence[int], likelihood: Likelihood, latent_dim: int, network: str, hidden: int | Sequence[int] | None
) -> tuple[GaussianEncoder, nn.Module]:
    """Build an encoder and a decoder of one family of networks and of one size."""
    networks, size = get_networks(network), {} if hidden is None else {"hidden": hidden}
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
    """Build a VAE with any posterior and any prior.

    Args:
        data_shape: shape of one datum; ``(channels, height, width)`` for the convolutional networks.
        likelihood: a name in :data:`~pyro_flowguides.vae.LIKELIHOODS`, or a likelihood.
        latent_dim: width of z.
        posterior: "normal" or a name in :data:`~pyro_flowguides.flows.FLOWS`.
        posterior_options: options of the flow, such as ``depth`` and ``hidden_dims``.
        prior: "normal", "vamp" or a name in :data:`~pyro_flowguides.flows.FLOWS`.
        prior_options: options of the flow, or of :class:`~pyro_flowguides.vae.VampPrior`.
        network: a name in :data:`~pyro_flowguides.vae.NETWORKS`.
        hidden: widths of the layers of "mlp", or number of features of the others (default: those of the papers).

    Raises:
        ValueError: if a name is unknown or a size is not positive.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import MODELS
        >>> vae = MODELS["vae"]((1, 8, 8), posterior="planar", prior="maf", latent_dim=4, hidden=[32])
        >>> vae.terms(torch.rand(5, 1, 8, 8), num_samples=2).kl.shape
        torch.Size([2, 5, 1])
    """
    likelihood = get_likelihood(likelihood)
    encoder, decoder = _make_networks(data_shape, likelihood, latent_dim, network, hidden)
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
    """Build a VAE with gated inverse autoregressive steps as its posterior (Kingma et al. 2016).

    Args:
        data_shape, likelihood, latent_dim, prior, prior_options, network, hidden: as for :func:`vae`.
        posterior: "iaf".
        posterior_options: options of :class:`~pyro_flowguides.vae.IAFVAE`, such as ``depth`` and ``hidden_dims``.

    Raises:
        ValueError: if ``posterior`` is not "iaf", a name is unknown or a size is not positive.

    Example:
        >>> from pyro_flowguides.vae import MODELS
        >>> MODELS["iafvae"]((8,), latent_dim=4, posterior_options={"depth": 4}).latent_dim
        4
    """
    if posterior != "iaf":
        raise ValueError(f'iafvae: the posterior is "iaf", got {posterior!r}: use the model "vae" for another one')
    likelihood = get_likelihood(likelihood)
    encoder, decoder = _make_networks(data_shape, likelihood, latent_dim, network, hidden)
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
    hidden: int = 64,
    scales: int = 2,
    layers: int = 2,
) -> HierarchicalVAE:
    """Build the hierarchical bidirectional ResNet-IAF (Kingma et al. 2016), which has a network and a prior of its own.

    Args:
        data_shape: ``(channels, height, width)``.
        likelihood: as for :func:`vae`.
        latent_dim: channels of each layer's latent map.
        posterior: "iaf" or "normal".
        posterior_options: for "iaf", ``steps`` per layer (default 1) and their ``step_width``.
        prior: "normal", which each layer shifts and scales.
        prior_options: none.
        network: "resnet".
        hidden: channels of the deterministic features.
        scales: number of resolutions.
        layers: stochastic layers per resolution.

    Raises:
        ValueError: if posterior, prior or network is another one, or a size is not positive.

    Example:
        >>> from pyro_flowguides.vae import MODELS
        >>> MODELS["hierarchical"]((1, 8, 8), latent_dim=2, hidden=8, scales=1, layers=2).latent_dim
        64
    """
    _check_choice("posterior", posterior, ["iaf", "normal"])
    _check_choice("prior", prior, ["normal"])
    _check_choice("network", network, ["resnet"])
    check_no_options("normal prior", prior_options)
    if posterior == "normal":
        check_no_options("normal posterior", posterior_options)
        posterior_options = {"steps": 0}
    return HierarchicalVAE(
        data_shape,
        get_likelihood(likelihood),
        channels=latent_dim,
        width=hidden,
        scales=scales,
        layers=layers,
        **(posterior_options or {}),
    )


def _check_choice(kind: str, name: str, choices: Sequence[str]) -> None:
    if name not in choices:
        raise ValueError(f"hierarchical: the {kind} must be {' or '.join(map(repr, choices))}, got {name!r}")


#: The prior of the variational lossy autoencoder: four mean-only steps with MADEs of three layers of 640 ReLU units.
VLAE_PRIOR: Options = {"depth": 4, "hidden_dims": (640,) * 3, "update": "shift", "activation": F.relu}


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
    """Build a variational lossy autoencoder (Chen et al. 2017), by default the published one for binary images.

    Its autoregressive decoder is a :class:`~pyro_flowguides.vae.PixelCNN` of six masked 3×3 convolutions with 12
    filters and four 1×1 blocks, which reads maps made from z beside the image. Its prior is an autoregressive flow of
    four mean-only steps. Train it with free bits of 0.01 nat per value of the data, Adamax at 2e-3 and an average of
    the weights (0.998).

    Args:
        data_shape: ``(channels, height, width)``, or ``(channels, length)`` for networks that read z itself.
        likelihood, latent_dim, posterior, posterior_options, network, hidden: as for :func:`vae`.
        prior: as for :func:`vae`.
        prior_options: options of the prior; for "maf" they override the published ones.
        decoder: a name in :data:`~pyro_flowguides.vae.DECODERS`.
        decoder_options: options of the autoregressive network, such as ``reach``, the size of its window.
        maps: maps that the autoregressive network reads beside the image; with 0 it ignores z.

    Raises:
        ValueError: if a name is unknown or a size is not positive.

    Example:
        >>> from pyro_flowguides.vae import MODELS
        >>> vae = MODELS["vlae"]((1, 8, 8), latent_dim=4, decoder="gated_pixelcnn", decoder_options={"reach": 2})
        >>> vae.network.reach
        2
    """
    autoregressive, pixels = make_decoder(decoder, data_shape, likelihood, latent_dim, maps, decoder_options)
    networks, size = get_networks(network), {} if hidden is None else {"hidden": hidden}
    encoder = GaussianEncoder(networks.encoder(tuple(data_shape), **size), latent_dim)
    map_decoder = None
    if autoregressive.maps:
        map_decoder = networks.decoder(latent_dim, (autoregressive.maps, *data_shape[1:]), 1, **size)
    family = make_posterior(posterior, latent_dim, encoder.context_dim, posterior_options)
    learned_prior = _make_vlae_prior(prior, latent_dim, data_shape, pixels, prior_options)
    return VLAE(encoder, map_decoder, autoregressive, pixels, family, learned_prior, data_shape=data_shape)


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
    """Build a variational lossy autoencoder for grey and color images, with a latent image of a quarter of the size.

    By default its autoregressive decoder is a :class:`~pyro_flowguides.vae.PixelCNNPlusPlus` of one resolution and one
    block, which sees a window of seven rows, and its likelihood a mixture of logistics over whole pixels.

    Args:
        data_shape: ``(channels, height, width)``.
        latent_dim: a multiple of the number of pixels of the latent image.
        hidden: feature maps of encoder and decoder.
        network: "resnet", the only one with a latent image.
        likelihood, posterior, posterior_options, prior, prior_options, decoder, decoder_options, maps: as for
            :func:`vlae`.

    Raises:
        ValueError: if a name is unknown, or ``latent_dim`` does not fit the image.

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
    defaults: Options = {"filters": 32, "blocks": 1, "levels": 1, "dropout": 0.0} if decoder == "pixelcnn++" else {}
    options = {**defaults, **(decoder_options or {})}
    autoregressive, pixels = make_decoder(decoder, data_shape, likelihood, latent_dim, maps, options)
    encoder, map_decoder = SpatialEncoder(data_shape, latent_dim, hidden), None
    if autoregressive.maps:
        map_decoder = SpatialDecoder(latent_dim, (autoregressive.maps, *data_shape[1:]), 1, hidden)
    family = make_posterior(posterior, latent_dim, encoder.context_dim, posterior_options)
    learned_prior = _make_vlae_prior(prior, latent_dim, data_shape, pixels, prior_options)
    return VLAE(encoder, map_decoder, autoregressive, pixels, family, learned_prior, data_shape=data_shape)


def _make_vlae_prior(
    prior: str, latent_dim: int, data_shape: Sequence[int], pixels: PixelLikelihood, options: Options | None
) -> Prior:
    if prior == "maf":
        options = {**VLAE_PRIOR, **(options or {})}
    return make_prior(prior, latent_dim, data_shape, pixels.values, options)


#: All builders by name; the training program, the tests and the benchmarks iterate over them.
MODELS: dict[str, Callable[..., VAE]] = {
    "vae": vae,
    "iafvae": iafvae,
    "hierarchical": hierarchical,
    "vlae": vlae,
    "spatial_vlae": spatial_vlae,
}
