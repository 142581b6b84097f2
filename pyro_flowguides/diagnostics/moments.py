"""Means and standard deviations of draws, also of draws that arrive in parts, and differences between them."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flowguides.diagnostics.psis import ParetoSmoothed, pareto_smooth, tail_length, without_invalid
from pyro_flowguides.programs.batched_run import chunks, per_chunk, select
from pyro_flowguides.programs.types import Values

__all__ = [
    "GuideSummary",
    "Moments",
    "RunningMoments",
    "SiteMoments",
    "SmoothedMoments",
    "log_sd_difference",
    "mean_difference",
    "moment_shift",
    "moments",
]

#: Means that differ by less than this, relative to their size, are equal.
_NEGLIGIBLE = 1e-10
#: Double-precision copies of the draws in memory at once: values, deviations, and their squares, two numbers each.
_COPIES = 6


class SiteMoments(NamedTuple):
    """Mean and standard deviation of each coordinate of a site, both (D,)."""

    mean: Tensor
    sd: Tensor


Moments = dict[str, SiteMoments]


def moments(draws: Mapping[str, Tensor], weights: Tensor | None = None) -> Moments:
    """Compute the mean and standard deviation of each coordinate.

    Args:
        draws: site -> (S, ...).
        weights: weights that sum to one, (S,); equal by default.

    Returns:
        site -> (mean, sd), each (D,), in double precision on the CPU.

    Cost: processes a few coordinates at a time, so that memory beyond the draws stays near 16 MiB.
    """
    return {site: _site_moments(value, weights) for site, value in draws.items()}


def _site_moments(draws: Tensor, weights: Tensor | None) -> SiteMoments:
    flat = draws.detach().reshape(draws.shape[0], -1)
    if weights is None:
        weights = torch.full((len(flat),), 1 / len(flat), dtype=torch.float64)
    mean, sd = weights.new_empty(2, flat.shape[1])
    for columns in chunks(len(mean), per_chunk(_COPIES * len(weights))):
        values = flat[:, columns].cpu().double()
        mean[columns] = weights @ values
        sd[columns] = (weights @ (values - mean[columns]).square()).sqrt()
    return SiteMoments(mean, sd)


class RunningMoments:
    r"""Moments of weighted draws that arrive in parts.

    For two parts with shares :math:`a + b = 1` of the total weight, means :math:`m_a, m_b` and variances
    :math:`v_a, v_b`,

    .. math:: m = a m_a + b m_b, \qquad v = a v_a + b v_b + a b (m_a - m_b)^2 .

    Attributes:
        moments: moments of all draws so far; empty until a draw has positive weight.

    References:
        T. Chan, G. Golub, R. LeVeque (1983). Algorithms for computing the sample variance. Am. Stat. 37(3).
    """

    def __init__(self) -> None:
        self.moments: Moments = {}
        self._log_total = torch.tensor(-torch.inf, dtype=torch.float64)

    def add(self, draws: Mapping[str, Tensor], log_w: Tensor) -> None:
        """Add draws, site -> (S, ...), with log weights (S,)."""
        log_total = log_w.logsumexp(0)
        if not log_total.isneginf():
            self.merge(log_total, moments(draws, (log_w - log_total).exp()))

    def merge(self, log_total: Tensor, part: Moments) -> None:
        """Add draws by their moments and the logarithm of the sum of their weights."""
        if log_total.isneginf():
            return
        before, self._log_total = self._log_total, torch.logaddexp(self._log_total, log_total)
        a, b = (before - self._log_total).exp(), (log_total - self._log_total).exp()
        self.moments = {
            site: _merge(a, self.moments[site], b, added) if self.moments else added for site, added in part.items()
        }


def _merge(a: Tensor, first: SiteMoments, b: Tensor, second: SiteMoments) -> SiteMoments:
    between = a * b * (first.mean - second.mean).square()
    variance = a * first.sd.square() + b * second.sd.square() + between
    return SiteMoments(a * first.mean + b * second.mean, variance.sqrt())


class SmoothedMoments:
    """Moments under Pareto-smoothed weights, of draws that arrive in parts.

    Smoothing changes only the largest weights, so only draws that may be among these are kept. The weights of all
    other draws are final relative to each other, and their moments are merged at once.

    Args:
        num_samples: total number of draws S.

    Cost: memory for min(S / 5, 3 √S) draws.
    """

    def __init__(self, num_samples: int) -> None:
        self._tail_length = tail_length(num_samples)
        self._log_w: list[Tensor] = []
        self._body = RunningMoments()
        self._tail_draws: Values = {}
        self._tail_index = torch.zeros(0, dtype=torch.long)

    @property
    def log_w(self) -> Tensor:
        """All log weights so far."""
        return torch.cat(self._log_w)

    def add(self, draws: Values, log_w: Tensor) -> None:
        """Add a part: site -> (S', ...), and log weights (S',)."""
        start = sum(map(len, self._log_w))
        self._log_w.append(log_w)
        index = torch.cat([self._tail_index, torch.arange(start, start + len(log_w))])
        if self._tail_draws:
            draws = {name: torch.cat([self._tail_draws[name], value]) for name, value in draws.items()}
        weights = without_invalid(self.log_w[index])
        in_tail = torch.zeros(len(index), dtype=torch.bool)
        in_tail[weights.topk(min(self._tail_length, len(index))).indices] = True
        self._body.add(select(draws, ~in_tail), weights[~in_tail])
        self._tail_draws, self._tail_index = select(draws, in_tail), index[in_tail]

    def smooth(self) -> tuple[ParetoSmoothed, Moments]:
        """Return the smoothed weights and the moments under them; at least one weight must be positive."""
        smoothed = pareto_smooth(self.log_w)
        weights, in_body = smoothed.log_weights, torch.ones(len(self.log_w), dtype=torch.bool)
        in_body[self._tail_index] = False
        total = RunningMoments()
        total.merge(weights[in_body].logsumexp(0), self._body.moments)
        total.add(self._tail_draws, weights[self._tail_index])
        return smoothed, total.moments


class GuideSummary:
    """Log weights of a guide's own draws, and their moments before and after weighting.

    Args:
        num_samples: total number of draws.

    Attributes:
        weighted: moments under Pareto-smoothed weights, and all log weights.
        unweighted: moments of equally weighted draws.
        constant: sites where all draws so far are equal.
    """

    def __init__(self, num_samples: int) -> None:
        self.weighted = SmoothedMoments(num_samples)
        self.constant: set[str] = set()
        self.unweighted = RunningMoments()
        self._first: Values = {}

    def add(self, draws: Values, log_w: Tensor) -> None:
        """Add a part: site -> (S', ...), and log weights (S',)."""
        if not self._first:
            self._first = {name: value[0].clone() for name, value in draws.items()}
            self.constant = set(draws)
        self.constant = {name for name in self.constant if bool((draws[name] == self._first[name]).all())}
        self.unweighted.add(draws, torch.zeros_like(log_w))
        self.weighted.add(draws, log_w)


def mean_difference(first: SiteMoments, second: SiteMoments, sd: Tensor) -> float:
    """Return the largest difference of two means in units of ``sd``; 0/0, as for a constant coordinate, is 0."""
    difference = (first.mean - second.mean).abs()
    negligible = _NEGLIGIBLE * (1 + first.mean.abs())
    is_zero = (difference <= negligible) & (sd <= negligible)
    return _largest(torch.where(is_zero, 0.0, difference / sd))


def log_sd_difference(first: SiteMoments, second: SiteMoments) -> float:
    """Return the largest difference of the logarithms of two standard deviations; 0 where both vanish."""
    negligible = _NEGLIGIBLE * (1 + first.mean.abs())
    is_zero = (first.sd <= negligible) & (second.sd <= negligible)
    return _largest(torch.where(is_zero, 0.0, (first.sd.log() - second.sd.log()).abs()))


def moment_shift(shifted: Moments, reference: Moments) -> tuple[float, float, str]:
    """Compare moments with those of a reference.

    Returns:
        The largest difference of means, in standard deviations of the reference; the largest difference of log
        standard deviations; and the site where the larger of the two occurs.
    """
    by_site = {
        site: (mean_difference(values, reference[site], reference[site].sd), log_sd_difference(values, reference[site]))
        for site, values in shifted.items()
    }
    largest_mean, largest_log_sd = map(max, zip(*by_site.values(), strict=True))
    return largest_mean, largest_log_sd, max(by_site, key=lambda site: max(by_site[site]))


def _largest(values: Tensor) -> float:
    """Return the largest of non-negative numbers; NaN counts as infinite, an empty tensor as 0."""
    return float(values.nan_to_num(nan=torch.inf, posinf=torch.inf).max()) if values.numel() else 0.0
