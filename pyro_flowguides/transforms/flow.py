"""What every flow shares: value and log-determinant in one pass, Pyro's interface on top, how context enters."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from pyro.distributions import TransformModule
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn
from torch.distributions import constraints
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyro_flowguides.nn import MLP, HyperNetwork
from pyro_flowguides.nn.precision import at_least_float32_outside_autocast, in_own_precision
from pyro_flowguides.transforms.solvers import tracing

__all__ = ["AmortizedFlow", "Compose", "ConditionalCompose", "ConditionalFlow", "ContextFlow", "Flow", "on_path"]

#: What a formula reads besides its input: tensors by name, or a list of such for a composition.
Theta: TypeAlias = Any
#: The input of a flow where it is known: a tensor, or a list of such for a composition.
Known: TypeAlias = Any

_optimizer_steps = 0


def _count_optimizer_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Some optimizers (torch's fused ones, Pyro's ClippedAdam) change parameters without raising their version.
register_optimizer_step_post_hook(_count_optimizer_step)


class _Memo(NamedTuple):
    """The last pair of a flow, and the state of everything it was computed from."""

    x: Tensor
    y: Tensor
    ladj: Tensor
    state: tuple[Any, ...]
    graph: bool


def _detached(theta: Theta) -> Theta:
    if isinstance(theta, Tensor):
        return theta.detach()
    if isinstance(theta, Mapping):
        return {name: value.detach() for name, value in theta.items()}
    return [_detached(part) for part in theta]


def _version(tensor: Tensor) -> tuple[int, int, int]:
    return id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def push_score(flow: Any, x: Tensor, score: Tensor, theta: Theta) -> tuple[Tensor, Tensor, Tensor]:
    """:meth:`Flow.forward_and_score` of any formula, from the derivatives of its inverse."""
    y, ladj, known = flow._push_known(x, theta)
    with torch.enable_grad():
        image = y.detach().requires_grad_()
        origin, pulled = flow._pull(image, _detached(theta), known)
        (score,) = torch.autograd.grad((origin * score).sum() - pulled.sum(), image)
    return y, ladj.detach(), score


def on_path(log_prob: Tensor, y: Tensor, score: Tensor) -> Tensor:
    """A known log density ``(...)`` at draws y ``(..., D)``, with the path gradient: that of ``score`` along y."""
    return log_prob.detach() + (score * (y - y.detach())).sum(-1)


class Flow(TransformModule):
    r"""A bijection of :math:`\mathbb{R}^D` that gives its value and log-determinant in one pass, in both directions.

    A family implements two formulas, :meth:`_push` and :meth:`_pull`, as functions of the input and of ``theta``,
    the tensors returned by :meth:`theta`. That is all: shape checks, Pyro's ``__call__``, ``inv`` and
    ``log_abs_det_jacobian``, the identity cache and conditioning are written here once.

    The cache holds the last (x, y, ladj) so that scoring a draw costs nothing; it answers only for the very same tensor
    objects, unchanged, under unchanged parameters, and is dropped by copying, pickling and device moves.
    ``flow.inv(y)`` of a draw ``y = flow(x)`` is then ``x`` itself, as elsewhere in Pyro; :meth:`inverse_and_ladj`
    always computes.

    Under autocast a flow computes in the precision of its parameters all the same.

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
    #: The direction that takes one pass: "both", or the only one that does.
    fast: Literal["both", "forward", "inverse"] = "both"

    def __init__(self, input_dim: int, *, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        if input_dim < 1:
            raise ValueError(f"{type(self).__name__}: input_dim must be at least 1, got {input_dim}")
        self.input_dim = input_dim
        self._memo: _Memo | None = None

    # -- what a family implements --------------------------------------------------------------------------------------

    def theta(self) -> Theta:
        """The tensors the formulas read: the flow's own parameters, unless a family derives them."""
        return dict(self._parameters)

    def _push(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _pull(self, y: Tensor, theta: Theta, known: Known = None) -> tuple[Tensor, Tensor]:
        """The inverse; where the x to return is ``known``, nothing is solved and only derivatives are attached."""
        raise NotImplementedError

    def _push_known(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor, Known]:
        """:meth:`_push`, and what :meth:`_pull` needs to know."""
        return *self._push(x, theta), x.detach()

    def _push_score(self, x: Tensor, score: Tensor, theta: Theta) -> tuple[Tensor, Tensor, Tensor]:
        """y, ladj without derivatives, and the score at y."""
        return push_score(self, x, score, theta)

    # -- value and log-determinant -------------------------------------------------------------------------------------

    @in_own_precision
    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x (..., D) -> y (..., D), log|det dy/dx| (...)``."""
        self._check(x)
        y, ladj = self._push(x, self.theta())
        return y, ladj.expand(y.shape[:-1])

    @in_own_precision
    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        r"""``y (..., D) -> x (..., D), log|det dy/dx| at x (...)``, for any y.

        Both round trips hold to a small multiple of what rounding leaves of any map with Jacobian J at the pair (x, y):
        :math:`\varepsilon (\lVert y \rVert + \lVert J \rVert \lVert x \rVert)` in y, and :math:`\lVert J^{-1} \rVert`
        times that in x.
        """
        self._check(y)
        x, ladj = self._pull(y, self.theta())
        return x, ladj.expand(x.shape[:-1])

    @in_own_precision
    def forward_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""What the path gradient of a density needs: y, ladj, and the score of the density that x becomes.

        .. math::
            \log q(y) = \log p(f^{-1}(y)) - \log|\det J|, \qquad
            \nabla_y \log q = J^{-\top} \big(\nabla_x \log p - \nabla_x \log|\det J|\big)

        A draw :math:`y = f_\phi(x)` depends on the parameters twice in :math:`\log q_\phi(y)`, through the draw and
        through the density. The score gives the first part alone, the path gradient
        :math:`\nabla_y \log q \cdot \partial y / \partial \phi`, which is unbiased and vanishes where q is the target
        (:func:`on_path` makes it the derivative of a number).

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
        y, ladj, score = self._push_score(x, score.detach(), self.theta())
        return y, ladj.expand(y.shape[:-1]), score

    @in_own_precision
    def inverse_on_path(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """x and ladj of a known pair as functions of y only: the density made from them has the path gradient."""
        return self._inverse_known(y, x, _detached(self.theta()))

    @in_own_precision
    def inverse_at(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`inverse_and_ladj` of a known pair: the same derivatives, nothing being solved."""
        return self._inverse_known(y, x, self.theta())

    def _inverse_known(self, y: Tensor, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        self._check(y)
        with torch.no_grad():
            known = self._push_known(x, theta)[2]
        x, ladj = self._pull(y, theta, known)
        return x, ladj.expand(y.shape[:-1])

    def _check(self, value: Tensor) -> None:
        if value.dim() == 0 or value.shape[-1] != self.input_dim:
            raise ValueError(
                f"{type(self).__name__}: expected a tensor of shape (..., {self.input_dim}), got {tuple(value.shape)}"
            )

    # -- Pyro's interface ----------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor) -> Tensor:
        return self._call(x)

    def _call(self, x: Tensor) -> Tensor:
        y, ladj = self.forward_and_ladj(x)
        self._remember(x, y, ladj)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        memo = self._recall()
        if memo is not None and memo.y is y:
            return memo.x
        return self._inverse(y)

    def _inverse(self, y: Tensor) -> Tensor:
        x, ladj = self.inverse_and_ladj(y)
        self._remember(x, y, ladj)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det dy/dx| at a pair, from the cache or by the direction that is fast."""
        memo = self._recall()
        if memo is not None and memo.x is x and memo.y is y:
            return memo.ladj
        return self.inverse_and_ladj(y)[1] if self.fast == "inverse" else self.forward_and_ladj(x)[1]

    def with_cache(self, cache_size: int = 1) -> Flow:
        """This flow with the same parameters and the given cache size."""
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

    # -- the cache -----------------------------------------------------------------------------------------------------

    def _remember(self, x: Tensor, y: Tensor, ladj: Tensor) -> None:
        self._memo = None
        if self._cache_size and not tracing(x):
            self._memo = _Memo(x, y, ladj, self._state(x, y), torch.is_grad_enabled())

    def _recall(self) -> _Memo | None:
        memo = self._memo
        if memo is None or tracing(memo.x) or memo.state != self._state(memo.x, memo.y):
            return None
        # A pair computed under no_grad would cut the graph of whoever scores it with gradients.
        if not memo.graph and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self._read()):
            return None
        return memo

    def _read(self) -> Iterable[Tensor]:
        """Everything besides its input that a call reads."""
        for module in self.modules():
            yield from (tensor for tensor in module._parameters.values() if tensor is not None)
            yield from (tensor for tensor in module._buffers.values() if tensor is not None)

    def _state(self, *tensors: Tensor) -> tuple[Any, ...]:
        return _optimizer_steps, *(_version(tensor) for tensor in (*tensors, *self._read()))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_memo": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Flow:
        self._memo = None
        return super()._apply(fn, recurse)

    __repr__ = nn.Module.__repr__

    def extra_repr(self) -> str:
        return f"{self.input_dim}"

    # -- how a context may change the formula --------------------------------------------------------------------------

    def amortized(self) -> tuple[Mapping[str, torch.Size], Collection[str]]:
        """Which tensors of ``theta`` a context shifts, by name with their shapes; and which shifts start at zero."""
        shapes = {name: value.shape for name, value in self.theta().items()}
        return shapes, shapes.keys()


class ConditionalFlow(ConditionalTransformModule):
    """A family of flows indexed by a context: ``condition(context)`` is a :class:`Flow` with the context's batch shape.

    ``theta(context)`` gives the formula of the unconditional family other tensors to read; no formula is written twice.
    """

    input_dim: int
    context_dim: int

    def theta(self, context: Tensor) -> Theta:
        raise NotImplementedError

    def _push(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _pull(self, y: Tensor, theta: Theta, known: Known = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _push_known(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor, Known]:
        return *self._push(x, theta), x.detach()

    def _push_score(self, x: Tensor, score: Tensor, theta: Theta) -> tuple[Tensor, Tensor, Tensor]:
        return push_score(self, x, score, theta)

    @property
    def fast(self) -> str:
        raise NotImplementedError

    def condition(self, context: Tensor) -> Flow:
        """The flow for this context, ``(..., context_dim)``.

        Raises:
            ValueError: if the context's last dimension is not ``context_dim``.
        """
        if context.dim() == 0 or context.shape[-1] != self.context_dim:
            raise ValueError(
                f"{type(self).__name__}: expected a context of shape (..., {self.context_dim}), "
                f"got {tuple(context.shape)}"
            )
        return _Conditioned(self, at_least_float32_outside_autocast(context))

    def extra_repr(self) -> str:
        return f"{self.input_dim}, context_dim={self.context_dim}"


class _Conditioned(Flow):
    """A conditional flow at one (batched) context; its parameters are those of the conditional flow."""

    context: Tensor

    def __init__(self, source: ConditionalFlow, context: Tensor) -> None:
        super().__init__(source.input_dim)
        self.source = source
        self.register_buffer("context", context, persistent=False)
        self.fast = source.fast  # type: ignore[assignment]

    def theta(self) -> Theta:
        return self.source.theta(self.context)

    def _push(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        return self.source._push(x, theta)

    def _pull(self, y: Tensor, theta: Theta, known: Known = None) -> tuple[Tensor, Tensor]:
        return self.source._pull(y, theta, known)

    def _push_known(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor, Known]:
        return self.source._push_known(x, theta)

    def _push_score(self, x: Tensor, score: Tensor, theta: Theta) -> tuple[Tensor, Tensor, Tensor]:
        return self.source._push_score(x, score, theta)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return torch.broadcast_shapes(shape, (*self.context.shape[:-1], self.input_dim))

    inverse_shape = forward_shape


class _FamilyFlow(ConditionalFlow):
    """A conditional flow made from an unconditional one and a hypernetwork that shifts what its formula reads."""

    family: ClassVar[type[Flow]]
    flow: Flow
    hyper: HyperNetwork

    def _assemble(self, flow: Flow, context_dim: int, hidden_dims: Sequence[int], scale: float = 1.0) -> None:
        self.input_dim, self.context_dim = flow.input_dim, context_dim
        self.flow = flow
        shapes, zero = flow.amortized()
        self.hyper = HyperNetwork(context_dim, hidden_dims, shapes, zero, scale)

    def theta(self, context: Tensor) -> Theta:
        theta = dict(self.flow.theta())
        for name, shift in self.hyper(context).items():
            theta[name] = theta[name] + shift
        return theta

    def _push(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        return self.flow._push(x, theta)

    def _pull(self, y: Tensor, theta: Theta, known: Known = None) -> tuple[Tensor, Tensor]:
        return self.flow._pull(y, theta, known)

    def _push_score(self, x: Tensor, score: Tensor, theta: Theta) -> tuple[Tensor, Tensor, Tensor]:
        return self.flow._push_score(x, score, theta)

    @property
    def fast(self) -> str:
        return self.flow.fast


class AmortizedFlow(_FamilyFlow):
    """The first way in which context enters: all parameters of a family are a function of it.

    The hypernetwork's outputs are divided by the root of the number of features behind them, see
    :class:`~pyro_flowguides.nn.HyperNetwork`.

    Args:
        input_dim: D.
        context_dim: width of the context.
        hidden_dims: hidden layers of the hypernetwork; ``()`` for the linear amortization of the papers.
        **options: passed to the family.
    """

    def __init__(self, input_dim: int, context_dim: int, hidden_dims: Sequence[int] = (), **options: Any) -> None:
        super().__init__()
        features = hidden_dims[-1] if hidden_dims else context_dim
        # The hypernetwork refuses a width below 1, with its message.
        self._assemble(self.family(input_dim, **options), context_dim, hidden_dims, max(features, 1) ** -0.5)


class ContextFlow(_FamilyFlow):
    """The second way in which context enters: every layer of a family's conditioner gets a projection of it.

    Args:
        input_dim: D.
        context_dim: width of the context.
        **options: passed to the family, ``hidden_dims`` of its conditioner among them.
    """

    #: Options of the family that only a context makes useful.
    context_options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, input_dim: int, context_dim: int, **options: Any) -> None:
        super().__init__()
        self._assemble(self.family(input_dim, **{**self.context_options, **options}), context_dim, ())


class ConditionerFlow(Flow):
    """A flow whose parameters are computed from part of its input by a network, ``self.conditioner``."""

    conditioner: MLP

    def theta(self) -> Theta:
        return self.conditioner.fold()

    def amortized(self) -> tuple[Mapping[str, torch.Size], Collection[str]]:
        depth = self.conditioner.depth
        shapes = {f"bias{layer}": self.conditioner.biases[layer].shape for layer in range(depth)}
        return shapes, [f"bias{depth - 1}"]


class _Chain:
    """The formulas of several flows run one after the other, their log-determinants added."""

    parts: nn.ModuleList

    def _flows(self) -> list[Any]:
        return list(self.parts)

    def _push_known(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor, Known]:
        total, known = x.new_zeros(()), []
        for part, part_theta in zip(self._flows(), theta, strict=True):
            x, ladj, part_known = part._push_known(x, part_theta)
            total = total + ladj
            known.append(part_known)
        return x, total, known

    def _push(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        y, ladj, _ = self._push_known(x, theta)
        return y, ladj

    def _push_score(self, x: Tensor, score: Tensor, theta: Theta) -> tuple[Tensor, Tensor, Tensor]:
        total = x.new_zeros(())
        for part, part_theta in zip(self._flows(), theta, strict=True):
            x, ladj, score = part._push_score(x, score, part_theta)
            total = total + ladj
        return x, total, score

    def _pull(self, y: Tensor, theta: Theta, known: Known = None) -> tuple[Tensor, Tensor]:
        flows = self._flows()
        total = y.new_zeros(())
        for part, part_theta, part_known in zip(
            reversed(flows), reversed(theta), reversed(known or [None] * len(flows)), strict=True
        ):
            y, ladj = part._pull(y, part_theta, part_known)
            total = total + ladj
        return y, total


def _common_dim(name: str, parts: Sequence[Any]) -> int:
    dims = [part.input_dim for part in parts]
    if len(set(dims)) != 1:
        raise ValueError(f"{name}: the parts must share one input_dim, got {dims or 'no parts'}")
    return dims[0]


def _common_direction(parts: Iterable[Any]) -> Any:
    directions = {part.fast for part in parts} - {"both"}
    return directions.pop() if len(directions) == 1 else "both" if not directions else "forward"


class Compose(_Chain, Flow):
    r"""Flows applied in order, as one flow: :math:`f = f_n \circ \dots \circ f_1`, ladj the sum of theirs.

    The same instance may stand at several places. A part's own cache is not used.

    Args:
        parts: flows of one ``input_dim``.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import Compose, Planar, Reverse
        >>> flow = Compose([Planar(3), Reverse(3), Planar(3)])
        >>> y, ladj = flow.forward_and_ladj(torch.randn(5, 3))
        >>> y.shape, ladj.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(self, parts: Iterable[Flow], *, cache_size: int = 1) -> None:
        parts = list(parts)
        super().__init__(_common_dim("Compose", parts), cache_size=cache_size)
        self.parts = nn.ModuleList(parts)
        self.fast = _common_direction(parts)

    def theta(self) -> Theta:
        return [part.theta() for part in self._flows()]

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        for part in self._flows():
            shape = part.forward_shape(shape)
        return shape

    inverse_shape = forward_shape


class ConditionalCompose(_Chain, ConditionalFlow):
    """Flows applied in order, at least one of them conditional: the conditional counterpart of :class:`Compose`.

    Args:
        parts: flows and conditional flows of one ``input_dim`` and one ``context_dim``.
    """

    def __init__(self, parts: Iterable[Flow | ConditionalFlow]) -> None:
        super().__init__()
        parts = list(parts)
        self.input_dim = _common_dim("ConditionalCompose", parts)
        widths = {part.context_dim for part in parts if isinstance(part, ConditionalFlow)}
        if len(widths) != 1:
            raise ValueError(f"ConditionalCompose: the parts must share one context_dim, got {sorted(widths)}")
        self.context_dim = widths.pop()
        self.parts = nn.ModuleList(parts)

    @property
    def fast(self) -> str:
        return _common_direction(self.parts)

    def theta(self, context: Tensor) -> Theta:
        return [part.theta(context) if isinstance(part, ConditionalFlow) else part.theta() for part in self._flows()]
