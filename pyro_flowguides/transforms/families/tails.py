"""Elementwise maps that give a normal base heavier tails."""

import math

import torch
from torch import Tensor, nn

from pyro_flowguides.nn.arguments import check_number
from pyro_flowguides.transforms.conditional import AmortizedFlow
from pyro_flowguides.transforms.flow import Flow, Theta

__all__ = ["ConditionalHeavyTail", "HeavyTail"]

#: Largest tail weight: with a standard normal base, a density that falls as exp(-0.7 |y|).
MAX_TAIL_WEIGHT = 0.5


class HeavyTail(Flow):
    r"""Heavier tails for every coordinate: far out, a normal variable becomes an exponential one.

    .. math::
        y = x \sqrt{1 + \lambda x^2}, \qquad
        x = y \sqrt{\frac{2}{1 + \sqrt{1 + 4 \lambda y^2}}}, \qquad
        \log|\det J| = \sum_i \log(1 + 2 \lambda_i x_i^2) - \tfrac12 \log(1 + \lambda_i x_i^2)

    It is the identity to second order at zero. Far out y grows as :math:`\sqrt\lambda x^2`, so that the density of a
    normal variable falls as :math:`e^{-|y| / (2 \sqrt\lambda)}`. Posteriors in unconstrained coordinates have such
    tails: where the density of a positive or bounded parameter is finite at its boundary, that of its logarithm or
    logit falls exponentially. The ratio of such a target to a density with normal tails is unbounded. Few draws show
    this, and it makes importance weights unreliable. The tail weights :math:`\lambda_i` are learned, between 0 and 1/2.

    Cost: O(D) in both directions. By default it starts within 1e-2 of the identity for :math:`|x| \le 4`.

    Args:
        input_dim: number of coordinates, D.
        start: initial tail weight, in (0, 1/2).

    Shapes:
        input, output ``(..., D)``; ladj ``(...)``.

    Raises:
        ValueError: if ``start`` is out of range.

    References:
        T. Hickling, D. Prangle (2024). Flexible tails for normalizing flows. arXiv:2406.16971, on learned tails.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import HeavyTail
        >>> flow = HeavyTail(1, start=0.2)
        >>> y = flow(torch.tensor([0.1, 4.0])[:, None])
        >>> [round(value, 2) for value in y.flatten().tolist()]
        [0.1, 8.2]
    """

    def __init__(self, input_dim: int, *, start: float = 2e-4, cache_size: int = 1) -> None:
        super().__init__(input_dim, cache_size=cache_size)
        check_number("HeavyTail", "start", start, 0, MAX_TAIL_WEIGHT)
        self.logit = nn.Parameter(torch.empty(input_dim))
        self.set_weight(start)

    @torch.no_grad()
    def set_weight(self, weight: float) -> None:
        """Set the tail weight of all coordinates, in (0, 1/2).

        Raises:
            ValueError: if the weight is out of range.
        """
        share = check_number("HeavyTail", "weight", weight, 0, MAX_TAIL_WEIGHT) / MAX_TAIL_WEIGHT
        self.logit.fill_(math.log(share / (1 - share)))

    def _weight(self, theta: Theta) -> Tensor:
        """Return the tail weights, between their bounds."""
        return MAX_TAIL_WEIGHT * theta["logit"].sigmoid()

    def _forward_formula(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        u = self._weight(theta) * x.square()
        return x * (1 + u).sqrt(), _log_slope(u)

    def _score_formula(self, x: Tensor, score: Tensor, theta: Theta) -> tuple[Tensor, Tensor, Tensor]:
        y, ladj = self._forward_formula(x, theta)
        with torch.no_grad():
            slope = self._weight(theta) * x
            u = slope * x
            score = (score - 4 * slope / (1 + 2 * u) + slope / (1 + u)) * (1 + u).sqrt() / (1 + 2 * u)
        return y, ladj.detach(), score

    def _inverse_formula(self, y: Tensor, theta: Theta, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weight = self._weight(theta)
        norm = torch.hypot(2 * weight.sqrt() * y, torch.ones_like(y))  # sqrt(1 + 4 weight y²), for any y
        x = y * (2 / (1 + norm)).sqrt()
        return x, _log_slope((norm - 1) / 2)


def _log_slope(u: Tensor) -> Tensor:
    return ((2 * u).log1p() - 0.5 * u.log1p()).sum(-1)


class ConditionalHeavyTail(AmortizedFlow, family=HeavyTail): ...
