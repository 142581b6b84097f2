"""Laplace approximation in many dimensions: a diagonal and a few directions, from products with the Hessian."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

from pyro_flowguides.transforms.algebra import stretch
from pyro_flowguides.transforms.families.low_rank_affine import DEFAULT_RANK

__all__ = ["MAX_FLAT_SCALE", "Density", "LowRankGaussian", "low_rank_laplace"]

Density: TypeAlias = Callable[[Tensor], Tensor]
#: HessianProduct of the negative Hessian with rows ``(M, D)``.
HessianProduct: TypeAlias = Callable[[Tensor], Tensor]
#: From a scale ``(D,)``, directions ``(R, D)`` and their eigenvalues ``(R,)`` to the diagonal of the scaled matrix with
#: these eigenvalues set to one, and to its standard error. Directions add nothing to a coordinate without curvature.
Curvature: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

#: Largest scale where the density is not log-concave.
MAX_FLAT_SCALE = 1.0
#: Curvature below which a coordinate counts as flat.
MIN_CURVATURE = 1e-12
#: Up to this many dimensions the diagonal of the Hessian is computed exactly.
EXACT_DIM = 4096
#: Random sign vectors for each estimate of the diagonal in more dimensions.
NUM_PROBES = 512
#: Products with the Hessian that are evaluated together.
CHUNK_SIZE = 64
#: Vectors by which the Krylov space grows, and its final dimension.
BLOCK_SIZE, KRYLOV_DIM = 8, 160
#: Fits of the diagonal without directions, and most fits that alternate with fits of the directions.
DIAGONAL_ROUNDS, MAX_ROUNDS = 3, 10
#: Gain per coordinate, in nats, below which the diagonal is not fitted again.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class LowRankGaussian:
    r"""The normal distribution of :math:`\ell + S (I + Q (e^\kappa - 1) Q^\top)\,\varepsilon`.

    :class:`~pyro_flowguides.transforms.LowRankAffine` maps the standard normal to it.

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
        """Map standard normal noise ``(S, D)`` to draws ``(S, D)``."""
        return self.loc + self.scale * stretch(noise, self.directions, self.log_stretch)

    @property
    def entropy(self) -> Tensor:
        """The differential entropy, in nats."""
        unit = 0.5 * self.loc.shape[0] * math.log(2 * math.pi * math.e)
        return self.scale.log().sum() + self.log_stretch.sum() + unit


