"""The hierarchical bidirectional ResNet-IAF of Kingma et al. (2016), for images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from pyro_flowguides.nn.precision import at_least_float32
from pyro_flowguides.transforms.bounds import soft_bound
from pyro_flowguides.transforms.solvers import autoregressive_root
from pyro_flowguides.transforms.updates import UPDATES
from pyro_flowguides.vae.decoders import MaskedConv2d
from pyro_flowguides.vae.decoders.likelihoods import Likelihood
from pyro_flowguides.vae.models.base import VAE, Terms
from pyro_flowguides.vae.networks import WeightNormConv2d
from pyro_flowguides.vae.networks.batching import flatten_batch
from pyro_flowguides.vae.networks.gated_conv import halved, image_size
from pyro_flowguides.vae.networks.resnet import RESIDUAL_SCALE, UpsampleConv2d

__all__ = ["ConvIAF", "HierarchicalVAE"]

#: Largest absolute log-scale of a Gaussian.
LOG_SCALE_BOUND = 7.0


class ConvIAF(nn.Module):
    r"""One inverse autoregressive step on a map of latent variables, by masked convolutions.

    .. math:: y_i = e^{a_i} x_i + m_i, \qquad (a_i, m_i) \text{ a function of } x_{<i} \text{ and of the context}

    in raster order of the pixels and, within a pixel, in the order of the channels; reversed if asked for. The update
    is the gated one of :class:`~pyro_flowguides.transforms.InverseAutoregressive`, from which the bounds are. Two
    layers of masked 3 × 3 convolutions with ELU, the context added to the first, and a third to (a, m) that starts at
    zero: the step starts at the identity.

    Cost: one pass of the network forward; backward a fixed-point iteration of at most C·H·W passes.

    Args:
        channels: C of the latent map.
        context_channels: those of the context.
        width: channels of the hidden layers, at least C.
        reverse: visit pixels and channels in the opposite order.

    Shapes:
        x, y, a ``(..., C, H, W)``; context ``(..., context_channels, H, W)``, with the same leading dimensions.

    References:
        D. Kingma, T. Salimans, R. Jozefowicz, X. Chen, I. Sutskever, M. Welling (2016). Improving variational inference
        with inverse autoregressive flow. arXiv:1606.04934.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import ConvIAF
        >>> step = ConvIAF(channels=2, context_channels=3, width=8)
        >>> y, a = step(torch.randn(5, 2, 4, 4), torch.randn(5, 3, 4, 4))
        >>> y.shape, a.shape
        (torch.Size([5, 2, 4, 4]), torch.Size([5, 2, 4, 4]))
    """

    def __init__(self, channels: int, context_channels: int, width: int = 32, *, reverse: bool = False) -> None:
        super().__init__()
        if not 1 <= channels <= width:
            raise ValueError(f"ConvIAF: width must be at least the {channels} channels of the latents, got {width}")
        self.channels, self.reverse = channels, reverse
        self.first = MaskedConv2d(channels, width, 1, 1, 1, groups=channels, strict=True)
        self.context = nn.Conv2d(context_channels, width, 3, padding=1)
        self.second = MaskedConv2d(width, width, 1, 1, 1, groups=channels)
        self.last = MaskedConv2d(width, 2 * channels, 1, 1, 1, groups=channels)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def _turned(self, x: Tensor) -> Tensor:
        return x.flip((-3, -2, -1)) if self.reverse else x

    def _update(self, x: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        """The elementwise log-scale and shift for ``x (N, C, H, W)`` and the context ``(N, width, H, W)``."""
        h = self.first(self._turned(x)) + projected
        h = self.last(F.elu(self.second(F.elu(h))))
        log_scale, shift = UPDATES["gated"](*at_least_float32(h).chunk(2, -3))
        return self._turned(log_scale), self._turned(shift)

    def _project(self, context: Tensor) -> Tensor:
        return self.context(self._turned(context))

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """y and the elementwise log-scale a; the log-determinant is its sum."""
        leading, event = x.shape[:-3], x.shape[-3:]
        projected = flatten_batch(self._project, context, 3).reshape(-1, self.first.out_channels, *event[1:])
        log_scale, shift = self._update(x.reshape(-1, *event), projected)
        log_scale, shift = log_scale.reshape(*leading, *event), shift.reshape(*leading, *event)
        return x * log_scale.exp() + shift, log_scale

    def inverse(self, y: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """x and the elementwise log-scale a at x."""
        leading, event = y.shape[:-3], y.shape[-3:]
        projected = flatten_batch(self._project, context, 3).reshape(-1, self.first.out_channels, *event[1:])

        def elementwise(x: Tensor) -> tuple[Tensor, Tensor]:
            log_scale, shift = self._update(x.unflatten(-1, event), projected)
            return log_scale.flatten(1), shift.flatten(1)

        x = autoregressive_root(elementwise, y.reshape(-1, event.numel()), self.rank(event))
        log_scale, _ = elementwise(x)
        return x.reshape(*leading, *event), log_scale.reshape(*leading, *event)

    def rank(self, event: Sequence[int]) -> Tensor:
        """The place of each coordinate of the flattened map ``(C, H, W)`` in the order."""
        channels, height, width = event
        by_pixel = torch.arange(height * width * channels, device=self.last.weight.device)
        rank = by_pixel.view(height, width, channels).movedim(-1, 0).flatten()
        return len(rank) - 1 - rank if self.reverse else rank


class _Gaussian(NamedTuple):
    """Location and log-scale of independent Gaussians."""

    loc: Tensor
    log_scale: Tensor

    @classmethod
    def of(cls, statistics: Tensor) -> _Gaussian:
        loc, raw = at_least_float32(statistics).chunk(2, -3)
        return cls(loc, soft_bound(raw, LOG_SCALE_BOUND))

    def draw(self, noise: Tensor) -> Tensor:
        return self.loc + self.log_scale.exp() * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """Elementwise."""
        return _log_normal((z - self.loc) * (-self.log_scale).exp()) - self.log_scale


def _log_normal(noise: Tensor) -> Tensor:
    return -0.5 * (noise * noise + math.log(2 * math.pi))


class _Evidence(NamedTuple):
    """What the pass from the image upwards contributes to one layer's posterior."""

    statistics: Tensor
    context: Tensor


