"""Autoregressive flows: inverse autoregressive (IAF) and masked autoregressive (MAF)."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_flowguides.nn import MADE
from pyro_flowguides.nn.arguments import check_one_of
from pyro_flowguides.transforms.conditional import ContextFlow
from pyro_flowguides.transforms.conditioner import ConditionerFlow
from pyro_flowguides.transforms.flow import Theta
from pyro_flowguides.transforms.solvers import implicit_root, with_implicit_gradient
from pyro_flowguides.transforms.tracing import in_dispatch_mode, is_tracing
from pyro_flowguides.transforms.updates import UPDATES, Limits, invert_affine

__all__ = [
    "ConditionalInverseAutoregressive",
    "ConditionalMaskedAutoregressive",
    "InverseAutoregressive",
    "MaskedAutoregressive",
]

#: Most numbers in a block for which iterating is faster than solving level by level, on one core.
MAX_ITERATED = 4096
#: Most passes that refine a substitution. Ordinary weights take two; all are taken only where the round trip is lost by
#: far.
MAX_REFINEMENTS = 12


class _Linearization(NamedTuple):
    """Constants at a pair: scale, log-determinant, and the derivatives of image and log-determinant.

    Both derivatives are with respect to the output of the conditioner.
    """

    scale: Tensor
    ladj: Tensor
    image_by_output: Tensor
    ladj_by_output: Tensor


class _Autoregressive(ConditionerFlow):
    r"""The map :math:`w_i = e^{a_i} z_i + m_i`, where :math:`(a_i, m_i)` is a function of earlier coordinates of z.

    :meth:`_parallel` evaluates it in one pass; :meth:`_sequential` solves it for z. IAF draws in the parallel
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
        check_one_of(type(self).__name__, "update", update, sorted(UPDATES))
        self.update = update
        self.conditioner: MADE = MADE(
            input_dim, hidden_dims, 2, order=order, lowest_degree=lowest_degree, activation=activation
        )

    def affine_map(self, z: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        """Compute log-scale and shift of each coordinate."""
        # TorchScript has a wrong derivative of a chunk of which one half is unused, but no derivative of a split.
        raw, shift = self.conditioner.run(z, theta).split(self.input_dim, -1)
        return UPDATES[self.update](raw, shift, self.limits(theta))

    def limits(self, theta: Theta) -> Limits:
        """Return the limits of the log-scale: IAF draws by multiplying by the scale, MAF by dividing by it."""
        return UPDATES[self.update].limits(theta["gain"], stretches_draws=self.cheap_direction == "forward")

    def _parallel(self, z: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.affine_map(z, theta)
        return z * log_scale.exp() + shift, log_scale.sum(-1)

    def _sequential(self, w: Tensor, theta: Theta, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if root is None and is_tracing(w):  # the derivatives are those of every step
            z = self._substitute(w, theta)
            return z, self.affine_map(z, theta)[0].sum(-1)
        if root is None and in_dispatch_mode():  # recorded steps must not depend on values
            with torch.no_grad():
                root = self._substitute(w, theta)
        elif root is None:
            root, ladj = self._solve(w, theta)
            if not torch.is_grad_enabled():
                return root, ladj
        elif not is_tracing(w) and not any(tensor.requires_grad for tensor in theta.values()):
            return self._at_root(w, root, theta)
        z = implicit_root(partial(self.affine_map, theta=theta), w, root, partial(self._solve_at, theta=theta))
        return z, self.affine_map(z, theta)[0].sum(-1)

    def _substitute(self, w: Tensor, theta: Theta) -> Tensor:
        return self.conditioner.substitute(self._inverse_update(theta), [w], theta)

    @torch.no_grad()
    def _solve(self, w: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        """Return the root and its log-determinant, by substitution and some passes that refine it.

        A substitution sums in an order of its own. A pass rounds as :meth:`_parallel` does, and so undoes the rounding
        of that direction. There are two passes, and more as long as they move the points, taken together, by more than
        rounding. A point whose last pass moves it no less than the first stays as the substitution left it: at such
        large weights passes move away from the root.
        """
        # On a GPU the number of operations counts, not their size.
        max_iterated = sys.maxsize if w.is_cuda else MAX_ITERATED
        z = self.conditioner.substitute_in_blocks(self._inverse_update(theta), [w], theta, max_iterated=max_iterated)
        moves, log_scales, points = [], [], [z]
        rounding = torch.finfo(z.dtype).eps * z.norm()
        for _ in range(MAX_REFINEMENTS):
            log_scale, shift = self.affine_map(points[-1], theta)
            log_scales.append(log_scale)
            points.append(invert_affine(log_scale, shift, w))
            moves.append((points[-1] - points[-2]).norm(dim=-1))
            if len(moves) > 1 and not moves[-1].norm() > rounding:
                break
        nearer = moves[-1] < moves[0]  # false if there is an infinity on the way
        if bool(nearer.all()):
            return points[-1], log_scales[-1].sum(-1)
        nearer = nearer[..., None]
        return torch.where(nearer, points[-1], z), torch.where(nearer, log_scales[-1], log_scales[0]).sum(-1)

    def _inverse_update(self, theta: Theta) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return the function from the two outputs of some coordinates and their w to their z."""
        update, limits = UPDATES[self.update], self.limits(theta)

        def solve(raw: Tensor, shift: Tensor, w: Tensor) -> Tensor:
            return invert_affine(*update(raw, shift, limits), w)

        return solve

    def _solve_at(self, z: Tensor, v: Tensor, theta: Theta) -> Tensor:
        output, hidden = self.conditioner.run_with_hidden(z, theta)
        return self._solve_transposed(v, self._linearize(z, output, theta), hidden, theta)

    def _at_root(self, w: Tensor, z: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        """Return the root and its log-determinant as functions of w only."""
        output, hidden = self.conditioner.run_with_hidden(z, theta)
        linear = self._linearize(z, output, theta)

        def pull_back(_: Sequence[Tensor], by_z: Tensor, by_ladj: Tensor) -> Tensor:
            v = by_z + by_ladj[..., None] * self._ladj_by_z(linear, hidden, theta)
            return self._solve_transposed(v, linear, hidden, theta)

        z, ladj = with_implicit_gradient(pull_back, w, z, linear.ladj)
        return z, ladj

    def _linearize(self, z: Tensor, output: Tensor, theta: Theta) -> _Linearization:
        with torch.enable_grad():
            output = output.detach().requires_grad_()
            raw, shift = output.chunk(2, -1)
            log_scale, shift = UPDATES[self.update](raw, shift, self.limits(theta))
            ladj = log_scale.sum(-1)
            (image,) = torch.autograd.grad((z.detach() * log_scale.exp() + shift).sum(), output, retain_graph=True)
            (by_ladj,) = torch.autograd.grad(ladj.sum(), output)
        return _Linearization(log_scale.detach().exp(), ladj.detach(), image, by_ladj)

    @torch.no_grad()
    def _ladj_by_z(self, linear: _Linearization, hidden: list[Tensor], theta: Theta) -> Tensor:
        rows = linear.ladj_by_output @ theta[f"weight{self.conditioner.depth - 1}"]
        return self.conditioner.pull_back(rows[..., None, :], hidden, theta)[..., 0, :]

    @torch.no_grad()
    def _solve_transposed(self, v: Tensor, linear: _Linearization, hidden: list[Tensor], theta: Theta) -> Tensor:
        r"""Solve :math:`J^\top u = v` for the Jacobian J of the map."""
        coefficients = [part / linear.scale for part in linear.image_by_output.chunk(2, -1)]
        return self.conditioner.solve_transposed(v, coefficients, hidden, theta) / linear.scale

    def extra_repr(self) -> str:
        return f"{self.input_dim}, update={self.update!r}"


class InverseAutoregressive(_Autoregressive):
    r"""Inverse autoregressive flow (IAF): fast to draw from, for variational posteriors.

    With :math:`(a_i, m_i)` computed by a MADE from the *inputs* :math:`x_{<i}`:

    .. math::
        \text{affine:}\quad y_i = e^{a_i} x_i + \delta(m_i), \quad a_i = b_i \tanh(s_i / b_i); \qquad
        \text{gated:}\quad y_i = \frac{\sigma_i}{\operatorname{sigmoid}(2)} x_i + (1 - \sigma_i) m_i, \quad
        \sigma_i = \operatorname{sigmoid}(4 \tanh(s_i / 4) + 2); \qquad
        \log|\det J| = \sum_i a_i \ \text{or}\ \sum_i \log \frac{\sigma_i}{\operatorname{sigmoid}(2)}

    The bound :math:`b_i` is 2 for negative :math:`s_i` and 2γ for positive, with the gain γ of the network. At a small
    gain, δ damps large shifts; else it is the identity. Both keep training stable
    (:mod:`~pyro_flowguides.transforms.updates`).

    The gate is the paper's with bias 2. It is normalized so that the flow starts at the identity (the plain gate
    shrinks its input by sigmoid(2) = 0.88 per step), and bounded like the affine scale: both stay above :math:`e^{-2}`,
    so that the flow is invertible at any weights. With D = 1 the network reads no input and the flow is one affine map.

    Cost: forward, one network pass; inverse, the arithmetic of half a pass in many small steps
    (:meth:`~pyro_flowguides.nn.MADE.substitute`) and two passes, more at large weights. Starts at the identity.

    Args:
        input_dim: number of coordinates, D.
        hidden_dims: hidden widths of the MADE; they may be below D.
        order: a permutation of ``range(D)``, listing the coordinates from first to last (default: natural order).
        update: "affine", "gated", or "shift" (:math:`y_i = x_i + \delta(m_i)`, volume preserving).
        activation: elementwise nonlinearity of the MADE.
        lowest_degree: lowest degree of a hidden unit, see :class:`~pyro_flowguides.nn.MADE`.

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

    cheap_direction = "forward"

    def _forward_formula(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        return self._parallel(x, theta)

    def _inverse_formula(self, y: Tensor, theta: Theta, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._sequential(y, theta, root)

    def _score_formula(self, x: Tensor, score: Tensor, theta: Theta) -> tuple[Tensor, Tensor, Tensor]:
        output, hidden = self.conditioner.run_with_hidden(x, theta)
        raw, shift = output.chunk(2, -1)
        log_scale, shift = UPDATES[self.update](raw, shift, self.limits(theta))
        linear = self._linearize(x, output, theta)
        score = self._solve_transposed(score - self._ladj_by_z(linear, hidden, theta), linear, hidden, theta)
        return x * log_scale.exp() + shift, linear.ladj, score


class MaskedAutoregressive(_Autoregressive):
    r"""Masked autoregressive flow (MAF): fast to score, for densities and learned priors.

    The parameters are computed from the *outputs* :math:`y_{<i}`; in the direction that takes one pass,

    .. math:: x_i = e^{a_i} y_i + \delta(m_i), \qquad \log|\det \partial y / \partial x| = -\sum_i a_i

    which is the paper's :math:`y_i = x_i e^{\alpha_i} + \mu_i` with :math:`\alpha_i = -a_i` and
    :math:`\mu_i = -e^{-a_i} \delta(m_i)`. Log-scale and :math:`\delta` are those
    of :class:`InverseAutoregressive`, but the bound is 2γ for negative :math:`s_i`, which stretch draws. With D = 1 the
    flow is one affine map.

    Cost: inverse, one network pass; forward, the arithmetic of half a pass in many small steps
    (:meth:`~pyro_flowguides.nn.MADE.substitute`) and two passes, more at large weights. Starts at the identity.

    Args:
        input_dim: number of coordinates, D.
        hidden_dims: hidden widths of the MADE; they may be below D.
        order: a permutation of ``range(D)``, listing the coordinates from first to last (default: natural order).
        update: "affine", "gated" or "shift", see :class:`InverseAutoregressive`.
        activation: elementwise nonlinearity of the MADE.
        lowest_degree: lowest degree of a hidden unit, see :class:`~pyro_flowguides.nn.MADE`.

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

    cheap_direction = "inverse"

    def _forward_formula(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        y, inverse_ladj = self._sequential(x, theta)
        return y, -inverse_ladj

    def _inverse_formula(self, y: Tensor, theta: Theta, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, inverse_ladj = self._parallel(y, theta)
        return x, -inverse_ladj


class ConditionalInverseAutoregressive(ContextFlow, family=InverseAutoregressive, lowest_degree=0): ...


class ConditionalMaskedAutoregressive(ContextFlow, family=MaskedAutoregressive, lowest_degree=0): ...
