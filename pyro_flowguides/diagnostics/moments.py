"""Means and standard deviations of draws, and how far apart two sets of them are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_flowguides.programs.chunking import chunks, per_chunk

Moments = dict[str, tuple[Tensor, Tensor]]

_NOTHING = 1e-10
#: Draws, their deviations and the squares of these, in double precision.
_COPIES = 6


def moments(draws: Mapping[str, Tensor], weights: Tensor | None = None) -> Moments:
    """Mean and standard deviation of each coordinate of some draws, a few coordinates at a time.

    Args:
        draws: site -> (S, ...).
        weights: weights that sum to one, (S,); equal weights if not given.

    Returns:
        site -> (mean, sd), each (D,), in double precision on the CPU.
    """
    return {site: _site_moments(value, weights) for site, value in draws.items()}


def _site_moments(draws: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    flat = draws.detach().reshape(draws.shape[0], -1)
    if weights is None:
        weights = torch.full((len(flat),), 1 / len(flat), dtype=torch.float64)
    mean, sd = weights.new_empty(2, flat.shape[1])
    for few in chunks(len(mean), per_chunk(_COPIES * len(weights))):
        values = flat[:, few].cpu().double()
        mean[few] = weights @ values
        sd[few] = (weights @ (values - mean[few]).square()).sqrt()
    return mean, sd


class RunningMoments:
    r"""Moments of weighted draws that come in parts.

    Of two parts with shares :math:`a + b = 1` of all weight, means :math:`m_a, m_b` and variances :math:`v_a, v_b`,

    .. math:: m = a m_a + b m_b, \qquad v = a v_a + b v_b + a b (m_a - m_b)^2 .

    Attributes:
        moments: those of all draws so far; empty before the first with a positive weight.

    References:
        T. Chan, G. Golub, R. LeVeque (1983). Algorithms for computing the sample variance. Am. Stat. 37(3).
    """

    def __init__(self) -> None:
        self.moments: Moments = {}
        self._log_total = torch.tensor(-torch.inf, dtype=torch.float64)

    def add(self, draws: Mapping[str, Tensor], log_w: Tensor) -> None:
        """Take in draws, site -> (S, ...), with log weights (S,)."""
        total = log_w.logsumexp(0)
        if not total.isneginf():
            self.merge(total, moments(draws, (log_w - total).exp()))

    def merge(self, log_total: Tensor, found: Moments) -> None:
        """Take in the moments of draws whose weights have a sum with this logarithm."""
        if log_total.isneginf():
            return
        before, self._log_total = self._log_total, torch.logaddexp(self._log_total, log_total)
        a, b = (before - self._log_total).exp(), (log_total - self._log_total).exp()
        self.moments = {
            site: _merged(a, self.moments[site], b, here) if self.moments else here for site, here in found.items()
        }


def _merged(a: Tensor, first: tuple[Tensor, Tensor], b: Tensor, second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    between = a * b * (first[0] - second[0]).square()
    return a * first[0] + b * second[0], (a * first[1].square() + b * second[1].square() + between).sqrt()


def mean_difference(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], sd: Tensor) -> float:
    """Largest difference of two means in units of ``sd``; 0/0, as for the constant entries of a matrix, is 0."""
    difference = (first[0] - second[0]).abs()
    is_nothing = (difference <= _NOTHING * (1 + first[0].abs())) & (sd <= _NOTHING * (1 + first[0].abs()))
    return _largest(torch.where(is_nothing, 0.0, difference / sd))


def log_sd_difference(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Largest difference of the logarithms of two standard deviations; 0 where both vanish."""
    is_nothing = (first[1] <= _NOTHING * (1 + first[0].abs())) & (second[1] <= _NOTHING * (1 + first[0].abs()))
    return _largest(torch.where(is_nothing, 0.0, (first[1].log() - second[1].log()).abs()))


def shift(found: Moments, reference: Moments) -> tuple[float, float, str]:
    """How far moments lie from a reference.

    Returns:
        The largest difference of means, in standard deviations of the reference; the largest difference of log
        standard deviations; and the site of the larger of the two.
    """
    changes = []
    for site, here in found.items():
        there = reference[site]
        changes.append((mean_difference(here, there, there[1]), log_sd_difference(here, there), site))
    worst = max(changes, key=lambda change: max(change[:2]))
    return max(change[0] for change in changes), max(change[1] for change in changes), worst[2]


def _largest(values: Tensor) -> float:
    """The largest of some non-negative numbers; NaN counts as infinite, and no number at all as 0."""
    return float(values.nan_to_num(nan=torch.inf, posinf=torch.inf).max()) if values.numel() else 0.0
