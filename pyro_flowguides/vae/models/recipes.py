"""Recipes: networks, posteriors and priors by name, one builder for each kind of VAE, and their registry.

All builders share the arguments of :func:`vae`, and raise a :class:`ValueError` if a name is unknown or a size does not
fit; some have options of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

from torch import nn
from torch.nn import functional as F

from pyro_flowguides.flows import FLOWS
from pyro_flowguides.guides import FlowPosterior
from pyro_flowguides.vae.decoders import Likelihood, PixelLikelihood, make_decoder
from pyro_flowguides.vae.decoders.likelihoods import get_likelihood
from pyro_flowguides.vae.models.hierarchical import HierarchicalVAE
from pyro_flowguides.vae.models.latents import FlowPrior, NormalPosterior, Prior, StandardNormal, VampPrior
from pyro_flowguides.vae.models.vae import IAFVAE, VAE, ContextEncoder, Posterior
from pyro_flowguides.vae.models.vlae import VLAE
from pyro_flowguides.vae.networks.dense import DenseDecoder, DenseEncoder, GaussianEncoder
from pyro_flowguides.vae.networks.gated_conv import GatedConvDecoder, GatedConvEncoder
from pyro_flowguides.vae.networks.resnet import ResNetDecoder, ResNetEncoder, SpatialDecoder, SpatialEncoder

__all__ = ["MODELS", "NETWORKS", "Options", "hierarchical", "iafvae", "spatial_vlae", "vae", "vlae"]

#: Options by name, passed on to a builder.
Options: TypeAlias = Mapping[str, Any]


class Networks(NamedTuple):
    """A pair of networks.

    The encoder takes ``(data_shape, hidden)``, the decoder ``(latent_dim, data_shape, parameters_per_value, hidden)``.
    """

    encoder: Callable[..., nn.Module]
    decoder: Callable[..., nn.Module]


def _gated_decoder(
    latent_dim: int, data_shape: Sequence[int], parameters_per_value: int, hidden: int | None = None
) -> GatedConvDecoder:
    """Build the gated decoder, whose layers do not depend on the number ``hidden`` of the encoder's features."""
    return GatedConvDecoder(latent_dim, data_shape, parameters_per_value)


#: The networks of a VAE by name.
NETWORKS: dict[str, Networks] = {
    "mlp": Networks(DenseEncoder, DenseDecoder),
    "gated": Networks(GatedConvEncoder, _gated_decoder),
    "resnet": Networks(ResNetEncoder, ResNetDecoder),
}


def _get_networks(network: str) -> Networks:
    if network not in NETWORKS:
        raise ValueError(f"unknown network {network!r}; known networks: {', '.join(NETWORKS)}")
    return NETWORKS[network]


def _make_posterior(posterior: str, latent_dim: int, context_dim: int, options: Options | None = None) -> Posterior:
    """Build a family of posteriors: "normal", or one by its name in :data:`~pyro_flowguides.flows.FLOWS`."""
    if posterior == "normal":
        _check_no_options("normal posterior", options)
        return NormalPosterior()
    _check_name("posterior", posterior, ["normal"])
    return cast("Posterior", FlowPosterior(latent_dim, context_dim, posterior, **(options or {})))


def _make_prior(
    prior: str, latent_dim: int, data_shape: Sequence[int], likelihood: Likelihood, options: Options | None = None
) -> Prior:
    """Build a prior: "normal", "vamp", or one by its name in :data:`~pyro_flowguides.flows.FLOWS`."""
    if prior == "normal":
        _check_no_options("normal prior", options)
        return StandardNormal(latent_dim)
    if prior == "vamp":
        return VampPrior(latent_dim, tuple(data_shape), likelihood.low, likelihood.high, **(options or {}))
    _check_name("prior", prior, ["normal", "vamp"])
    return FlowPrior(latent_dim, prior, **(options or {}))


def _check_no_options(owner: str, options: Options | None) -> None:
    if options:
        raise ValueError(f"the {owner} has no options, got {sorted(options)}")


def _check_name(kind: str, name: str, others: Sequence[str]) -> None:
    if name not in FLOWS:
        raise ValueError(f"unknown {kind} {name!r}; known {kind}s: {', '.join([*others, *FLOWS])}")


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
    likelihood, networks, size = get_likelihood(likelihood), _get_networks(network), _as_option(hidden)
    encoder = GaussianEncoder(networks.encoder(tuple(data_shape), **size), latent_dim)
    decoder = networks.decoder(latent_dim, tuple(data_shape), likelihood.parameters_per_value, **size)
    family = _make_posterior(posterior, latent_dim, encoder.context_dim, posterior_options)
    learned_prior = _make_prior(prior, latent_dim, data_shape, likelihood, prior_options)
    return VAE(encoder, decoder, likelihood, family, learned_prior, data_shape=data_shape)


