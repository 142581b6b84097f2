"""Planar flows."""

import torch
from torch import Tensor, nn

from pyro_flowguides.transforms.algebra import dot
from pyro_flowguides.transforms.bounds import shrink_factor
from pyro_flowguides.transforms.conditional import AmortizedFlow
from pyro_flowguides.transforms.flow import Flow, Theta
from pyro_flowguides.transforms.solvers import tanh_root

__all__ = ["ConditionalPlanar", "Planar"]


class Planar(Flow):
    r"""Planar flow: space is stretched along one direction by a tanh step across one hyperplane.

    .. math::
        y = x + \hat u \tanh(w^\top x + b), \qquad
        \log|\det J| = \log\left(1 + (1 - \tanh^2(w^\top x + b))\, w^\top \hat u\right)

    It is invertible for :math:`w^\top \hat u > -1`, which :math:`\hat u = r(w^\top u)\, u` ensures with a margin (see
    :func:`~pyro_flowguides.transforms.bounds.shrink_factor`). Unlike the paper's correction it is defined at
    :math:`w = 0`.

    The inverse needs one number: :math:`t = w^\top x + b` solves :math:`t + w^\top\hat u \tanh t = w^\top y + b`
    (:func:`~pyro_flowguides.transforms.solvers.tanh_root`), then :math:`x = y - \hat u \tanh t`. With D = 1 the flow is
    a monotone scalar function with one tanh step.

    Cost: O(D) forward; O(D) and four to eight ``tanh`` inverse. Starts within 1e-2 of the identity.

    Args:
        input_dim: number of coordinates, D.

    Shapes:
        input, output ``(..., D)``; ladj ``(...)``.

    References:
        D. Rezende, S. Mohamed (2015). Variational inference with normalizing flows. arXiv:1505.05770.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import Planar
        >>> flow = Planar(2)
        >>> y, ladj = flow.forward_and_ladj(torch.zeros(5, 2))
        >>> x, _ = flow.inverse_and_ladj(y)
        >>> torch.allclose(x, torch.zeros(5, 2), atol=1e-6)
        True
    """

    def __init__(self, input_dim: int, *, cache_size: int = 1) -> None:
        super().__init__(input_dim, cache_size=cache_size)
        self.u = nn.Parameter(1e-3 * torch.randn(input_dim))
        self.w = nn.Parameter(torch.randn(input_dim) / input_dim**0.5)
        self.b = nn.Parameter(torch.zeros(()))

    def _stretch(self, theta: Theta) -> tuple[Tensor, Tensor]:
        r"""Return the constrained :math:`\hat u`, and :math:`w^\top \hat u`."""
        s = (theta["w"] * theta["u"]).sum(-1)
        factor = shrink_factor(s)
        return factor[..., None] * theta["u"], factor * s

    def _forward_formula(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        u, slope = self._stretch(theta)
        tanh = (dot(x, theta["w"]) + theta["b"]).tanh()
        return x + u * tanh[..., None], ((1 - tanh * tanh) * slope).log1p()

    def _inverse_formula(self, y: Tensor, theta: Theta, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, slope = self._stretch(theta)
        t = None if root is None else dot(root, theta["w"]) + theta["b"]
        tanh = tanh_root(slope, dot(y, theta["w"]) + theta["b"], t).tanh()
        return y - u * tanh[..., None], ((1 - tanh * tanh) * slope).log1p()


class ConditionalPlanar(AmortizedFlow, family=Planar): ...
