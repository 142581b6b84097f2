"""Linear and affine maps given by their triangular factors."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_flowguides.nn.ordering import as_permutation
from pyro_flowguides.transforms.algebra import lower_triangle, matvec, per_coordinate, solve_triangle, triangle_size
from pyro_flowguides.transforms.conditional import AmortizedFlow
from pyro_flowguides.transforms.flow import Flow, Theta
from pyro_flowguides.transforms.reflections import paired_vectors, reflect

__all__ = [
    "ConditionalLULinear",
    "ConditionalLowerTriangularAffine",
    "ConditionalQRLinear",
    "LULinear",
    "LowerTriangularAffine",
    "QRLinear",
]


def _unit_lower(packed: Tensor, dim: int) -> Tensor:
    return lower_triangle(packed, dim) + torch.eye(dim, dtype=packed.dtype, device=packed.device)


class LowerTriangularAffine(Flow):
    r"""A full-rank affine map: with a standard normal base, the multivariate normal with a Cholesky factor.

    .. math:: y = \ell + e^{s} \odot (I + N) x, \qquad \log|\det J| = \sum_i s_i

    with N strictly lower triangular. N is relative to the scale, so that its entries mean the same at every scale.

    Cost: O(D²) in both directions. Starts at the identity by default.

    Args:
        input_dim: number of coordinates, D.
        loc: initial location, a number or ``(D,)``.
        scale: initial scale, positive, a number or ``(D,)``.

    Shapes:
        input, output ``(..., D)``; ladj ``(...)``.

    Raises:
        ValueError: if the scale is not positive, or a shape is wrong.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import LowerTriangularAffine
        >>> y, ladj = LowerTriangularAffine(2, loc=1.0, scale=3.0).forward_and_ladj(torch.zeros(2))
        >>> y.tolist(), round(ladj.exp().item(), 4)
        ([1.0, 1.0], 9.0)
    """

    def __init__(
        self, input_dim: int, loc: float | Tensor = 0.0, scale: float | Tensor = 1.0, *, cache_size: int = 1
    ) -> None:
        super().__init__(input_dim, cache_size=cache_size)
        owner = type(self).__name__
        self.loc = nn.Parameter(per_coordinate(owner, "loc", loc, input_dim))
        self.log_scale = nn.Parameter(per_coordinate(owner, "scale", scale, input_dim, positive=True).log())
        self.lower = nn.Parameter(self.loc.new_zeros(triangle_size(input_dim)))

    def _forward_formula(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        mixed = matvec(_unit_lower(theta["lower"], self.input_dim), x)
        return theta["loc"] + theta["log_scale"].exp() * mixed, theta["log_scale"].sum(-1)

    def _inverse_formula(self, y: Tensor, theta: Theta, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mixed = (y - theta["loc"]) * (-theta["log_scale"]).exp()
        lower = _unit_lower(theta["lower"], self.input_dim)
        return solve_triangle(lower, mixed, upper=False, unitriangular=True), theta["log_scale"].sum(-1)

    def _score_formula(self, x: Tensor, score: Tensor, theta: Theta) -> tuple[Tensor, Tensor, Tensor]:
        y, ladj = self._forward_formula(x, theta)
        with torch.no_grad():
            upper = _unit_lower(theta["lower"], self.input_dim).mT
            unmixed = solve_triangle(upper, score, upper=True, unitriangular=True)
            return y, ladj.detach(), unmixed * (-theta["log_scale"]).exp()


class LULinear(Flow):
    r"""A linear map given by its PLU factors.

    .. math:: y = P L U x, \qquad \log|\det J| = \sum_i s_i, \qquad U_{ii} = e^{s_i}

    with P a fixed permutation, L unit lower triangular and U upper triangular.

    Cost: O(D²) in both directions. Starts at its permutation, by default the identity.

    Args:
        input_dim: number of coordinates, D.
        permutation: p, the permutation of ``range(D)`` with ``(P v)_i = v_{p_i}`` (default: natural order).

    Shapes:
        input, output ``(..., D)``; ladj ``(...)``.

    Raises:
        ValueError: if ``permutation`` is not a permutation.

    References:
        D. Kingma, P. Dhariwal (2018). Glow: generative flow with invertible 1×1 convolutions. arXiv:1807.03039.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import LULinear
        >>> LULinear(2, permutation=[1, 0])(torch.tensor([1.0, 2.0])).tolist()
        [2.0, 1.0]
    """

    permutation: Tensor
    rank: Tensor

    def __init__(
        self, input_dim: int, permutation: Sequence[int] | Tensor | None = None, *, cache_size: int = 1
    ) -> None:
        super().__init__(input_dim, cache_size=cache_size)
        order = as_permutation("LULinear", input_dim, permutation, "permutation")
        self.register_buffer("permutation", order)
        self.register_buffer("rank", order.argsort())
        self.lower = nn.Parameter(torch.zeros(triangle_size(input_dim)))
        self.upper = nn.Parameter(torch.zeros(triangle_size(input_dim)))
        self.log_scale = nn.Parameter(torch.zeros(input_dim))

    def _factors(self, theta: Theta) -> tuple[Tensor, Tensor]:
        strictly_upper = lower_triangle(theta["upper"], self.input_dim).mT
        upper = strictly_upper + torch.diag_embed(theta["log_scale"].exp())
        return _unit_lower(theta["lower"], self.input_dim), upper

    def _forward_formula(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors(theta)
        return matvec(lower, matvec(upper, x))[..., self.permutation], theta["log_scale"].sum(-1)

    def _inverse_formula(self, y: Tensor, theta: Theta, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors(theta)
        mixed = solve_triangle(lower, y[..., self.rank], upper=False, unitriangular=True)
        return solve_triangle(upper, mixed, upper=True), theta["log_scale"].sum(-1)


class QRLinear(Flow):
    r"""A linear map given by its QR factors; the rotation is a product of Householder reflections.

    .. math:: y = H_K \cdots H_1 R x, \qquad \log|\det J| = \sum_i s_i, \qquad R_{ii} = e^{s_i}

    Cost: O(D² + KD) in both directions. Starts within 1e-2 of the identity.

    Args:
        input_dim: number of coordinates, D.
        reflections: K, even.

    Shapes:
        input, output ``(..., D)``; ladj ``(...)``.

    Raises:
        ValueError: if ``reflections`` is odd or below 2.

    References:
        E. Hoogeboom, R. van den Berg, M. Welling (2019). Emerging convolutions for generative normalizing flows.
        arXiv:1901.11137.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import QRLinear
        >>> QRLinear(3)(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """

    def __init__(self, input_dim: int, reflections: int = 2, *, cache_size: int = 1) -> None:
        super().__init__(input_dim, cache_size=cache_size)
        self.vectors = nn.Parameter(paired_vectors(type(self).__name__, input_dim, reflections))
        self.upper = nn.Parameter(torch.zeros(triangle_size(input_dim)))
        self.log_scale = nn.Parameter(torch.zeros(input_dim))

    def _triangle(self, theta: Theta) -> Tensor:
        return lower_triangle(theta["upper"], self.input_dim).mT + torch.diag_embed(theta["log_scale"].exp())

    def _forward_formula(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        return reflect(matvec(self._triangle(theta), x), theta["vectors"]), theta["log_scale"].sum(-1)

    def _inverse_formula(self, y: Tensor, theta: Theta, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rotated = reflect(y, theta["vectors"], transpose=True)
        return solve_triangle(self._triangle(theta), rotated, upper=True), theta["log_scale"].sum(-1)


class ConditionalLowerTriangularAffine(AmortizedFlow, family=LowerTriangularAffine): ...


class ConditionalLULinear(AmortizedFlow, family=LULinear): ...


class ConditionalQRLinear(AmortizedFlow, family=QRLinear): ...
