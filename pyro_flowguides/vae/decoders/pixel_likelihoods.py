"""The joint distribution of the channels of one position, given the outputs of an autoregressive network."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pyro_flowguides.nn.arguments import check_count
from pyro_flowguides.transforms.bounds import soft_bound
from pyro_flowguides.vae.decoders import likelihoods
from pyro_flowguides.vae.decoders.likelihoods import Likelihood

__all__ = ["IndependentChannels", "PixelLikelihood", "PixelLogisticMixture"]


class PixelLikelihood(nn.Module):
    """The joint distribution of all channels of one position, given the parameters that a network computes for it.

    Args:
        values: a likelihood of one value, which defines the range of the data and how to standardize them.
        channels: C.
        outputs: number of parameters per position.

    Shapes:
        params ``(B, outputs, *space)``, x ``(B, C, *space)``.
    """

    def __init__(self, values: Likelihood, channels: int, outputs: int) -> None:
        super().__init__()
        self.values, self.channels, self.outputs = values, channels, outputs

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """Return the log probability of each position or value, ``(B, ...)``, which sums to that of the datum."""
        raise NotImplementedError

    def draw(self, params: Tensor) -> Tensor:
        """Draw the channels ``(B, C)`` of one position from its parameters ``(B, outputs)``."""
        raise NotImplementedError


class IndependentChannels(PixelLikelihood):
    """Independent channels, each with the likelihood of one value; output k belongs to channel ``k % C``.

    The channels are independent only given the parameters. In a network with ``groups = C`` the parameters of a channel
    depend on the earlier channels, so that the distribution of a pixel is fully general.

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
        check_count("IndependentChannels", "channels", channels)
        values = likelihoods.get_likelihood(likelihood)
        super().__init__(values, channels, channels * values.parameters_per_value)

    def _by_channel(self, params: Tensor) -> Tensor:
        """Separate the channels: ``(B, P * C, ...) -> (B, C, ..., P)``."""
        return params.unflatten(1, (-1, self.channels)).movedim(1, -1)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return self.values.log_prob(self._by_channel(params), x)

    def draw(self, params: Tensor) -> Tensor:
        return self.values.sample(self._by_channel(params))


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
        K (1 + 2 C + C (C − 1) / 2) parameters per pixel: 10 K in color, 3 K in grey.

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
        check_count("PixelLogisticMixture", "channels", channels)
        check_count("PixelLogisticMixture", "components", components)
        #: Numbers of logits, locations, scales and coefficients.
        self.sizes = [components * count for count in (1, channels, channels, channels * (channels - 1) // 2)]
        super().__init__(likelihoods.DiscretizedLogistic(), channels, sum(self.sizes))
        self.components = components

    def _split(self, params: Tensor) -> tuple[Tensor, Iterator[tuple[Tensor, Tensor, list[Tensor]]]]:
        """Return log weights and, for every channel, locations, log-scales and coefficients, each ``(B, K, ...)``."""
        logits, locations, raw, tanh_inputs = params.split(self.sizes, 1)
        scales = soft_bound(raw, likelihoods.LOG_SCALE_BOUND)
        coefficients = iter(tanh_inputs.tanh().split(self.components, 1))
        by_channel = [[next(coefficients) for _ in range(channel)] for channel in range(self.channels)]
        parts = (part.split(self.components, 1) for part in (locations, scales))
        return logits.log_softmax(1), zip(*parts, by_channel, strict=True)

    def _shifted(self, location: Tensor, coefficients: list[Tensor], x: Tensor) -> Tensor:
        """Return the location of a channel given the earlier channels, which are the first ones of x."""
        earlier = self.values.standardize(x.to(location.dtype))
        for channel, coefficient in enumerate(coefficients):
            location = location + coefficient * earlier[:, channel : channel + 1]
        return location

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        total, channels = self._split(params)
        for channel, (location, scale, coefficients) in enumerate(channels):
            shifted = self._shifted(location, coefficients, x)
            total = total + likelihoods.pixel_log_prob(x[:, channel : channel + 1], shifted, scale)
        return total.logsumexp(1)

    def draw(self, params: Tensor) -> Tensor:
        log_weights, channels = self._split(params)
        component = torch.distributions.Categorical(logits=log_weights).sample()[:, None]
        drawn = params.new_zeros(len(params), 0)
        for location, scale, coefficients in channels:
            shifted = self._shifted(location, coefficients, drawn)
            value = likelihoods.draw_pixel(shifted.gather(1, component), scale.gather(1, component))
            drawn = torch.cat([drawn, value], 1)
        return drawn
