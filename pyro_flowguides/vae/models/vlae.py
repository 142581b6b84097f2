"""The variational lossy autoencoder: an autoregressive decoder that sees a small window, and a learned prior."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_flowguides.vae.decoders import (
    AgnosticMADE,
    AutoregressiveNetwork,
    GatedPixelCNN,
    PixelCNN,
    PixelCNNPlusPlus,
    PixelRNN,
    RowLSTM,
    WaveNet,
)
from pyro_flowguides.vae.decoders.autoregressive_distribution import (
    Autoregressive,
    PixelLikelihood,
    get_pixel_likelihood,
)
from pyro_flowguides.vae.decoders.likelihoods import Likelihood
from pyro_flowguides.vae.models.base import VAE

__all__ = ["DECODERS", "VLAE", "make_decoder"]

#: Draws whose average stands for the expected data.
MEAN_DRAWS = 8


class VLAE(VAE):
    r"""A VAE whose decoder is autoregressive, over a window of its own choice.

    .. math:: p(x \mid z) = \prod_i p\big(x_i \mid x_{\text{window}(i)}, u(z)\big)

    What the decoder predicts from its window it does not need z for, and coding it in z would cost the gap between
    posterior and truth on top: a decoder that sees everything leaves z empty. With a small window z carries what is
    far apart, such as shape, and the decoder what is near, such as texture. :meth:`decompress` shows which is which.

    With a learned autoregressive prior (:class:`~pyro_flowguides.vae.FlowPrior` with "maf") the bound is that of an
    inverse autoregressive posterior over the noise behind z, whose decoder contains the same flow: the generative model
    becomes deeper, and coding data costs one pass of the flow either way.

    Args:
        encoder, posterior, prior, data_shape: as for :class:`VAE`.
        decoder: ``z -> (..., maps, height, width, 1)``, the maps u(z) that the network reads beside the image; ``None``
            for a network that reads z itself, as global features.
        network: the autoregressive network.
        pixels: the likelihood of the channels of one position.

    Shapes:
        as for :class:`VAE`.

    Cost: :meth:`terms` one parallel pass per draw of z; :meth:`generate` one step of the network's ``generate`` per
    pixel; :meth:`mean` (and with it :meth:`reconstruct` and :meth:`traverse`) is an average over 8 generated data.

    References:
        X. Chen, D. Kingma, T. Salimans, Y. Duan, P. Dhariwal, J. Schulman, I. Sutskever, P. Abbeel (2017). Variational
        lossy autoencoder. arXiv:1611.02731.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import MODELS
        >>> vae = MODELS["vlae"]((1, 8, 8), latent_dim=4, network="mlp", prior_options={"hidden_dims": [16]})
        >>> x = torch.rand(5, 1, 8, 8).round()
        >>> vae.terms(x).log_likelihood.shape, vae.decompress(x, 3).shape
        (torch.Size([1, 5]), torch.Size([3, 5, 1, 8, 8]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module | None,
        network: AutoregressiveNetwork,
        pixels: PixelLikelihood,
        posterior: Callable[..., Any],
        prior: nn.Module,
        *,
        data_shape: Sequence[int],
    ) -> None:
        if (decoder is None) != (network.maps == 0):
            raise ValueError(
                f"VLAE: a decoder makes the maps that the network reads; the network reads {network.maps} maps, the "
                f"decoder is {'missing' if decoder is None else type(decoder).__name__}"
            )
        super().__init__(encoder, decoder, pixels.values, posterior, prior, data_shape=data_shape)  # type: ignore[arg-type]
        self.network, self.pixels = network, pixels

    def observation(self, z: Tensor, x: Tensor | None = None) -> Autoregressive:
        """p(x | z) as a distribution with batch shape that of z and event shape ``data_shape``."""
        maps = self.decoder(z)[..., 0] if self.network.maps else None
        features = z if self.network.features else None
        return Autoregressive(self.network, self.pixels, features, maps, batch_shape=z.shape[:-1], validate_args=False)

    def decode(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """Not defined: the parameters of a pixel depend on the pixels drawn before; see :meth:`observation`."""
        raise NotImplementedError(f"{type(self).__name__}: an autoregressive decoder has no parameters given z alone")

    def conditional_log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        return self.observation(z).log_prob(x)

    def generate(self, z: Tensor) -> Tensor:
        return self.observation(z).sample()

    def mean(self, z: Tensor) -> Tensor:
        """An estimate of the expected data for given latent vectors: the average over a few draws."""
        return self.observation(z).sample(torch.Size([MEAN_DRAWS])).mean(0)

    @torch.no_grad()
    def decompress(self, x: Tensor, count: int = 1) -> Tensor:
        """Several data for one z: what the latent vector of each datum leaves open, ``(count, *x.shape)``."""
        return self.observation(self.sample_posterior(x)[0]).sample(torch.Size([count]))


class Decoder(NamedTuple):
    """A network, and what its constructor takes."""

    build: Callable[..., AutoregressiveNetwork]
    #: Whether a latent vector reaches it through maps, or as global features.
    reads_maps: bool
    #: Whether the channels of a position are drawn from the same numbers.
    whole_pixels: bool


#: Autoregressive decoders by name.
DECODERS: dict[str, Decoder] = {
    "pixelcnn": Decoder(PixelCNN, reads_maps=True, whole_pixels=False),
    "gated_pixelcnn": Decoder(GatedPixelCNN, reads_maps=True, whole_pixels=False),
    "pixelcnn++": Decoder(PixelCNNPlusPlus, reads_maps=True, whole_pixels=True),
    "row_lstm": Decoder(partial(PixelRNN, recurrent=RowLSTM), reads_maps=True, whole_pixels=False),
    "diagonal_lstm": Decoder(PixelRNN, reads_maps=True, whole_pixels=False),
    "made": Decoder(AgnosticMADE, reads_maps=False, whole_pixels=False),
    "wavenet": Decoder(WaveNet, reads_maps=False, whole_pixels=True),
}


def make_decoder(
    decoder: str,
    data_shape: Sequence[int],
    likelihood: str | Likelihood,
    latent_dim: int,
    maps: int,
    options: Mapping[str, Any] | None = None,
) -> tuple[AutoregressiveNetwork, PixelLikelihood]:
    """The network of a name in :data:`DECODERS`, reading ``maps`` maps or z itself, and its likelihood.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> from pyro_flowguides.vae.models.vlae import make_decoder
        >>> network, pixels = make_decoder("gated_pixelcnn", (1, 8, 8), "bernoulli", 4, maps=2, options={"reach": 2})
        >>> network.maps, network.reach
        (2, 2)
    """
    if decoder not in DECODERS:
        raise ValueError(f"unknown decoder {decoder!r}: known are {', '.join(DECODERS)}")
    build, reads_maps, whole_pixels = DECODERS[decoder]
    pixels = get_pixel_likelihood(likelihood, data_shape[0], whole_pixels=whole_pixels)
    given = {"maps": maps} if reads_maps else {"features": latent_dim}
    if reads_maps and not whole_pixels:
        given["groups"] = data_shape[0]
    return build(tuple(data_shape), pixels.outputs, **{**given, **(options or {})}), pixels
