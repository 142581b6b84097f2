"""Autoregressive decoders by name."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from pyro_flowguides.vae.decoders.agnostic_made import AgnosticMADE
from pyro_flowguides.vae.decoders.autoregressive_decoder import AutoregressiveNetwork
from pyro_flowguides.vae.decoders.likelihoods import DiscretizedLogisticMixture, Likelihood, get_likelihood
from pyro_flowguides.vae.decoders.pixel_likelihoods import IndependentChannels, PixelLikelihood, PixelLogisticMixture
from pyro_flowguides.vae.decoders.pixelcnn import GatedPixelCNN, PixelCNN
from pyro_flowguides.vae.decoders.pixelcnnpp import PixelCNNPlusPlus
from pyro_flowguides.vae.decoders.pixelrnn import PixelRNN, RowLSTM
from pyro_flowguides.vae.decoders.wavenet import WaveNet

__all__ = ["DECODERS", "DecoderRecipe", "make_decoder"]


class DecoderRecipe(NamedTuple):
    """A network, and the options that its constructor takes."""

    build: Callable[..., AutoregressiveNetwork]
    #: The network reads the latent vector through maps; otherwise as global features.
    reads_maps: bool
    #: The channels of a position are drawn from the same parameters.
    whole_pixels: bool


#: Autoregressive decoders by name.
DECODERS: dict[str, DecoderRecipe] = {
    "pixelcnn": DecoderRecipe(PixelCNN, reads_maps=True, whole_pixels=False),
    "gated_pixelcnn": DecoderRecipe(GatedPixelCNN, reads_maps=True, whole_pixels=False),
    "pixelcnn++": DecoderRecipe(PixelCNNPlusPlus, reads_maps=True, whole_pixels=True),
    "row_lstm": DecoderRecipe(partial(PixelRNN, recurrent=RowLSTM), reads_maps=True, whole_pixels=False),
    "diagonal_lstm": DecoderRecipe(PixelRNN, reads_maps=True, whole_pixels=False),
    "made": DecoderRecipe(AgnosticMADE, reads_maps=False, whole_pixels=False),
    "wavenet": DecoderRecipe(WaveNet, reads_maps=False, whole_pixels=True),
}


def make_decoder(
    decoder: str,
    data_shape: Sequence[int],
    likelihood: str | Likelihood,
    latent_dim: int,
    maps: int,
    options: Mapping[str, object] | None = None,
) -> tuple[AutoregressiveNetwork, PixelLikelihood]:
    """Return an autoregressive network and the likelihood of its pixels.

    For a network of whole pixels the likelihood "logistic_mixture" is one mixture over all channels of a pixel.

    Args:
        decoder: a name in :data:`DECODERS`.
        data_shape: ``(channels, height, width)`` or ``(channels, length)``.
        likelihood: a name in :data:`~pyro_flowguides.vae.LIKELIHOODS`, or a likelihood.
        latent_dim: width of z, for networks that read z as global features.
        maps: number of maps, for networks that read maps.
        options: options of the network, which override those derived from the arguments above.

    Example:
        >>> from pyro_flowguides.vae import make_decoder
        >>> network, pixels = make_decoder("gated_pixelcnn", (1, 8, 8), "bernoulli", 4, maps=2, options={"reach": 2})
        >>> network.maps, network.reach
        (2, 2)
    """
    if decoder not in DECODERS:
        raise ValueError(f"unknown decoder {decoder!r}; known decoders: {', '.join(DECODERS)}")
    build, reads_maps, whole_pixels = DECODERS[decoder]
    values = get_likelihood(likelihood)
    pixels: PixelLikelihood = IndependentChannels(values, data_shape[0])
    if whole_pixels and isinstance(values, DiscretizedLogisticMixture):
        pixels = PixelLogisticMixture(data_shape[0], values.components)
    derived = {"maps": maps} if reads_maps else {"features": latent_dim}
    if reads_maps and not whole_pixels:
        derived["groups"] = data_shape[0]
    return build(tuple(data_shape), pixels.outputs, **{**derived, **(options or {})}), pixels
