"""Products with vectors and matrices that may carry batch dimensions, packed triangles, and numbers as vectors."""

import math

import torch
from torch import Tensor

from pyro_flowguides.nn.arguments import check_number

__all__ = [
    "dot",
    "lower_triangle",
    "matvec",
    "orthonormal",
    "per_coordinate",
    "solve_triangle",
    "stretch",
    "triangle_size",
]


def per_coordinate(owner: str, name: str, value: float | Tensor, dim: int, *, positive: bool = False) -> Tensor:
    """Expand a number or a vector to a new floating-point vector ``(dim,)`` on the value's device.

    Raises:
        ValueError: if the value is not finite, not positive where it must be, or not a number or a vector ``(dim,)``.
            The message names the owner and the name of the argument.
    """
    if not isinstance(value, Tensor):
        value = check_number(owner, name, value, 0 if positive else -math.inf)
    tensor = torch.as_tensor(value).detach()
    if tensor.dim() > 1 or tensor.shape[-1:] not in ((), (1,), (dim,)):
        raise ValueError(f"{owner}: {name} must be a number or a vector of {dim}, got shape {tuple(tensor.shape)}")
    is_valid = tensor.isfinite() & (tensor > 0) if positive else tensor.isfinite()
    if not tensor.is_meta and not bool(is_valid.all()):
        limits = "positive and finite" if positive else "finite"
        wrong = float(tensor.reshape(-1)[~is_valid.reshape(-1)][0])
        raise ValueError(f"{owner}: {name} must be {limits} in every coordinate, got {wrong:.4g}")
    return torch.zeros(dim, device=tensor.device) + tensor


def dot(x: Tensor, v: Tensor) -> Tensor:
    """Multiply ``x (..., D), v (..., D) -> (...)``, as one product if v has no batch dimension."""
    return x @ v if v.dim() == 1 else (x * v).sum(-1)


def matvec(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply ``matrix (..., M, D), x (..., D) -> (..., M)``, as one product if the matrix has no batch dimension."""
    return x @ matrix.mT if matrix.dim() == 2 else (matrix @ x[..., None])[..., 0]


def stretch(x: Tensor, directions: Tensor, log_stretch: Tensor) -> Tensor:
    r"""Stretch x along orthonormal directions: :math:`x + Q\,(e^\kappa - 1) \odot (Q^\top x)`.

    Args:
        x: ``(..., D)``.
        directions: Q, orthonormal columns ``(..., D, R)``.
        log_stretch: κ ``(..., R)``.
    """
    along = matvec(directions.mT, x)
    if directions.shape[-1] == directions.shape[-2]:  # Q spans the space: x is all along, and rounding adds nothing
        return matvec(directions, log_stretch.exp() * along)
    return x + matvec(directions, log_stretch.expm1() * along)


def orthonormal(columns: Tensor) -> Tensor:
    """Orthonormalize the columns ``(..., D, M)`` by QR with fixed signs, smoothly in the matrix."""
    q, r = torch.linalg.qr(columns)
    sign = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return q * sign[..., None, :]


def solve_triangle(matrix: Tensor, x: Tensor, *, upper: bool, unitriangular: bool = False) -> Tensor:
    """Solve ``matrix z = x`` for triangular ``matrix (..., D, D)`` and ``x (..., D)``."""
    if matrix.dim() == 2:
        flat = torch.linalg.solve_triangular(
            matrix, x.reshape(-1, x.shape[-1]).mT, upper=upper, unitriangular=unitriangular
        )
        return flat.mT.reshape(x.shape)
    return torch.linalg.solve_triangular(matrix, x[..., None], upper=upper, unitriangular=unitriangular)[..., 0]


def triangle_size(dim: int) -> int:
    """Count the entries strictly below the diagonal."""
    return dim * (dim - 1) // 2


def lower_triangle(packed: Tensor, dim: int) -> Tensor:
    """Unpack ``(..., D(D-1)/2)`` to strictly lower triangular ``(..., D, D)``, row by row."""
    rows = torch.arange(dim, device=packed.device)
    start = rows * (rows - 1) // 2
    index = torch.where(rows[:, None] > rows, start[:, None] + rows, packed.shape[-1])
    padded = torch.cat([packed, packed.new_zeros(*packed.shape[:-1], 1)], -1)
    return padded[..., index]
