"""The hierarchical bidirectional ResNet-IAF of Kingma et al. (2016), for images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_flowguides.vae.decoders.likelihoods import Likelihood
from pyro_flowguides.vae.models.ladder import (
    BottomUp,
    ConvIAF,
    DownLayer,
    DownState,
    Evidence,
    TopDown,
    TopLayer,
    UpLayer,
)
from pyro_flowguides.vae.models.latents import PosteriorAt, Prior
from pyro_flowguides.vae.models.vae import VAE, Posterior, Terms
from pyro_flowguides.vae.networks.image_shapes import as_image_shape, flatten_batch, halve_size

__all__ = ["HierarchicalVAE"]


class LadderDistribution(TorchDistribution):
    """The joint distribution of the latents of all layers, flattened and concatenated, the topmost layer first.

    It is the prior, or the posterior given the evidence of each layer, whose batch shape broadcasts to ``batch_shape``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, ladder: TopDown, evidence: Sequence[Evidence] | None = None, batch_shape: Sequence[int] = ()
    ) -> None:
        self.ladder, self.evidence = ladder, evidence
        self._last_draw: tuple[Tensor, Tensor] | None = None
        super().__init__(torch.Size(batch_shape), torch.Size((sum(ladder.latent_dims),)), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> LadderDistribution:
        return LadderDistribution(self.ladder, self.evidence, batch_shape)

    def flat_evidence(self, batch_shape: torch.Size) -> Sequence[Evidence | None]:
        """Return the evidence of each layer, with its batch dimensions expanded and flattened into one."""
        if self.evidence is None:
            return [None] * len(self.ladder.layers)
        return [part.expand_flat(batch_shape) for part in self.evidence]

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        evidence = self.flat_evidence(shape)

        def draw(index: int, layer: DownLayer, state: DownState) -> tuple[Tensor, Tensor]:
            return layer.draw(state, evidence[index])

        _, flat, log_probs = self.ladder.descend(shape.numel(), draw)
        z = flat.reshape(shape + self.event_shape)
        self._last_draw = z, _total(log_probs).reshape(shape)
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        if self._last_draw is not None and self._last_draw[0] is value:
            return self._last_draw[1]
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        maps = self.ladder.split(value.expand(*shape, value.shape[-1]).reshape(-1, value.shape[-1]))
        evidence = self.flat_evidence(shape)

        def score(index: int, layer: DownLayer, state: DownState) -> tuple[Tensor, Tensor]:
            return maps[index], layer.log_prob(state, evidence[index], maps[index])

        return _total(self.ladder.descend(shape.numel(), score)[2]).reshape(shape)


def _total(log_probs: Sequence[Tensor]) -> Tensor:
    """Return the log density ``(N,)`` from the elementwise ones of all layers."""
    return torch.stack([part.flatten(1).sum(-1) for part in log_probs]).sum(0)


class LadderPrior(Prior):
    """The prior of a ladder, whose parameters are those of the ladder."""

    def __init__(self, ladder: TopDown) -> None:
        super().__init__(sum(ladder.latent_dims))
        self._ladder = (ladder,)  # hidden from torch: the ladder is registered as the decoder

    def forward(self, posterior_at: PosteriorAt) -> LadderDistribution:
        return LadderDistribution(self._ladder[0])


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
        # The pass upwards halves the resolution in the stem and in the first layer of each further scale.
        places = [(scale, scale > 1 and layer == 0) for scale in range(1, scales + 1) for layer in range(layers)]
        strides = [2 if halves else 1 for _, halves in places]
        widths = channels, width, width if steps else 0
        step_width = max(width, channels) if step_width is None else step_width
        ups = [UpLayer(widths, stride) for stride in strides[:-1]]
        downs = []
        for scale, halves in reversed(places):
            iaf = [ConvIAF(channels, width, step_width, reverse=bool(step % 2)) for step in range(steps)]
            size = halve_size((height, breadth), scale)
            size_below = halve_size((height, breadth), scale - 1) if halves else size
            downs.append(DownLayer(widths, size, size_below, iaf))
        ladder = TopDown(downs, width, data_shape, likelihood.parameters_per_value)
        encoder = BottomUp(data_channels, width, ups, TopLayer(widths, strides[-1]), sum(ladder.latent_dims))
        posterior = cast("Posterior", nn.Identity())  # unused: the ladder has the parameters of the posterior
        super().__init__(encoder, ladder, likelihood, posterior, LadderPrior(ladder), data_shape=data_shape)

    def posterior_at(self, x: Tensor) -> LadderDistribution:
        return LadderDistribution(self.decoder, self.encoder(self._standardize(x)), x.shape[:1])

    def decode(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        return flatten_batch(self.decoder, z, 1)

    def terms(self, x: Tensor, num_samples: int = 1) -> Terms:
        """Return the parts of the bound, from one pass upwards and one downwards."""
        self._check_draws(x, num_samples)
        shape = torch.Size((num_samples, len(x)))
        evidence = self.posterior_at(x).flat_evidence(shape)

        def draw(index: int, layer: DownLayer, state: DownState) -> tuple[Tensor, Tensor]:
            z, log_q = layer.draw(state, evidence[index])
            return z, (log_q - state.prior.log_prob(z)).sum((-2, -1))

        features, z, kls = self.decoder.descend(shape.numel(), draw)
        params = self.decoder.emit(features).unflatten(0, shape)
        log_likelihood = self.likelihood.log_prob(params, x).sum(self._data_dims)
        return Terms(log_likelihood, torch.cat(kls, -1).unflatten(0, shape), z.unflatten(0, shape))
