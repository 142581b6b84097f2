"""The variational lossy autoencoder: an autoregressive decoder that sees a small window, and a learned prior."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from pyro_flowguides.vae.decoders import AutoregressiveDistribution, AutoregressiveNetwork, PixelLikelihood
from pyro_flowguides.vae.models.latents import Prior
from pyro_flowguides.vae.models.vae import VAE, Decoder, Encoder, Posterior

__all__ = ["VLAE"]

#: Draws that are averaged to estimate the expected data.
MEAN_DRAWS = 8


class VLAE(VAE):
    r"""A VAE whose decoder is autoregressive, within a window of any size.

    .. math:: p(x \mid z) = \prod_i p\big(x_i \mid x_{\text{window}(i)}, u(z)\big)

    The decoder does not need z for anything it can predict from its window. Coding such information in z would also
    cost the gap between the approximate and the exact posterior. A decoder that sees everything therefore leaves z
    empty; with a small window z carries global information such as shape, and the decoder local information such as
    texture. :meth:`decompress` shows the difference.

    With a learned autoregressive prior (:class:`~pyro_flowguides.vae.FlowPrior` with "maf") the bound equals that of an
    inverse autoregressive posterior over the noise behind z, in a model whose decoder contains the same flow. The prior
    makes the generative model deeper, and scoring data costs one pass of the flow in both cases.

    Args:
        encoder, posterior, prior, data_shape: as for :class:`VAE`.
        decoder: ``z -> (..., maps, height, width, 1)``, the maps u(z) that the network reads beside the image; ``None``
            for a network that reads z itself, as global features.
        network: the autoregressive network.
        pixels: the likelihood of the channels of one position.

    Shapes:
        as for :class:`VAE`.

    Raises:
        ValueError: if the network reads maps and there is no decoder, or the reverse.

    Cost: :meth:`terms` takes one parallel pass per draw of z; :meth:`generate` takes one step of the network's
    ``generate`` per pixel; :meth:`mean`, :meth:`reconstruct` and :meth:`traverse` average over 8 generated data.

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
        encoder: Encoder,
        decoder: Decoder | None,
        network: AutoregressiveNetwork,
        pixels: PixelLikelihood,
        posterior: Posterior,
        prior: Prior,
        *,
        data_shape: Sequence[int],
    ) -> None:
        if (decoder is None) != (network.maps == 0):
            raise ValueError(
                f"VLAE: a decoder is needed if and only if the network reads maps; the network reads {network.maps} "
                f"maps, the decoder is {'missing' if decoder is None else type(decoder).__name__}"
            )
        super().__init__(encoder, cast("Decoder", decoder), pixels.values, posterior, prior, data_shape=data_shape)
        self.network, self.pixels = network, pixels

    def observation(self, z: Tensor, x: Tensor | None = None) -> AutoregressiveDistribution:
        """Return p(x | z), a distribution with the batch shape of z and event shape ``data_shape``."""
        maps = self.decoder(z)[..., 0] if self.network.maps else None
        features = z if self.network.features else None
        return AutoregressiveDistribution(
            self.network, self.pixels, features, maps, batch_shape=z.shape[:-1], validate_args=False
        )

    def decode(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """Raise an error: the parameters of a pixel depend on earlier pixels; see :meth:`observation`."""
        raise NotImplementedError(
            f"{type(self).__name__}: an autoregressive decoder has no parameters given z alone: use observation()"
        )

    def conditional_log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        return self.observation(z).log_prob(x)

    def generate(self, z: Tensor) -> Tensor:
        return self.observation(z).sample()

    def mean(self, z: Tensor) -> Tensor:
        """Estimate the expected data given latent vectors by the average over 8 draws."""
        return self.observation(z).sample(torch.Size([MEAN_DRAWS])).mean(0)

    @torch.no_grad()
    def decompress(self, x: Tensor, num_samples: int = 1) -> Tensor:
        """Draw data from one latent vector of each datum, ``(num_samples, *x.shape)``.

        The draws differ in what the latent vector does not determine.
        """
        self._check_draws(x, num_samples)
        return self.observation(self.sample_posterior(x)[0]).sample(torch.Size([num_samples]))
