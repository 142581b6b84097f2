r"""The equations that inverses reduce to, and how gradients get through their solutions.

The package needs two: one scalar equation, :math:`t + k \tanh t = q`, for planar and Sylvester flows, and the
triangular system of an autoregressive map. The solver here takes any network; for a MADE
:meth:`~pyro_flowguides.nn.MADE.substitute` is faster. Both are solved without recording a graph; the solution then gets
the derivatives of the implicit function theorem.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_flowguides.transforms.tracing import is_tracing

__all__ = [
    "autoregressive_root",
    "count_newton_steps",
    "implicit_root",
    "solve_tanh",
    "tanh_root",
    "with_implicit_gradient",
]

#: Compute log-scale and shift of every coordinate from all coordinates.
AffineMap: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
#: Solve ``J^T u = v`` for u, given the root at which the Jacobian J is taken, and v.
SolveTransposed: TypeAlias = Callable[[Tensor, Tensor], Tensor]

#: Most Newton steps on one scalar equation (:func:`count_newton_steps`), enough for k = 1e10.
MAX_NEWTON_STEPS = 24


def tanh_root(k: Tensor, q: Tensor, root: Tensor | None = None) -> Tensor:
    r"""Solve :math:`t + k \tanh t = q` for :math:`t`, where :math:`k > -1`, elementwise and differentiable.

    The left side is odd and increasing, so take :math:`q \ge 0`. There :math:`\tanh t` lies between :math:`0` and
    :math:`\min(t, 1)`. The root therefore lies between :math:`q` and that one of :math:`q - k` and :math:`q/(1+k)`
    which is nearer to it. The left side is concave for :math:`k \ge 0` and convex for :math:`k < 0`, so Newton's method
    approaches the root monotonically from that nearer bound. Steps are kept inside the bracket all the same.

    Cost: ``count_newton_steps(k)`` evaluations of ``tanh`` per element, and one more for the derivatives; only that one
    if the ``root`` is known.
    """
    if root is None:
        with torch.no_grad():
            root = solve_tanh(k.detach(), q.detach(), count_newton_steps(k))
    t = root.detach()
    tanh = t.tanh()
    slope = 1 + k * (1 - tanh * tanh)
    return t - (t + k * tanh - q) / slope.detach()


@torch.no_grad()
def count_newton_steps(k: Tensor) -> int:
    r"""Count the Newton steps that :math:`t + k \tanh t = q` takes in float64, for any q.

    There are :math:`3 + 2 |\log_{10}(1 + k)|` steps, for the k with the most extreme slope. Because the count is known
    before the first step, no step waits for the outcome of the one before. Under tracing, where the slopes are not
    known, it is the largest possible count.
    """
    if is_tracing(k) or k.numel() == 0:
        return MAX_NEWTON_STEPS
    needed = 3 + 2 * (1 + k).log10().abs().amax().item()
    return math.ceil(needed) if needed <= MAX_NEWTON_STEPS else MAX_NEWTON_STEPS  # also where it is not a number


def solve_tanh(k: Tensor, q: Tensor, steps: int) -> Tensor:
    """Solve the equation of :func:`tanh_root` by Newton's method, without derivatives."""
    magnitude = q.abs()
    saturated, linear = magnitude - k, magnitude / (1 + k)
    near = torch.where(k >= 0, torch.maximum(saturated, linear), torch.minimum(saturated, linear))
    low, high = torch.minimum(near, magnitude), torch.maximum(near, magnitude)
    one, t = torch.ones_like(near), near
    for _ in range(steps):
        tanh = t.tanh()
        residual = torch.addcmul(t - magnitude, k, tanh)
        slope = torch.addcmul(one, k, torch.addcmul(one, tanh, tanh, value=-1))
        t = torch.addcdiv(t, residual, slope, value=-1).clamp(low, high)
    return torch.copysign(t, q)


