"""Autoregressive flows: inverse autoregressive (IAF) and masked autoregressive (MAF)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pyro_flowguides.nn import MADE
from pyro_flowguides.transforms.flow import ConditionerFlow, ContextFlow, Known, Theta
from pyro_flowguides.transforms.solvers import attach, implicit_root, tracing, watched
from pyro_flowguides.transforms.updates import UPDATES, place

__all__ = [
    "ConditionalInverseAutoregressive",
    "ConditionalMaskedAutoregressive",
    "InverseAutoregressive",
    "MaskedAutoregressive",
    "conditional_inverse_autoregressive",
    "conditional_masked_autoregressive",
    "inverse_autoregressive",
    "masked_autoregressive",
]

#: Up to that many numbers in a block it is quicker to iterate than to solve for one level after the other, on one core.
TOGETHER = 4096
#: Passes at most after a substitution: two where weights are ordinary, all of them where the round trip is lost by far.
PASSES = 12


def _together(w: Tensor) -> int:
    """How many numbers to iterate: on a GPU steps count and not their size; recorded steps do not depend on values."""
    if watched():
        return 0
    return sys.maxsize if w.is_cuda else TOGETHER


class _Slopes(NamedTuple):
    """Constants of a pair: scale, derivatives of image and log-determinant by the conditioner's output, the latter."""

    scale: Tensor
    image_by_output: Tensor
    ladj_by_output: Tensor
    ladj: Tensor


