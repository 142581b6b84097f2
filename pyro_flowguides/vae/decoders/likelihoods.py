"""The distribution of data given the parameters that a decoder computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from pyro_flowguides.nn.arguments import check_count
from pyro_flowguides.transforms.bounds import soft_bound

__all__ = ["LIKELIHOODS", "Bernoulli", "Categorical", "DiscretizedLogistic", "DiscretizedLogisticMixture", "Likelihood"]
__all__ += ["LOG_SCALE_BOUND", "draw_pixel", "get_likelihood", "pixel_log_prob"]

#: Largest absolute log-scale, approached smoothly.
LOG_SCALE_BOUND = 7.0


class Likelihood(nn.Module):
    """The distribution of one value of the data, given the parameters that the decoder computes for it.

    Given its parameters, every value (a channel of a pixel, or a coordinate) is independent of the others.

    Shapes:
        params ``(..., parameters_per_value)``; x ``(...)``; the leading dimensions of both broadcast.
    """

    parameters_per_value: int
    #: The smallest and the largest value of the data.
    low: ClassVar[float]
    high: ClassVar[float]
    support: ClassVar[constraints.Constraint]
    #: The values that the data may have, and how to convert others, for error messages.
    expected_data: ClassVar[str]

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """Return the log probability of each value, ``(...)``."""
        raise NotImplementedError

    def mean(self, params: Tensor) -> Tensor:
        """Return the expectation of each value, in the units of the data, ``(...)``."""
        raise NotImplementedError

    def sample(self, params: Tensor) -> Tensor:
        """Draw each value, ``(...)``."""
        raise NotImplementedError

    def standardize(self, x: Tensor) -> Tensor:
        """Scale data for use as network inputs."""
        raise NotImplementedError

    def distribution(self, params: Tensor) -> LikelihoodDistribution:
        """Return a Pyro distribution with one batch dimension per dimension of the data."""
        return LikelihoodDistribution(self, params)

    def check(self, x: Tensor) -> None:
        """Check that all values of the data are in the support; otherwise raise an error that names the remedy."""
        if x.numel() and not bool(self.support.check(x).all()):
            low, high = x.min().item(), x.max().item()
            raise ValueError(
                f"{type(self).__name__}: the data must be {self.expected_data}; got {x.dtype} in [{low:g}, {high:g}]"
                f"{'' if math.isfinite(low + high) else ' with values that are not finite'}"
            )


class LikelihoodDistribution(TorchDistribution):
    """A likelihood with given parameters, as a Pyro distribution.

    The leading dimensions of the parameters ``(..., parameters_per_value)`` are the batch shape.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, likelihood: Likelihood, params: Tensor, *, validate_args: bool | None = None) -> None:
        self.likelihood, self.params = likelihood, params
        super().__init__(params.shape[:-1], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return self.likelihood.support

    @property
    def mean(self) -> Tensor:
        return self.likelihood.mean(self.params)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> LikelihoodDistribution:
        params = self.params.expand((*batch_shape, self.params.shape[-1]))
        return LikelihoodDistribution(self.likelihood, params, validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.likelihood.log_prob(self.params, value)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.likelihood.sample(self.params.expand((*sample_shape, *self.params.shape)))


class Bernoulli(Likelihood):
    r"""Bits, or intensities in [0, 1] as probabilities of bits.

    .. math:: \log p(x) = x \log \sigma(l) + (1 - x) \log \sigma(-l) = \log \sigma(l) - (1 - x)\, l

    For x between 0 and 1 this is the expected log-likelihood over random binarizations of x.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import Bernoulli
        >>> Bernoulli().log_prob(torch.zeros(3, 1), torch.tensor([0.0, 0.5, 1.0])).exp()
        tensor([0.5000, 0.5000, 0.5000])
    """

    parameters_per_value = 1
    low, high = 0.0, 1.0
    support = constraints.unit_interval
    expected_data = "bits or numbers in [0, 1]: divide 8-bit pixels by 255"

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        logits = params[..., 0]
        return torch.addcmul(F.logsigmoid(logits), x.to(logits.dtype) - 1, logits)

    def mean(self, params: Tensor) -> Tensor:
        return params[..., 0].sigmoid()

    def sample(self, params: Tensor) -> Tensor:
        return self.mean(params).bernoulli()

    def standardize(self, x: Tensor) -> Tensor:
        return x


class _PixelValues(Likelihood):
    """A distribution over the integers 0..255, of any dtype."""

    low, high = 0.0, 255.0
    support = constraints.integer_interval(0, 255)
    expected_data = "whole numbers 0..255 (of any dtype): multiply intensities in [0, 1] by 255 and round"

    def standardize(self, x: Tensor) -> Tensor:
        return x / 127.5 - 1


class Categorical(_PixelValues):
    r"""A free distribution over the 256 values of a pixel: 256 logits per value.

    .. math:: \log p(x) = l_x - \log \sum_{k=0}^{255} e^{l_k}

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import Categorical
        >>> Categorical().log_prob(torch.zeros(2, 256), torch.tensor([0, 255])).exp() * 256
        tensor([1., 1.])
    """

    parameters_per_value = 256

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(params.shape[:-1], x.shape)
        log_probs = params.log_softmax(-1).expand(*shape, 256)
        return log_probs.gather(-1, x.to(torch.long).expand(shape)[..., None])[..., 0]

    def mean(self, params: Tensor) -> Tensor:
        return params.softmax(-1) @ torch.arange(256, dtype=params.dtype, device=params.device)

    def sample(self, params: Tensor) -> Tensor:
        return torch.distributions.Categorical(logits=params).sample().to(params.dtype)


def pixel_log_prob(x: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log mass of the logistic on the interval of each pixel value; the outer intervals are half-lines.

    For the ends a > b of an interval in units of the scale, σ(a) − σ(b) = σ(a) σ(−b) (1 − exp(b − a)). Every factor has
    a stable logarithm. For a half-line one end is infinite, and two of the factors are 1.
    """
    precision = (-log_scale).exp()
    centered = x.to(loc.dtype) / 127.5 - 1 - loc
    above = F.logsigmoid(precision * (centered + 1 / 255))
    below = F.logsigmoid(-precision * (centered - 1 / 255))
    width = (-(-2 / 255 * precision).expm1()).log()
    first, last = x <= 0, x >= 255
    return above.masked_fill(last, 0) + below.masked_fill(first, 0) + width.masked_fill(first | last, 0)


def pixel_mean(loc: Tensor, log_scale: Tensor) -> Tensor:
    """Return the exact expectation E[X] = Σ_k P(X ≥ k) of a pixel value."""
    precision, total = (-log_scale).exp(), torch.zeros_like(loc)
    for k in range(1, 256):
        total += ((loc - ((k - 0.5) / 127.5 - 1)) * precision).sigmoid()
    return total


def draw_pixel(loc: Tensor, log_scale: Tensor) -> Tensor:
    """Draw pixel values, as whole numbers 0..255 in the dtype of the location."""
    tiny = torch.finfo(loc.dtype).tiny
    uniform = torch.rand_like(loc).clamp(tiny, 1 - torch.finfo(loc.dtype).eps)
    value = loc + log_scale.exp() * (uniform.log() - (-uniform).log1p())
    return ((value + 1) * 127.5).round().clamp(0, 255)


class DiscretizedLogistic(_PixelValues):
    r"""A logistic distribution on [−1, 1], integrated over the interval of each pixel value: location and log-scale.

    .. math:: p(x) = \sigma\!\left(\frac{v + \frac{1}{255} - \mu}{s}\right)
        - \sigma\!\left(\frac{v - \frac{1}{255} - \mu}{s}\right), \qquad v = \frac{x}{127.5} - 1

    The intervals of 0 and 255 extend to infinity, so that the 256 probabilities sum to one. The difference is computed
    as a product of stable factors: value and gradient are accurate however far x is from the location. The log-scale is
    bounded smoothly to ±7.

    Cost: O(1) per value; :meth:`mean` is exact and takes 255 evaluations.

    References:
        D. Kingma et al. (2016). Improving variational inference with inverse autoregressive flow. arXiv:1606.04934.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import DiscretizedLogistic
        >>> params = torch.tensor([0.3, -2.0]).expand(256, 2)
        >>> DiscretizedLogistic().log_prob(params, torch.arange(256)).exp().sum()
        tensor(1.0000)
    """

    parameters_per_value = 2

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return location and log-scale."""
        return params[..., 0], soft_bound(params[..., 1], LOG_SCALE_BOUND)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return pixel_log_prob(x, *self._split(params))

    def mean(self, params: Tensor) -> Tensor:
        return pixel_mean(*self._split(params))

    def sample(self, params: Tensor) -> Tensor:
        return draw_pixel(*self._split(params))


class DiscretizedLogisticMixture(_PixelValues):
    r"""A mixture of K discretized logistics per value: K logits, K locations, K log-scales.

    .. math:: p(x) = \sum_{k=1}^{K} \pi_k\, p_{\mu_k, s_k}(x)

    Args:
        components: K.

    Cost: O(K) per value; :meth:`mean` is exact and takes 255 evaluations.

    References:
        T. Salimans, A. Karpathy, X. Chen, D. Kingma (2017). PixelCNN++. arXiv:1701.05517.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import DiscretizedLogisticMixture
        >>> likelihood = DiscretizedLogisticMixture(components=3)
        >>> likelihood.log_prob(torch.randn(256, 9), torch.arange(256)).shape
        torch.Size([256])
    """

    def __init__(self, components: int = 10) -> None:
        super().__init__()
        check_count("DiscretizedLogisticMixture", "components", components)
        self.components, self.parameters_per_value = components, 3 * components

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log weights, locations and log-scales."""
        logits, loc, raw = params.chunk(3, -1)
        return logits.log_softmax(-1), loc, soft_bound(raw, LOG_SCALE_BOUND)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        log_weights, loc, log_scale = self._split(params)
        return (log_weights + pixel_log_prob(x[..., None], loc, log_scale)).logsumexp(-1)

    def mean(self, params: Tensor) -> Tensor:
        log_weights, loc, log_scale = self._split(params)
        return (log_weights.exp() * pixel_mean(loc, log_scale)).sum(-1)

    def sample(self, params: Tensor) -> Tensor:
        log_weights, loc, log_scale = self._split(params)
        index = torch.distributions.Categorical(logits=log_weights).sample()[..., None]
        return draw_pixel(loc.gather(-1, index)[..., 0], log_scale.gather(-1, index)[..., 0])


#: Every likelihood by name.
LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "bernoulli": Bernoulli,
    "categorical": Categorical,
    "logistic": DiscretizedLogistic,
    "logistic_mixture": DiscretizedLogisticMixture,
}


def get_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """Return the likelihood of a name in :data:`LIKELIHOODS`, or the given likelihood itself."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"unknown likelihood {likelihood!r}; known likelihoods: {', '.join(LIKELIHOODS)}")
    return LIKELIHOODS[likelihood]()