def low_rank_laplace(
    density: Density, point: Tensor, rank: int = DEFAULT_RANK, *, seed: int = 0, exact_dim: int = EXACT_DIM
) -> LowRankGaussian:
    r"""Approximate a density at a point by a Gaussian of diagonal plus low-rank form, fitted to the Hessian in ELBO.

    With H the negative Hessian of the log density, the divergence of
    :math:`q = N(\ell, S (I + Q (e^{2\kappa} - 1) Q^\top) S)` from :math:`N(\ell, H^{-1})` is stationary where the
    columns of Q are eigenvectors of :math:`P = S H S`, with eigenvalues :math:`\lambda`, and

    .. math:: \kappa = -\tfrac{1}{2} \log \lambda, \qquad \mathrm{diag}\left(P - Q (\lambda - 1) Q^\top\right) = 1 .

    The two conditions are met in turn. The eigenvectors are the Ritz vectors of a block Krylov space with the largest
    gain :math:`\lambda - 1 - \log \lambda`, whether narrow or wide. The diagonal of H comes from D products with unit
    vectors in up to ``exact_dim`` dimensions. In more dimensions, the diagonal of P is estimated from products with
    random signs. The scale so far is divided out and the part of the directions subtracted, so that only the remainder
    is subject to noise; an entry below its standard error is replaced by the standard error.

    Where the density is not log-concave, the absolute value of its negative curvature is used, and the scale is
    bounded: by 1 in a coordinate, by the scale of the coordinates in a direction.

    Args:
        density: log density, ``(S, D) -> (S,)``, twice differentiable.
        point: ℓ ``(D,)``, preferably a mode.
        rank: R ≤ D, at most 160.
        seed: seed of the probes; the global generator is not touched.
        exact_dim: most dimensions in which the diagonal is computed exactly.

    Returns:
        the Gaussian, with the dtype and device of the point.

    Raises:
        ValueError: if ``rank`` is out of range.
        RuntimeError: if the Hessian is not finite at the point, or an operation of the density has no second
            derivative.

    Cost: D + 160 to D + 1,760 products with the Hessian in up to 4,096 dimensions, 2,208 to 8,416 in more, up to 64 at
    once. Memory O(D), for a Krylov space of dimension 160; no matrix has size D × D.

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
    scale = torch.full_like(point, MAX_FLAT_SCALE, dtype=torch.float64)
    curvature = _exact_curvature(hessian, scale) if dim <= exact_dim else _probed_curvature(hessian, generator)
    directions, eigenvalues = scale.new_zeros(1, dim), scale.new_ones(1)
    for _ in range(DIAGONAL_ROUNDS):
        scale = _rescaled(scale, *curvature(scale, directions, eigenvalues))
    directions, eigenvalues, log_stretch = _extremes(hessian, scale, rank, generator, eps)
    for _ in range(MAX_ROUNDS):
        remainder, noise = curvature(scale, directions, eigenvalues)
        if _gain(remainder).mean() < TOLERANCE:
            break
        scale = _rescaled(scale, remainder, noise)
        directions, eigenvalues, log_stretch = _extremes(hessian, scale, rank, generator, eps)
    return LowRankGaussian(point.detach().clone(), scale.to(point), directions.mT.to(point), log_stretch.to(point))


def _negative_hessian(density: Density, point: Tensor) -> HessianProduct:
    """Return a function that multiplies rows ``(M, D)`` by the negative Hessian, all at once."""

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


def _exact_curvature(hessian: HessianProduct, like: Tensor) -> Curvature:
    """Return the curvature from products with all unit vectors, computed once."""
    dim = len(like)
    chunks = torch.arange(dim, device=like.device).split(CHUNK_SIZE)
    units = (torch.nn.functional.one_hot(rows, dim).to(like) for rows in chunks)
    diagonal = torch.cat([(hessian(unit) * unit).sum(-1) for unit in units])

    def curvature(scale: Tensor, directions: Tensor, eigenvalues: Tensor) -> tuple[Tensor, Tensor]:
        own, change = scale**2 * diagonal, (1 - eigenvalues) @ directions**2
        return torch.where(own.abs() > MIN_CURVATURE, own + change, own), torch.zeros_like(own)

    return curvature


def _probed_curvature(hessian: HessianProduct, generator: torch.Generator) -> Curvature:
    """Return the curvature from products with random signs, with the error of what scale and directions leave over."""

    def curvature(scale: Tensor, directions: Tensor, eigenvalues: Tensor) -> tuple[Tensor, Tensor]:
        first = second = own = torch.zeros_like(scale)
        for _ in range(NUM_PROBES // CHUNK_SIZE):
            signs = (2 * torch.randint(2, (CHUNK_SIZE, len(scale)), generator=generator, device="cpu") - 1).to(scale)
            images = scale * hessian(scale * signs)
            own = own + images.square().sum(0)
            images = images + ((signs @ directions.mT) * (1 - eigenvalues)) @ directions
            first, second = first + (signs * images).sum(0), second + images.square().sum(0)
        curved = own / NUM_PROBES > MIN_CURVATURE**2
        mean, square = curved * first / NUM_PROBES, curved * second / NUM_PROBES
        return mean, ((square - mean**2).clamp(min=0) / NUM_PROBES).sqrt()

    return curvature


def _rescaled(scale: Tensor, curvature: Tensor, noise: Tensor) -> Tensor:
    """Return the scale at which the curvature is one, bounded where there is no positive curvature."""
    rescaled = scale * torch.maximum(curvature.abs(), noise).clamp(min=MIN_CURVATURE).rsqrt()
    return torch.where(curvature + 3 * noise > MIN_CURVATURE, rescaled, rescaled.clamp(max=MAX_FLAT_SCALE))


def _log_stretch(eigenvalues: Tensor, eps: float) -> Tensor:
    """Return κ, without a stretch along directions that are flat up to rounding or curved upwards."""
    log_stretch = -0.5 * eigenvalues.abs().log()
    is_curved = eigenvalues > 10 * eps * eigenvalues.abs().max()
    return torch.where(is_curved, log_stretch, log_stretch.clamp(max=0))


def _gain(curvature: Tensor) -> Tensor:
    """Return the nats by which the best scale beats a unit scale at this curvature."""
    magnitude = curvature.abs().clamp(min=MIN_CURVATURE)
    return (magnitude - 1 - magnitude.log()) / 2


def _extremes(
    hessian: HessianProduct, scale: Tensor, rank: int, generator: torch.Generator, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the Ritz pairs of the scaled Hessian with the largest gain: vectors (rows), eigenvalues and κ."""
    basis, images = _krylov(lambda rows: scale * hessian(scale * rows), scale, generator)
    projected = basis @ images.mT
    eigenvalues, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
    log_stretch = _log_stretch(eigenvalues, eps)
    chosen = _gain((-2 * log_stretch).exp()).topk(rank).indices
    return vectors[:, chosen].mT @ basis, eigenvalues[chosen], log_stretch[chosen]


def _krylov(product: HessianProduct, like: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return orthonormal rows of a block Krylov space, or of the whole space if it is small, and their images."""
    dim = like.shape[0]
    if dim <= KRYLOV_DIM:
        basis = torch.eye(dim).to(like)
        return basis, product(basis)
    basis = images = like.new_zeros(0, dim)
    block = torch.randn(BLOCK_SIZE, dim, generator=generator, device="cpu").to(like)
    while len(basis) < KRYLOV_DIM:
        for _ in range(2):  # a single pass leaves rounding errors, which matter when the block adds little
            block = torch.linalg.qr((block - (block @ basis.mT) @ basis).mT).Q.mT
        basis, block = torch.cat([basis, block]), product(block)
        images = torch.cat([images, block])
    return basis, images