class _Autoregressive(ConditionerFlow):
    r"""The map :math:`w_i = e^{a_i} z_i + m_i` with :math:`(a_i, m_i)` a function of earlier coordinates of z.

    :meth:`_parallel` evaluates it in one pass, :meth:`_sequential` solves it for z. IAF draws in the parallel
    direction, MAF scores in it.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        *,
        order: Sequence[int] | Tensor | None = None,
        update: str = "affine",
        activation: Callable[[Tensor], Tensor] = nn.functional.elu,
        lowest_degree: int = 1,
        cache_size: int = 1,
    ) -> None:
        super().__init__(input_dim, cache_size=cache_size)
        if update not in UPDATES:
            raise ValueError(f"{type(self).__name__}: update must be one of {sorted(UPDATES)}, got {update!r}")
        self.update = update
        self.conditioner: MADE = MADE(
            input_dim, hidden_dims, 2, order=order, lowest_degree=lowest_degree, activation=activation
        )

    def _elementwise(self, z: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        """Log-scale and shift of each coordinate."""
        raw, shift = self.conditioner.run(z, theta).chunk(2, -1)
        return UPDATES[self.update](raw, shift)

    def _parallel(self, z: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._elementwise(z, theta)
        return z * log_scale.exp() + shift, log_scale.sum(-1)

    def _sequential(self, w: Tensor, theta: Theta, known: Known = None) -> tuple[Tensor, Tensor]:
        if known is not None and not tracing(w) and not any(tensor.requires_grad for tensor in theta.values()):
            return self._attach(w, known, theta)
        if known is None and not tracing(w) and not watched():
            known, ladj = self._refine(self._substitute(w, theta, _together(w)), w, theta)
            if not torch.is_grad_enabled():
                return known, ladj
        z = self._root(w, theta, known)
        return z, self._elementwise(z, theta)[0].sum(-1)

    def _substitute(self, w: Tensor, theta: Theta, together: int = 0) -> Tensor:
        formula, number = UPDATES[self.update]
        bound = w.new_full((), number)  # once: every operation with a number makes it a tensor

        def placed(raw: Tensor, shift: Tensor, w: Tensor) -> Tensor:
            return place(*formula(raw, shift, bound), w)

        return self.conditioner.substitute(placed, [w], theta, together)

    @torch.no_grad()
    def _refine(self, z: Tensor, w: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        """The root after some passes of the fixed point, and its log-determinant.

        A substitution sums up in an order of its own. A pass rounds as :meth:`_parallel` does, and so undoes what that
        has rounded. There are two, and more as long as they move all points together by more than rounding. Points
        whose last pass does not move less than the first stay as they are: weights are so large there that passes move
        away from the root.
        """
        moves, log_scales, points = [], [], [z]
        rounding = 2 * torch.finfo(z.dtype).eps * z.norm()
        for _ in range(PASSES):
            log_scale, shift = self._elementwise(points[-1], theta)
            log_scales.append(log_scale)
            points.append(place(log_scale, shift, w))
            moves.append((points[-1] - points[-2]).norm(dim=-1))
            if len(moves) > 1 and not moves[-1].norm() > rounding:
                break
        nearer = moves[-1] < moves[0]  # not so where there is an infinity on the way
        if bool(nearer.all()):
            return points[-1], log_scales[-1].sum(-1)
        nearer = nearer[..., None]
        return torch.where(nearer, points[-1], z), torch.where(nearer, log_scales[-1], log_scales[0]).sum(-1)

    def _root(self, w: Tensor, theta: Theta, known: Known = None) -> Tensor:
        """z, with the derivatives of the implicit function; under tracing with those of every step to it."""
        if known is None:
            if tracing(w):
                return self._substitute(w, theta)
            with torch.no_grad():
                known = self._substitute(w, theta)
        return implicit_root(lambda z: self._elementwise(z, theta), w, known, partial(self._solve_at, theta=theta))

    def _solve_at(self, z: Tensor, v: Tensor, theta: Theta) -> Tensor:
        output, hidden = self.conditioner.run_and_keep(z, theta)
        return self._solve_transposed(v, self._slopes(z, output), hidden, theta)

    def _attach(self, w: Tensor, z: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        """The known root and its log-determinant as functions of w only."""
        output, hidden = self.conditioner.run_and_keep(z, theta)
        slopes = self._slopes(z, output)

        def pull(_: Sequence[Tensor], by_z: Tensor, by_ladj: Tensor) -> Tensor:
            v = by_z + by_ladj[..., None] * self._ladj_by_z(slopes, hidden, theta)
            return self._solve_transposed(v, slopes, hidden, theta)

        z, ladj = attach(pull, w, z, slopes.ladj)
        return z, ladj

    def _slopes(self, z: Tensor, output: Tensor) -> _Slopes:
        with torch.enable_grad():
            output = output.detach().requires_grad_()
            log_scale, shift = UPDATES[self.update](*output.chunk(2, -1))
            ladj = log_scale.sum(-1)
            (image,) = torch.autograd.grad((z.detach() * log_scale.exp() + shift).sum(), output, retain_graph=True)
            (by_ladj,) = torch.autograd.grad(ladj.sum(), output)
        return _Slopes(log_scale.detach().exp(), image, by_ladj, ladj.detach())

    @torch.no_grad()
    def _ladj_by_z(self, slopes: _Slopes, hidden: list[Tensor], theta: Theta) -> Tensor:
        rows = slopes.ladj_by_output @ theta[f"weight{self.conditioner.depth - 1}"]
        return self.conditioner.pull_back(rows[..., None, :], hidden, theta)[..., 0, :]

    @torch.no_grad()
    def _solve_transposed(self, v: Tensor, slopes: _Slopes, hidden: list[Tensor], theta: Theta) -> Tensor:
        r"""Solve :math:`J^\top u = v` for the derivative J of the map."""
        coefficients = [part / slopes.scale for part in slopes.image_by_output.chunk(2, -1)]
        return self.conditioner.solve_transposed(v, coefficients, hidden, theta) / slopes.scale

    def extra_repr(self) -> str:
        return f"{self.input_dim}, update={self.update!r}"


class InverseAutoregressive(_Autoregressive):
    r"""Inverse autoregressive flow (IAF): fast to draw from, for variational posteriors.

    With :math:`(a_i, m_i)` computed by a MADE from the *inputs* :math:`x_{<i}`:

    .. math::
        \text{affine:}\quad y_i = e^{a_i} x_i + m_i, \quad a_i = 2 \tanh(s_i / 2); \qquad
        \text{gated:}\quad y_i = \frac{\sigma_i}{\operatorname{sigmoid}(2)} x_i + (1 - \sigma_i) m_i, \quad
        \sigma_i = \operatorname{sigmoid}(4 \tanh(s_i / 4) + 2); \qquad
        \log|\det J| = \sum_i a_i \ \text{or}\ \sum_i \log \frac{\sigma_i}{\operatorname{sigmoid}(2)}

    The gate is the paper's with bias 2, normalized so that the flow starts at the identity (the plain gate shrinks its
    input by sigmoid(2) = 0.88 per step), and bounded like the affine scale: both stay above :math:`e^{-2}`, so that the
    flow is invertible whatever the weights. With D = 1 the network sees nothing and the flow is one affine map.

    Cost: one network pass forward; inverse the arithmetic of half a pass in many small steps
    (:meth:`~pyro_flowguides.nn.MADE.substitute`) and two passes, more at large weights. Starts at the identity.

    Args:
        input_dim: D.
        hidden_dims: widths of the MADE, any (also below D).
        order: a permutation of ``range(D)``, the first coordinate to come first (default: natural order).
        update: "affine", "gated", or "shift" (:math:`y_i = x_i + m_i`, volume preserving).
        activation: elementwise nonlinearity of the MADE.
        lowest_degree: see :class:`~pyro_flowguides.nn.MADE`.

    Shapes:
        input, output ``(..., D)``; ladj ``(...)``.

    Raises:
        ValueError: for an unknown update, or an order that is not a permutation.

    References:
        D. Kingma, T. Salimans, R. Jozefowicz, X. Chen, I. Sutskever, M. Welling (2016). Improving variational inference
        with inverse autoregressive flow. arXiv:1606.04934.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import InverseAutoregressive
        >>> flow = InverseAutoregressive(3, [16], order=[2, 1, 0], update="gated")
        >>> y, ladj = flow.forward_and_ladj(torch.randn(5, 3))
        >>> y.shape, ladj.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    fast = "forward"

    def _push(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        return self._parallel(x, theta)

    def _pull(self, y: Tensor, theta: Theta, known: Known = None) -> tuple[Tensor, Tensor]:
        return self._sequential(y, theta, known)

    def _push_score(self, x: Tensor, score: Tensor, theta: Theta) -> tuple[Tensor, Tensor, Tensor]:
        output, hidden = self.conditioner.run_and_keep(x, theta)
        log_scale, shift = UPDATES[self.update](*output.chunk(2, -1))
        slopes = self._slopes(x, output)
        score = self._solve_transposed(score - self._ladj_by_z(slopes, hidden, theta), slopes, hidden, theta)
        return x * log_scale.exp() + shift, slopes.ladj, score


class MaskedAutoregressive(_Autoregressive):
    r"""Masked autoregressive flow (MAF): fast to score, for densities and learned priors.

    The parameters are computed from the *outputs* :math:`y_{<i}`; in the direction that takes one pass,

    .. math:: x_i = e^{a_i} y_i + m_i, \qquad \log|\det \partial y / \partial x| = -\sum_i a_i

    which is the paper's :math:`y_i = x_i e^{\alpha_i} + \mu_i` with :math:`\alpha_i = -a_i`,
    :math:`\mu_i = -m_i e^{-a_i}`. With D = 1 the flow is one affine map.

    Cost: one network pass inverse; forward the arithmetic of half a pass in many small steps
    (:meth:`~pyro_flowguides.nn.MADE.substitute`) and two passes, more at large weights. Starts at the identity.

    Args:
        input_dim: D.
        hidden_dims: widths of the MADE, any (also below D).
        order: a permutation of ``range(D)``, the first coordinate to come first (default: natural order).
        update: "affine", "gated" or "shift", see :class:`InverseAutoregressive`.
        activation: elementwise nonlinearity of the MADE.
        lowest_degree: see :class:`~pyro_flowguides.nn.MADE`.

    Shapes:
        input, output ``(..., D)``; ladj ``(...)``.

    Raises:
        ValueError: for an unknown update, or an order that is not a permutation.

    References:
        G. Papamakarios, T. Pavlakou, I. Murray (2017). Masked autoregressive flow for density estimation.
        arXiv:1705.07057.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import MaskedAutoregressive
        >>> x, ladj = MaskedAutoregressive(3, [16]).inverse_and_ladj(torch.randn(5, 3))
        >>> x.shape, ladj.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    fast = "inverse"

    def _push(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        y, inverse_ladj = self._sequential(x, theta)
        return y, -inverse_ladj

    def _pull(self, y: Tensor, theta: Theta, known: Known = None) -> tuple[Tensor, Tensor]:
        x, inverse_ladj = self._parallel(y, theta)
        return x, -inverse_ladj


class ConditionalInverseAutoregressive(ContextFlow):
    """Inverse autoregressive flow with a context: every layer of its MADE gets a projection of the context.

    Args:
        input_dim: D.
        context_dim: width of the context.
        **options: those of :class:`InverseAutoregressive`.

    Shapes:
        context ``(..., context_dim)``, broadcast against the batch dimensions of the input.

    References:
        D. Kingma et al. (2016). arXiv:1606.04934.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import ConditionalInverseAutoregressive
        >>> flow = ConditionalInverseAutoregressive(3, context_dim=4, hidden_dims=[16])
        >>> flow.condition(torch.randn(7, 4))(torch.randn(7, 3)).shape
        torch.Size([7, 3])
    """

    family = InverseAutoregressive
    context_options: ClassVar[Mapping[str, Any]] = {"lowest_degree": 0}


class ConditionalMaskedAutoregressive(ContextFlow):
    """Masked autoregressive flow with a context: every layer of its MADE gets a projection of the context.

    Args:
        input_dim: D.
        context_dim: width of the context.
        **options: those of :class:`MaskedAutoregressive`.

    Shapes:
        context ``(..., context_dim)``, broadcast against the batch dimensions of the input.

    References:
        G. Papamakarios, T. Pavlakou, I. Murray (2017). arXiv:1705.07057.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import ConditionalMaskedAutoregressive
        >>> flow = ConditionalMaskedAutoregressive(3, context_dim=4, hidden_dims=[16])
        >>> flow.condition(torch.randn(7, 4)).inv(torch.randn(7, 3)).shape
        torch.Size([7, 3])
    """

    family = MaskedAutoregressive
    context_options: ClassVar[Mapping[str, Any]] = {"lowest_degree": 0}


inverse_autoregressive, conditional_inverse_autoregressive = InverseAutoregressive, ConditionalInverseAutoregressive
masked_autoregressive, conditional_masked_autoregressive = MaskedAutoregressive, ConditionalMaskedAutoregressive
