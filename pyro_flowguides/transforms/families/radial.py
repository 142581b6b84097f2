"""Radial flows."""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_flowguides.transforms.bounds import above_minus_one
from pyro_flowguides.transforms.conditional import AmortizedFlow
from pyro_flowguides.transforms.flow import Flow, Theta

__all__ = ["ConditionalRadial", "Radial"]


class Radial(Flow):
    r"""Radial flow: space expands or contracts around one point.

    .. math::
        y = x + \frac{\beta}{\alpha + r} (x - x_0), \quad r = \lVert x - x_0 \rVert, \qquad
        \log|\det J| = (D-1) \log\left(1 + \frac{\beta}{\alpha + r}\right)
                       + \log\left(1 + \frac{\alpha\beta}{(\alpha + r)^2}\right)

    with :math:`\alpha > 0` and :math:`\beta > -\alpha` by a margin. The image lies at the distance
    :math:`\rho = r (1 + \beta/(\alpha + r))` from the center, a quadratic equation for r, so the inverse has a closed
    form. With D = 1 the flow is a monotone scalar function.

    Cost: O(D) in both directions. Starts within 1e-2 of the identity.

    Args:
        input_dim: number of coordinates, D.

    Shapes:
        input, output ``(..., D)``; ladj ``(...)``.

    References:
        D. Rezende, S. Mohamed (2015). Variational inference with normalizing flows. arXiv:1505.05770.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import Radial
        >>> flow = Radial(2)
        >>> y, ladj = flow.forward_and_ladj(torch.ones(5, 2))
        >>> torch.allclose(flow.inverse_and_ladj(y)[0], torch.ones(5, 2), atol=1e-6)
        True
    """

    def __init__(self, input_dim: int, *, cache_size: int = 1) -> None:
        super().__init__(input_dim, cache_size=cache_size)
        self.center = nn.Parameter(0.1 * torch.randn(input_dim))
        self.alpha = nn.Parameter(torch.tensor(1.0).expm1().log())
        self.beta = nn.Parameter(1e-3 * torch.randn(()))

    def _forward_formula(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        alpha, beta = self._strength(theta)
        offset = x - theta["center"]
        r = torch.linalg.vector_norm(offset, dim=-1)
        return x + (beta / (alpha + r))[..., None] * offset, self._ladj(r, alpha, beta)

    def _inverse_formula(self, y: Tensor, theta: Theta, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
        alpha, beta = self._strength(theta)
        offset = y - theta["center"]
        rho = torch.linalg.vector_norm(offset, dim=-1)
        # r^2 + p r - alpha rho = 0, by the formula without cancellation for either sign of p
        p = alpha + beta - rho
        root = (p * p + 4 * alpha * rho).sqrt()
        r = torch.where(p > 0, 2 * alpha * rho / (root + p.abs()), (root - p) / 2)
        return theta["center"] + offset / (1 + beta / (alpha + r))[..., None], self._ladj(r, alpha, beta)

    def _strength(self, theta: Theta) -> tuple[Tensor, Tensor]:
        alpha = softplus(theta["alpha"])
        return alpha, alpha * above_minus_one(theta["beta"])

    def _ladj(self, r: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        tangential = (beta / (alpha + r)).log1p()
        radial = (alpha * beta / (alpha + r) ** 2).log1p()
        return (self.input_dim - 1) * tangential + radial


class ConditionalRadial(AmortizedFlow, family=Radial): ...
