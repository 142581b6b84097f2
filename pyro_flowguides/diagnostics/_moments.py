"""Means and standard deviations of draws, and how far apart two sets of them are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ._chunks import chunks, per_chunk

Moments = dict[str, tuple[Tensor, Tensor]]

_NOTHING = 1e-10
#: Draws, their deviations and the squares of these, in double precision.
_COPIES = 6


def moments(*parts: Mapping[str, Tensor], weights: Tensor | None = None) -> Moments:
    """Mean and standard deviation of each coordinate of some draws, a few coordinates at a time.

    Args:
        *parts: site -> (part of S, ...): the draws, whole or in parts that follow each other.
        weights: weights that sum to one, (S,); equal weights if not given.

    Returns:
        site -> (mean, sd), each (D,), in double precision on the CPU.
    """
    return {site: _site_moments([part[site] for part in parts], weights) for site in parts[0]}


def _site_moments(parts: Sequence[Tensor], weights: Tensor | None) -> tuple[Tensor, Tensor]:
    flat = [part.detach().reshape(part.shape[0], -1) for part in parts]
    if weights is None:
        size = sum(map(len, flat))
        weights = torch.full((size,), 1 / size, dtype=torch.float64)
    mean, sd = weights.new_empty(2, flat[0].shape[1])
    for few in chunks(len(mean), per_chunk(_COPIES * len(weights))):
        values = torch.cat([part[:, few].cpu().double() for part in flat])
        mean[few] = weights @ values
        sd[few] = (weights @ (values - mean[few]).square()).sqrt()
    return mean, sd


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
