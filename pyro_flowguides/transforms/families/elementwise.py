"""Elementwise affine maps."""

import torch
from torch import Tensor, nn

from pyro_flowguides.nn.arguments import check_tensor
from pyro_flowguides.transforms.algebra import per_coordinate
from pyro_flowguides.transforms.conditional import AmortizedFlow
from pyro_flowguides.transforms.flow import Flow, Theta

__all__ = ["ActNorm", "ConditionalActNorm", "ConditionalElementwiseAffine", "ElementwiseAffine"]


class ElementwiseAffine(Flow):
    r"""A location and a positive scale for every coordinate.

    .. math:: y_i = \ell_i + e^{s_i} x_i, \qquad \log|\det J| = \sum_i s_i

    Cost: O(D) in both directions. Starts at the identity by default.

    Args:
        input_dim: number of coordinates, D.
        loc: initial location, a number or ``(D,)``.
        scale: initial scale, positive, a number or ``(D,)``.

    Shapes:
        input, output ``(..., D)``; ladj ``(...)``.

    Raises:
        ValueError: if the scale is not positive, or a shape is wrong.

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
        owner = type(self).__name__
        self.loc = nn.Parameter(per_coordinate(owner, "loc", loc, input_dim))
        self.log_scale = nn.Parameter(per_coordinate(owner, "scale", scale, input_dim, positive=True).log())

    def _forward_formula(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        return theta["loc"] + theta["log_scale"].exp() * x, theta["log_scale"].sum(-1)

    def _inverse_formula(self, y: Tensor, theta: Theta, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (y - theta["loc"]) * (-theta["log_scale"]).exp(), theta["log_scale"].sum(-1)


class ActNorm(ElementwiseAffine):
    r"""Activation normalization: an elementwise affine map that can be set from a batch.

    .. math:: y_i = \ell_i + e^{s_i} x_i, \qquad \log|\det J| = \sum_i s_i

    :meth:`initialize` sets it so that the images of a batch have mean 0 and standard deviation 1. For a
    ``ConditionalActNorm`` it is called on the unconditional part, ``module.flow.initialize(x)``.

    Cost: O(D) in both directions. Starts at the identity.

    Args:
        input_dim: number of coordinates, D.

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
        check_tensor("ActNorm", "x", x)
        self._check(x)
        points = x.reshape(-1, self.input_dim)
        std = points.std(0) if len(points) > 1 else torch.zeros_like(self.loc)
        if not bool((std > 0).all()):
            constant = (~(std > 0)).nonzero().flatten().tolist()
            raise ValueError(f"ActNorm: coordinates {constant} do not vary in the batch, or are not finite")
        self.log_scale.copy_(-std.log())
        self.loc.copy_(-points.mean(0) / std)


class ConditionalElementwiseAffine(AmortizedFlow, family=ElementwiseAffine): ...


class ConditionalActNorm(AmortizedFlow, family=ActNorm): ...
