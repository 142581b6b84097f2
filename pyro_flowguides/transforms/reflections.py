"""Products of Householder reflections, applied to vectors."""

from numbers import Integral

import torch
from torch import Tensor

from pyro_flowguides.nn.arguments import describe
from pyro_flowguides.transforms.algebra import dot

__all__ = ["paired_vectors", "reflect"]


def reflect(x: Tensor, vectors: Tensor, *, transpose: bool = False) -> Tensor:
    r"""Apply :math:`Q = H_K \cdots H_1`, :math:`H_k = I - 2 v_k v_k^\top / \lVert v_k \rVert^2`, or :math:`Q^\top`.

    The reflections are applied to the vector one after the other, in O(KD). A zero vector reflects nothing.

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


def paired_vectors(owner: str, input_dim: int, reflections: int) -> Tensor:
    """Draw vectors ``(K, D)`` in near-equal pairs, so that the product of their reflections is near the identity.

    Raises:
        ValueError: if ``reflections`` is odd or below 2; the message names the owner.
    """
    if not isinstance(reflections, Integral) or reflections < 2 or reflections % 2:
        raise ValueError(
            f"{owner}: reflections must be even and at least 2, so that they can start as a rotation, got "
            f"{describe(reflections)}"
        )
    v = torch.randn(reflections // 2, input_dim)
    v = v / v.norm(dim=-1, keepdim=True)
    return (v[:, None] + 1e-4 * torch.randn(reflections // 2, 2, input_dim)).flatten(0, 1)
