"""Forward and back substitution through a masked network: its inputs are solved for in their order, in blocks.

Inputs are counted in that order here, hidden units are sorted by their degrees, and the outputs of an input stand side
by side. Whatever belongs to some successive inputs is then a slice: of the inputs, of the units in every layer that
they are the first to read, and of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["Block", "Forward", "Place", "Pull", "group", "split_levels"]

#: From the outputs of some inputs, one tensor per output, and what is given for these inputs, to the inputs.
Place: TypeAlias = Callable[..., Tensor]


class Block(NamedTuple):
    """Successive inputs, and of every hidden layer the units that they are the first to read.

    The inputs of one level read the same units, those of the next some more.
    """

    inputs: slice
    units: list[slice]
    levels: int = 1


def split_levels(dim: int, hidden: Sequence[Tensor]) -> list[Block]:
    """The levels of D inputs for the degrees of every hidden layer."""
    degrees = torch.cat(list(hidden)).unique() if hidden else torch.arange(1, dim)
    inputs = [0, *degrees.tolist(), dim]
    units = [[0, 0, *torch.searchsorted(layer, degrees, right=True).tolist()] for layer in hidden]
    return [
        Block(slice(*inputs[level : level + 2]), [slice(*layer[level : level + 2]) for layer in units])
        for level in range(len(inputs) - 1)
    ]


def group(levels: Iterable[Block], fits: Callable[[Block], bool]) -> list[Block]:
    """Successive levels in blocks, each of as many as fit but at least one."""
    blocks: list[Block] = []
    for level in levels:
        joint = _join(blocks[-1], level) if blocks else level
        if blocks and fits(joint):
            blocks[-1] = joint
        else:
            blocks.append(level)
    return blocks


def _join(one: Block, next_: Block) -> Block:
    units = [slice(first.start, last.stop) for first, last in zip(one.units, next_.units, strict=True)]
    return Block(slice(one.inputs.start, next_.inputs.stop), units, one.levels + next_.levels)


def _width(part: slice) -> int:
    return int(part.stop - part.start)


class Forward(NamedTuple):
    """Inputs that are functions of their own outputs; the points are columns, ``(D, B)``.

    ``known`` are the inputs placed so far and the units of every layer that can be evaluated from them. Where there is
    ``room`` for all of them they are written there, instead of being copied whenever some are added.
    """

    weights: list[Tensor]
    biases: list[Tensor]
    outputs: int
    activation: Callable[[Tensor], Tensor]
    place: Place
    given: list[Tensor]
    room: Sequence[Tensor] = ()

    def extend(self, known: Sequence[Tensor], block: Block) -> list[Tensor]:
        """The known inputs and units with those of a block."""
        return self._iterate(known, block) if block.levels > 1 else self._step(known, block)

    def _step(self, known: Sequence[Tensor], level: Block) -> list[Tensor]:
        inputs, *units = known
        read = inputs
        for layer, to in enumerate(level.units):
            if to.start < to.stop:
                units[layer] = self._add(layer + 1, units[layer], self.activation(self._feed(layer, to, read)))
            read = units[layer]
        outputs = self._feed(len(units), self._outputs(level), read)
        return [self._add(0, inputs, self._placed(outputs, level)), *units]

    def _iterate(self, known: Sequence[Tensor], block: Block) -> list[Tensor]:
        """After k passes the first k levels are final whatever the others hold; left once a pass changes no bit.

        What is not final may overflow on the way, and spoil the rest through weights of zero: then there are numbers
        that are not finite in the end.
        """
        stages = [*block.units, self._outputs(block)]
        fed = [self._feed(layer, to, read) for layer, (to, read) in enumerate(zip(stages, known, strict=True))]
        inner = [
            weight[to, len(read) : len(read) + part.stop - part.start]
            for weight, to, read, part in zip(self.weights, stages, known, [block.inputs, *block.units], strict=True)
        ]
        placed: list[Tensor] = []
        for _ in range(block.levels):
            units: list[Tensor] = []
            entering = torch.addmm(fed[0], inner[0], placed[-1]) if placed else fed[0]
            for settled, weight in zip(fed[1:], inner[1:], strict=True):
                units.append(self.activation(entering))
                entering = torch.addmm(settled, weight, units[-1])
            placed = [*placed[-1:], self._placed(entering, block)]
            if torch.equal(placed[0], placed[-1]) and len(placed) > 1:
                break
        added = enumerate(zip(known, [placed[-1], *units], strict=True))
        return [self._add(stage, *pair) for stage, pair in added]

    def _add(self, stage: int, known: Tensor, new: Tensor) -> Tensor:
        if not self.room:
            return torch.cat([known, new])
        size = len(known) + len(new)
        self.room[stage][len(known) : size] = new
        return self.room[stage][:size]

    def _outputs(self, block: Block) -> slice:
        return slice(block.inputs.start * self.outputs, block.inputs.stop * self.outputs)

    def _feed(self, layer: int, to: slice, read: Tensor) -> Tensor:
        return torch.addmm(self.biases[layer][to], self.weights[layer][to, : len(read)], read)

    def _placed(self, outputs: Tensor, block: Block) -> Tensor:
        each = outputs.unflatten(0, (-1, self.outputs)).unbind(1)
        return self.place(*each, *(value[block.inputs] for value in self.given))


class Pull(NamedTuple):
    """Derivatives carried from the outputs downwards, through the part of a network that belongs to a block.

    Layers are listed from the last to the first, and so are the stages of a block: its outputs, its units in every
    layer, its inputs. The derivatives by the outputs of an input are those by the input times its coefficients.
    """

    weights: list[Tensor]
    slopes: list[Tensor]
    coefficients: Tensor

    def stages(self, block: Block) -> list[slice]:
        outputs = self.coefficients.shape[-1]
        return [
            slice(block.inputs.start * outputs, block.inputs.stop * outputs),
            *reversed(block.units),
            block.inputs,
        ]

    def feed(self, known: Sequence[Tensor], stages: Sequence[slice]) -> list[Tensor]:
        """What the known derivatives of later blocks add to every stage after the first; nothing if none are known."""
        return [
            by @ weight[len(weight) - by.shape[-1] :, to]
            for by, weight, to in zip(known, self.weights, stages[1:], strict=False)
        ]

    def carry(self, u: Tensor, stages: Sequence[slice], fed: Sequence[Tensor]) -> list[Tensor]:
        """The derivatives by the outputs and by what enters the units, for u of the inputs and what others have fed."""
        by = (u[..., None] * self.coefficients[..., stages[-1], :]).flatten(-2)
        carried = [by]
        for layer, slopes in enumerate(self.slopes):
            here, to = stages[layer : layer + 2]
            by = by @ self.weights[layer][here, to]
            by = (by + fed[layer] if fed else by) * slopes[..., to]
            carried.append(by)
        return carried

    def solve(self, right: Tensor, stages: Sequence[slice], fed: Sequence[Tensor]) -> Tensor:
        """u such that u and what its derivatives pull back to the inputs add up to the right-hand side.

        A dense triangle is solved, as large as the inputs or the units that read them, whichever are fewer.
        """
        first = self.weights[-1][stages[-2], stages[-1]]
        if first.shape[0] < first.shape[1]:
            by_first = _solve_left(self._rows(first, stages), self.carry(right, stages, fed)[-1])
            return right - by_first @ first
        if fed:
            right = right - self.carry(torch.zeros_like(right), stages, fed)[-1] @ first
        identity = torch.eye(first.shape[1], dtype=right.dtype, device=right.device)
        return _solve_left(self._rows(identity, stages) @ first, right)

    def _rows(self, u: Tensor, stages: Sequence[slice]) -> Tensor:
        """The derivatives by what enters the first units, ``(..., K, units)``, for rows of u ``(K, inputs)``."""
        weight = self.weights[0][stages[0], stages[1]].unflatten(0, (u.shape[-1], -1))
        # All points share the rows and the weights, so that the first layer is one product with the coefficients.
        products = (u.mT[:, None, :, None] * weight[:, :, None, :]).flatten(0, 1)
        by = (self.coefficients[..., stages[-1], :].flatten(-2) @ products.flatten(1)).unflatten(-1, (len(u), -1))
        by = by * self.slopes[0][..., None, stages[1]]
        for layer, slopes in enumerate(self.slopes[1:], 1):
            here, to = stages[layer : layer + 2]
            by = by @ self.weights[layer][here, to] * slopes[..., None, to]
        return by


def _solve_left(lower: Tensor, right: Tensor) -> Tensor:
    """u with u (I + L) = r for a strictly lower triangle L."""
    right = right[..., None, :]
    return torch.linalg.solve_triangular(lower, right, upper=False, left=False, unitriangular=True)[..., 0, :]
