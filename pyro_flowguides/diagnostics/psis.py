"""Pareto-smoothed importance sampling: tail index k-hat, smoothed weights, effective sample size, and resampling."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flowguides.diagnostics import arviz_compat
from pyro_flowguides.diagnostics.weights import WeightedDraws, weigh
from pyro_flowguides.nn.arguments import check_count, check_tensor, describe
from pyro_flowguides.programs.batched_run import select
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.types import Guide, Model, Values

__all__ = [
    "MIN_DRAWS",
    "ParetoSmoothed",
    "effective_sample_size",
    "importance_resample",
    "khat_threshold",
    "log_mean_weight",
    "pareto_smooth",
    "resample",
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
    check_tensor("pareto_smooth", "log_w", log_w)
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
    check_count("khat_threshold", "num_samples", num_samples, 2)
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
    _check_vector("effective_sample_size", log_w)
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
    _check_vector("log_mean_weight", log_w)
    valid = log_w[~(log_w.isnan() | log_w.isposinf())].double()
    ess = effective_sample_size(valid)
    if ess == 0:
        return math.nan, math.nan
    size = len(valid)
    return float(valid.logsumexp(0)) - math.log(size), math.sqrt(max(size / ess - 1, 0.0) / size)


def _check_vector(owner: str, log_w: Tensor) -> None:
    check_tensor(owner, "log_w", log_w)
    if log_w.dim() != 1:
        raise ValueError(f"{owner}: log_w must be a vector, one log weight per draw, got shape {tuple(log_w.shape)}")


def without_invalid(log_w: Tensor) -> Tensor:
    """Return log weights in double precision on the CPU, with −inf in place of NaN and +inf."""
    log_w = log_w.detach().cpu().double()
    return torch.where(log_w.isnan() | log_w.isposinf(), -torch.inf, log_w)


def tail_length(num_samples: int) -> int:
    """Return the largest number of weights that smoothing changes."""
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))


def importance_resample(
    model: Model,
    guide: Guide,
    *args: object,
    num_samples: int = 1000,
    num_proposals: int = 4000,
    replace: bool = True,
    **kwargs: object,
) -> Values:
    r"""Draw from a guide, and resample the draws with Pareto-smoothed weights, so that they follow the posterior.

    Of S draws, draw s is selected with probability proportional to its smoothed weight :math:`\tilde w_s`. With
    replacement, resampling is systematic: draw s appears :math:`n \tilde w_s` times, rounded up or down, in shuffled
    order. Without replacement, the n draws are distinct, and their distribution lies between guide and posterior unless
    n is much smaller than the effective sample size. Run :func:`diagnose` first: if k-hat is above its threshold,
    resampling helps little.

    Args:
        model, guide: a Pyro model and any Pyro guide for it.
        *args, **kwargs: arguments of both.
        num_samples: number of draws n to return.
        num_proposals: number of draws S from the guide.
        replace: whether a draw may be selected more than once.

    Returns:
        Draws of each latent site, ``(n, *batch, *event)``.

    Raises:
        ValueError: if ``num_samples`` or ``num_proposals`` is too small; if no weight is positive, or, without
            replacement, fewer than ``num_samples`` are; and for the reasons that :func:`log_weights` gives.

    Cost: S runs of guide and model.

    References:
        A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry (2024). Pareto smoothed importance sampling.
        arXiv:1507.02646. A. Agrawal, D. Sheldon, J. Domke (2020). Advances in black-box VI. arXiv:2006.10343.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> _ = pyro.set_rng_seed(0)
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))
        >>> def guide():  # the posterior is N(1, 0.71)
        ...     pyro.sample("z", dist.Normal(0.5, 1.0))
        >>> draws = importance_resample(model, guide, num_samples=2000)
        >>> draws["z"].shape, round(draws["z"].mean().item(), 1)
        (torch.Size([2000]), 1.0)
    """
    check_count("importance_resample", "num_samples", num_samples)
    check_count("importance_resample", "num_proposals", num_proposals, MIN_DRAWS)
    weighted = weigh(Program.inspect(model, guide, args, kwargs), num_proposals)
    return resample(weighted, num_samples, replace=replace).draws


def resample(weighted: WeightedDraws, num_samples: int, *, replace: bool = True) -> WeightedDraws:
    """Resample weighted draws; each keeps its densities and its weight.

    Args:
        weighted: draws with their weights.
        num_samples: number of draws n to return.
        replace: whether a draw may be selected more than once.

    Raises:
        ValueError: for the reasons that :func:`importance_resample` gives.
    """
    num_samples = check_count("resample", "num_samples", num_samples)
    if not isinstance(weighted, WeightedDraws):
        raise TypeError(f"resample: weighted must be WeightedDraws, got {describe(weighted)}")
    smoothed = pareto_smooth(weighted.log_w).log_weights
    index = _systematic(smoothed, num_samples) if replace else _distinct(smoothed, num_samples)
    return dataclasses.replace(
        weighted,
        draws=select(weighted.draws, index),
        log_p=weighted.log_p[index],
        log_q=weighted.log_q[index],
        log_w=weighted.log_w[index],
    )


def _systematic(log_w: Tensor, num_samples: int) -> Tensor:
    """Select indices by systematic resampling, shuffled: index s appears n·w_s times, rounded up or down."""
    edges = log_w.exp().cumsum(0)
    ticks = (torch.arange(num_samples, dtype=edges.dtype) + torch.rand((), dtype=edges.dtype)) / num_samples
    index = torch.searchsorted(edges / edges[-1], ticks, right=True)
    last_positive = int(torch.where(log_w.isfinite())[0][-1])
    return index.clamp(max=last_positive)[torch.randperm(num_samples)]


def _distinct(log_w: Tensor, num_samples: int) -> Tensor:
    """Select distinct indices: those of the largest log weights after adding Gumbel noise."""
    num_positive = int(log_w.isfinite().sum())
    if num_samples > num_positive:
        raise ValueError(
            f"cannot select {num_samples} distinct draws: only {num_positive} have positive weight. Ask for fewer, or "
            "pass replace=True"
        )
    noise = -torch.empty_like(log_w).exponential_().log()
    return (log_w + noise).topk(num_samples).indices
