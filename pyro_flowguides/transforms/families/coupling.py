"""Coupling flows: additive (NICE) and affine (RealNVP)."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from pyro_flowguides.nn import MLP
from pyro_flowguides.nn.ordering import as_permutation
from pyro_flowguides.transforms.conditional import ContextFlow
from pyro_flowguides.transforms.conditioner import ConditionerFlow
from pyro_flowguides.transforms.flow import Theta
from pyro_flowguides.transforms.updates import UPDATES, invert_affine

__all__ = ["AdditiveCoupling", "AffineCoupling", "ConditionalAdditiveCoupling", "ConditionalAffineCoupling"]


class _Coupling(ConditionerFlow):
    """The first ⌊D/2⌋ coordinates of an order are kept, and parametrize an elementwise map of the others."""

    #: Number of parameters of the map of one coordinate.
    outputs: ClassVar[int]
    #: The map, a name in :data:`~pyro_flowguides.transforms.updates.UPDATES`.
    update: ClassVar[str]

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

    def _affine_map(self, kept: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        """Compute log-scale and shift of the changed coordinates."""
        raise NotImplementedError

    def _update(self, raw: Tensor, shift: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        update = UPDATES[self.update]
        return update(raw, shift, update.limits(theta["gain"], stretches_draws=True))

    def _join(self, kept: Tensor, changed: Tensor) -> Tensor:
        kept = kept.expand(*changed.shape[:-1], -1)
        return torch.cat([kept, changed], -1)[..., self.rank]

    def _forward_formula(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        kept = x[..., self.kept]
        log_scale, shift = self._affine_map(kept, theta)
        return self._join(kept, x[..., self.changed] * log_scale.exp() + shift), log_scale.sum(-1)

    def _inverse_formula(self, y: Tensor, theta: Theta, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept = y[..., self.kept]
        log_scale, shift = self._affine_map(kept, theta)
        return self._join(kept, invert_affine(log_scale, shift, y[..., self.changed])), log_scale.sum(-1)


class AdditiveCoupling(_Coupling):
    r"""Additive coupling (NICE): a network of one half of the coordinates shifts the other half.

    .. math:: y_A = x_A, \quad y_B = x_B + \delta(m(x_A)), \qquad \log|\det J| = 0

    At a small gain of the network, δ damps large shifts (:mod:`~pyro_flowguides.transforms.updates`); else it is the
    identity.

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
    update = "shift"

    def _affine_map(self, kept: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        raw = self.conditioner.run(kept, theta)
        _, shift = self._update(raw, raw, theta)
        return shift.new_zeros(1), shift


class AffineCoupling(_Coupling):
    r"""Affine coupling (RealNVP): a network of one half of the coordinates scales and shifts the other half.

    .. math:: y_A = x_A, \quad y_B = e^{a(x_A)} \odot x_B + \delta(m(x_A)), \quad a = b \tanh(s / b), \qquad
        \log|\det J| = \sum_i a_i

    The bound b is 2 for negative s and 2γ for positive, with the gain γ of the network. At a small gain, δ damps large
    shifts; else it is the identity. Both keep training stable (:mod:`~pyro_flowguides.transforms.updates`).

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
    update = "affine"

    def _affine_map(self, kept: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        raw, shift = self.conditioner.run(kept, theta).chunk(2, -1)
        return self._update(raw, shift, theta)


class ConditionalAdditiveCoupling(ContextFlow, family=AdditiveCoupling): ...


class ConditionalAffineCoupling(ContextFlow, family=AffineCoupling): ...
