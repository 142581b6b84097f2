"""Forward and back substitution through a masked network: solve for its inputs in their order, in blocks.

Here inputs are numbered in that order, hidden units are sorted by their degrees, and the outputs of an input stand side
by side. Everything that belongs to successive inputs is then a slice: of the inputs, of the units in every layer that
these inputs are the first to feed, and of the outputs.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["BackSubstitution", "Block", "ForwardSubstitution", "SolveInput", "group_levels", "split_levels"]

#: Compute inputs, elementwise, from their outputs (one tensor per output) and their targets.
SolveInput: TypeAlias = Callable[..., Tensor]


class Block(NamedTuple):
    """Successive inputs, and in every hidden layer the units that these inputs are the first to feed.

    A block consists of levels: the inputs of one level read the same hidden units, those of the next level read more.
    ``sizes`` holds the number of inputs of each level, then for every hidden layer the number of units of each level.
    """

    inputs: slice
    units: list[slice]
    sizes: list[list[int]]

    @property
    def num_levels(self) -> int:
        return len(self.sizes[0])


def split_levels(dim: int, degrees: Sequence[Tensor]) -> list[Block]:
    """Split D inputs into levels, given the degrees of the units of every hidden layer."""
    distinct = torch.cat(list(degrees)).unique() if degrees else torch.arange(1, dim)
    inputs = [0, *distinct.tolist(), dim]
    units = [[0, 0, *torch.searchsorted(layer, distinct, right=True).tolist()] for layer in degrees]
    bounds = ([slice(*part) for part in itertools.pairwise(layer)] for layer in (inputs, *units))
    return [
        Block(first, list(rest), [[part.stop - part.start] for part in (first, *rest)])
        for first, *rest in zip(*bounds, strict=True)
    ]


def group_levels(levels: Iterable[Block], fits: Callable[[Block], bool]) -> list[Block]:
    """Join successive levels into blocks, each as large as fits and of at least one level."""
    blocks: list[Block] = []
    for level in levels:
        joint = _join(blocks[-1], level) if blocks else level
        if blocks and fits(joint):
            blocks[-1] = joint
        else:
            blocks.append(level)
    return blocks


def _join(one: Block, following: Block) -> Block:
    units = [slice(first.start, last.stop) for first, last in zip(one.units, following.units, strict=True)]
    sizes = [first + last for first, last in zip(one.sizes, following.sizes, strict=True)]
    return Block(slice(one.inputs.start, following.inputs.stop), units, sizes)


class ForwardSubstitution(NamedTuple):
    """Solve for inputs that are functions of their own outputs; the points are columns, ``(D, B)``.

    There are three ways to extend the solution by a level or a block. Each takes the state, that is the inputs solved
    so far and the units of every layer that these determine, and returns the extended state.
    """

    weights: list[Tensor]
    biases: list[Tensor]
    outputs: int
    activation: Callable[[Tensor], Tensor]
    solve: SolveInput
    targets: list[Tensor]

    def solve_level(self, state: Sequence[Tensor], level: Block) -> list[Tensor]:
        """Solve a single level; write nothing in place."""
        inputs, *units = state
        read = inputs
        for layer, rows in enumerate(level.units):
            if rows.start < rows.stop:
                units[layer] = torch.cat([units[layer], self.activation(self._affine(layer, rows, read))])
            read = units[layer]
        outputs = self._affine(len(units), self._stages(level)[-1], read)
        return [torch.cat([inputs, self.solve(*self._by_output(outputs), *self._targets(level))]), *units]

    def sweep(self, state: Sequence[Tensor], block: Block) -> list[Tensor]:
        """Solve a block level by level, and add each result in place to all of the block that reads it.

        All slices are made in advance, so that a level takes few operations. Units that do not read a result, those of
        earlier levels included, meet it with weights of zero.
        """
        entering, (widths, *sizes) = self._enter(block, state), block.sizes
        columns = zip(*map(_split_columns, self._weights_within(block), block.sizes), strict=True)
        units = list(zip(*map(_split_rows, entering, sizes), strict=True)) or [()] * block.num_levels
        values = zip(
            *(_split_rows(value, widths) for value in (*self._by_output(entering[-1]), *self._targets(block))),
            strict=True,
        )
        solved: list[list[Tensor]] = []
        for level_units, (input_columns, *unit_columns), level_values in zip(units, columns, values, strict=True):
            evaluated: list[Tensor] = []
            for part, weight, later in zip(level_units, unit_columns, entering[1:], strict=True):
                evaluated.append(self.activation(part))
                later.addmm_(weight, evaluated[-1])
            inputs = self.solve(*level_values)
            entering[0].addmm_(input_columns, inputs)
            solved.append([inputs, *evaluated])
        return [torch.cat([part, *new]) for part, *new in zip(state, *solved, strict=True)]

    def iterate(self, state: Sequence[Tensor], block: Block) -> list[Tensor]:
        """Solve all levels of a block at once, by passes through it, until a pass changes no bit.

        After k passes the first k levels are final, whatever the others hold. Levels that are not final may overflow on
        the way and spoil final ones through weights of zero. The result then has numbers that are not finite, and the
        block is solved again by :meth:`sweep`.
        """
        entering, within, targets = self._enter(block, state), self._weights_within(block), self._targets(block)
        iterates: list[Tensor] = []
        units: list[Tensor] = []
        for _ in range(block.num_levels):
            units = []
            read = torch.addmm(entering[0], within[0], iterates[-1]) if iterates else entering[0]
            for constant, weight in zip(entering[1:], within[1:], strict=True):
                units.append(self.activation(read))
                read = torch.addmm(constant, weight, units[-1])
            iterates = [*iterates[-1:], self.solve(*self._by_output(read), *targets)]
            if len(iterates) > 1 and torch.equal(*iterates):
                break
        if not bool(iterates[-1].isfinite().all()):
            return self.sweep(state, block)
        return [torch.cat(pair) for pair in zip(state, [iterates[-1], *units], strict=True)]

    def _stages(self, block: Block) -> list[slice]:
        """Return the block's units in every layer, and its outputs."""
        return [*block.units, slice(block.inputs.start * self.outputs, block.inputs.stop * self.outputs)]

    def _enter(self, block: Block, state: Sequence[Tensor]) -> list[Tensor]:
        """Compute what the state contributes to the pre-activations and outputs of a block."""
        return [self._affine(layer, *pair) for layer, pair in enumerate(zip(self._stages(block), state, strict=True))]

    def _weights_within(self, block: Block) -> list[Tensor]:
        """Return the weights by which a block reads its own inputs and units."""
        stages = zip(self._stages(block), [block.inputs, *block.units], strict=True)
        return [weight[pair] for weight, pair in zip(self.weights, stages, strict=True)]

    def _affine(self, layer: int, rows: slice, read: Tensor) -> Tensor:
        return torch.addmm(self.biases[layer][rows], self.weights[layer][rows, : len(read)], read)

    def _by_output(self, outputs: Tensor) -> tuple[Tensor, ...]:
        return outputs.unflatten(0, (-1, self.outputs)).unbind(1)

    def _targets(self, block: Block) -> list[Tensor]:
        return [target[block.inputs] for target in self.targets]


