"""Conditional flows: the two ways in which a context enters a family, and the classes made from them.

The conditional form of a family is one line::

    class ConditionalPlanar(AmortizedFlow, family=Planar): ...

The base class gives it a signature and a docstring in which the family's options are named and explained.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, cast

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor

from pyro_flowguides.nn import HyperNetwork
from pyro_flowguides.nn.arguments import check_count, check_widths
from pyro_flowguides.nn.precision import in_own_precision
from pyro_flowguides.transforms.docstrings import format_sections, parse_docstring
from pyro_flowguides.transforms.flow import BoundFormula, Direction, Flow, Theta

__all__ = ["AmortizedFlow", "ConditionalFlow", "ConditionedFlow", "ContextFlow"]


class ConditionalFlow(ConditionalTransformModule):
    """A family of flows indexed by a context: ``condition(context)`` is a :class:`Flow` with the context's batch shape.

    A context changes the tensors that formulas read. No formula is written twice.
    """

    input_dim: int
    context_dim: int
    #: The direction that takes one pass, or "both".
    cheap_direction: Direction = "both"

    def formulas(self, context: Tensor) -> list[BoundFormula]:
        """Return the formulas that the flow applies in order, with the tensors that they read for this context."""
        raise NotImplementedError

    @in_own_precision
    def condition(self, context: Tensor) -> Flow:
        """Return the flow for a context ``(..., context_dim)``.

        Raises:
            ValueError: if the context's last dimension is not ``context_dim``.
        """
        if context.dim() == 0 or context.shape[-1] != self.context_dim:
            raise ValueError(
                f"{type(self).__name__}: expected a context of shape (..., {self.context_dim}), "
                f"got {tuple(context.shape)}"
            )
        return ConditionedFlow(self, context)

    def forward(self, *_: object) -> Tensor:
        """Refuse a call without a context.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{type(self).__name__} is not a flow before it has a context: call condition(context) first")

    def extra_repr(self) -> str:
        return f"{self.input_dim}, context_dim={self.context_dim}"


class ConditionedFlow(Flow):
    """A conditional flow at one (batched) context; its parameters are those of the conditional flow."""

    context: Tensor

    def __init__(self, source: ConditionalFlow, context: Tensor) -> None:
        super().__init__(source.input_dim)
        self.source = source
        self.register_buffer("context", context, persistent=False)
        self.cheap_direction = source.cheap_direction

    def formulas(self) -> list[BoundFormula]:
        return self.source.formulas(self.context)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return torch.broadcast_shapes(shape, (*self.context.shape[:-1], self.input_dim))

    inverse_shape = forward_shape


def _signature(cls: type[_FamilyFlow]) -> inspect.Signature:
    """Return the signature of ``__init__`` with the family's options in place of ``**options``."""
    own = list(inspect.signature(cls.__init__).parameters.values())[1:]
    if not hasattr(cls, "family") or not own or own[-1].kind is not own[-1].VAR_KEYWORD:
        return inspect.Signature(own)
    omitted = {parameter.name for parameter in own} | {"cache_size"}  # only a conditioned flow has a cache
    options = [
        option.replace(kind=option.KEYWORD_ONLY, default=cls.family_defaults.get(option.name, option.default))
        for option in inspect.signature(cls.family).parameters.values()
        if option.name not in omitted
    ]
    return inspect.Signature([*own[:-1], *options])


def _docstring(cls: type[_FamilyFlow]) -> str:
    """Make the docstring of a conditional class from those of its family and of its base class."""
    family, module = cls.family.__name__, cls.__module__.partition(".families.")[0]
    own, inherited = parse_docstring(cls.__base__.__doc__), parse_docstring(cls.family.__doc__)
    descriptions = inherited.arguments | own.arguments
    sections = {
        "Args": "\n".join(f"{name}: {descriptions.get(name, '')}" for name in _signature(cls).parameters),
        "Shapes": "context ``(..., context_dim)``, broadcast against the batch dimensions of the input;\n"
        "input, output ``(..., D)``; ladj ``(...)``.",
        "Raises": "\n".join(
            ["ValueError: if ``input_dim`` or ``context_dim`` is below 1.", inherited.sections.get("Raises", "")]
        ).strip(),
        "References": inherited.sections.get("References", ""),
        "Example": EXAMPLE.format(name=cls.__name__, module=module),
    }
    paragraphs = [
        f"Conditional form of :class:`{family}`: {cls._context_enters}.",
        inherited.summary,
        f"The unconditional flow is :attr:`flow`. Cost: that of :class:`{family}`, and {cls._context_costs}.",
        format_sections(sections),
    ]
    return "\n\n".join(paragraphs) + "\n"


