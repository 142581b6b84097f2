"""What a decoder's output means: the distribution of data given its parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from pyro_flowguides.transforms.bounds import soft_bound

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "Categorical",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Likelihood",
    "Observation",
    "get_likelihood",
]

#: Largest absolute log-scale, approached smoothly, of a logistic whose values lie in [-1, 1].
LOG_SCALE_BOUND = 7.0


class Likelihood(nn.Module):
    """The distribution of one value of the data, given the numbers that the decoder emits for it.

    Every value (pixel and channel, or coordinate) is independent of the others given its parameters.

    Shapes:
        params ``(..., parameters_per_value)``; x ``(...)``; the leading dimensions of both broadcast.
    """

    parameters_per_value: int
    #: The smallest and the largest value of the data.
    low: ClassVar[float]
    high: ClassVar[float]
    support: ClassVar[constraints.Constraint]
    #: What the data must be, in words.
    wanted: ClassVar[str]

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """The log probability of each value, ``(...)``."""
        raise NotImplementedError

    def mean(self, params: Tensor) -> Tensor:
        """The expectation of each value, in the data's units, ``(...)``."""
        raise NotImplementedError

    def sample(self, params: Tensor) -> Tensor:
        """A draw of each value, ``(...)``."""
        raise NotImplementedError

    def standardize(self, x: Tensor) -> Tensor:
        """The data as networks want to see them."""
        raise NotImplementedError

    def distribution(self, params: Tensor) -> Observation:
        """The same as a Pyro distribution with one batch dimension per dimension of the data."""
        return Observation(self, params)

    def check(self, x: Tensor) -> None:
        """Look at every value of the data.

        Raises:
            ValueError: if a value is outside the support; the message names the remedy.
        """
        if x.numel() and not bool(self.support.check(x).all()):
            low, high = x.min().item(), x.max().item()
            raise ValueError(
                f"{type(self).__name__}: the data must be {self.wanted}; got {x.dtype} in [{low:g}, {high:g}]"
                f"{'' if math.isfinite(low + high) else ' with values that are not finite'}"
            )


