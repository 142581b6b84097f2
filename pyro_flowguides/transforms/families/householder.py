"""Products of Householder reflections."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_flowguides.transforms.algebra import dot
from pyro_flowguides.transforms.flow import AmortizedFlow, Flow, Known, Theta

__all__ = [
    "ConditionalHouseholder",
    "Householder",
    "conditional_householder",
    "householder",
    "paired_vectors",
    "reflect",
]


def reflect(x: Tensor, vectors: Tensor, *, transpose: bool = False) -> Tensor:
    r"""Apply :math:`Q = H_K \cdots H_1`, :math:`H_k = I - 2 v_k v_k^\top / \lVert v_k \rVert^2`, or :math:`Q^\top`.

    Reflections are applied to the vector one after the other, O(KD); a zero vector reflects nothing.

    Args:
        x: ``(..., D)``.
        vectors: ``(..., K, D)``, with any batch dimensions.
        transpose: apply the transpose, which is the inverse.
    """
    square = (vectors * vectors).sum(-1, keepdim=True)
    scaled = 2 * vectors / torch.where(square == 0, 1, square)
    pairs = list(zip(vectors.unbind(-2), scaled.unbind(-2), strict=True))
    for v, u in reversed(pairs) if transpose else pairs:
        x = x - dot(x, v)[..., None] * u
    return x


def paired_vectors(input_dim: int, reflections: int) -> Tensor:
    """Random vectors ``(K, D)`` in near-equal pairs, so that their product of reflections is close to the identity."""
    if reflections < 2 or reflections % 2:
        raise ValueError(
            f"reflections must be even and at least 2, so that they can start as a rotation: {reflections}"
        )
    v = torch.randn(reflections // 2, input_dim)
    v = v / v.norm(dim=-1, keepdim=True)
    return (v[:, None] + 1e-4 * torch.randn(reflections // 2, 2, input_dim)).flatten(0, 1)


class Householder(Flow):
    r"""Householder flow: a rotation made of an even number K of reflections.

    .. math:: y = H_K \cdots H_1 x, \quad H_k = I - 2 \frac{v_k v_k^\top}{\lVert v_k \rVert^2}, \qquad \log|\det J| = 0

    K is even so that the flow can start at the identity; with D = 1 it stays there.

    Cost: O(KD) in both directions.

    Args:
        input_dim: D.
        reflections: K, even.

    Shapes:
        input, output ``(..., D)``; ladj ``(...)``.

    Raises:
        ValueError: if ``reflections`` is odd or below 2.

    References:
        J. Tomczak, M. Welling (2016). Improving variational auto-encoders using Householder flow. arXiv:1611.09630.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import Householder
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(Householder(3)(x).norm(dim=-1), x.norm(dim=-1), atol=1e-6)
        True
    """

    def __init__(self, input_dim: int, reflections: int = 2, *, cache_size: int = 1) -> None:
        super().__init__(input_dim, cache_size=cache_size)
        self.vectors = nn.Parameter(paired_vectors(input_dim, reflections))

    def _push(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        return reflect(x, theta["vectors"]), x.new_zeros(())

    def _pull(self, y: Tensor, theta: Theta, known: Known = None) -> tuple[Tensor, Tensor]:
        return reflect(y, theta["vectors"], transpose=True), y.new_zeros(())


class ConditionalHouseholder(AmortizedFlow):
    """Householder flow whose vectors are a function of a context.

    Args:
        input_dim: D.
        context_dim: width of the context.
        hidden_dims: hidden layers of the hypernetwork, ``()`` for a linear map.
        **options: those of :class:`Householder`.

    Shapes:
        context ``(..., context_dim)``, broadcast against the batch dimensions of the input.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import ConditionalHouseholder
        >>> ConditionalHouseholder(3, context_dim=4).condition(torch.randn(7, 4))(torch.randn(7, 3)).shape
        torch.Size([7, 3])
    """

    family = Householder


householder, conditional_householder = Householder, ConditionalHouseholder
