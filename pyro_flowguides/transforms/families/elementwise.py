"""Elementwise affine maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_flowguides.transforms.algebra import per_coordinate
from pyro_flowguides.transforms.flow import AmortizedFlow, Flow, Known, Theta

__all__ = [
    "ActNorm",
    "ConditionalActNorm",
    "ConditionalElementwiseAffine",
    "ElementwiseAffine",
    "act_norm",
    "conditional_act_norm",
    "conditional_elementwise_affine",
    "elementwise_affine",
]


class ElementwiseAffine(Flow):
    r"""A location and a positive scale for every coordinate.

    .. math:: y_i = \ell_i + e^{s_i} x_i, \qquad \log|\det J| = \sum_i s_i

    Cost: O(D) in both directions. Starts at the identity unless told otherwise.

    Args:
        input_dim: D.
        loc: initial location, a number or ``(D,)``.
        scale: initial scale, positive, a number or ``(D,)``.

    Shapes:
        input, output ``(..., D)``; ladj ``(...)``.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import ElementwiseAffine
        >>> flow = ElementwiseAffine(2, loc=1.0, scale=3.0)
        >>> flow(torch.zeros(2)).tolist()
        [1.0, 1.0]
    """

    def __init__(
        self, input_dim: int, loc: float | Tensor = 0.0, scale: float | Tensor = 1.0, *, cache_size: int = 1
    ) -> None:
        super().__init__(input_dim, cache_size=cache_size)
        self.loc = nn.Parameter(per_coordinate(loc, input_dim))
        self.log_scale = nn.Parameter(per_coordinate(scale, input_dim).log())

    def _push(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        return theta["loc"] + theta["log_scale"].exp() * x, theta["log_scale"].sum(-1)

    def _pull(self, y: Tensor, theta: Theta, known: Known = None) -> tuple[Tensor, Tensor]:
        return (y - theta["loc"]) * (-theta["log_scale"]).exp(), theta["log_scale"].sum(-1)


class ActNorm(ElementwiseAffine):
    r"""Activation normalization: an elementwise affine map that can be set from a batch.

    .. math:: y_i = \ell_i + e^{s_i} x_i, \qquad \log|\det J| = \sum_i s_i

    It starts at the identity; :meth:`initialize` sets it so that a batch leaves with mean 0 and standard deviation 1.

    Cost: O(D) in both directions.

    Args:
        input_dim: D.

    Shapes:
        input, output ``(..., D)``; ladj ``(...)``.

    References:
        D. Kingma, P. Dhariwal (2018). Glow: generative flow with invertible 1×1 convolutions. arXiv:1807.03039.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import ActNorm
        >>> flow, x = ActNorm(2), 5 + 3 * torch.randn(100, 2)
        >>> flow.initialize(x)
        >>> torch.allclose(flow(x).mean(0), torch.zeros(2), atol=1e-5)
        True
    """

    def __init__(self, input_dim: int, *, cache_size: int = 1) -> None:
        super().__init__(input_dim, cache_size=cache_size)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set location and scale from a batch ``(..., D)`` of at least two points that differ in every coordinate.

        Raises:
            ValueError: if a coordinate does not vary in the batch.
        """
        self._check(x)
        points = x.reshape(-1, self.input_dim)
        std = points.std(0) if len(points) > 1 else torch.zeros_like(self.loc)
        if not bool((std > 0).all()):
            raise ValueError(f"ActNorm: coordinates {(std <= 0).nonzero().flatten().tolist()} do not vary in the batch")
        self.log_scale.copy_(-std.log())
        self.loc.copy_(-points.mean(0) / std)


class ConditionalElementwiseAffine(AmortizedFlow):
    """Elementwise affine map with location and scale a function of a context.

    Args:
        input_dim: D.
        context_dim: width of the context.
        hidden_dims: hidden layers of the hypernetwork, ``()`` for a linear map.
        **options: those of :class:`ElementwiseAffine`.

    Shapes:
        context ``(..., context_dim)``, broadcast against the batch dimensions of the input.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import ConditionalElementwiseAffine
        >>> ConditionalElementwiseAffine(3, context_dim=4).condition(torch.randn(7, 4))(torch.randn(7, 3)).shape
        torch.Size([7, 3])
    """

    family = ElementwiseAffine


class ConditionalActNorm(AmortizedFlow):
    """Activation normalization whose location and scale are shifted by a function of a context.

    ``flow.initialize(x)`` of the unconditional part, :attr:`flow`, sets it from a batch.

    Args:
        input_dim: D.
        context_dim: width of the context.
        hidden_dims: hidden layers of the hypernetwork, ``()`` for a linear map.

    Shapes:
        context ``(..., context_dim)``, broadcast against the batch dimensions of the input.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import ConditionalActNorm
        >>> ConditionalActNorm(3, context_dim=4).condition(torch.randn(7, 4))(torch.randn(7, 3)).shape
        torch.Size([7, 3])
    """

    family = ActNorm


elementwise_affine, conditional_elementwise_affine = ElementwiseAffine, ConditionalElementwiseAffine
act_norm, conditional_act_norm = ActNorm, ConditionalActNorm
