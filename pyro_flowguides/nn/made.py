"""Masked autoencoder: a network whose outputs depend on earlier inputs only."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from pyro_flowguides.nn.arguments import check_count, check_widths
from pyro_flowguides.nn.mlp import MLP, elementwise_derivative
from pyro_flowguides.nn.ordering import as_permutation
from pyro_flowguides.nn.substitution import (
    BackSubstitution,
    Block,
    ForwardSubstitution,
    SolveInput,
    group_levels,
    split_levels,
)

__all__ = ["MADE", "layer_masks"]

#: Most levels of a block in forward substitution.
MAX_BLOCK_LEVELS = 24
#: Largest dense triangle that back substitution solves at once: inputs, or units that read them.
MAX_TRIANGLE = 16


def layer_masks(degrees: Sequence[Tensor], outputs: int) -> list[Tensor]:
    """Return the masks of all layers for the degrees of the inputs and of every hidden layer, see :class:`MADE`."""
    masks = [later[:, None] >= earlier for earlier, later in itertools.pairwise(degrees)]
    masks.append((degrees[0][:, None] > degrees[-1]).repeat(outputs, 1))
    return masks


class MADE(MLP):
    r"""Masked autoencoder for distribution estimation.

    It computes ``outputs`` numbers per input, each a function of the inputs that come strictly earlier in ``order``.
    Input :math:`i` has as its degree :math:`m(i)` its rank in the order (1 … D). The degrees of hidden units are spread
    evenly over ``lowest_degree`` … D − 1, for any number of units (also fewer than D). A hidden unit reads units of at
    most its own degree; an output of degree :math:`m` reads hidden units of degree below :math:`m`:

    .. math:: M^{W}_{kj} = 1[m(k) \ge m(j)], \qquad M^{V}_{ik} = 1[m(i) > m(k)]

    :meth:`fold` multiplies the masks into the weights, once for all passes of an inversion.

    Args:
        input_dim: number of inputs D.
        hidden_dims: widths of the hidden layers.
        outputs: numbers per input.
        order: a permutation of ``range(input_dim)``, listing the inputs from first to last (default: natural order).
        lowest_degree: 1, or 0 to include hidden units that read no input; only these carry a context to the first
            coordinate.
        activation: elementwise nonlinearity.

    Shapes:
        ``x``: ``(..., D)``; output ``(..., outputs * D)``, of which the first D are the first output of each input.

    Raises:
        ValueError: if ``order`` is not a permutation or a width is not positive.
        TypeError: if a number or ``hidden_dims`` has another type.

    References:
        M. Germain, K. Gregor, I. Murray, H. Larochelle (2015). MADE: masked autoencoder for distribution estimation.
        arXiv:1502.03509.

    Example:
        >>> import torch
        >>> from pyro_flowguides.nn import MADE
        >>> net = MADE(3, [8], outputs=2)
        >>> _ = torch.nn.init.normal_(net.weights[-1])
        >>> torch.autograd.functional.jacobian(net, torch.zeros(3))[:3].triu().count_nonzero().item()
        0
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int],
        outputs: int = 1,
        *,
        order: Sequence[int] | Tensor | None = None,
        lowest_degree: int = 1,
        activation: Callable[[Tensor], Tensor] = nn.functional.elu,
    ) -> None:
        check_count("MADE", "input_dim", input_dim)
        check_count("MADE", "outputs", outputs)
        hidden_dims = check_widths("MADE", "hidden_dims", hidden_dims)
        order = as_permutation("MADE", input_dim, order)
        lowest = min(check_count("MADE", "lowest_degree", lowest_degree, 0), input_dim - 1)
        hidden = [lowest + torch.arange(max(width, 0)) * (input_dim - lowest) // width for width in hidden_dims]
        masks = layer_masks([order.argsort() + 1, *hidden], outputs)
        super().__init__(input_dim, hidden_dims, outputs * input_dim, activation, masks)
        self.outputs = outputs
        self.register_buffer("order", order)
        self._levels = split_levels(input_dim, hidden)
        self._blocks = group_levels(self._levels, lambda block: block.num_levels <= MAX_BLOCK_LEVELS)
        self._triangles = group_levels(self._levels, _fits_a_triangle) if hidden else self._levels

    def substitute(self, solve: SolveInput, targets: Sequence[Tensor], folded: Mapping[str, Tensor]) -> Tensor:
        r"""Solve for inputs, each a function of its own outputs, by forward substitution.

        .. math:: x_i = \mathrm{solve}(f_i(x_{<i}), w_i)

        Inputs that read the same hidden units form one level. Level after level is solved, and every unit is evaluated
        once, as soon as the inputs it reads are known. Nothing is written in place and no operation depends on values,
        so that the substitution can be traced, recorded and differentiated.

        Cost: about a dozen small operations per level, with the arithmetic of half a pass in total. There is at most
        one more level than hidden units have different degrees.

        Args:
            solve: elementwise, from the outputs of some inputs and their targets to these inputs.
            targets: w, one or more tensors ``(..., D)``.
            folded: the layers; biases may carry batch dimensions.

        Returns:
            ``(..., D)``.
        """
        forward, batch = self._forward_substitution(solve, targets, folded)
        state = reduce(forward.solve_level, self._levels, self._initial_state(forward))
        return self._natural_order(state[0], batch)

    def substitute_in_blocks(
        self, solve: SolveInput, targets: Sequence[Tensor], folded: Mapping[str, Tensor], *, max_iterated: int
    ) -> Tensor:
        """Solve as :meth:`substitute` does, faster and without a graph; the inputs are the same up to rounding.

        Levels are grouped into blocks. All that precedes a block enters it by one product per layer. Where there are
        several blocks of few enough numbers, iterating a block until nothing changes is faster than solving its levels
        one by one.

        Cost: a few operations per level, or a few passes through each block.

        Args:
            solve: elementwise, from the outputs of some inputs and their targets to these inputs.
            targets: one or more tensors ``(..., D)``.
            folded: the layers; biases may carry batch dimensions.
            max_iterated: most numbers, inputs times points, of a block that is iterated.

        Returns:
            ``(..., D)``.
        """
        forward, batch = self._forward_substitution(solve, targets, folded)
        several = len(self._blocks) > 1
        iterable = several and forward.targets[0].numel() <= max_iterated * len(self._blocks)
        with torch.inference_mode():  # where operations start sooner
            state = reduce(forward.iterate if iterable else forward.sweep, self._blocks, self._initial_state(forward))
        return self._natural_order(state[0], batch)

    def _forward_substitution(
        self, solve: SolveInput, targets: Sequence[Tensor], folded: Mapping[str, Tensor]
    ) -> tuple[ForwardSubstitution, torch.Size]:
        """Prepare a substitution whose points are columns; also return their batch shape."""
        weights, biases = self._sorted(folded)
        batch = torch.broadcast_shapes(*(value.shape[:-1] for value in (*targets, *biases)))

        def columns(value: Tensor) -> Tensor:
            return value.expand(*batch, -1).reshape(-1, value.shape[-1]).mT.contiguous()

        biases = [bias[:, None] if bias.dim() == 1 else columns(bias) for bias in biases]
        ordered = [columns(target).index_select(0, self.get_buffer("order")) for target in targets]
        return ForwardSubstitution(weights, biases, self.outputs, self.activation, solve, ordered), batch

    def _initial_state(self, forward: ForwardSubstitution) -> list[Tensor]:
        """Return the state before the first level: no inputs, and no units of any hidden layer."""
        return [forward.targets[0][:0]] * self.depth

    def _natural_order(self, inputs: Tensor, batch: torch.Size) -> Tensor:
        x = inputs.index_select(0, self.get_buffer("order").argsort())
        return x.mT.reshape(*batch, self.in_features).contiguous()

    @torch.no_grad()
    def solve_transposed(
        self, v: Tensor, coefficients: Sequence[Tensor], hidden: Sequence[Tensor], folded: Mapping[str, Tensor]
    ) -> Tensor:
        r"""Solve a linear system with the triangular Jacobian of the network, by back substitution.

        .. math:: \Big(I + \sum_k \operatorname{diag}(c_k) \frac{\partial f_k}{\partial x}\Big)^{\!\top} u = v

        where :math:`f_k` is output k of every input. The last inputs come first, in blocks; what a block contributes to
        earlier inputs goes through the layers in products. Within a block a dense triangle is solved.

        Cost: the arithmetic of a backward pass and of the triangles.

        Args:
            v: ``(..., D)``.
            coefficients: c, ``(..., D)`` for every output.
            hidden: pre-activations from :meth:`run_with_hidden` at the point in question.
            folded: the layers.

        Returns:
            u ``(..., D)``.
        """
        weights, _ = self._sorted(folded)
        derivatives = [elementwise_derivative(self.activation, entering) for entering in reversed(hidden)]
        v, *coefficients = torch.stack([v, *coefficients])[..., self.get_buffer("order")]
        back = BackSubstitution(weights[::-1], derivatives, torch.stack(coefficients, -1))
        solved: list[Tensor] = []
        later: list[Tensor] = []  # derivatives of the blocks that are solved, by stage
        for block in reversed(self._triangles):
            stages = back.stages(block)
            contributions = back.contribute(later, stages)
            u = v[..., block.inputs] - contributions[-1] if contributions else v[..., block.inputs]
            if block.num_levels > 1:
                u = back.solve(u, stages, contributions)
            solved.insert(0, u)
            if block.inputs.start:
                here = back.propagate(u, stages, contributions)
                later = [torch.cat(pair, -1) for pair in zip(here, later, strict=True)] if later else here
        return torch.cat(solved, -1)[..., self.get_buffer("order").argsort()]

    def _sorted(self, folded: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return weights and biases with the inputs in their order and the outputs of each input side by side."""
        order = self.get_buffer("order")
        rows = (order[:, None] + self.in_features * torch.arange(self.outputs, device=order.device)).flatten()
        weights, biases = ([folded[f"{kind}{layer}"] for layer in range(self.depth)] for kind in ("weight", "bias"))
        weights[0] = weights[0].index_select(1, order)
        weights[-1], biases[-1] = weights[-1][rows], biases[-1][..., rows]
        return weights, biases


def _fits_a_triangle(block: Block) -> bool:
    return min(part.stop - part.start for part in (block.inputs, block.units[0])) <= MAX_TRIANGLE
