"""Pareto-smoothed importance sampling: the tail index k-hat, smoothed weights, and effective sample size."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flowguides.diagnostics import arviz_compat

__all__ = [
    "MIN_DRAWS",
    "ParetoSmoothed",
    "effective_sample_size",
    "khat_threshold",
    "log_mean_weight",
    "pareto_smooth",
    "tail_length",
    "without_invalid",
]

#: Fewest draws for which the tail of the weights is fitted.
MIN_DRAWS = 25
#: The largest weights have no tail if their logarithms span less than this.
_FLAT_TAIL = 1e-3


@dataclass(frozen=True)
class ParetoSmoothed:
    """Smoothed weights and their tail index.

    Attributes:
        log_weights: smoothed log weights, normalized so that the weights sum to one, shape (S,).
        khat: tail index k-hat.
    """

    log_weights: Tensor
    khat: float


def pareto_smooth(log_w: Tensor) -> ParetoSmoothed:
    r"""Replace the largest importance weights by quantiles of a generalized Pareto distribution fitted to them.

    Above a high threshold u, the distribution of the weights is modeled by

    .. math:: \Pr(w - u > x \mid w > u) = (1 + k x / \sigma)^{-1/k},

    and k-hat is the estimate of k: the weights have 1/k finite moments. If the largest weights are within 0.1 % of
    each other, there is no tail to fit: k-hat is 0 and the weights are not changed. If too few weights are positive to
    fit a tail, k-hat is infinite.

    Args:
        log_w: log importance ratios, shape (S,). Entries of −inf and NaN get zero weight.

    Raises:
        ValueError: if ``log_w`` is not one-dimensional, has fewer than 25 entries, or has no finite entry.

    References:
        A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry (2024). Pareto smoothed importance sampling.
        arXiv:1507.02646.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> z = torch.randn(4000)
        >>> wide = pareto_smooth(-(z**2) / 2)  # N(0, 1) corrected to N(0, 1/2)
        >>> wide.khat < 0.5, round(wide.log_weights.exp().sum().item(), 6)
        (True, 1.0)
    """
    if log_w.dim() != 1 or log_w.shape[0] < MIN_DRAWS:
        shape = tuple(log_w.shape)
        raise ValueError(f"Pareto smoothing needs a vector of at least {MIN_DRAWS} log weights, got shape {shape}")
    clean = without_invalid(log_w)
    finite = clean[clean.isfinite()]
    if len(finite) == 0:
        raise ValueError("no draw has a positive, finite importance weight")
    length = tail_length(len(clean))
    smoothed, khat = clean, math.inf
    if len(finite) > length + 1:
        tail = finite.topk(length).values
        if float(tail[0] - tail[-1]) < _FLAT_TAIL:
            khat = 0.0
        else:
            normalized, khat = arviz_compat.psislw((clean - finite.max()).numpy())
            smoothed = torch.from_numpy(normalized)
    return ParetoSmoothed(smoothed - smoothed.logsumexp(0), khat)


def khat_threshold(num_samples: int) -> float:
    r"""Return the largest k-hat at which Pareto-smoothed estimates from S draws are reliable.

    .. math:: \min(1 - 1/\log_{10} S,\ 0.7)

    Args:
        num_samples: number of draws S.

    Raises:
        ValueError: if S is less than two.

    References:
        A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry (2024). Pareto smoothed importance sampling.
        arXiv:1507.02646.

    Example:
        >>> round(khat_threshold(100), 3), khat_threshold(4000)
        (0.5, 0.7)
    """
    if num_samples < 2:
        raise ValueError(f"the threshold of k-hat needs at least two draws, got {num_samples}")
    return min(1 - 1 / math.log10(num_samples), 0.7)


def effective_sample_size(log_w: Tensor) -> float:
    r"""Return the number of equally weighted draws that estimate means as well as S weighted draws do.

    .. math:: \Big(\sum_s w_s\Big)^2 \Big/ \sum_s w_s^2

    Args:
        log_w: log weights up to a constant, shape (S,). Entries of −inf and NaN get zero weight.

    Returns:
        A number between 1 and S; 0 if no weight is positive and finite.

    References:
        A. Kong (1992). A note on importance sampling using standardized weights. University of Chicago, report 348.

    Example:
        >>> import torch
        >>> effective_sample_size(torch.tensor([0.0, 0.0, -torch.inf, 0.0]))
        3.0
    """
    clean = without_invalid(log_w)
    if not clean.isfinite().any():
        return 0.0
    return round(float((2 * clean.logsumexp(0) - (2 * clean).logsumexp(0)).exp()), 9)


def log_mean_weight(log_w: Tensor) -> tuple[float, float]:
    r"""Estimate the log evidence and its standard error.

    .. math:: \log \frac1S \sum_s w_s, \qquad \sqrt{(S / \text{ESS} - 1) / S}

    The standard error follows from the delta method, since var(w) / mean(w)² = S / ESS − 1. It is unreliable if
    k-hat > 0.5.

    Args:
        log_w: log weights, shape (S,). NaN entries are ignored.

    Returns:
        The estimate and its standard error; both NaN if no weight is positive and finite.

    Example:
        >>> import torch
        >>> log_mean_weight(torch.full((10,), -1.5))
        (-1.5, 0.0)
    """
    valid = log_w[~(log_w.isnan() | log_w.isposinf())].double()
    ess = effective_sample_size(valid)
    if ess == 0:
        return math.nan, math.nan
    size = len(valid)
    return float(valid.logsumexp(0)) - math.log(size), math.sqrt(max(size / ess - 1, 0.0) / size)


def without_invalid(log_w: Tensor) -> Tensor:
    """Return log weights in double precision on the CPU, with −inf in place of NaN and +inf."""
    log_w = log_w.detach().cpu().double()
    return torch.where(log_w.isnan() | log_w.isposinf(), -torch.inf, log_w)


def tail_length(num_samples: int) -> int:
    """Return the largest number of weights that smoothing changes."""
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))
