"""Compositions: flows applied in order, as one flow."""

from collections.abc import Iterable, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from pyro_flowguides.nn.arguments import describe
from pyro_flowguides.transforms.conditional import ConditionalFlow
from pyro_flowguides.transforms.flow import BoundFormula, Direction, Flow

__all__ = ["Compose", "ConditionalCompose"]

PartT = TypeVar("PartT", bound=Flow | ConditionalFlow)


class Compose(Flow):
    r"""Flows applied in order, as one flow: :math:`f = f_n \circ \dots \circ f_1`; ladj is the sum of theirs.

    The same instance may appear several times. The parts' own caches are not used.

    Args:
        parts: flows of one ``input_dim``, at least one.

    Raises:
        ValueError: if there are no parts, or their ``input_dim`` differ.
        TypeError: if a part is conditional, or no flow of this package.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import Compose, Planar, Reverse
        >>> flow = Compose([Planar(3), Reverse(3), Planar(3)])
        >>> y, ladj = flow.forward_and_ladj(torch.randn(5, 3))
        >>> y.shape, ladj.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(self, parts: Iterable[Flow], *, cache_size: int = 1) -> None:
        parts = _listed("Compose", parts)
        for part in parts:
            if isinstance(part, ConditionalFlow):
                raise TypeError(
                    f"Compose: {type(part).__name__} needs a context: compose the parts by ConditionalCompose, or give "
                    "it one by condition(context)"
                )
        super().__init__(_shared_input_dim("Compose", parts), cache_size=cache_size)
        self.parts = nn.ModuleList(parts)
        self.cheap_direction = _shared_direction(parts)

    def formulas(self) -> list[BoundFormula]:
        return [formula for part in cast("Iterable[Flow]", self.parts) for formula in part.formulas()]

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        for part in cast("Iterable[Flow]", self.parts):
            shape = part.forward_shape(shape)
        return shape

    inverse_shape = forward_shape


class ConditionalCompose(ConditionalFlow):
    """Flows applied in order, at least one of them conditional: the conditional counterpart of :class:`Compose`.

    Args:
        parts: flows and conditional flows of one ``input_dim`` and one ``context_dim``.

    Raises:
        ValueError: if the parts do not share one ``input_dim`` and one ``context_dim``, or none is conditional.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import ConditionalCompose, ConditionalPlanar, Reverse
        >>> module = ConditionalCompose([ConditionalPlanar(3, context_dim=2), Reverse(3)])
        >>> module.condition(torch.randn(5, 2))(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """

    def __init__(self, parts: Iterable[Flow | ConditionalFlow]) -> None:
        super().__init__()
        parts = _listed("ConditionalCompose", parts)
        self.input_dim = _shared_input_dim("ConditionalCompose", parts)
        widths = {part.context_dim for part in parts if isinstance(part, ConditionalFlow)}
        if len(widths) != 1:
            hint = "" if widths else ": no part is conditional, use Compose"
            raise ValueError(f"ConditionalCompose: the parts must share one context_dim, got {sorted(widths)}{hint}")
        self.context_dim = widths.pop()
        self.parts = nn.ModuleList(parts)
        self.cheap_direction = _shared_direction(parts)

    def formulas(self, context: Tensor) -> list[BoundFormula]:
        parts = cast("Iterable[Flow | ConditionalFlow]", self.parts)
        return [
            formula
            for part in parts
            for formula in (part.formulas(context) if isinstance(part, ConditionalFlow) else part.formulas())
        ]


def _listed(owner: str, parts: Iterable[PartT]) -> list[PartT]:
    """Return the parts as a list; refuse anything but flows."""
    if isinstance(parts, str) or not isinstance(parts, Iterable):
        raise TypeError(f"{owner}: parts must be a sequence of flows, got {describe(parts)}")
    parts = list(parts)
    for part in parts:
        if not isinstance(part, Flow | ConditionalFlow):
            raise TypeError(f"{owner}: every part must be a flow of this package, got {describe(part)}")
    return parts


def _shared_input_dim(owner: str, parts: Sequence[Flow | ConditionalFlow]) -> int:
    dims = [part.input_dim for part in parts]
    if len(set(dims)) != 1:
        raise ValueError(f"{owner}: the parts must share one input_dim, got {dims or 'no parts'}")
    return dims[0]


def _shared_direction(parts: Sequence[Flow | ConditionalFlow]) -> Direction:
    """Return the direction that is cheap for all parts, and "forward" if there is none."""
    directions = {part.cheap_direction for part in parts if part.cheap_direction != "both"}
    if len(directions) == 2:
        return "forward"
    return directions.pop() if directions else "both"
