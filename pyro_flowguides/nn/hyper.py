"""Hypernetworks: networks that compute the parameters of something else from a context."""

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from pyro_flowguides.nn.arguments import check_count, check_mapping, check_number, check_tensor, check_widths
from pyro_flowguides.nn.mlp import MLP

__all__ = ["HyperNetwork"]


class HyperNetwork(nn.Module):
    r"""Amortized parameters: one network from a context to several named tensors.

    .. math:: (\theta_1, \dots, \theta_k) = s\, (W\, h(c) + b)

    With ``hidden_dims=()`` the amortization is linear, as in van den Berg et al. (2018). The tensors named in ``zero``
    start at zero for every context; the others start random, of size ``scale``.

    A step of Adam moves every weight by about the learning rate, hence an output by the learning rate times the sum of
    the n features it reads. A ``scale`` :math:`s = 1/\sqrt n` (as in Jacot et al. 2018) makes that step grow with
    :math:`\sqrt n` instead of n, so that parameters amortized from a wide context tolerate the learning rate of an
    encoder.

    Args:
        context_dim: width of the context.
        hidden_dims: widths of the hidden layers, ``()`` for a linear map.
        shapes: name -> shape of each output.
        zero: names that start at zero (all by default).
        scale: factor s of all outputs.

    Shapes:
        context ``(..., context_dim)``; each output ``(..., *shape)``.

    Raises:
        ValueError: if a width is not positive.

    References:
        R. van den Berg, L. Hasenclever, J. Tomczak, M. Welling (2018). Sylvester normalizing flows for variational
        inference. arXiv:1803.05649. D. Ha, A. Dai, Q. Le (2017). HyperNetworks. arXiv:1609.09106.
        A. Jacot, F. Gabriel, C. Hongler (2018). Neural tangent kernel. arXiv:1806.07572.

    Example:
        >>> import torch
        >>> from pyro_flowguides.nn import HyperNetwork
        >>> hyper = HyperNetwork(4, [8], {"u": (3,), "b": ()})
        >>> {name: tuple(value.shape) for name, value in hyper(torch.randn(7, 4)).items()}
        {'u': (7, 3), 'b': (7,)}
    """

    def __init__(
        self,
        context_dim: int,
        hidden_dims: Sequence[int],
        shapes: Mapping[str, Sequence[int]],
        zero: Collection[str] | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_count("HyperNetwork", "context_dim", context_dim)
        check_number("HyperNetwork", "scale", scale)
        check_mapping("HyperNetwork", "shapes", shapes)
        unknown = sorted({*(zero or ())} - shapes.keys())
        if unknown or not shapes:
            raise ValueError(f"HyperNetwork: zero names {unknown}, the outputs are {sorted(shapes)}")
        self.context_dim, self.scale = context_dim, scale
        self.shapes = {name: check_widths("HyperNetwork", f"shape {name!r}", shape) for name, shape in shapes.items()}
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.network = MLP(context_dim, hidden_dims, sum(self.sizes))
        self._randomize_except(self.shapes if zero is None else zero)

    @torch.no_grad()
    def _randomize_except(self, zero: Collection[str]) -> None:
        """Draw the last layer's weights of all outputs but those that start at zero."""
        weight = self.network.weights[-1]
        for name, rows in zip(self.shapes, weight.split(self.sizes), strict=True):
            if name not in zero:
                rows.uniform_(-1, 1).div_(math.sqrt(weight.shape[1]))

    def forward(self, context: Tensor) -> dict[str, Tensor]:
        check_tensor("HyperNetwork", "context", context)
        if context.shape[-1:] != (self.context_dim,):
            raise ValueError(
                f"HyperNetwork: expected a context of shape (..., {self.context_dim}), got {tuple(context.shape)}"
            )
        flat = self.network(context) * self.scale
        return {
            name: part.reshape((*flat.shape[:-1], *shape))
            for (name, shape), part in zip(self.shapes.items(), flat.split(self.sizes, -1), strict=True)
        }
