"""Smooth constraints that keep flows invertible with a margin."""

import torch
from torch import Tensor

__all__ = ["MARGIN", "above_minus_one", "shrink_factor", "soft_bound", "soft_log"]

#: Distance of the slope of a planar, radial or Sylvester flow from zero: it contracts by at most a factor of 100.
MARGIN = 0.01


def shrink_factor(s: Tensor) -> Tensor:
    r"""Return a factor :math:`r(s) > 0` with :math:`s\, r(s) > -1 + \text{margin}` for every real s.

    .. math:: r(s) = \frac{1 - \text{margin}}{2} \left( 1 + \frac{s}{2 + \sqrt{s^2 + 4}} \right)

    It tends to :math:`1 - \text{margin}` for large positive s and to :math:`(1 - \text{margin})/|s|` for large negative
    s, is analytic everywhere, and takes no logarithm or division that could fail.
    """
    root = torch.hypot(s, torch.full_like(s, 2))
    root_plus_s = torch.where(s < 0, 4 / (root - s.clamp(max=0)), root + s)  # free of cancellation
    return (1 - MARGIN) / 2 * (2 + root_plus_s) / (2 + root)


def above_minus_one(s: Tensor) -> Tensor:
    r"""Map the line smoothly and increasingly onto :math:`(-1 + \text{margin}, \infty)`, 0 to 0: :math:`s\, r(s)`."""
    return s * shrink_factor(s)


def soft_bound(value: Tensor, bound: float | Tensor) -> Tensor:
    r"""Bound a value smoothly to :math:`\pm` ``bound``, with slope 1 at zero: :math:`b \tanh(v / b)`.

    The bound may depend on the sign of the value.
    """
    return bound * (value / bound).tanh()


def soft_log(value: Tensor, onset: Tensor) -> Tensor:
    r"""Damp a value smoothly beyond an onset c: nearly the identity below it, a logarithm far beyond.

    .. math:: c \operatorname{asinh}(v / c)
    """
    return onset * (value / onset).asinh()
