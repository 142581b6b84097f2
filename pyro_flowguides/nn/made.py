"""Masked autoencoder: a network whose outputs depend only on earlier inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from pyro_flowguides.nn.mlp import MLP, slope
from pyro_flowguides.nn.ordering import as_permutation
from pyro_flowguides.nn.substitution import Block, Forward, Place, Pull, group, split_levels

__all__ = ["MADE", "layer_masks"]

#: Up to this number of levels are a block in forward substitution.
FIXED_LEVELS = 24
#: Up to this number of inputs, or of units that read them, are taken together in back substitution, by a triangle.
DENSE_SIZE = 16


def layer_masks(degrees: Sequence[Tensor], outputs: int) -> list[Tensor]:
    """The masks of all layers for the degrees of the inputs and of every hidden layer, see :class:`MADE`."""
    masks = [later[:, None] >= earlier for earlier, later in itertools.pairwise(degrees)]
    masks.append((degrees[0][:, None] > degrees[-1]).repeat(outputs, 1))
    return masks


class MADE(MLP):
    r"""Masked autoencoder for distribution estimation: ``outputs`` numbers per input, each a function of the inputs
    that come strictly earlier in ``order``.

    Input :math:`i` has degree :math:`m(i)` = its rank in the order (1 … D); hidden units get degrees spread evenly over
    ``lowest_degree`` … D − 1, whatever their number (also fewer than D); a hidden unit reads units of at most its own
    degree, an output of degree :math:`m` reads hidden units of degree below :math:`m`:

    .. math:: M^{W}_{kj} = 1[m(k) \ge m(j)], \qquad M^{V}_{ik} = 1[m(i) > m(k)]

    The masks are multiplied into the weights by :meth:`fold`, once for all the passes of an inversion.

    Args:
        input_dim: number of inputs D.
        hidden_dims: widths of the hidden layers.
        outputs: numbers per input.
        order: a permutation of ``range(input_dim)``, the first to come first (default: natural order).
        lowest_degree: 1, or 0 to include hidden units that read no input: they are what carries a context to the
            first coordinate.
        activation: elementwise nonlinearity.

    Shapes:
        ``x``: ``(..., D)``; output ``(..., outputs * D)``, the first D numbers being the first output of each input.

    Raises:
        ValueError: if ``order`` is not a permutation or a width is not positive.

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
        order = as_permutation("MADE", input_dim, order)
        lowest = min(lowest_degree, input_dim - 1)
        hidden = [lowest + torch.arange(max(width, 0)) * (input_dim - lowest) // width for width in hidden_dims]
        masks = layer_masks([order.argsort() + 1, *hidden], outputs)
        super().__init__(input_dim, hidden_dims, outputs * input_dim, activation, masks)
        self.outputs = outputs
        self.register_buffer("order", order)
        self._levels = split_levels(input_dim, hidden)
        self._blocks = group(self._levels, lambda block: block.levels <= FIXED_LEVELS)
        self._dense = group(self._levels, _fits_densely) if hidden else self._levels

    def substitute(
        self, place: Place, given: Sequence[Tensor], folded: Mapping[str, Tensor], together: int = 0
    ) -> Tensor:
        r"""Inputs of which each is a function of its own outputs, by forward substitution.

        .. math:: x_i = \mathrm{place}(f_i(x_{<i}), g_i)

        Inputs that read the same hidden units are one level. Level after level is placed, and every unit evaluated
        once, as soon as what it reads is known.

        Levels are taken in blocks, which what comes before enters by one product for each layer. Where there are some
        blocks and not too many numbers, it is quicker not to take the levels of a block one by one but to iterate it
        until nothing changes. The inputs are the same up to rounding.

        Cost: at most one more level than hidden units have different degrees, about a dozen small operations each, with
        the arithmetic of half a pass together; or a few passes through each block.

        Args:
            place: elementwise, from the outputs of some inputs and what is given for these to the inputs.
            given: one or more tensors ``(..., D)``.
            folded: the layers; biases may carry batch dimensions.
            together: up to that many numbers, inputs times points, of a block are iterated; nothing is recorded for
                derivatives. 0 for level after level, nothing written in place and nothing depending on values, to be
                traced, recorded or differentiated.

        Returns:
            ``(..., D)``.
        """
        weights, biases = self._sorted(folded)
        batch = torch.broadcast_shapes(*(value.shape[:-1] for value in (*given, *biases)))

        def columns(value: Tensor) -> Tensor:
            return value.expand(*batch, -1).reshape(-1, value.shape[-1]).mT.contiguous()

        biases = [bias[:, None] if bias.dim() == 1 else columns(bias) for bias in biases]
        points = [columns(value).index_select(0, self.get_buffer("order")) for value in given]
        forward = Forward(weights, biases, self.outputs, self.activation, place, points)
        known = [points[0][:0]] * self.depth
        if together:
            iterable = len(self._blocks) > 1 and points[0].numel() <= together * len(self._blocks)
            with torch.inference_mode():  # where operations start sooner
                known = reduce(forward.iterate if iterable else forward.sweep, self._blocks, known)
        else:
            known = reduce(forward.step, self._levels, known)
        x = known[0].index_select(0, self.get_buffer("order").argsort())
        return x.mT.reshape(*batch, self.in_features).contiguous()

    @torch.no_grad()
    def solve_transposed(
        self, v: Tensor, coefficients: Sequence[Tensor], hidden: Sequence[Tensor], folded: Mapping[str, Tensor]
    ) -> Tensor:
        r"""Solve a linear equation with the triangular Jacobian of the network, by back substitution.

        .. math:: \Big(I + \sum_k \operatorname{diag}(c_k) \frac{\partial f_k}{\partial x}\Big)^{\!\top} u = v

        for output k of every input. The last inputs come first, in blocks, and what they pull back to earlier ones goes
        through the layers in products. Within a block a dense triangle is solved.

        Cost: the arithmetic of a backward pass and of the triangles.

        Args:
            v: ``(..., D)``.
            coefficients: c, ``(..., D)`` for every output.
            hidden: what :meth:`run_and_keep` kept at the point in question.
            folded: the layers.

        Returns:
            u ``(..., D)``.
        """
        weights, _ = self._sorted(folded)
        slopes = [slope(self.activation, entering) for entering in reversed(hidden)]
        v, *coefficients = torch.stack([v, *coefficients])[..., self.get_buffer("order")]
        pull = Pull(weights[::-1], slopes, torch.stack(coefficients, -1))
        solved: list[Tensor] = []
        known: list[Tensor] = []
        for block in reversed(self._dense):
            stages = pull.stages(block)
            fed = pull.feed(known, stages)
            u = v[..., block.inputs] - fed[-1] if fed else v[..., block.inputs]
            if block.levels > 1:
                u = pull.solve(u, stages, fed)
            solved.insert(0, u)
            if block.inputs.start:
                carried = pull.carry(u, stages, fed)
                known = [torch.cat(pair, -1) for pair in zip(carried, known, strict=True)] if known else carried
        return torch.cat(solved, -1)[..., self.get_buffer("order").argsort()]

    def _sorted(self, folded: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases with the inputs in their order, and the outputs of an input side by side."""
        order = self.get_buffer("order")
        rows = (order[:, None] + self.in_features * torch.arange(self.outputs, device=order.device)).flatten()
        weights, biases = ([folded[f"{kind}{layer}"] for layer in range(self.depth)] for kind in ("weight", "bias"))
        weights[0] = weights[0].index_select(1, order)
        weights[-1], biases[-1] = weights[-1][rows], biases[-1][..., rows]
        return weights, biases


def _fits_densely(block: Block) -> bool:
    return min(part.stop - part.start for part in (block.inputs, block.units[0])) <= DENSE_SIZE