def iafvae(
    data_shape: Sequence[int], *, posterior: str = "iaf", posterior_options: Options | None = None, **options: Any
) -> IAFVAE:
    """Build a VAE with gated inverse autoregressive steps as its posterior (Kingma et al. 2016).

    Args:
        data_shape, **options: as for :func:`vae`.
        posterior: "iaf".
        posterior_options: options of :class:`~pyro_flowguides.vae.IAFVAE`, such as ``depth`` and ``hidden_dims``.

    Example:
        >>> from pyro_flowguides.vae import MODELS
        >>> MODELS["iafvae"]((8,), latent_dim=4, posterior_options={"depth": 4}).latent_dim
        4
    """
    if posterior != "iaf":
        raise ValueError(f'iafvae: the posterior is "iaf", got {posterior!r}: use the model "vae" for another one')
    parts = vae(data_shape, posterior="normal", **options)
    encoder = cast("ContextEncoder", parts.encoder)
    return IAFVAE(
        encoder, parts.decoder, parts.likelihood, parts.prior, data_shape=data_shape, **(posterior_options or {})
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
        prior, prior_options: "normal", which each layer shifts and scales, without options.
        network: "resnet".
        hidden: channels of the deterministic features.
        scales, layers: number of resolutions, and of stochastic layers for each.

    Example:
        >>> from pyro_flowguides.vae import MODELS
        >>> MODELS["hierarchical"]((1, 8, 8), latent_dim=2, hidden=8, scales=1, layers=2).latent_dim
        64
    """
    names = {"posterior": posterior, "prior": prior, "network": network}
    for kind, known in {"posterior": ["iaf", "normal"], "prior": ["normal"], "network": ["resnet"]}.items():
        if names[kind] not in known:
            raise ValueError(f"hierarchical: the {kind} must be {' or '.join(map(repr, known))}, got {names[kind]!r}")
    _check_no_options("normal prior", prior_options)
    if posterior == "normal":
        _check_no_options("normal posterior", posterior_options)
        posterior_options = {"steps": 0}
    sizes = {"channels": latent_dim, "width": hidden, "scales": scales, "layers": layers}
    return HierarchicalVAE(data_shape, get_likelihood(likelihood), **sizes, **(posterior_options or {}))


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
        likelihood, latent_dim, posterior, posterior_options, prior, network, hidden: as for :func:`vae`.
        prior_options: options of the prior; for "maf" they override the published ones.
        decoder: a name in :data:`~pyro_flowguides.vae.DECODERS`.
        decoder_options: options of the autoregressive network, such as ``reach``, the size of its window.
        maps: maps that the autoregressive network reads beside the image; with 0 it ignores z.

    Example:
        >>> from pyro_flowguides.vae import MODELS
        >>> vae = MODELS["vlae"]((1, 8, 8), latent_dim=4, decoder="gated_pixelcnn", decoder_options={"reach": 2})
        >>> vae.network.reach
        2
    """
    autoregressive, pixels = make_decoder(decoder, data_shape, likelihood, latent_dim, maps, decoder_options)
    networks, size = _get_networks(network), _as_option(hidden)
    encoder = GaussianEncoder(networks.encoder(tuple(data_shape), **size), latent_dim)
    map_decoder = None
    if autoregressive.maps:
        map_decoder = networks.decoder(latent_dim, (autoregressive.maps, *data_shape[1:]), 1, **size)
    family = _make_posterior(posterior, latent_dim, encoder.context_dim, posterior_options)
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
    family = _make_posterior(posterior, latent_dim, encoder.context_dim, posterior_options)
    learned_prior = _make_vlae_prior(prior, latent_dim, data_shape, pixels, prior_options)
    return VLAE(encoder, map_decoder, autoregressive, pixels, family, learned_prior, data_shape=data_shape)


def _make_vlae_prior(
    prior: str, latent_dim: int, data_shape: Sequence[int], pixels: PixelLikelihood, options: Options | None
) -> Prior:
    if prior == "maf":
        options = {**VLAE_PRIOR, **(options or {})}
    return _make_prior(prior, latent_dim, data_shape, pixels.values, options)


def _as_option(hidden: int | Sequence[int] | None) -> Options:
    return {} if hidden is None else {"hidden": hidden}


#: All builders by name; the training program, the tests and the benchmarks iterate over them.
MODELS: dict[str, Callable[..., VAE]] = {
    "vae": vae,
    "iafvae": iafvae,
    "hierarchical": hierarchical,
    "vlae": vlae,
    "spatial_vlae": spatial_vlae,
}
