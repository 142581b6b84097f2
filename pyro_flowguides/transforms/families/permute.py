"""Permutations of the coordinates."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_flowguides.nn.arguments import check_count, describe
from pyro_flowguides.nn.ordering import as_permutation
from pyro_flowguides.transforms.flow import Flow, Theta

__all__ = ["Permute", "Reverse", "permute"]


class Permute(Flow):
    r"""A fixed permutation of the coordinates, which is saved and moved with the flow that contains it.

    .. math:: y_i = x_{\pi_i}, \qquad \log|\det J| = 0

    Cost: O(D) in both directions.

    Args:
        permutation: :math:`\pi`, a permutation of ``range(D)``.

    Shapes:
        input, output ``(..., D)``; ladj ``(...)``.

    Raises:
        ValueError: if ``permutation`` is not a permutation.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import Permute
        >>> Permute([2, 0, 1])(torch.tensor([10.0, 11.0, 12.0]))
        tensor([12., 10., 11.])
    """

    permutation: Tensor
    rank: Tensor

    def __init__(self, permutation: Sequence[int] | Tensor, *, cache_size: int = 1) -> None:
        owner = type(self).__name__
        if not hasattr(permutation, "__len__"):
            raise TypeError(f"{owner}: permutation must be a sequence of indices, got {describe(permutation)}")
        super().__init__(len(permutation), cache_size=cache_size)
        order = as_permutation(owner, self.input_dim, permutation, "permutation")
        self.register_buffer("permutation", order)
        self.register_buffer("rank", order.argsort())

    def _forward_formula(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        return x[..., self.permutation], x.new_zeros(())

    def _inverse_formula(self, y: Tensor, theta: Theta, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y[..., self.rank], y.new_zeros(())


class Reverse(Permute):
    """The coordinates in reverse order: the usual permutation between autoregressive layers.

    Cost: O(D) in both directions.

    Args:
        input_dim: number of coordinates, D.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import Reverse
        >>> Reverse(3)(torch.tensor([1.0, 2.0, 3.0]))
        tensor([3., 2., 1.])
    """

    def __init__(self, input_dim: int, *, cache_size: int = 1) -> None:
        super().__init__(range(check_count("Reverse", "input_dim", input_dim))[::-1], cache_size=cache_size)


def permute(input_dim: int, permutation: Sequence[int] | Tensor | None = None) -> Permute:
    """Make a :class:`Permute`, of a random permutation by default.

    Raises:
        ValueError: if ``permutation`` is not a permutation of ``range(input_dim)``.
    """
    dim = check_count("permute", "input_dim", input_dim)
    if permutation is None:
        return Permute(torch.randperm(dim))
    return Permute(as_permutation("permute", dim, permutation, "permutation"))
