"""Laplace approximation in many dimensions: a diagonal and a few directions, from products with the Hessian alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pyro_flowguides.transforms.algebra import stretch
from pyro_flowguides.transforms.families.low_rank_affine import DEFAULT_RANK

__all__ = ["LowRankGaussian", "low_rank_laplace"]

Density = Callable[[Tensor], Tensor]
Product = Callable[[Tensor], Tensor]
#: Scale ``(D,)``, directions ``(R, D)`` and their eigenvalues ``(R,)`` -> the diagonal of the scaled matrix where these
#: eigenvalues are set to one, and its standard error. A coordinate without curvature gets none from the directions.
Curvature = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

#: Largest scale of a coordinate in which the density is not log-concave.
FLAT_SCALE = 1.0
#: Curvature below which a coordinate counts as flat.
FLAT = 1e-12
#: Up to this many dimensions the diagonal of the Hessian is computed exactly; beyond, from so many probes each time.
EXACT_DIM, PROBES = 4096, 512
#: Products with the Hessian that are evaluated at once.
CHUNK = 64
#: Vectors that the Krylov space grows by, and their number at its end.
BLOCK, KRYLOV_DIM = 8, 160
#: Times that the diagonal is fitted: without directions, and at most in turn with them.
DIAGONAL_ROUNDS, ROUNDS = 3, 10
#: Gain per coordinate, in nats, for which the diagonal is not fitted again.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class LowRankGaussian:
    r"""The normal distribution of :math:`\ell + S (I + Q (e^\kappa - 1) Q^\top)\,\varepsilon`.

    It is what :class:`~pyro_flowguides.transforms.LowRankAffine` makes of the standard normal.

    Attributes:
        loc: location ℓ ``(D,)``.
        scale: diagonal of S ``(D,)``.
        directions: Q, orthonormal columns ``(D, R)``.
        log_stretch: κ ``(R,)``.
    """

    loc: Tensor
    scale: Tensor
    directions: Tensor
    log_stretch: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """``noise (S, D) -> draws (S, D)``."""
        return self.loc + self.scale * stretch(noise, self.directions, self.log_stretch)

    @property
    def entropy(self) -> Tensor:
        """Its differential entropy, in nats."""
        unit = 0.5 * self.loc.shape[0] * math.log(2 * math.pi * math.e)
        return self.scale.log().sum() + self.log_stretch.sum() + unit


def low_rank_laplace(density: Density, point: Tensor, rank: int = DEFAULT_RANK, *, seed: int = 0) -> LowRankGaussian:
    r"""The Laplace approximation at a point, by a Gaussian of diagonal plus low-rank form that fits it in ELBO.

    With H the negative Hessian of the log density, the divergence of
    :math:`q = N(\ell, S (I + Q (e^{2\kappa} - 1) Q^\top) S)` from :math:`N(\ell, H^{-1})` is stationary where the
    columns of Q are eigenvectors of :math:`P = S H S`, with eigenvalues :math:`\lambda`, and

    .. math:: \kappa = -\tfrac{1}{2} \log \lambda, \qquad \mathrm{diag}\left(P - Q (\lambda - 1) Q^\top\right) = 1 .

    The two conditions are met in turn. Eigenvectors are Ritz vectors of a block Krylov space, those of the largest gain
    :math:`\lambda - 1 - \log \lambda`, be they narrow or wide. The diagonal of H comes from D products with unit
    vectors up to 4,096 dimensions. Beyond, that of P is estimated from products with random signs, in the coordinates
    scaled so far and without the part of the directions, so that only what these leave over is subject to noise; an
    entry that the noise hides is taken to be as large as the noise.

    Where the density is not log-concave, its negative curvature is taken by its absolute value and the scale bounded:
    by 1 in a coordinate, by the scale of the coordinates in a direction.

    Args:
        density: log density, ``(S, D) -> (S,)``, twice differentiable.
        point: ℓ ``(D,)``, preferably a mode.
        rank: R ≤ D, at most 160.
        seed: of the probes; the global generator is not touched.

    Returns:
        the Gaussian, with the dtype and device of the point.

    Raises:
        ValueError: if ``rank`` is out of range.
        RuntimeError: if the Hessian is not finite at the point, or an operation of the density has no second
            derivative.

    Cost: up to 4,096 dimensions D + 160 to D + 1,760 products with the Hessian, beyond 2,208 to 8,416, up to 64 at
    once. Memory O(D), for a Krylov space of dimension 160; no matrix is of size D × D.

    References:
        C. Bekas, E. Kokiopoulou, Y. Saad (2007). An estimator for the diagonal of a matrix. Appl. Numer. Math. 57.
        G. Golub, R. Underwood (1977). The block Lanczos method for computing eigenvalues. Mathematical Software III.

    Example:
        >>> import torch
        >>> precision = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> gaussian = low_rank_laplace(lambda z: -0.5 * ((z @ precision) * z).sum(-1), torch.zeros(2), rank=2)
        >>> root = gaussian.draw(torch.eye(2))
        >>> torch.allclose(root.T @ root, precision.inverse(), atol=1e-4)
        True
    """
    dim = point.shape[0]
    if not 1 <= rank <= min(dim, KRYLOV_DIM):
        raise ValueError(f"low_rank_laplace: rank must lie in 1..{min(dim, KRYLOV_DIM)}, got {rank}")
    generator = torch.Generator().manual_seed(seed)
    hessian, eps = _negative_hessian(density, point.detach()), torch.finfo(point.dtype).eps
    scale = torch.full_like(point, FLAT_SCALE, dtype=torch.float64)
    curvature = _exact_curvature(hessian, scale) if dim <= EXACT_DIM else _probed_curvature(hessian, generator)
    directions, eigenvalues = scale.new_zeros(1, dim), scale.new_ones(1)
    for _ in range(DIAGONAL_ROUNDS):
        scale = _rescaled(scale, *curvature(scale, directions, eigenvalues))
    directions, eigenvalues, log_stretch = _extremes(hessian, scale, rank, generator, eps)
    for _ in range(ROUNDS):
        rest, noise = curvature(scale, directions, eigenvalues)
        if _gain(rest).mean() < TOLERANCE:
            break
        scale = _rescaled(scale, rest, noise)
        directions, eigenvalues, log_stretch = _extremes(hessian, scale, rank, generator, eps)
    return LowRankGaussian(point.detach().clone(), scale.to(point), directions.mT.to(point), log_stretch.to(point))


def _negative_hessian(density: Density, point: Tensor) -> Product:
    """A function of rows ``(M, D)``: their products with the negative Hessian, evaluated together."""

    @cache
    def graph(rows: int) -> tuple[Tensor, Tensor]:
        z = point.expand(rows, -1).clone().requires_grad_()
        return z, torch.autograd.grad(-density(z).sum(), z, create_graph=True)[0]

    def product(vectors: Tensor) -> Tensor:
        z, gradient = graph(len(vectors))
        if not gradient.requires_grad:  # linear in all coordinates
            return torch.zeros_like(vectors)
        (image,) = torch.autograd.grad(gradient, z, vectors.to(point), retain_graph=True, materialize_grads=True)
        if not bool(image.isfinite().all()):
            raise RuntimeError("low_rank_laplace: the Hessian of the log density is not finite at the point")
        return image.to(vectors)

    return product


def _exact_curvature(hessian: Product, like: Tensor) -> Curvature:
    """By products with all unit vectors, once."""
    dim = len(like)
    chunks = torch.arange(dim, device=like.device).split(CHUNK)
    units = (torch.nn.functional.one_hot(rows, dim).to(like) for rows in chunks)
    diagonal = torch.cat([(hessian(unit) * unit).sum(-1) for unit in units])

    def curvature(scale: Tensor, directions: Tensor, eigenvalues: Tensor) -> tuple[Tensor, Tensor]:
        own, change = scale**2 * diagonal, (1 - eigenvalues) @ directions**2
        return torch.where(own.abs() > FLAT, own + change, own), torch.zeros_like(own)

    return curvature


def _probed_curvature(hessian: Product, generator: torch.Generator) -> Curvature:
    """By products with random signs, in the coordinates scaled so far: the error is that of what is left over."""

    def curvature(scale: Tensor, directions: Tensor, eigenvalues: Tensor) -> tuple[Tensor, Tensor]:
        first = second = own = torch.zeros_like(scale)
        for _ in range(PROBES // CHUNK):
            signs = (2 * torch.randint(2, (CHUNK, len(scale)), generator=generator, device="cpu") - 1).to(scale)
            images = scale * hessian(scale * signs)
            own = own + images.square().sum(0)
            images = images + ((signs @ directions.mT) * (1 - eigenvalues)) @ directions
            first, second = first + (signs * images).sum(0), second + images.square().sum(0)
        curved = own / PROBES > FLAT**2
        mean, square = curved * first / PROBES, curved * second / PROBES
        return mean, ((square - mean**2).clamp(min=0) / PROBES).sqrt()

    return curvature


def _rescaled(scale: Tensor, curvature: Tensor, noise: Tensor) -> Tensor:
    """The scale in whose place these curvatures are one, bounded where there is none."""
    rescaled = scale * torch.maximum(curvature.abs(), noise).clamp(min=FLAT).rsqrt()
    return torch.where(curvature + 3 * noise > FLAT, rescaled, rescaled.clamp(max=FLAT_SCALE))


def _log_stretch(eigenvalues: Tensor, eps: float) -> Tensor:
    """κ; no stretch along what is flat but for rounding, or bends upwards."""
    log_stretch = -0.5 * eigenvalues.abs().log()
    sound = eigenvalues > 10 * eps * eigenvalues.abs().max()
    return torch.where(sound, log_stretch, log_stretch.clamp(max=0))


def _gain(curvature: Tensor) -> Tensor:
    """Nats that a unit scale loses to the best one where the curvature is not one."""
    magnitude = curvature.abs().clamp(min=FLAT)
    return (magnitude - 1 - magnitude.log()) / 2


def _extremes(
    hessian: Product, scale: Tensor, rank: int, generator: torch.Generator, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Those Ritz pairs (rows) of the scaled Hessian that gain most, and their κ."""
    basis, images = _krylov(lambda rows: scale * hessian(scale * rows), scale, generator)
    projected = basis @ images.mT
    eigenvalues, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
    log_stretch = _log_stretch(eigenvalues, eps)
    chosen = _gain((-2 * log_stretch).exp()).topk(rank).indices
    return vectors[:, chosen].mT @ basis, eigenvalues[chosen], log_stretch[chosen]


def _krylov(product: Product, like: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Orthonormal rows of a block Krylov space, of the whole space if it is small, and their images."""
    dim = like.shape[0]
    if dim <= KRYLOV_DIM:
        basis = torch.eye(dim).to(like)
        return basis, product(basis)
    basis = images = like.new_zeros(0, dim)
    block = torch.randn(BLOCK, dim, generator=generator, device="cpu").to(like)
    while len(basis) < KRYLOV_DIM:
        for _ in range(2):  # once leaves rounding errors behind, which matter when little is new
            block = torch.linalg.qr((block - (block @ basis.mT) @ basis).mT).Q.mT
        basis, block = torch.cat([basis, block]), product(block)
        images = torch.cat([images, block])
    return basis, images
