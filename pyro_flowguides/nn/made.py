"""Masked autoencoder: a network whose outputs depend only on earlier inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_flowguides.nn.mlp import MLP
from pyro_flowguides.nn.ordering import as_permutation

__all__ = ["MADE", "layer_masks"]


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
