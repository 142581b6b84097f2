"""Means and standard deviations of draws, and how far apart two sets of them are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Moments = dict[str, tuple[Tensor, Tensor]]

_NOTHING = 1e-10


def moments(draws: Mapping[str, Tensor], weights: Tensor | None = None) -> Moments:
    """Mean and standard deviation of each coordinate of some draws.

    Args:
        draws: site -> (S, ...).
        weights: weights that sum to one, (S,); equal weights if not given.

    Returns:
        site -> (mean, sd), each (D,), in double precision on the CPU.
    """
    return {site: _site_moments(value, weights) for site, value in draws.items()}


def _site_moments(value: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    flat = value.detach().cpu().double().reshape(value.shape[0], -1)
    if weights is None:
        weights = flat.new_full((flat.shape[0],), 1 / flat.shape[0])
    mean = weights @ flat
    return mean, (weights @ (flat - mean).square()).sqrt()


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
