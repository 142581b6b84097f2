"""Householder flows: rotations made of reflections."""

from torch import Tensor, nn

from pyro_flowguides.transforms.conditional import AmortizedFlow
from pyro_flowguides.transforms.flow import Flow, Theta
from pyro_flowguides.transforms.reflections import paired_vectors, reflect

__all__ = ["ConditionalHouseholder", "Householder"]


class Householder(Flow):
    r"""Householder flow: a rotation made of an even number K of reflections.

    .. math:: y = H_K \cdots H_1 x, \quad H_k = I - 2 \frac{v_k v_k^\top}{\lVert v_k \rVert^2}, \qquad \log|\det J| = 0

    K is even so that the flow can start at the identity. With D = 1 it stays there.

    Cost: O(KD) in both directions. Starts within 1e-2 of the identity.

    Args:
        input_dim: number of coordinates, D.
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
        self.vectors = nn.Parameter(paired_vectors(type(self).__name__, input_dim, reflections))

    def _forward_formula(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        return reflect(x, theta["vectors"]), x.new_zeros(())

    def _inverse_formula(self, y: Tensor, theta: Theta, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return reflect(y, theta["vectors"], transpose=True), y.new_zeros(())


class ConditionalHouseholder(AmortizedFlow, family=Householder): ...
