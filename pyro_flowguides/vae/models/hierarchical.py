"""The hierarchical bidirectional ResNet-IAF of Kingma et al. (2016), for images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from pyro_flowguides.vae.decoders.likelihoods import Likelihood
from pyro_flowguides.vae.models.conv_iaf import ConvIAF
from pyro_flowguides.vae.models.ladder import BottomUp, DownLayer, DownState, TopDown, TopLayer, UpLayer, Widths
from pyro_flowguides.vae.models.ladder_distributions import LadderDistribution, LadderPosterior, LadderPrior
from pyro_flowguides.vae.models.vae import VAE, Posterior, Terms
from pyro_flowguides.vae.networks.image_shapes import as_image_shape, flatten_batch, halve_size

__all__ = ["HierarchicalVAE"]


class _Place(NamedTuple):
    """A layer among those of its resolution."""

    scale: int
    layer: int

    @property
    def halves(self) -> bool:
        """The pass upwards halves the resolution in this layer."""
        return self.scale > 1 and self.layer == 0


class HierarchicalVAE(VAE):
    r"""A VAE with several layers of latent maps, inferred in both directions.

    .. math::
        p(z) = \prod_{l=1}^{L} p(z_l \mid z_{<l}), \qquad q(z \mid x) = \prod_{l=1}^{L} q(z_l \mid z_{<l}, x)

    A deterministic pass goes from the image upwards. A stochastic pass, shared by model and posterior, goes from the
    topmost layer downwards. It emits the moments of each layer's prior, a Gaussian. The posterior of a layer is a
    Gaussian whose moments are the sum of those that the two passes emit, followed by inverse autoregressive steps
    (:class:`ConvIAF`) whose context is the sum of two. The networks are residual blocks of weight-normalized 3 × 3
    convolutions with ELU; call :meth:`initialize` before training.

    The divergence is grouped by layer and channel, as free bits require: ``terms.kl`` is ``(S, B, layers * channels)``.
    The latents of all layers, the topmost first, are one vector, the site ``"z"`` of the programs.

    Args:
        data_shape: ``(channels, height, width)``.
        likelihood: the distribution of a pixel, a discretized logistic in the paper.
        channels: channels of each layer's latents.
        width: channels of the deterministic features.
        scales: number of resolutions; the first is half that of the image, and each further one half the one before.
        layers: stochastic layers per resolution.
        steps: IAF steps per layer, in alternating order; 0 for diagonal Gaussians.
        step_width: hidden channels of a step (default: the larger of ``width`` and ``channels``).

    Raises:
        ValueError: if the data are not images, or a number is not positive.

    References:
        D. Kingma, T. Salimans, R. Jozefowicz, X. Chen, I. Sutskever, M. Welling (2016). Improving variational inference
        with inverse autoregressive flow. arXiv:1606.04934.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import DiscretizedLogistic, HierarchicalVAE
        >>> vae = HierarchicalVAE((3, 8, 8), DiscretizedLogistic(), channels=2, width=8, scales=2, layers=1)
        >>> x = torch.randint(0, 256, (5, 3, 8, 8))
        >>> vae.initialize(x)
        >>> vae.terms(x).kl.shape
        torch.Size([1, 5, 4])
        >>> vae.sample(2).shape
        torch.Size([2, 3, 8, 8])
    """

    encoder: BottomUp
    decoder: TopDown

    def __init__(
        self,
        data_shape: Sequence[int],
        likelihood: Likelihood,
        *,
        channels: int = 32,
        width: int = 64,
        scales: int = 2,
        layers: int = 2,
        steps: int = 1,
        step_width: int | None = None,
    ) -> None:
        for name, value in {"channels": channels, "width": width, "scales": scales, "layers": layers}.items():
            if value < 1:
                raise ValueError(f"HierarchicalVAE: {name} must be at least 1, got {value}")
        if steps < 0:
            raise ValueError(f"HierarchicalVAE: steps must be at least 0, got {steps}")
        data_channels, height, breadth = as_image_shape("HierarchicalVAE", data_shape)
        places = [_Place(scale, layer) for scale in range(1, scales + 1) for layer in range(layers)]
        strides = [2 if place.halves else 1 for place in places]
        widths = Widths(channels, width, width if steps else 0)
        step_width = max(width, channels) if step_width is None else step_width
        ups = [UpLayer(widths, stride) for stride in strides[:-1]]
        downs = []
        for place in reversed(places):
            iaf = [ConvIAF(channels, width, step_width, reverse=bool(step % 2)) for step in range(steps)]
            size = halve_size((height, breadth), place.scale)
            size_below = halve_size((height, breadth), place.scale - 1) if place.halves else size
            downs.append(DownLayer(widths, size, size_below, iaf))
        ladder = TopDown(downs, width, data_shape, likelihood.parameters_per_value)
        encoder = BottomUp(data_channels, width, ups, TopLayer(widths, strides[-1]), sum(ladder.latent_dims))
        posterior = cast("Posterior", LadderPosterior(ladder))  # only the methods below use it
        super().__init__(encoder, ladder, likelihood, posterior, LadderPrior(ladder), data_shape=data_shape)

    def posterior_at(self, x: Tensor) -> LadderDistribution:
        posterior = cast("LadderPosterior", self.posterior)
        return posterior(self.encoder(self._standardize(x)))

    def decode(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        return flatten_batch(self.decoder, z, 1)

    def terms(self, x: Tensor, num_samples: int = 1) -> Terms:
        """Return the parts of the bound, from one pass upwards and one downwards."""
        self._check_shape(x)
        shape = torch.Size((num_samples, len(x)))
        posterior = self.posterior_at(x).layers.expand_flat(shape)
        draws: list[Tensor] = []
        kls: list[Tensor] = []

        def choose(index: int, layer: DownLayer, state: DownState) -> Tensor:
            z, log_q = posterior.draw(index, layer, state)
            draws.append(z.flatten(1))
            kls.append((log_q - state.prior.log_prob(z)).sum((-2, -1)))
            return z

        params = self.decoder.emit(self.decoder.descend(shape.numel(), choose)).unflatten(0, shape)
        log_likelihood = self.likelihood.log_prob(params, x).sum(self._data_dims)
        return Terms(log_likelihood, torch.cat(kls, -1).unflatten(0, shape), torch.cat(draws, -1).unflatten(0, shape))
