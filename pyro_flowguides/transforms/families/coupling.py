"""Coupling flows: additive (NICE) and affine (RealNVP)."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from pyro_flowguides.nn import MLP
from pyro_flowguides.nn.ordering import as_permutation
from pyro_flowguides.transforms.bounds import soft_bound
from pyro_flowguides.transforms.conditional import ContextFlow
from pyro_flowguides.transforms.flow import ConditionerFlow, Theta

__all__ = ["AdditiveCoupling", "AffineCoupling", "ConditionalAdditiveCoupling", "ConditionalAffineCoupling"]

#: Largest absolute log-scale of one affine coupling.
LOG_SCALE_BOUND = 2.0


class _Coupling(ConditionerFlow):
    """The first ⌊D/2⌋ coordinates of an order are kept, and parametrize an elementwise map of the others."""

    #: Number of parameters of the map of one coordinate.
    outputs: ClassVar[int]

    kept: Tensor
    changed: Tensor
    rank: Tensor

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        *,
        order: Sequence[int] | Tensor | None = None,
        activation: Callable[[Tensor], Tensor] = nn.functional.elu,
        cache_size: int = 1,
    ) -> None:
        super().__init__(input_dim, cache_size=cache_size)
        indices, split = as_permutation(type(self).__name__, input_dim, order), input_dim // 2
        self.register_buffer("kept", indices[:split].clone())
        self.register_buffer("changed", indices[split:].clone())
        self.register_buffer("rank", indices.argsort())
        self.conditioner = MLP(split, hidden_dims, self.outputs * (input_dim - split), activation)

    def _split(self, value: Tensor, theta: Theta) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return the kept coordinates, the changed coordinates, and the parameters of their map."""
        kept = value[..., self.kept]
        return kept, value[..., self.changed], self.conditioner.run(kept, theta).chunk(self.outputs, -1)

    def _join(self, kept: Tensor, changed: Tensor) -> Tensor:
        kept = kept.expand(*changed.shape[:-1], -1)
        return torch.cat([kept, changed], -1)[..., self.rank]


class AdditiveCoupling(_Coupling):
    r"""Additive coupling (NICE): a network of one half of the coordinates shifts the other half.

    .. math:: y_A = x_A, \quad y_B = x_B + m(x_A), \qquad \log|\det J| = 0

    Successive layers must alternate the order, as the recipe does. With D = 1 nothing is kept and the flow is a
    constant shift.

    Cost: one network pass in both directions. Starts at the identity.

    Args:
        input_dim: number of coordinates, D.
        hidden_dims: widths of the network.
        order: a permutation of ``range(D)`` whose first ⌊D/2⌋ entries are kept (default: natural order).
        activation: elementwise nonlinearity.

    Shapes:
        input, output ``(..., D)``; ladj ``(...)``.

    Raises:
        ValueError: if ``order`` is not a permutation.

    References:
        L. Dinh, D. Krueger, Y. Bengio (2015). NICE: non-linear independent components estimation. arXiv:1410.8516.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import AdditiveCoupling
        >>> AdditiveCoupling(4, [8])(torch.randn(5, 4)).shape
        torch.Size([5, 4])
    """

    outputs = 1

    def _forward_formula(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        kept, changed, (shift,) = self._split(x, theta)
        return self._join(kept, changed + shift), x.new_zeros(())

    def _inverse_formula(self, y: Tensor, theta: Theta, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, changed, (shift,) = self._split(y, theta)
        return self._join(kept, changed - shift), y.new_zeros(())


class AffineCoupling(_Coupling):
    r"""Affine coupling (RealNVP): a network of one half of the coordinates scales and shifts the other half.

    .. math:: y_A = x_A, \quad y_B = e^{a(x_A)} \odot x_B + m(x_A), \quad a = 2 \tanh(s / 2), \qquad
        \log|\det J| = \sum_i a_i

    Successive layers must alternate the order, as the recipe does. With D = 1 nothing is kept and the flow is one
    affine map.

    Cost: one network pass in both directions. Starts at the identity.

    Args:
        input_dim: number of coordinates, D.
        hidden_dims: widths of the network.
        order: a permutation of ``range(D)`` whose first ⌊D/2⌋ entries are kept (default: natural order).
        activation: elementwise nonlinearity.

    Shapes:
        input, output ``(..., D)``; ladj ``(...)``.

    Raises:
        ValueError: if ``order`` is not a permutation.

    References:
        L. Dinh, J. Sohl-Dickstein, S. Bengio (2017). Density estimation using Real NVP. arXiv:1605.08803.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import AffineCoupling
        >>> y, ladj = AffineCoupling(4, [8], order=[3, 2, 1, 0]).forward_and_ladj(torch.randn(5, 4))
        >>> y.shape, ladj.shape
        (torch.Size([5, 4]), torch.Size([5]))
    """

    outputs = 2

    def _forward_formula(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        kept, changed, (raw, shift) = self._split(x, theta)
        log_scale = soft_bound(raw, LOG_SCALE_BOUND)
        return self._join(kept, changed * log_scale.exp() + shift), log_scale.sum(-1)

    def _inverse_formula(self, y: Tensor, theta: Theta, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, changed, (raw, shift) = self._split(y, theta)
        log_scale = soft_bound(raw, LOG_SCALE_BOUND)
        return self._join(kept, (changed - shift) * (-log_scale).exp()), log_scale.sum(-1)


class ConditionalAdditiveCoupling(ContextFlow, family=AdditiveCoupling): ...


class ConditionalAffineCoupling(ContextFlow, family=AffineCoupling): ...
