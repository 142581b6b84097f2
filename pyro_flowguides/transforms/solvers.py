"""The equations that inverses come down to, and how gradients get through their solutions.

Two are enough for the package: one scalar equation, :math:`t + k \tanh t = q`, behind planar and Sylvester flows, and
the triangular system of an autoregressive map, here with any network; with a MADE there is a faster way,
:meth:`~pyro_flowguides.nn.MADE.substitute`. Both are solved without recording a graph; the solution is then given the
derivatives of the implicit function theorem.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "attach",
    "autoregressive_root",
    "implicit_root",
    "newton_steps",
    "tanh_newton",
    "tanh_root",
    "tracing",
    "watched",
]

Elementwise = Callable[[Tensor], tuple[Tensor, Tensor]]
Transposed = Callable[[Tensor, Tensor], Tensor]

#: Most Newton steps on one scalar equation (:func:`newton_steps`), enough for k = 1e10.
NEWTON_STEPS = 24


def tracing(*tensors: Tensor) -> bool:
    """Whether control flow must not depend on values: under compile, jit.trace, functorch transforms, or on meta."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(tensor.is_meta for tensor in tensors)
    )


def watched() -> bool:
    """Whether operations are intercepted one by one, to be written down: as values are known, ``tracing`` is not."""
    return torch._C._len_torch_dispatch_stack() > 0


def tanh_root(k: Tensor, q: Tensor, known: Tensor | None = None) -> Tensor:
    r"""The root :math:`t` of :math:`t + k \tanh t = q` for :math:`k > -1`, elementwise and differentiable.

    The left side is odd and increasing, so take :math:`q \ge 0`. There :math:`\tanh t` lies between :math:`0` and
    :math:`\min(t, 1)`, so that the root lies between :math:`q` and whichever of :math:`q - k`, :math:`q/(1+k)` is
    nearer to it; and the left side is concave (:math:`k \ge 0`) or convex (:math:`k < 0`), so that Newton's method
    approaches the root monotonically from that nearer bound. Steps are kept inside the bracket all the same.

    Cost: ``newton_steps(k)`` evaluations of ``tanh`` per element, and one more for the derivatives; only that one if
    the root is ``known``.
    """
    if known is None:
        with torch.no_grad():
            known = tanh_newton(k.detach(), q.detach(), newton_steps(k))
    t = known.detach()
    tanh = t.tanh()
    slope = 1 + k * (1 - tanh * tanh)
    return t - (t + k * tanh - q) / slope.detach()


@torch.no_grad()
def newton_steps(k: Tensor) -> int:
    r"""How many Newton steps :math:`t + k \tanh t = q` takes in float64, whatever q: :math:`3 + 2 |\log_{10}(1 + k)|`.

    They are counted from the extreme slopes before the first step, so that no step waits for the outcome of the one
    before. Under tracing, where the slopes are not known, the most there can be.
    """
    if tracing(k) or k.numel() == 0:
        return NEWTON_STEPS
    needed = 3 + 2 * (1 + k).log10().abs().amax().item()
    return math.ceil(needed) if needed <= NEWTON_STEPS else NEWTON_STEPS  # also where it is not a number


def tanh_newton(k: Tensor, q: Tensor, steps: int) -> Tensor:
    """The root of :func:`tanh_root` without derivatives."""
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


