"""The layers of the hierarchical VAE: a deterministic pass upwards, and a stochastic pass downwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.nn.precision import at_least_float32
from pyro_flowguides.transforms.bounds import soft_bound
from pyro_flowguides.vae.models.conv_iaf import ConvIAF
from pyro_flowguides.vae.networks import WeightNormConv2d
from pyro_flowguides.vae.networks.image_shapes import params_last
from pyro_flowguides.vae.networks.resnet import RESIDUAL_SCALE, UpsampleConv2d

__all__ = ["BottomUp", "DownLayer", "DownState", "Evidence", "Gaussian", "TopDown", "TopLayer", "UpLayer", "Widths"]

#: Largest absolute log-scale of a Gaussian.
LOG_SCALE_BOUND = 7.0


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


class Widths(NamedTuple):
    """Numbers of channels of a layer: of its latents, of its features and of the context of its IAF steps."""

    latents: int
    features: int
    #: 0 without steps.
    context: int


class TopLayer(nn.Module):
    """The topmost layer of the pass upwards, which only emits evidence about its latents."""

    def __init__(self, widths: Widths, stride: int) -> None:
        super().__init__()
        self.parts = [2 * widths.latents, widths.context]
        self.emission = WeightNormConv2d(widths.features, sum(self.parts), stride=stride)

    def evidence(self, x: Tensor) -> Evidence:
        """Return the evidence of the features ``(N, features, H, W)`` about the latents."""
        statistics, context = self.emission(F.elu(x)).split(self.parts, -3)
        return Evidence(RESIDUAL_SCALE * statistics, context)


class UpLayer(TopLayer):
    """A layer of the pass upwards: a residual block that also emits evidence about its latents."""

    def __init__(self, widths: Widths, stride: int) -> None:
        super().__init__(widths, stride)
        features = widths.features
        self.skip = WeightNormConv2d(features, features, stride=stride) if stride > 1 else nn.Identity()
        self.first = WeightNormConv2d(features, features, stride=stride)
        self.second = WeightNormConv2d(features, features)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.skip(x) + RESIDUAL_SCALE * self.second(F.elu(self.first(F.elu(x))))
        return h


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


#: A function ``(index, layer, state) -> z`` that chooses the latents of a layer, ``(N, C, H, W)``.
ChooseLatents: TypeAlias = Callable[[int, "DownLayer", DownState], Tensor]


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
        residual = self.second(F.elu(torch.cat([state.features, z], -3)))
        h: Tensor = self.skip(state.h) + RESIDUAL_SCALE * residual
        return h

    def draw(self, state: DownState, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """Draw from the posterior; return the draw and its elementwise log density."""
        gaussian, context = self._posterior(state, evidence)
        z = gaussian.draw(torch.randn_like(gaussian.loc))
        log_q = gaussian.log_prob(z)
        for step in self._steps():
            z, log_scale = step(z, context)
            log_q = log_q - log_scale
        return z, log_q

    def log_prob(self, state: DownState, evidence: Evidence, z: Tensor) -> Tensor:
        """Return the elementwise log density of the posterior at any z."""
        gaussian, context = self._posterior(state, evidence)
        ladj = torch.zeros_like(z)
        for step in reversed(self._steps()):
            z, log_scale = step.inverse(z, context)
            ladj = ladj - log_scale
        return ladj + gaussian.log_prob(z)

    def _posterior(self, state: DownState, evidence: Evidence) -> tuple[Gaussian, Tensor]:
        """Return the Gaussian below the IAF steps, and the context of the steps."""
        gaussian = Gaussian.from_statistics(state.statistics + evidence.statistics)
        return gaussian, state.context + evidence.context

    def _steps(self) -> list[ConvIAF]:
        return list(cast("Iterable[ConvIAF]", self.steps))


class TopDown(nn.Module):
    """The pass downwards, with latents chosen by the caller: draws of the prior or the posterior, or given values.

    Its forward maps given latents ``(N, latent_dim)`` to likelihood parameters ``(N, *data_shape, P)``.
    """

    def __init__(
        self, layers: Sequence[DownLayer], features: int, data_shape: Sequence[int], parameters_per_value: int
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.data_channels = data_shape[0]
        self.top = nn.Parameter(torch.zeros(features, *layers[0].event[1:]))
        self.head = UpsampleConv2d(features, data_shape[0] * parameters_per_value, (data_shape[1], data_shape[2]))
        self.head.convolution.init_scale = RESIDUAL_SCALE

    @property
    def latent_dims(self) -> list[int]:
        """The number of latents of each layer, the topmost first."""
        return [layer.event.numel() for layer in self._layers()]

    def descend(self, count: int, choose: ChooseLatents) -> Tensor:
        """Return the features at the bottom for ``count`` data, ``(count, features, H, W)``."""
        h = self.top.expand(count, *self.top.shape)
        for index, layer in enumerate(self._layers()):
            state = layer.open(h)
            h = layer.close(state, choose(index, layer, state))
        return h

    def split(self, z: Tensor) -> list[Tensor]:
        """Split ``z (N, latent_dim)`` into the maps of each layer."""
        parts = z.split(self.latent_dims, -1)
        return [part.unflatten(-1, layer.event) for part, layer in zip(parts, self._layers(), strict=True)]

    def emit(self, h: Tensor) -> Tensor:
        """Return the parameters of the likelihood for the features at the bottom."""
        return params_last(at_least_float32(self.head(F.elu(h))), self.data_channels)

    def forward(self, z: Tensor) -> Tensor:
        maps = self.split(z)
        return self.emit(self.descend(len(z), lambda index, layer, state: maps[index]))

    def _layers(self) -> list[DownLayer]:
        return list(cast("Iterable[DownLayer]", self.layers))
