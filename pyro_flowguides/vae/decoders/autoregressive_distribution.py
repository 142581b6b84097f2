"""Autoregressive networks as Pyro distributions over images or sequences."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_flowguides.nn.precision import at_least_float32
from pyro_flowguides.vae.decoders.autoregressive_network import AutoregressiveNetwork
from pyro_flowguides.vae.decoders.likelihoods import (
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Likelihood,
    _log_interval,
    _log_scale,
    _logistic_pixel,
    get_likelihood,
)

__all__ = ["Autoregressive", "IndependentChannels", "PixelLikelihood", "PixelLogisticMixture", "get_pixel_likelihood"]


class PixelLikelihood(nn.Module):
    """The distribution of all channels of one position, given the numbers that a network emits for it.

    Args:
        values: the likelihood that says what the data are: their range and how networks want to see them.
        channels: C.
        outputs: numbers per position.

    Shapes:
        numbers ``(B, outputs, *space)``, x ``(B, C, *space)``.
    """

    def __init__(self, values: Likelihood, channels: int, outputs: int) -> None:
        super().__init__()
        self.values, self.channels, self.outputs = values, channels, outputs

    def log_prob(self, numbers: Tensor, x: Tensor) -> Tensor:
        """The log probability of each position or value, ``(B, ...)``; their sum is that of the datum."""
        raise NotImplementedError

    def draw(self, numbers: Tensor) -> Tensor:
        """A draw of the channels ``(B, C)`` of one position from its numbers ``(B, outputs)``."""
        raise NotImplementedError


class IndependentChannels(PixelLikelihood):
    """A likelihood for each channel, its parameters those numbers whose index is the channel's modulo C.

    The channels are independent given the numbers. With a network of ``groups = C`` the numbers of a channel depend on
    the earlier channels, and so nothing is lost by that.

    Args:
        likelihood: a name in :data:`~pyro_flowguides.vae.LIKELIHOODS`, or a likelihood.
        channels: C.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import IndependentChannels
        >>> pixels = IndependentChannels("logistic", channels=3)
        >>> pixels.outputs, pixels.draw(torch.zeros(5, 6)).shape
        (6, torch.Size([5, 3]))
    """

    def __init__(self, likelihood: str | Likelihood, channels: int) -> None:
        values = get_likelihood(likelihood)
        super().__init__(values, channels, channels * values.parameters_per_value)

    def _by_channel(self, numbers: Tensor) -> Tensor:
        """``(B, P * C, ...) -> (B, C, ..., P)``."""
        return numbers.unflatten(1, (-1, self.channels)).movedim(1, -1)

    def log_prob(self, numbers: Tensor, x: Tensor) -> Tensor:
        return self.values.log_prob(self._by_channel(numbers), x)

    def draw(self, numbers: Tensor) -> Tensor:
        return self.values.sample(self._by_channel(numbers))


class PixelLogisticMixture(PixelLikelihood):
    r"""A mixture over whole pixels: K discretized logistics per channel, whose locations depend on earlier channels.

    .. math::
        p(x_1, \dots, x_C) = \sum_{k=1}^{K} \pi_k \prod_{c=1}^{C} p_{\mu_{kc}, s_{kc}}(x_c), \qquad
        \mu_{kc} = m_{kc} + \sum_{b < c} \tanh(\alpha_{kcb})\, v_b, \qquad v = \frac{x}{127.5} - 1

    All channels share the component k. With one channel it is the mixture of
    :class:`~pyro_flowguides.vae.DiscretizedLogisticMixture`.

    Args:
        channels: C.
        components: K.

    Shapes:
        K (1 + 2 C + C (C − 1) / 2) numbers per pixel: 10 K in color, 3 K in grey.

    Cost: O(K C²) per pixel.

    References:
        T. Salimans, A. Karpathy, X. Chen, D. Kingma (2017). PixelCNN++. arXiv:1701.05517.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import PixelLogisticMixture
        >>> pixels = PixelLogisticMixture(channels=3, components=5)
        >>> pixels.outputs, pixels.log_prob(torch.randn(2, 50, 8, 8), torch.zeros(2, 3, 8, 8)).shape
        (50, torch.Size([2, 8, 8]))
    """

    def __init__(self, channels: int, components: int = 10) -> None:
        if channels < 1 or components < 1:
            raise ValueError(f"PixelLogisticMixture: need channels, components >= 1, got {channels} and {components}")
        self.sizes = [
            components * count for count in (1, channels, channels, channels * (channels - 1) // 2)
        ]  # weights, locations, scales, coefficients
        super().__init__(DiscretizedLogistic(), channels, sum(self.sizes))
        self.components = components

    def _split(self, numbers: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], list[list[Tensor]]]:
        """Log weights, and by channel locations, log-scales and coefficients; components in dimension 1 of each."""
        logits, locations, scales, raw = numbers.split(self.sizes, 1)
        coefficients = list(raw.tanh().split(self.components, 1))
        by_channel = [[coefficients.pop(0) for _ in range(channel)] for channel in range(self.channels)]
        return (
            logits.log_softmax(1),
            list(locations.split(self.components, 1)),
            list(_log_scale(scales).split(self.components, 1)),
            by_channel,
        )

    def _located(self, location: Tensor, coefficients: list[Tensor], x: Tensor) -> Tensor:
        """The location of a channel given the earlier ones, which x begins with."""
        earlier = self.values.standardize(x.to(location.dtype))
        for channel, coefficient in enumerate(coefficients):
            location = location + coefficient * earlier[:, channel : channel + 1]
        return location

    def log_prob(self, numbers: Tensor, x: Tensor) -> Tensor:
        total, locations, scales, coefficients = self._split(numbers)
        for channel in range(self.channels):
            location = self._located(locations[channel], coefficients[channel], x)
            total = total + _log_interval(x[:, channel : channel + 1], location, scales[channel])
        return total.logsumexp(1)

    def draw(self, numbers: Tensor) -> Tensor:
        log_weights, locations, scales, coefficients = self._split(numbers)
        component = torch.distributions.Categorical(logits=log_weights).sample()[:, None]
        drawn = numbers.new_zeros(len(numbers), 0)
        for channel in range(self.channels):
            location = self._located(locations[channel], coefficients[channel], drawn)
            value = _logistic_pixel(location.gather(1, component), scales[channel].gather(1, component))
            drawn = torch.cat([drawn, value], 1)
        return drawn


def get_pixel_likelihood(likelihood: str | Likelihood, channels: int, *, whole_pixels: bool) -> PixelLikelihood:
    """The likelihood of all channels of a position, from the likelihood of one value.

    Args:
        likelihood: a name in :data:`~pyro_flowguides.vae.LIKELIHOODS`, or a likelihood.
        channels: C.
        whole_pixels: whether the channels are drawn from the same numbers; then a mixture is one over whole pixels.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> from pyro_flowguides.vae.decoders.autoregressive_distribution import get_pixel_likelihood
        >>> get_pixel_likelihood("logistic_mixture", channels=3, whole_pixels=True).outputs
        100
    """
    values = get_likelihood(likelihood)
    if whole_pixels and isinstance(values, DiscretizedLogisticMixture):
        return PixelLogisticMixture(channels, values.components)
    return IndependentChannels(values, channels)


class Autoregressive(TorchDistribution):
    r"""The distribution over images or sequences that an autoregressive network and a likelihood make.

    .. math:: \log p(x \mid c) = \sum_i \log p(x_i \mid \theta_i(x_{<i}, c))

    For a network with several members (:class:`~pyro_flowguides.nn.AgnosticMADE` in evaluation) it is their mixture.

    Cost: ``log_prob`` one parallel pass (per member); ``sample`` what the network's ``generate`` says.

    Args:
        network: with ``likelihood.outputs`` outputs.
        likelihood: of the channels of one position.
        features: ``(*batch, network.features)``, if the network has any.
        maps: ``(*batch, network.maps, *space)``, if the network has any.
        batch_shape: broadcast with the batch shapes of the context.

    Shapes:
        event shape ``network.shape``.

    Raises:
        ValueError: if network and likelihood do not fit.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.decoders import PixelCNN
        >>> from pyro_flowguides.vae import Autoregressive, IndependentChannels
        >>> pixels = IndependentChannels("bernoulli", channels=1)
        >>> network = PixelCNN((1, 6, 6), pixels.outputs, reach=2, depth=2, maps=4)
        >>> p = Autoregressive(network, pixels, maps=torch.randn(5, 4, 6, 6))
        >>> x = p.sample((2,))
        >>> x.shape, p.log_prob(x).shape
        (torch.Size([2, 5, 1, 6, 6]), torch.Size([2, 5]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        network: AutoregressiveNetwork,
        likelihood: PixelLikelihood,
        features: Tensor | None = None,
        maps: Tensor | None = None,
        *,
        batch_shape: torch.Size = torch.Size(),  # noqa: B008  torch's own default
        validate_args: bool | None = None,
    ) -> None:
        if (network.outputs, network.shape[0]) != (likelihood.outputs, likelihood.channels):
            raise ValueError(
                f"Autoregressive: the network has {network.outputs} outputs for {network.shape[0]} channels, the "
                f"likelihood needs {likelihood.outputs} for {likelihood.channels}"
            )
        self.network, self.likelihood, self.features, self.maps = network, likelihood, features, maps
        shapes = [batch_shape]
        if features is not None:
            shapes.append(features.shape[:-1])
        if maps is not None:
            shapes.append(maps.shape[: -len(network.shape)])
        super().__init__(torch.broadcast_shapes(*shapes), torch.Size(network.shape), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(self.likelihood.values.support, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Autoregressive:
        return Autoregressive(
            self.network,
            self.likelihood,
            self.features,
            self.maps,
            batch_shape=torch.Size(batch_shape),
            validate_args=self._validate_args,
        )

    def _context(self, batch: torch.Size) -> tuple[Tensor | None, Tensor | None]:
        """Features and maps for a flat batch."""
        features, maps = self.features, self.maps
        if features is not None:
            features = features.expand(*batch, features.shape[-1]).reshape(-1, features.shape[-1])
        if maps is not None:
            event = maps.shape[-len(self.event_shape) :]
            maps = maps.expand(*batch, *event).reshape(-1, *event)
        return features, maps

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        batch = torch.broadcast_shapes(self.batch_shape, value.shape[: -len(self.event_shape)])
        x = value.expand(*batch, *self.event_shape).reshape(-1, *self.event_shape)
        features, maps = self._context(batch)
        inputs = self.likelihood.values.standardize(x.to(next(self.network.parameters()).dtype))
        members = self.network.members()
        densities = [
            self.likelihood.log_prob(at_least_float32(member(inputs, features, maps)), x).flatten(1).sum(-1)
            for member in members
        ]
        return (torch.stack(densities).logsumexp(0) - math.log(len(members))).reshape(batch)

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  torch's own default
        batch = torch.Size((*sample_shape, *self.batch_shape))
        features, maps = self._context(batch)
        members, size = self.network.members(), math.prod(batch)
        chosen = torch.randint(len(members), (size,))
        x = next(self.network.parameters()).new_zeros(size, *self.event_shape)
        for number in chosen.unique().tolist():
            mine = (chosen == number).nonzero()[:, 0].to(x.device)
            x[mine] = members[number].generate(
                self.likelihood.draw,
                len(mine),
                None if features is None else features[mine],
                None if maps is None else maps[mine],
                self.likelihood.values.standardize,
            )
        return x.reshape(*batch, *self.event_shape)