class _State(NamedTuple):
    """What the pass downwards has before a layer's latents are known."""

    h: Tensor
    prior: _Gaussian
    statistics: Tensor
    context: Tensor
    features: Tensor


class _Sizes(NamedTuple):
    """Channels of a layer's latents, of its features, and of the context of its autoregressive steps (0: no steps)."""

    latents: int
    width: int
    context: int


class _Top(nn.Module):
    """The topmost layer of the pass upwards: it only emits its evidence about the latents."""

    def __init__(self, sizes: _Sizes, stride: int) -> None:
        super().__init__()
        self.parts = [2 * sizes.latents, sizes.context]
        self.emission = WeightNormConv2d(sizes.width, sum(self.parts), stride=stride)

    def evidence(self, x: Tensor) -> _Evidence:
        statistics, context = self.emission(F.elu(x)).split(self.parts, -3)
        return _Evidence(RESIDUAL_SCALE * statistics, context)


class _Up(_Top):
    """A layer of the pass upwards: a residual block that also emits its evidence."""

    def __init__(self, sizes: _Sizes, stride: int) -> None:
        super().__init__(sizes, stride)
        width = sizes.width
        self.skip = WeightNormConv2d(width, width, stride=stride) if stride > 1 else nn.Identity()
        self.first = WeightNormConv2d(width, width, stride=stride)
        self.second = WeightNormConv2d(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.skip(x) + RESIDUAL_SCALE * self.second(F.elu(self.first(F.elu(x))))
        return h


class _Down(nn.Module):
    """A layer of the pass downwards: prior and posterior of its latents, and what they add to the features."""

    def __init__(self, sizes: _Sizes, size: tuple[int, int], larger: tuple[int, int], steps: Sequence[ConvIAF]) -> None:
        super().__init__()
        channels, width, context = sizes
        self.event = torch.Size((channels, *size))
        self.parts = [2 * channels, 2 * channels, context, width]
        self.first = WeightNormConv2d(width, sum(self.parts))
        self.steps = nn.ModuleList(steps)
        grows = larger != size
        self.skip: nn.Module = UpsampleConv2d(width, width, larger) if grows else nn.Identity()
        inputs = width + channels
        self.second = UpsampleConv2d(inputs, width, larger) if grows else WeightNormConv2d(inputs, width)

    def open(self, h: Tensor) -> _State:
        """The pass up to this layer's latents."""
        prior, statistics, context, features = self.first(F.elu(h)).split(self.parts, -3)
        return _State(h, _Gaussian.of(RESIDUAL_SCALE * prior), RESIDUAL_SCALE * statistics, context, features)

    def close(self, state: _State, z: Tensor) -> Tensor:
        """The features below this layer."""
        added = self.second(F.elu(torch.cat([state.features, z], -3)))
        h: Tensor = self.skip(state.h) + RESIDUAL_SCALE * added
        return h

    def _posterior(self, state: _State, evidence: _Evidence) -> tuple[_Gaussian, Tensor]:
        return _Gaussian.of(state.statistics + evidence.statistics), state.context + evidence.context

    def draw(self, state: _State, evidence: _Evidence) -> tuple[Tensor, Tensor]:
        """A posterior draw and its elementwise log density."""
        gaussian, context = self._posterior(state, evidence)
        z = gaussian.draw(torch.randn_like(gaussian.loc))
        log_q = gaussian.log_prob(z)
        for step in self.steps:
            z, log_scale = step(z, context)
            log_q = log_q - log_scale
        return z, log_q

    def score(self, state: _State, evidence: _Evidence, z: Tensor) -> Tensor:
        """The elementwise log density of the posterior at any z."""
        gaussian, context = self._posterior(state, evidence)
        total = torch.zeros_like(z)
        for step in reversed(list(cast("Iterable[ConvIAF]", self.steps))):
            z, log_scale = step.inverse(z, context)
            total = total - log_scale
        return total + gaussian.log_prob(z)


class _BottomUp(nn.Module):
    """The pass from the image upwards."""

    def __init__(self, channels: int, width: int, layers: Sequence[_Up], top: _Top, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.stem = WeightNormConv2d(channels, width, 5, stride=2)
        self.layers, self.top = nn.ModuleList(layers), top

    def forward(self, x: Tensor) -> list[_Evidence]:
        """The evidence of all layers, the topmost first, for ``x (N, channels, height, width)``."""
        h, evidence = self.stem(x), []
        for layer in cast("Iterable[_Up]", self.layers):
            evidence.append(layer.evidence(h))
            h = layer(h)
        return [self.top.evidence(h), *evidence[::-1]]


Choose = Callable[[int, _Down, _State], Tensor]


class _TopDown(nn.Module):
    """The pass downwards, whoever chooses the latents: draws of the prior, of the posterior, or given values."""

    def __init__(self, layers: Sequence[_Down], width: int, data_shape: Sequence[int], parameters: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.data_channels = data_shape[0]
        self.top = nn.Parameter(torch.zeros(width, *layers[0].event[1:]))
        self.head = UpsampleConv2d(width, data_shape[0] * parameters, (data_shape[1], data_shape[2]))
        self.head.convolution.init_scale = RESIDUAL_SCALE

    @property
    def sizes(self) -> list[int]:
        """The number of latent variables of each layer, the topmost first."""
        return [layer.event.numel() for layer in self._layers()]

    def _layers(self) -> list[_Down]:
        return list(cast("Iterable[_Down]", self.layers))

    def descend(self, count: int, choose: Choose) -> Tensor:
        """The features at the bottom, ``(count, width, H, W)``."""
        h = self.top.expand(count, *self.top.shape)
        for index, layer in enumerate(self._layers()):
            state = layer.open(h)
            h = layer.close(state, choose(index, layer, state))
        return h

    def split(self, z: Tensor) -> list[Tensor]:
        """The maps of all layers from ``z (N, latent_dim)``."""
        parts = z.split(self.sizes, -1)
        return [part.unflatten(-1, layer.event) for part, layer in zip(parts, self._layers(), strict=True)]

    def emit(self, h: Tensor) -> Tensor:
        """The parameters of the likelihood, ``(N, *data_shape, parameters)``."""
        y = at_least_float32(self.head(F.elu(h)))
        return y.unflatten(-3, (self.data_channels, -1)).movedim(-3, -1)

    def forward(self, z: Tensor) -> Tensor:
        maps = self.split(z)
        return self.emit(self.descend(len(z), lambda index, layer, state: maps[index]))


class _Joint(TorchDistribution):
    """The joint distribution of the latents of all layers, flattened: the prior, or a posterior given evidence."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, ladder: _TopDown, evidence: Sequence[_Evidence] | None, batch_shape: Any) -> None:
        self.ladder, self.evidence = ladder, evidence
        self._last: tuple[Tensor, Tensor] | None = None
        super().__init__(torch.Size(batch_shape), torch.Size((sum(ladder.sizes),)), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Joint:
        shape = torch.Size(batch_shape)
        if self.evidence is None:
            return _Joint(self.ladder, None, shape)
        return _Joint(self.ladder, [_expanded(part, shape) for part in self.evidence], shape)

    def _at(self, shape: torch.Size) -> list[_Evidence] | None:
        """The evidence for that many flattened points."""
        if self.evidence is None:
            return None
        return [_Evidence(*(t.flatten(0, -4) for t in _expanded(part, shape))) for part in self.evidence]

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  torch's own default
        shape = torch.Size(sample_shape) + self.batch_shape
        evidence = self._at(shape)
        draws: list[Tensor] = []
        log_probs: list[Tensor] = []

        def choose(index: int, layer: _Down, state: _State) -> Tensor:
            if evidence is None:
                z = state.prior.draw(torch.randn_like(state.prior.loc))
                log_prob = state.prior.log_prob(z)
            else:
                z, log_prob = layer.draw(state, evidence[index])
            draws.append(z.flatten(1))
            log_probs.append(log_prob.flatten(1).sum(-1))
            return z

        self.ladder.descend(shape.numel(), choose)
        z = torch.cat(draws, -1).reshape(shape + self.event_shape)
        self._last = z, torch.stack(log_probs).sum(0).reshape(shape)
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        if self._last is not None and self._last[0] is value:
            return self._last[1]
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        flat = value.expand(*shape, value.shape[-1]).reshape(-1, value.shape[-1])
        evidence, maps = self._at(shape), self.ladder.split(flat)
        log_probs: list[Tensor] = []

        def choose(index: int, layer: _Down, state: _State) -> Tensor:
            z = maps[index]
            log_prob = state.prior.log_prob(z) if evidence is None else layer.score(state, evidence[index], z)
            log_probs.append(log_prob.flatten(1).sum(-1))
            return z

        self.ladder.descend(len(flat), choose)
        return torch.stack(log_probs).sum(0).reshape(shape)


def _expanded(evidence: _Evidence, shape: torch.Size) -> _Evidence:
    statistics, context = (t.expand(*shape, *t.shape[-3:]) for t in evidence)
    return _Evidence(statistics, context)


class _JointPrior(nn.Module):
    """The prior of a ladder, whose parameters are the ladder's."""

    def __init__(self, ladder: _TopDown) -> None:
        super().__init__()
        self._ladder = (ladder,)  # hidden from torch: the ladder is registered as the decoder

    def forward(self, posterior: Any) -> _Joint:
        return _Joint(self._ladder[0], None, ())


class HierarchicalVAE(VAE):
    r"""A VAE with several layers of latent maps, inferred in both directions.

    .. math::
        p(z) = \prod_{l=1}^{L} p(z_l \mid z_{<l}), \qquad q(z \mid x) = \prod_{l=1}^{L} q(z_l \mid z_{<l}, x)

    A deterministic pass goes from the image upwards; a stochastic one from the topmost layer downwards, shared by model
    and posterior. Each layer's prior is a Gaussian whose moments the pass downwards emits; its posterior is a Gaussian
    whose moments are the sum of what the two passes emit, followed by inverse autoregressive steps (:class:`ConvIAF`)
    with the sum of two contexts. Residual blocks of 3 × 3 convolutions, ELU, weight normalization; call
    :meth:`initialize` before training.

    The divergence is grouped by layer and channel: ``terms.kl`` is ``(S, B, layers * channels)``, which is what free
    bits are meant for. The latent vector of all layers, the topmost first, is the site ``"z"`` of the programs.

    Args:
        data_shape: ``(channels, height, width)``.
        likelihood: what the decoder's numbers mean, a discretized logistic in the paper.
        channels: of each layer's latents.
        width: channels of the deterministic features.
        scales: resolutions: the first is half of the image's, each further one half of the one before.
        layers: stochastic layers per resolution.
        steps: autoregressive steps per layer, in alternating order; 0 for diagonal Gaussians.
        step_width: hidden channels of a step, by default the larger of ``width`` and ``channels``.

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
        sizes = {"channels": channels, "width": width, "scales": scales, "layers": layers, "steps + 1": steps + 1}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"HierarchicalVAE: {name} must be at least 1, got {value}")
        data_channels, height, breadth = image_size("HierarchicalVAE", data_shape)
        places = [(scale, layer) for scale in range(1, scales + 1) for layer in range(layers)]
        strides = [2 if scale > 1 and layer == 0 else 1 for scale, layer in places]
        parts = _Sizes(channels, width, width if steps else 0)
        ups = [_Up(parts, stride) for stride in strides[:-1]]
        downs = []
        for scale, layer in reversed(places):
            size = halved((height, breadth), scale)
            larger = halved((height, breadth), scale - 1) if scale > 1 and layer == 0 else size
            hidden = max(width, channels) if step_width is None else step_width
            iaf = [ConvIAF(channels, width, hidden, reverse=bool(step % 2)) for step in range(steps)]
            downs.append(_Down(parts, size, larger, iaf))
        ladder = _TopDown(downs, width, data_shape, likelihood.parameters_per_value)
        encoder = _BottomUp(data_channels, width, ups, _Top(parts, strides[-1]), sum(ladder.sizes))
        super().__init__(encoder, ladder, likelihood, nn.Identity(), _JointPrior(ladder), data_shape=data_shape)

    def posterior_at(self, x: Tensor) -> _Joint:
        return _Joint(self.decoder, self.encoder(self._inputs(x)), x.shape[:1])

    def decode(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        return flatten_batch(self.decoder, z, 1)

    def terms(self, x: Tensor, num_samples: int = 1) -> Terms:
        """The parts of the bound, in one pass upwards and one downwards."""
        self._check(x)
        posterior = self.posterior_at(x)
        shape = torch.Size((num_samples, len(x)))
        evidence = posterior._at(shape)
        assert evidence is not None
        draws: list[Tensor] = []
        kls: list[Tensor] = []

        def choose(index: int, layer: _Down, state: _State) -> Tensor:
            z, log_q = layer.draw(state, evidence[index])
            draws.append(z.flatten(1))
            kls.append((log_q - state.prior.log_prob(z)).sum((-2, -1)))
            return z

        params = self.decoder.emit(self.decoder.descend(shape.numel(), choose)).unflatten(0, shape)
        log_likelihood = self.likelihood.log_prob(params, x).sum(self._data_dims)
        return Terms(log_likelihood, torch.cat(kls, -1).unflatten(0, shape), torch.cat(draws, -1).unflatten(0, shape))
