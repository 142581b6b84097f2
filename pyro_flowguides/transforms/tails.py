"""Elementwise maps that give a normal base heavier tails."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyro_flowguides.transforms.base import AmortisedFlow, Flow, Known, Theta

__all__ = ["ConditionalHeavyTail", "HeavyTail", "conditional_heavy_tail", "heavy_tail"]

#: Heaviest tail: with a standard normal base, that of Student's t with four degrees of freedom.
HEAVIEST = 0.25


def _mean_exponential(u: Tensor) -> Tensor:
    r"""The mean of :math:`e^t` over :math:`0 \le t \le u`, which is :math:`(e^u - 1)/u`, analytic at zero."""
    small = u < 1e-8
    safe = torch.where(small, 1.0, u)
    return torch.where(small, 1 + u / 2, safe.expm1() / safe)


class HeavyTail(Flow):
    r"""Heavier tails for every coordinate: a standard normal becomes, nearly, Student's t.

    .. math::
        y = x \sqrt{\frac{e^{\lambda x^2} - 1}{\lambda x^2}}, \qquad
        x = y \sqrt{\frac{\log(1 + \lambda y^2)}{\lambda y^2}}, \qquad
        \log|\det J| = \sum_i \lambda_i x_i^2 - \tfrac12 \log \frac{e^{\lambda_i x_i^2} - 1}{\lambda_i x_i^2}

    It is the identity to third order at zero, and far out the density of a normal variable falls as
    :math:`|y|^{-1/\lambda}`: like that of Student's t with :math:`1/\lambda - 1` degrees of freedom. The tail weight
    :math:`\lambda_i` is learned between ``floor`` and 1/4. A floor above zero keeps the ratio of a target to the
    density bounded where a normal density would fall short of it far out, which no draw from the bulk can show: the
    importance weights of a fit then have a tail that can be relied on.

    Cost: O(D) in both directions. Starts within 1e-2 of the identity for :math:`|x| \le 4` unless told otherwise.

    Args:
        input_dim: D.
        floor: smallest tail weight, in [0, 1/4).
        start: initial tail weight, in (floor, 1/4).

    Shapes:
        input, output ``(..., D)``; ladj ``(...)``.

    Raises:
        ValueError: if ``floor`` or ``start`` is out of range.

    References:
        D. Wallace (1959). Bounds on normal approximations to Student's and the chi-square distributions. Annals of
        Mathematical Statistics 30(4), for the map. T. Hickling, D. Prangle (2024). Flexible tails for normalizing
        flows. arXiv:2406.16971, for learned tails in flows.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import HeavyTail
        >>> flow = HeavyTail(1, start=0.2)
        >>> y = flow(torch.tensor([0.1, 4.0])[:, None])
        >>> [round(value, 2) for value in y.flatten().tolist()]
        [0.1, 10.85]
    """

    def __init__(self, input_dim: int, *, floor: float = 0.0, start: float = 5e-4, cache_size: int = 1) -> None:
        super().__init__(input_dim, cache_size=cache_size)
        if not 0 <= floor < start < HEAVIEST:
            raise ValueError(f"HeavyTail: need 0 <= floor < start < {HEAVIEST}, got floor {floor}, start {start}")
        self.floor = floor
        share = (start - floor) / (HEAVIEST - floor)
        self.logit = nn.Parameter(torch.full((input_dim,), math.log(share / (1 - share))))

    def _weight(self, theta: Theta) -> Tensor:
        """The tail weights, between their bounds."""
        return self.floor + (HEAVIEST - self.floor) * theta["logit"].sigmoid()

    def _push(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        u = self._weight(theta) * x.square()
        stretch = _mean_exponential(u)
        return x * stretch.sqrt(), (u - 0.5 * stretch.log()).sum(-1)

    def _pull(self, y: Tensor, theta: Theta, known: Known = None) -> tuple[Tensor, Tensor]:
        weight = self._weight(theta)
        v = weight.sqrt() * y
        u = 2 * torch.hypot(v, torch.ones_like(v)).log()  # log(1 + weight y²), for any y
        stretch = _mean_exponential(u)
        return y / stretch.sqrt(), (u - 0.5 * stretch.log()).sum(-1)


class ConditionalHeavyTail(AmortisedFlow):
    """Heavier tails whose weight is a function of a context.

    Args:
        input_dim: D.
        context_dim: width of the context.
        hidden_dims: hidden layers of the hypernetwork, ``()`` for a linear map.
        **options: those of :class:`HeavyTail`.

    Shapes:
        context ``(..., context_dim)``, broadcast against the batch dimensions of the input.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import ConditionalHeavyTail
        >>> ConditionalHeavyTail(3, context_dim=4).condition(torch.randn(7, 4))(torch.randn(7, 3)).shape
        torch.Size([7, 3])
    """

    family = HeavyTail


heavy_tail, conditional_heavy_tail = HeavyTail, ConditionalHeavyTail
