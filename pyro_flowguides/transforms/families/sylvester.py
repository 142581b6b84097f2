"""Sylvester flows: orthogonal, Householder and triangular."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pyro_flowguides.nn.arguments import check_count
from pyro_flowguides.nn.ordering import as_permutation
from pyro_flowguides.transforms.algebra import matvec, orthonormal, solve_triangle
from pyro_flowguides.transforms.bounds import shrink_factor
from pyro_flowguides.transforms.conditional import AmortizedFlow
from pyro_flowguides.transforms.flow import Flow, Theta
from pyro_flowguides.transforms.reflections import paired_vectors, reflect
from pyro_flowguides.transforms.solvers import count_newton_steps, solve_tanh
from pyro_flowguides.transforms.tracing import is_tracing

__all__ = [
    "ConditionalHouseholderSylvester",
    "ConditionalOrthogonalSylvester",
    "ConditionalTriangularSylvester",
    "HouseholderSylvester",
    "OrthogonalSylvester",
    "TriangularSylvester",
]


class _Sylvester(Flow):
    r"""The formula of all Sylvester flows; the variants differ in the M orthonormal columns of Q.

    .. math::
        y = x + Q R \tanh(\tilde R Q^\top x + b), \qquad
        \log|\det J| = \sum_{i=1}^{M} \log\left(1 + h'_i R_{ii} \tilde R_{ii}\right)

    with :math:`R, \tilde R` upper triangular and :math:`h' = 1 - \tanh^2`. It is invertible for
    :math:`R_{ii} \tilde R_{ii} > -1`, which shrinking the diagonal of :math:`\tilde R` ensures with a margin
    (:func:`~pyro_flowguides.transforms.bounds.shrink_factor`).

    The inverse solves :math:`v + R \tanh(\tilde R v + b) = Q^\top y` for :math:`v = Q^\top x` from the last coordinate
    to the first, one scalar equation each. Q is applied only to vectors.
    """

    def __init__(self, input_dim: int, bottleneck: int | None = None, *, cache_size: int = 1) -> None:
        super().__init__(input_dim, cache_size=cache_size)
        m = input_dim if bottleneck is None else bottleneck
        self.bottleneck = m = check_count(type(self).__name__, "bottleneck", m, 1, input_dim)
        # One matrix holds both triangles: strictly upper that of R, strictly lower the transpose of that of R~.
        self.triangles = nn.Parameter((1e-3 * torch.randn(m, m).triu(1) + 0.1 * torch.randn(m, m).tril(-1)) / m**0.5)
        self.diagonal = nn.Parameter(1e-3 * torch.randn(m))
        self.diagonal_tilde = nn.Parameter(torch.ones(m))
        self.b = nn.Parameter(torch.zeros(m))

    def _project(self, x: Tensor, theta: Theta) -> Tensor:
        r"""Compute :math:`Q^\top x`: ``(..., D) -> (..., M)``."""
        raise NotImplementedError

    def _embed(self, v: Tensor, theta: Theta) -> Tensor:
        """Compute :math:`Q v`: ``(..., M) -> (..., D)``."""
        raise NotImplementedError

    @staticmethod
    def _diagonals(theta: Theta) -> tuple[Tensor, Tensor]:
        r"""Return the diagonal of :math:`\tilde R`, and its product with that of :math:`R`."""
        product = theta["diagonal"] * theta["diagonal_tilde"]
        factor = shrink_factor(product)
        return factor * theta["diagonal_tilde"], factor * product

    def _factors(self, theta: Theta) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return :math:`R`, :math:`\tilde R`, and the product of their diagonals."""
        diagonal_tilde, product = self._diagonals(theta)
        r = theta["triangles"].triu(1) + torch.diag_embed(theta["diagonal"])
        r_tilde = theta["triangles"].tril(-1).mT + torch.diag_embed(diagonal_tilde)
        return r, r_tilde, product

    def _forward_formula(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        # Strict triangles and diagonals are kept apart, to touch amortized matrices, the bulk of the work, the least.
        diagonal_tilde, product = self._diagonals(theta)
        v = self._project(x, theta)
        tanh = (matvec(theta["triangles"].tril(-1).mT, v) + diagonal_tilde * v + theta["b"]).tanh()
        step = matvec(theta["triangles"].triu(1), tanh) + theta["diagonal"] * tanh
        return x + self._embed(step, theta), ((1 - tanh * tanh) * product).log1p().sum(-1)

    def _inverse_formula(self, y: Tensor, theta: Theta, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r, r_tilde, product = self._factors(theta)
        target = self._project(y, theta)
        with torch.no_grad():
            if root is None:
                v = _back_substitute(r, r_tilde, product, theta["b"], target)
            else:
                v = self._project(root, theta)
        if torch.is_grad_enabled() or is_tracing(v):
            v = self._differentiable(v.detach(), r, r_tilde, theta["b"], target)
        tanh = (matvec(r_tilde, v) + theta["b"]).tanh()
        return y - self._embed(matvec(r, tanh), theta), ((1 - tanh * tanh) * product).log1p().sum(-1)

    @staticmethod
    def _differentiable(v: Tensor, r: Tensor, r_tilde: Tensor, b: Tensor, target: Tensor) -> Tensor:
        """Give v the derivatives of the implicit function theorem, by one Newton step on the whole system."""
        tanh = (matvec(r_tilde, v) + b).tanh()
        residual = v + matvec(r, tanh) - target
        identity = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
        jacobian = identity + (r * (1 - tanh * tanh)[..., None, :]) @ r_tilde
        return v - solve_triangle(jacobian.detach(), residual, upper=True)

    def extra_repr(self) -> str:
        return f"{self.input_dim}, bottleneck={self.bottleneck}"


def _back_substitute(r: Tensor, r_tilde: Tensor, product: Tensor, b: Tensor, target: Tensor) -> Tensor:
    r"""Solve :math:`v + R \tanh(\tilde R v + b) = t` from the last coordinate to the first.

    With :math:`s_i = (\tilde R v + b)_i = \tilde R_{ii} v_i + c_i`, the i-th equation reads
    :math:`s_i + R_{ii} \tilde R_{ii} \tanh s_i = \tilde R_{ii} (t_i - \sum_{j>i} R_{ij} \tanh s_j) + c_i`.
    """
    steps = count_newton_steps(product)
    values: list[Tensor] = []  # v_m, v_{m-1}, ...
    rest, c = target, b  # less the terms of the coordinates solved so far
    for i in reversed(range(r.shape[-1])):
        tanh = solve_tanh(product[..., i], r_tilde[..., i, i] * rest[..., i] + c[..., i], steps).tanh()
        v = rest[..., i] - r[..., i, i] * tanh
        values.append(v)
        rest = torch.addcmul(rest[..., :i], r[..., :i, i], tanh[..., None], value=-1)
        c = torch.addcmul(c[..., :i], r_tilde[..., :i, i], v[..., None])
    return torch.stack(values[::-1], -1)


class OrthogonalSylvester(_Sylvester):
    r"""Sylvester flow with Q the orthonormal factor of a free D × M matrix.

    .. math:: y = x + Q R \tanh(\tilde R Q^\top x + b), \qquad
        \log|\det J| = \sum_{i=1}^{M} \log\left(1 + (1 - \tanh^2_i) R_{ii} \tilde R_{ii}\right)

    Q comes from a QR factorization with fixed signs, a smooth function of the matrix (the paper approaches it by
    iteration). With D = 1 the flow, as all variants, is a monotone scalar function with one tanh step.

    Cost: O(DM) per point and O(DM²) once per call, in both directions; the inverse adds M scalar equations.
    Starts within 1e-2 of the identity.

    Args:
        input_dim: number of coordinates, D.
        bottleneck: M ≤ D (default D).

    Shapes:
        input, output ``(..., D)``; ladj ``(...)``.

    Raises:
        ValueError: if ``bottleneck`` is not in 1..D.

    References:
        R. van den Berg, L. Hasenclever, J. Tomczak, M. Welling (2018). Sylvester normalizing flows for variational
        inference. arXiv:1803.05649.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import OrthogonalSylvester
        >>> flow = OrthogonalSylvester(4, bottleneck=2)
        >>> y, ladj = flow.forward_and_ladj(torch.ones(5, 4))
        >>> torch.allclose(flow.inverse_and_ladj(y)[0], torch.ones(5, 4), atol=1e-5)
        True
    """

    def __init__(self, input_dim: int, bottleneck: int | None = None, *, cache_size: int = 1) -> None:
        super().__init__(input_dim, bottleneck, cache_size=cache_size)
        self.columns = nn.Parameter(torch.randn(input_dim, self.bottleneck))

    def _forward_formula(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        return super()._forward_formula(x, self._orthonormal(theta))

    def _inverse_formula(self, y: Tensor, theta: Theta, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super()._inverse_formula(y, self._orthonormal(theta), root)

    @staticmethod
    def _orthonormal(theta: Theta) -> Theta:
        """Return theta with Q, which is computed once per call."""
        return {**theta, "q": orthonormal(theta["columns"])}

    def _project(self, x: Tensor, theta: Theta) -> Tensor:
        return matvec(theta["q"].mT, x)

    def _embed(self, v: Tensor, theta: Theta) -> Tensor:
        return matvec(theta["q"], v)


class HouseholderSylvester(_Sylvester):
    r"""Sylvester flow with Q the first M columns of a product of K Householder reflections.

    .. math:: y = x + Q R \tanh(\tilde R Q^\top x + b), \qquad Q = H_1 \cdots H_K \begin{pmatrix} I_M \\ 0 \end{pmatrix}

    with the log-determinant of :class:`OrthogonalSylvester`.

    Cost: O(KD + M²) per point in both directions, no matrix of size D × D; the inverse adds M scalar equations.
    Starts within 1e-2 of the identity.

    Args:
        input_dim: number of coordinates, D.
        bottleneck: M ≤ D (default D).
        reflections: K, even.

    Shapes:
        input, output ``(..., D)``; ladj ``(...)``.

    Raises:
        ValueError: if ``bottleneck`` is not in 1..D or ``reflections`` is odd.

    References:
        R. van den Berg, L. Hasenclever, J. Tomczak, M. Welling (2018). arXiv:1803.05649.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import HouseholderSylvester
        >>> HouseholderSylvester(4, reflections=4)(torch.randn(5, 4)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self, input_dim: int, bottleneck: int | None = None, *, reflections: int = 4, cache_size: int = 1
    ) -> None:
        super().__init__(input_dim, bottleneck, cache_size=cache_size)
        self.vectors = nn.Parameter(paired_vectors(type(self).__name__, input_dim, reflections))

    def _project(self, x: Tensor, theta: Theta) -> Tensor:
        return reflect(x, theta["vectors"])[..., : self.bottleneck]

    def _embed(self, v: Tensor, theta: Theta) -> Tensor:
        return reflect(pad(v, (0, self.input_dim - self.bottleneck)), theta["vectors"], transpose=True)


class TriangularSylvester(_Sylvester):
    r"""Sylvester flow with Q the first M columns of a permutation matrix.

    .. math:: y = x + Q R \tanh(\tilde R Q^\top x + b), \qquad Q^\top x = (x_{o_1}, \dots, x_{o_M})

    with the log-determinant of :class:`OrthogonalSylvester`. Successive layers should alternate the order, as the
    recipe does.

    Cost: O(D + M²) per point in both directions; the inverse adds M scalar equations. Starts within 1e-2 of the
    identity.

    Args:
        input_dim: number of coordinates, D.
        bottleneck: M ≤ D (default D).
        order: a permutation o of ``range(D)`` (default: natural order).

    Shapes:
        input, output ``(..., D)``; ladj ``(...)``.

    Raises:
        ValueError: if ``bottleneck`` is not in 1..D or ``order`` is not a permutation.

    References:
        R. van den Berg, L. Hasenclever, J. Tomczak, M. Welling (2018). arXiv:1803.05649.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import TriangularSylvester
        >>> TriangularSylvester(4, order=[3, 2, 1, 0])(torch.randn(5, 4)).shape
        torch.Size([5, 4])
    """

    order: Tensor
    rank: Tensor

    def __init__(
        self,
        input_dim: int,
        bottleneck: int | None = None,
        *,
        order: Sequence[int] | Tensor | None = None,
        cache_size: int = 1,
    ) -> None:
        super().__init__(input_dim, bottleneck, cache_size=cache_size)
        order = as_permutation(type(self).__name__, input_dim, order)
        self.register_buffer("order", order)
        self.register_buffer("rank", order.argsort())

    def _project(self, x: Tensor, theta: Theta) -> Tensor:
        return x[..., self.order[: self.bottleneck]]

    def _embed(self, v: Tensor, theta: Theta) -> Tensor:
        return pad(v, (0, self.input_dim - self.bottleneck))[..., self.rank]


class ConditionalOrthogonalSylvester(AmortizedFlow, family=OrthogonalSylvester): ...


class ConditionalHouseholderSylvester(AmortizedFlow, family=HouseholderSylvester): ...


class ConditionalTriangularSylvester(AmortizedFlow, family=TriangularSylvester): ...