def _split_rows(value: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return value.unsafe_split_with_sizes(sizes)


def _split_columns(weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return weight.unsafe_split_with_sizes(sizes, 1)


class BackSubstitution(NamedTuple):
    """Pull derivatives back from the outputs to the inputs, through the part of a network that belongs to a block.

    Layers are listed from the last to the first, and so are the stages of a block: its outputs, its units in every
    layer, its inputs. The derivative with respect to an output is the derivative with respect to its input times the
    output's coefficient.
    """

    weights: list[Tensor]
    activation_derivatives: list[Tensor]
    coefficients: Tensor

    def stages(self, block: Block) -> list[slice]:
        outputs = self.coefficients.shape[-1]
        return [slice(block.inputs.start * outputs, block.inputs.stop * outputs), *reversed(block.units), block.inputs]

    def contribute(self, later: Sequence[Tensor], stages: Sequence[slice]) -> list[Tensor]:
        """Pull the derivatives of later blocks back to every stage but the first; return an empty list for none."""
        return [
            derivative @ weight[len(weight) - derivative.shape[-1] :, columns]
            for derivative, weight, columns in zip(later, self.weights, stages[1:], strict=False)
        ]

    def propagate(self, u: Tensor, stages: Sequence[slice], contributions: Sequence[Tensor]) -> list[Tensor]:
        """Return the derivatives with respect to the outputs and all pre-activations, for u of the inputs."""
        derivative = (u[..., None] * self.coefficients[..., stages[-1], :]).flatten(-2)
        derivatives = [derivative]
        for layer, activation_derivative in enumerate(self.activation_derivatives):
            rows, columns = stages[layer : layer + 2]
            derivative = derivative @ self.weights[layer][rows, columns]
            derivative = (derivative + contributions[layer] if contributions else derivative) * (
                activation_derivative[..., columns]
            )
            derivatives.append(derivative)
        return derivatives

    def solve(self, right: Tensor, stages: Sequence[slice], contributions: Sequence[Tensor]) -> Tensor:
        """Find u such that u plus what its derivatives pull back to the inputs equals the right-hand side.

        The system is a dense triangle, as large as the inputs or the units that read them, whichever are fewer.
        """
        first = self.weights[-1][stages[-2], stages[-1]]
        if first.shape[0] < first.shape[1]:
            derivative = self.propagate(right, stages, contributions)[-1]
            return right - _solve_left(self._rows(first, stages), derivative) @ first
        if contributions:
            right = right - self.propagate(torch.zeros_like(right), stages, contributions)[-1] @ first
        identity = torch.eye(first.shape[1], dtype=right.dtype, device=right.device)
        return _solve_left(self._rows(identity, stages) @ first, right)

    def _rows(self, u: Tensor, stages: Sequence[slice]) -> Tensor:
        """Return derivatives with respect to the first pre-activations, ``(..., K, units)``, for u ``(K, inputs)``."""
        weight = self.weights[0][stages[0], stages[1]].unflatten(0, (u.shape[-1], -1))
        # All points share u and the weights, so that the first layer is one product with the coefficients.
        products = (u.mT[:, None, :, None] * weight[:, :, None, :]).flatten(0, 1)
        rows = (self.coefficients[..., stages[-1], :].flatten(-2) @ products.flatten(1)).unflatten(-1, (len(u), -1))
        rows = rows * self.activation_derivatives[0][..., None, stages[1]]
        for layer, activation_derivative in enumerate(self.activation_derivatives[1:], 1):
            before, after = stages[layer : layer + 2]
            rows = rows @ self.weights[layer][before, after] * activation_derivative[..., None, after]
        return rows


def _solve_left(lower: Tensor, right: Tensor) -> Tensor:
    """Solve ``u (I + L) = r`` for a strictly lower triangular L."""
    right = right[..., None, :]
    return torch.linalg.solve_triangular(lower, right, upper=False, left=False, unitriangular=True)[..., 0, :]