class Observation(TorchDistribution):
    """A likelihood at given parameters as a Pyro distribution.

    Args:
        likelihood: whose formulas are used.
        params: ``(..., parameters_per_value)``; the batch shape is the leading part.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import Bernoulli
        >>> Bernoulli().distribution(torch.zeros(5, 3, 1)).to_event(1).log_prob(torch.ones(5, 3)).shape
        torch.Size([5])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, likelihood: Likelihood, params: Tensor, *, validate_args: bool | None = None) -> None:
        self.likelihood, self.params = likelihood, params
        super().__init__(params.shape[:-1], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return self.likelihood.support

    @property
    def mean(self) -> Tensor:
        return self.likelihood.mean(self.params)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Observation:
        params = self.params.expand((*batch_shape, self.params.shape[-1]))
        return Observation(self.likelihood, params, validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.likelihood.log_prob(self.params, value)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  torch's own default
        with torch.no_grad():
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
    wanted = "bits or numbers in [0, 1]: divide 8-bit pixels by 255"

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        logits = params[..., 0]
        return torch.addcmul(F.logsigmoid(logits), x.to(logits.dtype) - 1, logits)

    def mean(self, params: Tensor) -> Tensor:
        return params[..., 0].sigmoid()

    def sample(self, params: Tensor) -> Tensor:
        return self.mean(params).bernoulli()

    def standardize(self, x: Tensor) -> Tensor:
        return x


class _Pixels(Likelihood):
    """Integers 0..255, of any dtype."""

    low, high = 0.0, 255.0
    support = constraints.integer_interval(0, 255)
    wanted = "whole numbers 0..255 (of any dtype): multiply intensities in [0, 1] by 255 and round"

    def standardize(self, x: Tensor) -> Tensor:
        return x / 127.5 - 1


class Categorical(_Pixels):
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


def _log_scale(raw: Tensor) -> Tensor:
    return soft_bound(raw, LOG_SCALE_BOUND)


def _log_interval(x: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """The log mass that a logistic puts on the interval of each pixel value; the outer intervals are half-lines.

    For the ends a > b of an interval in units of the scale, σ(a) − σ(b) = σ(a) σ(−b) (1 − exp(b − a)): every factor has
    a stable logarithm, and at an edge one end is infinite and two factors are 1.
    """
    precision = (-log_scale).exp()
    centered = x.to(loc.dtype) / 127.5 - 1 - loc
    above = F.logsigmoid(precision * (centered + 1 / 255))
    below = F.logsigmoid(-precision * (centered - 1 / 255))
    width = (-(-2 / 255 * precision).expm1()).log()
    first, last = x <= 0, x >= 255
    return above.masked_fill(last, 0) + below.masked_fill(first, 0) + width.masked_fill(first | last, 0)


def _interval_mean(loc: Tensor, log_scale: Tensor) -> Tensor:
    """E[X] = Σ_k P(X ≥ k), exactly."""
    precision, total = (-log_scale).exp(), torch.zeros_like(loc)
    for k in range(1, 256):
        total += ((loc - ((k - 0.5) / 127.5 - 1)) * precision).sigmoid()
    return total


def _logistic_pixel(loc: Tensor, log_scale: Tensor) -> Tensor:
    tiny = torch.finfo(loc.dtype).tiny
    uniform = torch.rand_like(loc).clamp(tiny, 1 - torch.finfo(loc.dtype).eps)
    value = loc + log_scale.exp() * (uniform.log() - (-uniform).log1p())
    return ((value + 1) * 127.5).round().clamp(0, 255)


class DiscretizedLogistic(_Pixels):
    r"""A logistic distribution on [−1, 1], integrated over the interval of each pixel value: location and log-scale.

    .. math:: p(x) = \sigma\!\left(\frac{v + \frac{1}{255} - \mu}{s}\right)
        - \sigma\!\left(\frac{v - \frac{1}{255} - \mu}{s}\right), \qquad v = \frac{x}{127.5} - 1

    The intervals of 0 and 255 extend to infinity, so that the 256 probabilities sum to one. The difference is computed
    as a product of stable factors: value and gradient are right however far x is from the location. The log-scale is
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
        return params[..., 0], _log_scale(params[..., 1])

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        return _log_interval(x, *self._split(params))

    def mean(self, params: Tensor) -> Tensor:
        return _interval_mean(*self._split(params))

    def sample(self, params: Tensor) -> Tensor:
        return _logistic_pixel(*self._split(params))


class DiscretizedLogisticMixture(_Pixels):
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
        if components < 1:
            raise ValueError(f"DiscretizedLogisticMixture: components must be at least 1, got {components}")
        self.components, self.parameters_per_value = components, 3 * components

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, loc, raw = params.chunk(3, -1)
        return logits.log_softmax(-1), loc, _log_scale(raw)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        log_weights, loc, log_scale = self._split(params)
        return (log_weights + _log_interval(x[..., None], loc, log_scale)).logsumexp(-1)

    def mean(self, params: Tensor) -> Tensor:
        log_weights, loc, log_scale = self._split(params)
        return (log_weights.exp() * _interval_mean(loc, log_scale)).sum(-1)

    def sample(self, params: Tensor) -> Tensor:
        log_weights, loc, log_scale = self._split(params)
        index = torch.distributions.Categorical(logits=log_weights).sample()[..., None]
        return _logistic_pixel(loc.gather(-1, index)[..., 0], log_scale.gather(-1, index)[..., 0])


#: Every likelihood by name.
LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "bernoulli": Bernoulli,
    "categorical": Categorical,
    "logistic": DiscretizedLogistic,
    "logistic_mixture": DiscretizedLogisticMixture,
}


def get_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood of a registered name; a likelihood is returned as it is.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> from pyro_flowguides.vae.decoders.likelihoods import get_likelihood
        >>> get_likelihood("logistic").parameters_per_value
        2
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"unknown likelihood {likelihood!r}: known are {', '.join(LIKELIHOODS)}")
    return LIKELIHOODS[likelihood]()
