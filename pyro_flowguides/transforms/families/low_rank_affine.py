"""Affine maps with a diagonal and a low-rank part, for dimensions where a full triangle is too large."""

import torch
from torch import Tensor, nn

from pyro_flowguides.nn.arguments import check_count
from pyro_flowguides.transforms.algebra import orthonormal, per_coordinate, stretch
from pyro_flowguides.transforms.conditional import AmortizedFlow
from pyro_flowguides.transforms.flow import Flow, Theta

__all__ = ["ConditionalLowRankAffine", "LowRankAffine"]

#: Default rank, in dimensions of at least this size.
DEFAULT_RANK = 20


class LowRankAffine(Flow):
    r"""A diagonal affine map after a stretch along a few directions.

    .. math:: y = \ell + e^{s} \odot \left(x + Q\,(e^{\kappa} - 1) \odot (Q^\top x)\right), \qquad
        \log|\det J| = \sum_{i=1}^{D} s_i + \sum_{k=1}^{R} \kappa_k

    where Q has R orthonormal columns, those of the QR factorization of a free matrix, with fixed signs. The inverse has
    the same form with :math:`-\kappa`. With a standard normal base this is the multivariate normal with covariance
    :math:`S (I + Q (e^{2\kappa} - 1) Q^\top) S`, :math:`S = \mathrm{diag}(e^s)`: a diagonal plus a term of rank R. Its
    precision has the same form.

    Cost: O(DR) per point and O(DR²) once per call, in both directions; O(DR) memory. By default it starts exactly at
    the identity: the directions are random and nothing is stretched along them.

    Args:
        input_dim: number of coordinates, D.
        rank: R ≤ D (default: the smaller of 20 and D).
        loc: initial location, a number or ``(D,)``.
        scale: initial scale, positive, a number or ``(D,)``.

    Shapes:
        input, output ``(..., D)``; ladj ``(...)``.

    Raises:
        ValueError: if ``rank`` is not in 1..D, or the scale is not positive.

    References:
        V. Ong, D. Nott, M. Smith (2018). Gaussian variational approximation with a factor covariance structure.
        arXiv:1701.03208.
        J. Tomczak, S. Swaroop, R. Turner (2020). Efficient low rank Gaussian variational inference for neural networks.
        NeurIPS 33.

    Example:
        >>> import torch
        >>> from pyro_flowguides.transforms import LowRankAffine
        >>> y, ladj = LowRankAffine(2, rank=1, loc=1.0, scale=3.0).forward_and_ladj(torch.zeros(2))
        >>> y.tolist(), round(ladj.exp().item(), 4)
        ([1.0, 1.0], 9.0)
    """

    def __init__(
        self,
        input_dim: int,
        rank: int | None = None,
        loc: float | Tensor = 0.0,
        scale: float | Tensor = 1.0,
        *,
        cache_size: int = 1,
    ) -> None:
        super().__init__(input_dim, cache_size=cache_size)
        rank = min(DEFAULT_RANK, input_dim) if rank is None else rank
        owner = type(self).__name__
        self.rank = rank = check_count(owner, "rank", rank, 1, input_dim)
        self.loc = nn.Parameter(per_coordinate(owner, "loc", loc, input_dim))
        self.log_scale = nn.Parameter(per_coordinate(owner, "scale", scale, input_dim, positive=True).log())
        self.columns = nn.Parameter(torch.randn(input_dim, rank).to(self.loc))
        self.log_stretch = nn.Parameter(self.loc.new_zeros(rank))

    @torch.no_grad()
    def assign(self, loc: Tensor, scale: Tensor, directions: Tensor, log_stretch: Tensor) -> None:
        """Set the map.

        Args:
            loc: location ``(D,)``.
            scale: diagonal scale ``(D,)``, positive.
            directions: orthonormal columns ``(D, K)``, K ≤ R; nothing is stretched along the other R − K columns.
            log_stretch: κ ``(K,)`` of these directions.

        Raises:
            ValueError: if a shape is wrong, the scale is not positive, or the columns are not orthonormal.
        """
        shapes = [tuple(value.shape) for value in (loc, scale, directions, log_stretch)]
        dim, count = self.input_dim, log_stretch.shape[-1]
        if count > self.rank or shapes != [(dim,), (dim,), (dim, count), (count,)]:
            raise ValueError(
                f"LowRankAffine: expected loc, scale, directions and log_stretch of shapes ({dim},), ({dim},), "
                f"({dim}, K) and (K,) with K at most {self.rank}, got {', '.join(map(str, shapes))}"
            )
        if not bool((scale > 0).all()):
            raise ValueError(f"LowRankAffine: scale must be positive, got {scale.min():.3g}")
        error = directions.mT @ directions - torch.eye(count, dtype=directions.dtype, device=directions.device)
        if not bool((error.abs() < torch.finfo(directions.dtype).eps ** 0.5).all()):
            raise ValueError("LowRankAffine: directions must have orthonormal columns; take those of torch.linalg.qr")
        self.loc.copy_(loc)
        self.log_scale.copy_(scale.log())
        self.columns[:, :count] = directions.to(self.columns)  # as the first columns they come out of QR unchanged
        self.log_stretch.zero_()
        self.log_stretch[:count] = log_stretch.to(self.log_stretch)

    def _forward_formula(self, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
        stretched = stretch(x, orthonormal(theta["columns"]), theta["log_stretch"])
        return theta["loc"] + theta["log_scale"].exp() * stretched, self._ladj(theta)

    def _inverse_formula(self, y: Tensor, theta: Theta, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
        stretched = (y - theta["loc"]) * (-theta["log_scale"]).exp()
        return stretch(stretched, orthonormal(theta["columns"]), -theta["log_stretch"]), self._ladj(theta)

    @staticmethod
    def _ladj(theta: Theta) -> Tensor:
        return theta["log_scale"].sum(-1) + theta["log_stretch"].sum(-1)

    def extra_repr(self) -> str:
        return f"{self.input_dim}, rank={self.rank}"


class ConditionalLowRankAffine(AmortizedFlow, family=LowRankAffine): ...
