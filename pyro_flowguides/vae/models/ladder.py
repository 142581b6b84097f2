"""The layers of the hierarchical VAE: a pass upwards, a stochastic pass downwards, and its autoregressive steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.nn.precision import at_least_float32
from pyro_flowguides.transforms.bounds import soft_bound
from pyro_flowguides.transforms.solvers import autoregressive_root
from pyro_flowguides.transforms.updates import UPDATES
from pyro_flowguides.vae.decoders import MaskedConv2d
from pyro_flowguides.vae.networks import WeightNormConv2d
from pyro_flowguides.vae.networks.image_shapes import flatten_batch, params_last
from pyro_flowguides.vae.networks.resnet import RESIDUAL_SCALE, UpsampleConv2d

__all__ = ["BottomUp", "ConvIAF", "DownLayer", "DownState", "Evidence", "Gaussian", "TopDown", "TopLayer", "UpLayer"]

#: Largest absolute log-scale of a Gaussian.
LOG_SCALE_BOUND = 7.0
#: Channels of a layer's latents, of its features, and of the context of its IAF steps (0 without steps).
Widths: TypeAlias = tuple[int, int, int]
T = TypeVar("T")


class ConvIAF(nn.Module):
    r"""One inverse autoregressive step on a map of latent variables, by masked convolutions.

    .. math:: y_i = e^{a_i} x_i + m_i, \qquad (a_i, m_i) \text{ a function of } x_{<i} \text{ and of the context}

    in raster order of the pixels and, within a pixel, in the order of the channels, or in the reverse of both. The
    update is the gated one of :class:`~pyro_flowguides.transforms.InverseAutoregressive`, with its bounds. The network
    has three masked 3 × 3 convolutions with ELU between them; the context is added to the output of the first. The last
    one starts at zero, and so the step starts at the identity.

    Cost: one pass of the network forward; backward a fixed-point iteration of at most C·H·W passes.

    Args:
        channels: C of the latent map.
        context_channels: channels of the context.
        width: channels of the hidden layers, at least C.
        reverse: visit pixels and channels in reverse order.

    Shapes:
        x, y, a ``(..., C, H, W)``; context ``(..., context_channels, H, W)``, with the same leading dimensions.

    Raises:
        ValueError: if ``channels`` is not positive or exceeds ``width``.

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

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and the elementwise log-scale a, whose sum is the ladj."""
        event = x.shape[-3:]
        log_scale, shift = self._affine_map(x.reshape(-1, *event), self._project(context))
        log_scale, shift = log_scale.reshape(x.shape), shift.reshape(x.shape)
        return x * log_scale.exp() + shift, log_scale

    def inverse(self, y: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and the elementwise log-scale a at x."""
        event, projected = y.shape[-3:], self._project(context)

        def affine_map(x: Tensor) -> tuple[Tensor, Tensor]:
            log_scale, shift = self._affine_map(x.unflatten(-1, event), projected)
            return log_scale.flatten(1), shift.flatten(1)

        x = autoregressive_root(affine_map, y.reshape(-1, event.numel()), self.rank(event))
        log_scale, _ = affine_map(x)
        return x.reshape(y.shape), log_scale.reshape(y.shape)

    def rank(self, event: Sequence[int]) -> Tensor:
        """Return the position of each coordinate of the flattened map ``(C, H, W)`` in the order."""
        channels, height, width = event
        device = self.last.weight.device
        rank = torch.arange(channels * height * width, device=device).reshape(height * width, channels).mT.flatten()
        return len(rank) - 1 - rank if self.reverse else rank

    def _affine_map(self, x: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Return the elementwise log-scale and shift for ``x (N, C, H, W)`` and a context ``(N, width, H, W)``."""
        h = self.first(self._in_order(x)) + projected
        h = self.last(F.elu(self.second(F.elu(h))))
        raw, shift = at_least_float32(h).chunk(2, -3)
        log_scale, shift = UPDATES["gated"](raw, shift)
        return self._in_order(log_scale), self._in_order(shift)

    def _project(self, context: Tensor) -> Tensor:
        """Project the context to the hidden layer: ``(..., context_channels, H, W) -> (N, width, H, W)``."""
        projected = flatten_batch(lambda maps: self.context(self._in_order(maps)), context, 3)
        return projected.reshape(-1, *projected.shape[-3:])

    def _in_order(self, x: Tensor) -> Tensor:
        """Flip channels and pixels if they are visited in reverse order; it is its own inverse."""
        return x.flip((-3, -2, -1)) if self.reverse else x


class Gaussian(NamedTuple):
    """Location and log-scale of independent Gaussians."""

    loc: Tensor
    log_scale: Tensor

    @classmethod
    def from_statistics(cls, statistics: Tensor) -> Gaussian:
        """Split channels ``(..., 2 C, H, W)`` into location and log-scale."""
        loc, raw = at_least_float32(statistics).chunk(2, -3)
        return cls(loc, soft_bound(raw, LOG_SCALE_BOUND))

    def draw(self, noise: Tensor) -> Tensor:
        """Scale and shift standard normal noise."""
        return self.loc + self.log_scale.exp() * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the elementwise log density."""
        noise = (z - self.loc) * (-self.log_scale).exp()
        return -0.5 * (noise * noise + math.log(2 * math.pi)) - self.log_scale


class Evidence(NamedTuple):
    """The contribution of the pass upwards to the posterior of one layer."""

    statistics: Tensor
    context: Tensor

    def expand_flat(self, batch_shape: Sequence[int]) -> Evidence:
        """Expand the batch dimensions, and flatten them into one."""
        return Evidence(*(part.expand(*batch_shape, *part.shape[-3:]).flatten(0, -4) for part in self))


class TopLayer(nn.Module):
    """The topmost layer of the pass upwards, which only emits evidence about its latents."""

    def __init__(self, widths: Widths, stride: int) -> None:
        super().__init__()
        channels, features, context = widths
        self.parts = [2 * channels, context]
        self.emission = WeightNormConv2d(features, sum(self.parts), stride=stride)

    def evidence(self, x: Tensor) -> Evidence:
        """Return the evidence of the features ``(N, features, H, W)`` about the latents."""
        statistics, context = self.emission(F.elu(x)).split(self.parts, -3)
        return Evidence(RESIDUAL_SCALE * statistics, context)


class UpLayer(TopLayer):
    """A layer of the pass upwards: a residual block that also emits evidence about its latents."""

    def __init__(self, widths: Widths, stride: int) -> None:
        super().__init__(widths, stride)
        features = widths[1]
        self.skip = WeightNormConv2d(features, features, stride=stride) if stride > 1 else nn.Identity()
        self.first = WeightNormConv2d(features, features, stride=stride)
        self.second = WeightNormConv2d(features, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + RESIDUAL_SCALE * self.second(F.elu(self.first(F.elu(x))))


class BottomUp(nn.Module):
    """The pass upwards: ``(N, channels, height, width)`` -> the evidence of each layer, the topmost first."""

    def __init__(self, channels: int, features: int, layers: Sequence[UpLayer], top: TopLayer, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.stem = WeightNormConv2d(channels, features, 5, stride=2)
        self.layers, self.top = nn.ModuleList(layers), top

    def forward(self, x: Tensor) -> list[Evidence]:
        h, evidence = self.stem(x), []
        for layer in cast("Iterable[UpLayer]", self.layers):
            evidence.append(layer.evidence(h))
            h = layer(h)
        return [self.top.evidence(h), *evidence[::-1]]


class DownState(NamedTuple):
    """The state of a layer of the pass downwards before its latents are chosen."""

    h: Tensor
    prior: Gaussian
    #: Contributions to the posterior.
    statistics: Tensor
    context: Tensor
    #: Features that are combined with the latents.
    features: Tensor


class DownLayer(nn.Module):
    """A layer of the pass downwards: the prior and the posterior of its latents, and their effect on the features.

    The latents have the height and width ``size``, the layer below ``size_below``: twice as much, or the same.
    """

    def __init__(
        self, widths: Widths, size: tuple[int, int], size_below: tuple[int, int], steps: Sequence[ConvIAF]
    ) -> None:
        super().__init__()
        channels, features, context = widths
        self.event = torch.Size((channels, *size))
        self.parts = [2 * channels, 2 * channels, context, features]
        self.first = WeightNormConv2d(features, sum(self.parts))
        self.steps = nn.ModuleList(steps)
        grows = size_below != size
        self.skip: nn.Module = UpsampleConv2d(features, features, size_below) if grows else nn.Identity()
        inputs = features + channels
        self.second = UpsampleConv2d(inputs, features, size_below) if grows else WeightNormConv2d(inputs, features)

    def open(self, h: Tensor) -> DownState:
        """Compute the state of this layer from the features above it."""
        prior, statistics, context, features = self.first(F.elu(h)).split(self.parts, -3)
        prior_gaussian = Gaussian.from_statistics(RESIDUAL_SCALE * prior)
        return DownState(h, prior_gaussian, RESIDUAL_SCALE * statistics, context, features)

    def close(self, state: DownState, z: Tensor) -> Tensor:
        """Return the features below this layer."""
        return self.skip(state.h) + RESIDUAL_SCALE * self.second(F.elu(torch.cat([state.features, z], -3)))

    def draw(self, state: DownState, evidence: Evidence | None) -> tuple[Tensor, Tensor]:
        """Draw from the posterior given the evidence, or from the prior; return the elementwise log density, too."""
        gaussian, context, steps = self._distribution(state, evidence)
        z = gaussian.draw(torch.randn_like(gaussian.loc))
        log_prob = gaussian.log_prob(z)
        for step in steps:
            z, log_scale = step(z, context)
            log_prob = log_prob - log_scale
        return z, log_prob

    def log_prob(self, state: DownState, evidence: Evidence | None, z: Tensor) -> Tensor:
        """Return the elementwise log density of the posterior given the evidence, or of the prior, at any z."""
        gaussian, context, steps = self._distribution(state, evidence)
        ladj = torch.zeros_like(z)
        for step in reversed(steps):
            z, log_scale = step.inverse(z, context)
            ladj = ladj - log_scale
        return ladj + gaussian.log_prob(z)

    def _distribution(self, state: DownState, evidence: Evidence | None) -> tuple[Gaussian, Tensor, list[ConvIAF]]:
        """Return the Gaussian below the IAF steps, their context, and the steps; the prior has none."""
        if evidence is None:
            return state.prior, state.context, []
        gaussian = Gaussian.from_statistics(state.statistics + evidence.statistics)
        return gaussian, state.context + evidence.context, list(cast("Iterable[ConvIAF]", self.steps))


class TopDown(nn.Module):
    """The pass downwards, with latents chosen by the caller: draws of the prior or the posterior, or given values.

    Its forward maps given latents ``(N, latent_dim)`` to likelihood parameters ``(N, *data_shape, P)``.
    """

    def __init__(
        self, layers: Sequence[DownLayer], features: int, data_shape: Sequence[int], parameters_per_value: int
    ) -> None:
        super().__init__()
        self.layers = cast("Sequence[DownLayer]", nn.ModuleList(layers))
        self.data_channels = data_shape[0]
        self.top = nn.Parameter(torch.zeros(features, *layers[0].event[1:]))
        self.head = UpsampleConv2d(features, data_shape[0] * parameters_per_value, (data_shape[1], data_shape[2]))
        self.head.convolution.init_scale = RESIDUAL_SCALE

    @property
    def latent_dims(self) -> list[int]:
        """The number of latents of each layer, the topmost first."""
        return [layer.event.numel() for layer in self.layers]

    def descend(
        self, count: int, choose: Callable[[int, DownLayer, DownState], tuple[Tensor, T]]
    ) -> tuple[Tensor, Tensor, list[T]]:
        """Pass ``count`` data downwards, with latents ``(count, C, H, W)`` of each layer chosen by a function.

        Return the features at the bottom, ``(count, features, H, W)``, all latents, ``(count, latent_dim)``, and what
        the function returns beside the latents of each layer.
        """
        h, latents, others = self.top.expand(count, *self.top.shape), [], []
        for index, layer in enumerate(self.layers):
            state = layer.open(h)
            z, other = choose(index, layer, state)
            latents.append(z.flatten(1))
            others.append(other)
            h = layer.close(state, z)
        return h, torch.cat(latents, -1), others

    def split(self, z: Tensor) -> list[Tensor]:
        """Split ``z (N, latent_dim)`` into the maps of each layer."""
        parts = z.split(self.latent_dims, -1)
        return [part.unflatten(-1, layer.event) for part, layer in zip(parts, self.layers, strict=True)]

    def emit(self, h: Tensor) -> Tensor:
        """Return the parameters of the likelihood for the features at the bottom."""
        return params_last(at_least_float32(self.head(F.elu(h))), self.data_channels)

    def forward(self, z: Tensor) -> Tensor:
        maps = self.split(z)
        return self.emit(self.descend(len(z), lambda index, layer, state: (maps[index], None))[0])
