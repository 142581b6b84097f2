"""Networks, posteriors and priors by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

from torch import nn

from pyro_flowguides.flows import FLOWS
from pyro_flowguides.guides import FlowPosterior
from pyro_flowguides.vae.decoders import Likelihood
from pyro_flowguides.vae.models.normal_posterior import NormalPosterior
from pyro_flowguides.vae.models.priors import FlowPrior, Prior, StandardNormal, VampPrior
from pyro_flowguides.vae.models.vae import Posterior
from pyro_flowguides.vae.networks import (
    DenseDecoder,
    DenseEncoder,
    GatedConvDecoder,
    GatedConvEncoder,
    ResNetDecoder,
    ResNetEncoder,
)

__all__ = ["NETWORKS", "Networks", "Options", "check_no_options", "get_networks", "make_posterior", "make_prior"]

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


def get_networks(network: str) -> Networks:
    """Return the encoder and decoder of a registered name.

    Raises:
        ValueError: if the name is unknown.
    """
    if network not in NETWORKS:
        raise ValueError(f"unknown network {network!r}; known networks: {', '.join(NETWORKS)}")
    return NETWORKS[network]


def make_posterior(posterior: str, latent_dim: int, context_dim: int, options: Options | None = None) -> Posterior:
    """Build a family of posteriors: "normal", or one by its name in :data:`~pyro_flowguides.flows.FLOWS`.

    Raises:
        ValueError: if the name is unknown, or a Gaussian is given options.
    """
    if posterior == "normal":
        check_no_options("normal posterior", options)
        return NormalPosterior()
    _check_name("posterior", posterior, ["normal"])
    return cast("Posterior", FlowPosterior(latent_dim, context_dim, posterior, **(options or {})))


def make_prior(
    prior: str, latent_dim: int, data_shape: Sequence[int], likelihood: Likelihood, options: Options | None = None
) -> Prior:
    """Build a prior: "normal", "vamp", or one by its name in :data:`~pyro_flowguides.flows.FLOWS`.

    Raises:
        ValueError: if the name is unknown, or a Gaussian is given options.
    """
    if prior == "normal":
        check_no_options("normal prior", options)
        return StandardNormal(latent_dim)
    if prior == "vamp":
        return VampPrior(latent_dim, tuple(data_shape), likelihood.low, likelihood.high, **(options or {}))
    _check_name("prior", prior, ["normal", "vamp"])
    return FlowPrior(latent_dim, prior, **(options or {}))


def check_no_options(owner: str, options: Options | None) -> None:
    """Raise a :class:`ValueError` if options are given for a component that has none."""
    if options:
        raise ValueError(f"the {owner} has no options, got {sorted(options)}")


def _check_name(kind: str, name: str, others: Sequence[str]) -> None:
    if name not in FLOWS:
        raise ValueError(f"unknown {kind} {name!r}; known {kind}s: {', '.join([*others, *FLOWS])}")
