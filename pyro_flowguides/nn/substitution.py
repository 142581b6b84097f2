"""Forward and back substitution through a masked network: its inputs are solved for in their order, in blocks.

Inputs are counted in that order here, hidden units are sorted by their degrees, and the outputs of an input stand side
by side. Whatever belongs to some successive inputs is then a slice: of the inputs, of the units in every layer that
they are the first to read, and of the outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["Block", "Forward", "Place", "Pull", "group", "split_levels"]

#: From the outputs of some inputs, one tensor per output, and what is given for these inputs, to the inputs.
Place: TypeAlias = Callable[..., Tensor]


class Block(NamedTuple):
    """Successive inputs, and of every hidden layer the units that they are the first to read.

    The inputs of one level read the same units, those of the next some more. Of each level there are the numbers of
    inputs and of units in every layer.
    """

    inputs: slice
    units: list[slice]
    sizes: list[list[int]]

    @property
    def levels(self) -> int:
        return len(self.sizes[0])


def split_levels(dim: int, hidden: Sequence[Tensor]) -> list[Block]:
    """The levels of D inputs for the degrees of every hidden layer."""
    degrees = torch.cat(list(hidden)).unique() if hidden else torch.arange(1, dim)
    inputs = [0, *degrees.tolist(), dim]
    units = [[0, 0, *torch.searchsorted(layer, degrees, right=True).tolist()] for layer in hidden]
    bounds = ([slice(*part) for part in itertools.pairwise(layer)] for layer in (inputs, *units))
    return [
        Block(first, list(rest), [[part.stop - part.start] for part in (first, *rest)])
        for first, *rest in zip(*bounds, strict=True)
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
    sizes = [first + last for first, last in zip(one.sizes, next_.sizes, strict=True)]
    return Block(slice(one.inputs.start, next_.inputs.stop), units, sizes)


class Forward(NamedTuple):
    """Inputs that are functions of their own outputs; the points are columns, ``(D, B)``.

    There are three ways to take the next inputs and the units that are the first to read them. ``known`` are the inputs
    placed so far and the units of every layer that can be evaluated from them; they are returned with those of a block.
    """

    weights: list[Tensor]
    biases: list[Tensor]
    outputs: int
    activation: Callable[[Tensor], Tensor]
    place: Place
    given: list[Tensor]

    def step(self, known: Sequence[Tensor], level: Block) -> list[Tensor]:
        """A single level, nothing being written in place."""
        inputs, *units = known
        read = inputs
        for layer, to in enumerate(level.units):
            if to.start < to.stop:
                units[layer] = torch.cat([units[layer], self.activation(self._feed(layer, to, read))])
            read = units[layer]
        outputs = self._feed(len(units), self._stages(level)[-1], read)
        return [torch.cat([inputs, self.place(*self._each(outputs), *self._given(level))]), *units]

    def sweep(self, known: Sequence[Tensor], block: Block) -> list[Tensor]:
        """One level after the other, written in place: what is found enters all of the block that reads it at once.

        So all slices can be made beforehand, and a level takes few operations. What does not read it, earlier levels
        among them, meets it with weights of zero.
        """
        entering, (widths, *sizes) = self._enter(block, known), block.sizes
        columns = zip(*map(_columns, self._within(block), block.sizes), strict=True)
        units = list(zip(*map(_rows, entering, sizes), strict=True)) or [()] * block.levels
        values = zip(*(_rows(value, widths) for value in (*self._each(entering[-1]), *self._given(block))), strict=True)
        found: list[list[Tensor]] = []
        for reached, (first, *weights), read in zip(units, columns, values, strict=True):
            new: list[Tensor] = []
            for part, weight, later in zip(reached, weights, entering[1:], strict=True):
                new.append(self.activation(part))
                later.addmm_(weight, new[-1])
            placed = self.place(*read)
            entering[0].addmm_(first, placed)
            found.append([placed, *new])
        return [torch.cat([part, *new]) for part, *new in zip(known, *found, strict=True)]

    def iterate(self, known: Sequence[Tensor], block: Block) -> list[Tensor]:
        """All levels together, until a pass changes no bit: after k passes the first k are final whatever others hold.

        What is not final may overflow on the way, and spoil the rest through weights of zero. Then there are numbers
        that are not finite in the end, and it is done again one level after the other.
        """
        entering, inner, given = self._enter(block, known), self._within(block), self._given(block)
        placed: list[Tensor] = []
        for _ in range(block.levels):
            units: list[Tensor] = []
            fed = torch.addmm(entering[0], inner[0], placed[-1]) if placed else entering[0]
            for settled, weight in zip(entering[1:], inner[1:], strict=True):
                units.append(self.activation(fed))
                fed = torch.addmm(settled, weight, units[-1])
            placed = [*placed[-1:], self.place(*self._each(fed), *given)]
            if len(placed) > 1 and torch.equal(*placed):
                break
        if not bool(placed[-1].isfinite().all()):
            return self.sweep(known, block)
        return [torch.cat(pair) for pair in zip(known, [placed[-1], *units], strict=True)]

    def _stages(self, block: Block) -> list[slice]:
        """The units of every layer, and the outputs."""
        return [*block.units, slice(block.inputs.start * self.outputs, block.inputs.stop * self.outputs)]

    def _enter(self, block: Block, known: Sequence[Tensor]) -> list[Tensor]:
        """What enters the units and outputs of a block from what is known."""
        return [self._feed(layer, *pair) for layer, pair in enumerate(zip(self._stages(block), known, strict=True))]

    def _within(self, block: Block) -> list[Tensor]:
        """The weights by which a block reads its own inputs and units."""
        stages = zip(self._stages(block), [block.inputs, *block.units], strict=True)
        return [weight[pair] for weight, pair in zip(self.weights, stages, strict=True)]

    def _feed(self, layer: int, to: slice, read: Tensor) -> Tensor:
        return torch.addmm(self.biases[layer][to], self.weights[layer][to, : len(read)], read)

    def _each(self, outputs: Tensor) -> tuple[Tensor, ...]:
        return outputs.unflatten(0, (-1, self.outputs)).unbind(1)

    def _given(self, block: Block) -> list[Tensor]:
        return [value[block.inputs] for value in self.given]


def _rows(value: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return value.unsafe_split_with_sizes(sizes)


def _columns(weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return weight.unsafe_split_with_sizes(sizes, 1)


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