def autoregressive_root(affine_map: AffineMap, w: Tensor, rank: Tensor) -> Tensor:
    r"""Solve :math:`e^{a(z)} \odot z + m(z) = w` for :math:`z`, where :math:`a_i, m_i` read only earlier coordinates.

    Jacobi iteration :math:`z \leftarrow (w - m(z)) / e^{a(z)}`: after :math:`k` passes the first :math:`k` coordinates
    are final, whatever the others hold. D passes thus give the same as solving one coordinate after the other. The
    iteration stops earlier, at the first iterate that itself satisfies the equations to rounding. Coordinates that are
    not final may grow without bound on the way. They are kept within the square root of the largest number; from there
    no network reaches an infinity that would spoil earlier coordinates through weights of zero. Gradients solve the
    transposed triangular system in the same way.

    Under tracing (compile, vmap, jit, meta) all passes run and are recorded: the same values and gradients, more
    memory.

    Args:
        affine_map: ``z -> (log-scale a, shift m)``.
        w: right-hand side ``(..., D)``.
        rank: position of each coordinate in the order, ``(D,)``.

    Returns:
        z ``(..., D)``.
    """
    if is_tracing(w):
        z = w
        for passes in range(len(rank)):
            z = _bounded(_jacobi(affine_map, z, w)[0], rank <= passes)
        return z
    with torch.no_grad():
        root = _iterate(affine_map, w, rank)
    return implicit_root(affine_map, w, root, lambda z, v: _iterate_transposed(affine_map, z, v, len(rank)))


def implicit_root(affine_map: AffineMap, w: Tensor, root: Tensor, solve_transposed: SolveTransposed) -> Tensor:
    r"""Give a root of :func:`autoregressive_root` its derivatives with respect to w and the tensors of ``affine_map``.

    Args:
        affine_map: ``z -> (log-scale a, shift m)``.
        w: right-hand side ``(..., D)``.
        root: the root.
        solve_transposed: from the root and v to the solution of :math:`J^\top u = v`, J the Jacobian of the map there.
    """
    if not torch.is_grad_enabled():
        return root
    log_scale, shift = affine_map(root)
    residual = w - (root * log_scale.exp() + shift)
    if not residual.requires_grad:
        return root
    (solution,) = with_implicit_gradient(lambda values, v: solve_transposed(values[0], v), residual, root)
    return solution


def with_implicit_gradient(pull_back: Callable[..., Tensor], w: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Make known values functions of w, to first order.

    Args:
        pull_back: from the tuple of values and the derivatives with respect to each of them to the derivative with
            respect to w.
        w: the tensor that the values depend on.
        values: the values.

    Returns:
        copies of the values.
    """
    attached: tuple[Tensor, ...] = _ImplicitGradient.apply(pull_back, w, *values)
    return attached


def _jacobi(affine_map: AffineMap, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Make one pass; also return the size of its rounding errors in units of machine precision."""
    log_scale, shift = affine_map(z)
    scale = log_scale.exp()
    return (w - shift) / scale, (w.abs() + shift.abs()) / scale


def _bounded(z: Tensor, final: Tensor) -> Tensor:
    """Keep coordinates that are not final finite, and small enough for the products inside a network."""
    huge = torch.finfo(z.dtype).max ** 0.5
    return torch.where(final, z, z.nan_to_num(nan=0.0).clamp(-huge, huge))


def _iterate(affine_map: AffineMap, w: Tensor, rank: Tensor) -> Tensor:
    tolerance = 4 * torch.finfo(w.dtype).eps
    z = w
    for passes in range(len(rank)):
        update, size = _jacobi(affine_map, z, w)
        if passes + 1 < len(rank) and bool(((update - z).abs() <= tolerance * size).all()):
            return z.expand_as(update)  # a batched context may have more dimensions than w
        z = _bounded(update, rank <= passes)
    return z


def _iterate_transposed(affine_map: AffineMap, z: Tensor, v: Tensor, passes: int) -> Tensor:
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        log_scale, shift = affine_map(leaf)
        image = leaf * log_scale.exp() + shift
    inverse_scale = torch.exp(-log_scale.detach())
    tolerance = 4 * torch.finfo(v.dtype).eps
    static = is_tracing(v)
    u = v * inverse_scale
    for _ in range(passes - 1):
        (pulled_back,) = torch.autograd.grad(image, leaf, u, retain_graph=True)
        step = (v - pulled_back) * inverse_scale
        u = u + step
        if not static and bool((step.abs() <= tolerance * u.abs().amax(-1, keepdim=True)).all()):
            break
    return u


class _ImplicitGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pull_back: Callable[..., Tensor], w: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*values)
        ctx.pull_back = pull_back
        return tuple(value.clone() for value in values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *derivatives: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.pull_back(ctx.saved_tensors, *derivatives), *(None for _ in derivatives)
