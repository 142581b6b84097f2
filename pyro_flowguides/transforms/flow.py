"""The contract of a flow: value and log-determinant in one pass, in both directions, with Pyro's interface on top."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, cast

import torch
from pyro.distributions import TransformModule
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_flowguides.nn.arguments import check_count, check_tensor
from pyro_flowguides.nn.precision import in_own_precision
from pyro_flowguides.transforms.cache import Memo, recall, remember

if TYPE_CHECKING:
    from torch.distributions.transforms import Transform

    class InverseFlow(Transform):
        """The inverse of a flow, as Pyro and torch see it."""

        @property
        def inv(self) -> Flow: ...
        def __call__(self, x: Tensor) -> Tensor: ...
        def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor: ...


__all__ = ["BoundFormula", "Direction", "Flow", "Theta", "with_path_gradient"]

#: The tensors that a formula reads besides its input, by name.
Theta: TypeAlias = Mapping[str, Tensor]
#: The directions of a flow that take one pass.
Direction: TypeAlias = Literal["both", "forward", "inverse"]


class BoundFormula(NamedTuple):
    """A formula, that of a flow, and the tensors that it reads."""

    flow: Flow
    theta: Theta

    def detached(self) -> BoundFormula:
        """Return the formula with its tensors as constants."""
        return BoundFormula(self.flow, {name: value.detach() for name, value in self.theta.items()})


class Flow(TransformModule):
    r"""A bijection of :math:`\mathbb{R}^D` that gives its value and log-determinant in one pass, in both directions.

    A family implements two formulas, ``_forward_formula`` and ``_inverse_formula``, as functions of the input and of
    the tensors returned by :meth:`theta`. Everything else is written here: shape checks, Pyro's ``__call__``, ``inv``
    and ``log_abs_det_jacobian``, the identity cache, and conditioning, which gives the formulas other tensors to read.

    The cache holds the last (x, y, ladj), so that scoring a draw costs nothing. It answers only for the same tensor
    objects, unchanged, under unchanged parameters; copying, pickling and device moves drop it. For a draw
    ``y = flow(x)``, ``flow.inv(y)`` is then ``x`` itself, as elsewhere in Pyro; :meth:`inverse_and_ladj` always
    computes.

    Under autocast, too, a flow computes in the precision of its parameters.

    Args:
        input_dim: D, at least 1.
        cache_size: 1, or 0 for no cache.

    Shapes:
        input and output ``(..., D)``, ladj ``(...)``.

    Raises:
        ValueError: if ``input_dim < 1`` or the last dimension of an input is not D.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    #: The direction that takes one pass, or "both".
    cheap_direction: Direction = "both"

    def __init__(self, input_dim: int, *, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.input_dim = check_count(type(self).__name__, "input_dim", input_dim)
        self._memo: Memo | None = None

    def theta(self) -> Theta:
        """Return the tensors that the formulas read: the flow's own parameters, unless a family derives them."""
        return cast("Theta", dict(self._parameters))

    def _forward_formula(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        """Compute y and ladj."""
        raise NotImplementedError(f"{type(self).__name__} has no formula: use a family, or implement _forward_formula")

    def _inverse_formula(self, y: Tensor, theta: Theta, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute x and ladj; if x is known (``root``), solve nothing and only give it its derivatives."""
        raise NotImplementedError(f"{type(self).__name__} has no formula: use a family, or implement _inverse_formula")

    def _score_formula(self, x: Tensor, score: Tensor, theta: Theta) -> tuple[Tensor, Tensor, Tensor]:
        """Compute y, ladj without derivatives, and the score at y, by default from the inverse at a known root."""
        y, ladj = self._forward_formula(x, theta)
        constants = BoundFormula(self, theta).detached().theta
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            origin, inverse_ladj = self._inverse_formula(leaf, constants, x.detach())
            (score,) = torch.autograd.grad((origin * score).sum() - inverse_ladj.sum(), leaf)
        return y, ladj.detach(), score

    def formulas(self) -> list[BoundFormula]:
        """Return the formulas that the flow applies in order: its own, or those of its parts."""
        return [BoundFormula(self, self.theta())]

    def context_shifts(self) -> tuple[Mapping[str, torch.Size], Collection[str]]:
        """Describe how a context enters.

        Returns:
            the shapes of the tensors of ``theta`` that a context shifts, by name; and the names of the shifts that
            start at zero.
        """
        shapes = {name: value.shape for name, value in self.theta().items()}
        return shapes, shapes.keys()

    @in_own_precision
    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``x (..., D)`` to ``y (..., D), log|det dy/dx| (...)``."""
        self._check(x)
        ladjs: list[Tensor] = []
        for flow, theta in self.formulas():
            x, ladj = flow._forward_formula(x, theta)
            ladjs.append(ladj)
        return x, _total(ladjs, x)

    @in_own_precision
    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map ``y (..., D)`` to ``x (..., D), log|det dy/dx| at x (...)``, for any y.

        Round trips are accurate to a small multiple of what rounding leaves of any map with Jacobian J at the pair
        (x, y): :math:`\varepsilon (\lVert y \rVert + \lVert J \rVert \lVert x \rVert)` in y, and
        :math:`\lVert J^{-1} \rVert` times that in x.
        """
        self._check(y)
        return _invert(self.formulas(), y)

    @in_own_precision
    def inverse_at(self, y: Tensor, x: Tensor, *, detach_parameters: bool = False) -> tuple[Tensor, Tensor]:
        """Return the x and ladj of a known pair with the derivatives of the inverse, without solving for x.

        Args:
            y: image ``(..., D)``.
            x: its origin ``(..., D)``.
            detach_parameters: treat x and ladj as functions of y only. A density made from them has the path gradient.

        Returns:
            x ``(..., D)`` and ladj ``(...)``, as :meth:`inverse_and_ladj`.
        """
        self._check(y)
        self._check(x)
        formulas = self.formulas()
        if detach_parameters:
            formulas = [formula.detached() for formula in formulas]
        return _invert(formulas, y, _inputs(formulas, x))

    @in_own_precision
    def forward_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return what the path gradient of a density needs: y, ladj, and the score of the density that x becomes.

        .. math::
            \log q(y) = \log p(f^{-1}(y)) - \log|\det J|, \qquad
            \nabla_y \log q = J^{-\top} \big(\nabla_x \log p - \nabla_x \log|\det J|\big)

        A draw :math:`y = f_\phi(x)` depends on the parameters twice in :math:`\log q_\phi(y)`, through the draw and
        through the density. The score gives the first part alone, the path gradient
        :math:`\nabla_y \log q \cdot \partial y / \partial \phi`, which is unbiased and vanishes where q is the target
        (:func:`with_path_gradient` makes it the derivative of a number).

        Cost: one forward pass and the derivatives of one inverse pass; nothing is solved, since x is known.

        Args:
            x: draws ``(..., D)``.
            score: :math:`\nabla_x \log p` at them, the same shape, a constant.

        Returns:
            y ``(..., D)`` with derivatives; ladj ``(...)`` and score ``(..., D)`` without.

        References:
            G. Roeder, Y. Wu, D. Duvenaud (2017). Sticking the landing. arXiv:1703.09194.
            L. Vaitl, K. Nicoli, S. Nakajima, P. Kessel (2022). Gradients should stay on path. arXiv:2207.08219.
        """
        self._check(x)
        self._check(score)
        score = score.detach()
        ladjs: list[Tensor] = []
        for flow, theta in self.formulas():
            x, ladj, score = flow._score_formula(x, score, theta)
            ladjs.append(ladj)
        return x, _total(ladjs, x), score

    def _check(self, value: Tensor) -> None:
        if value.dim() == 0 or value.shape[-1] != self.input_dim:
            raise ValueError(
                f"{type(self).__name__}: expected a tensor of shape (..., {self.input_dim}), got {tuple(value.shape)}"
            )

    if TYPE_CHECKING:

        @property
        def inv(self) -> InverseFlow: ...

    def __call__(self, x: Tensor) -> Tensor:
        return self._call(x)

    def _call(self, x: Tensor) -> Tensor:
        y, ladj = self.forward_and_ladj(x)
        self._remember(x, y, ladj)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        memo = recall(self, self._memo)
        if memo is not None and memo.y is y:
            return memo.x
        return self._inverse(y)

    def _inverse(self, y: Tensor) -> Tensor:
        x, ladj = self.inverse_and_ladj(y)
        self._remember(x, y, ladj)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log|det dy/dx| at a pair, from the cache or by the cheap direction."""
        memo = recall(self, self._memo)
        if memo is not None and memo.x is x and memo.y is y:
            return memo.ladj
        return self.inverse_and_ladj(y)[1] if self.cheap_direction == "inverse" else self.forward_and_ladj(x)[1]

    def with_cache(self, cache_size: int = 1) -> Flow:
        """Return this flow, with the same parameters and the given cache size."""
        if cache_size == self._cache_size:
            return self
        if cache_size not in (0, 1):
            raise ValueError(f"{type(self).__name__}: cache_size must be 0 or 1, got {cache_size}")
        other = copy.copy(self)
        other._cache_size = cache_size
        return other

    @property
    def sign(self) -> int:
        """Not defined for a map of several coordinates."""
        raise AttributeError(f"{type(self).__name__} has no sign: it maps several coordinates together")

    def _remember(self, x: Tensor, y: Tensor, ladj: Tensor) -> None:
        self._memo = None
        if self._cache_size:
            self._memo = remember(self, x, y, ladj)

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_memo": None, "_inv": None}  # a copy makes an inverse object of its own

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Flow:
        self._memo = None
        return super()._apply(fn, recurse)

    __repr__ = nn.Module.__repr__

    def extra_repr(self) -> str:
        return f"{self.input_dim}"


def with_path_gradient(log_prob: Tensor, y: Tensor, score: Tensor) -> Tensor:
    """Give a log density the path gradient: the derivatives of its draws alone.

    Args:
        log_prob: values of the log density ``(...)``; their own derivatives are dropped.
        y: the draws ``(..., D)``.
        score: the gradient of the log density at the draws ``(..., D)``.

    Returns:
        the same values ``(...)``, whose derivative with respect to y is the score.
    """
    for name, value in (("log_prob", log_prob), ("y", y), ("score", score)):
        check_tensor("with_path_gradient", name, value)
    if score.shape != y.shape or log_prob.shape != y.shape[:-1]:
        raise ValueError(
            "with_path_gradient: expected log_prob (...), y (..., D) and score (..., D), got "
            f"{tuple(log_prob.shape)}, {tuple(y.shape)} and {tuple(score.shape)}"
        )
    return log_prob.detach() + (score * (y - y.detach())).sum(-1)


def _inputs(formulas: Sequence[BoundFormula], x: Tensor) -> list[Tensor]:
    """Return the input of every formula, if x is that of the first."""
    inputs = [x.detach()]
    with torch.no_grad():
        for flow, theta in formulas[:-1]:
            inputs.append(flow._forward_formula(inputs[-1], theta)[0])
    return inputs


def _invert(
    formulas: Sequence[BoundFormula], y: Tensor, roots: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Apply the inverse formulas from the last to the first, at their roots if these are known."""
    ladjs: list[Tensor] = []
    for place, (flow, theta) in reversed(list(enumerate(formulas))):
        y, ladj = flow._inverse_formula(y, theta, None if roots is None else roots[place])
        ladjs.append(ladj)
    return y, _total(ladjs, y)


def _total(ladjs: Sequence[Tensor], value: Tensor) -> Tensor:
    """Add log-determinants; give the sum the batch shape of the value."""
    return functools.reduce(operator.add, ladjs).expand(value.shape[:-1])
