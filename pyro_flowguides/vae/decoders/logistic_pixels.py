"""The logistic distribution on [−1, 1], discretized to the 256 values of a pixel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_flowguides.transforms.bounds import soft_bound

__all__ = ["bounded_log_scale", "draw_pixel", "pixel_log_prob", "pixel_mean"]

#: Largest absolute log-scale, approached smoothly.
LOG_SCALE_BOUND = 7.0


def bounded_log_scale(raw: Tensor) -> Tensor:
    """Map real numbers smoothly to log-scales between −7 and 7."""
    return soft_bound(raw, LOG_SCALE_BOUND)


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