EXAMPLE = """\
>>> import torch
>>> from {module} import {name}
>>> flow = {name}(3, context_dim=4).condition(torch.randn(7, 4))
>>> flow(torch.randn(2, 7, 3)).shape
torch.Size([2, 7, 3])"""


class _FamilyFlow(ConditionalFlow):
    """An unconditional flow, and a hypernetwork that shifts the tensors of its formula by functions of the context."""

    #: The unconditional class, which holds the formula.
    family: ClassVar[type[Flow]]
    #: Defaults of the family's options that only make sense with a context.
    family_defaults: ClassVar[Mapping[str, object]] = {}
    #: How the context enters, and what that costs; for docstrings.
    _context_enters: ClassVar[str]
    _context_costs: ClassVar[str]

    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, *, family: type[Flow] | None = None, **defaults: object) -> None:
        """Make the conditional class of a family.

        Args:
            family: the unconditional class.
            **defaults: options of the family whose default is another one with a context.
        """
        super().__init_subclass__()
        if family is not None:
            cls.family, cls.family_defaults = family, defaults
            cls.__doc__ = cls.__doc__ or _docstring(cls)
        cls.__signature__ = _signature(cls)

    def __init__(self, flow: Flow, context_dim: int, hidden_dims: Sequence[int] = (), scale: float = 1.0) -> None:
        super().__init__()
        self.input_dim, self.context_dim = flow.input_dim, context_dim
        self.cheap_direction = flow.cheap_direction
        self.flow = flow
        shapes, zero = flow.context_shifts()
        self.hyper = HyperNetwork(context_dim, hidden_dims, shapes, zero, scale)

    def _build(self, input_dim: int, options: Mapping[str, object]) -> Flow:
        if not hasattr(type(self), "family"):
            raise TypeError(f"{type(self).__name__} is a base class: use a family, such as ConditionalPlanar")
        build = cast("Callable[..., Flow]", self.family)
        return build(input_dim, **{**self.family_defaults, **options})

    def theta(self, context: Tensor) -> Theta:
        """Return the tensors that the family's formula reads for this context."""
        theta = dict(self.flow.theta())
        for name, shift in self.hyper(context).items():
            theta[name] = theta[name] + shift
        return theta

    def formulas(self, context: Tensor) -> list[BoundFormula]:
        return [BoundFormula(self.flow, self.theta(context))]


class AmortizedFlow(_FamilyFlow):
    """The first way in which a context enters: all parameters of a family are a function of it.

    A hypernetwork computes shifts of the parameters. Its outputs are divided by the root of the number of features
    behind them, see :class:`~pyro_flowguides.nn.HyperNetwork`.

    Args:
        input_dim: number of coordinates, D.
        context_dim: width of the context.
        hidden_dims: widths of the hypernetwork's hidden layers; ``()`` for the linear amortization of the papers.
        **options: passed to the family.
    """

    _context_enters = "its parameters are a function of the context"
    _context_costs = "one pass of the hypernetwork for each context"

    def __init__(self, input_dim: int, context_dim: int, hidden_dims: Sequence[int] = (), **options: object) -> None:
        context_dim = check_count(type(self).__name__, "context_dim", context_dim)
        hidden_dims = check_widths(type(self).__name__, "hidden_dims", hidden_dims)
        flow = self._build(input_dim, options)
        features = hidden_dims[-1] if hidden_dims else context_dim
        # Widths below 1 are refused by the hypernetwork, with its message.
        super().__init__(flow, context_dim, hidden_dims, max(features, 1) ** -0.5)


class ContextFlow(_FamilyFlow):
    """The second way in which a context enters: every layer of a family's conditioner gets a projection of it.

    Args:
        input_dim: number of coordinates, D.
        context_dim: width of the context.
        **options: passed to the family, ``hidden_dims`` of its conditioner among them.
    """

    _context_enters = "every layer of its conditioner gets a projection of the context"
    _context_costs = "one matrix product for each context"

    def __init__(self, input_dim: int, context_dim: int, **options: object) -> None:
        context_dim = check_count(type(self).__name__, "context_dim", context_dim)
        super().__init__(self._build(input_dim, options), context_dim)