def autoregressive_root(elementwise: Elementwise, w: Tensor, rank: Tensor, known: Tensor | None = None) -> Tensor:
    r"""The root :math:`z` of :math:`e^{a(z)} \odot z + m(z) = w`, where :math:`a_i, m_i` read only earlier coordinates.

    Jacobi iteration :math:`z \leftarrow (w - m(z)) / e^{a(z)}`: after :math:`k` passes the first :math:`k` coordinates
    are final whatever the others hold, so that D passes give what solving for one coordinate after the other gives.
    It stops before, at the first iterate that satisfies the equations to rounding: what is returned early has been put
    to the test itself. Coordinates that are not final may grow without bound on the way. They are kept within the
    square root of the largest number, from where no network reaches an infinity that would spoil earlier coordinates
    through weights of zero. Gradients solve the transposed triangular system in the same way.

    Under tracing (compile, vmap, jit, meta) all passes run, recorded: the same values and gradients, more memory.

    Args:
        elementwise: ``z -> (log-scale a, shift m)``.
        w: right-hand side ``(..., D)``.
        rank: place of each coordinate in the order, ``(D,)``.
        known: the root, if it is known and only its derivatives are wanted.
    """
    if known is None and tracing(w):
        z = w
        for done in range(len(rank)):
            z = _bounded(_jacobi(elementwise, z, w)[0], rank <= done)
        return z
    if known is None:
        with torch.no_grad():
            known = _iterate(elementwise, w, rank)
    return implicit_root(elementwise, w, known, lambda z, v: _iterate_transposed(elementwise, z, v, len(rank)))


def implicit_root(elementwise: Elementwise, w: Tensor, root: Tensor, solve_transposed: Transposed) -> Tensor:
    r"""The known root of :func:`autoregressive_root` with its derivatives by w and by what ``elementwise`` reads.

    Args:
        elementwise: ``z -> (log-scale a, shift m)``.
        w: right-hand side ``(..., D)``.
        root: the root.
        solve_transposed: from the root and v to the solution of :math:`J^\top u = v`, J the Jacobian of the map there.
    """
    if not torch.is_grad_enabled():
        return root
    log_scale, shift = elementwise(root)
    residual = w - (root * log_scale.exp() + shift)
    if not residual.requires_grad:
        return root
    (moved,) = attach(lambda values, v: solve_transposed(values[0], v), residual, root)
    return moved


def attach(pull: Callable[..., Tensor], w: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Known values as functions of w, to first order.

    Args:
        pull: from the values and the derivatives by each of them to the derivative by w.
        w: what the values depend on.
        values: the values.

    Returns:
        copies of the values.
    """
    attached: tuple[Tensor, ...] = _Attached.apply(pull, w, *values)
    return attached


def _jacobi(elementwise: Elementwise, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """One pass, and the size of the rounding error it carries."""
    log_scale, shift = elementwise(z)
    scale = log_scale.exp()
    return (w - shift) / scale, (w.abs() + shift.abs()) / scale


def _bounded(z: Tensor, final: Tensor) -> Tensor:
    """What is not final kept finite, and small enough for the products inside a network."""
    huge = torch.finfo(z.dtype).max ** 0.5
    return torch.where(final, z, z.nan_to_num(nan=0.0).clamp(-huge, huge))


def _iterate(elementwise: Elementwise, w: Tensor, rank: Tensor) -> Tensor:
    tolerance = 4 * torch.finfo(w.dtype).eps
    z = w
    for done in range(len(rank)):
        update, size = _jacobi(elementwise, z, w)
        if done + 1 < len(rank) and bool(((update - z).abs() <= tolerance * size).all()):
            return z.expand_as(update)  # a batched context may have more dimensions than w
        z = _bounded(update, rank <= done)
    return z


def _iterate_transposed(elementwise: Elementwise, z: Tensor, v: Tensor, passes: int) -> Tensor:
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        log_scale, shift = elementwise(leaf)
        image = leaf * log_scale.exp() + shift
    inverse_scale = torch.exp(-log_scale.detach())
    tolerance = 4 * torch.finfo(v.dtype).eps
    static = tracing(v)
    u = v * inverse_scale
    for _ in range(passes - 1):
        (pulled,) = torch.autograd.grad(image, leaf, u, retain_graph=True)
        step = (v - pulled) * inverse_scale
        u = u + step
        if not static and bool((step.abs() <= tolerance * u.abs().amax(-1, keepdim=True)).all()):
            break
    return u


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pull: Callable[..., Tensor], w: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*values)
        ctx.pull = pull
        return tuple(value.clone() for value in values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *derivatives: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.pull(ctx.saved_tensors, *derivatives), *(None for _ in derivatives)
