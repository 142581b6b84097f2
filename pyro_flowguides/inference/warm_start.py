"""Where the affine part of a flow guide starts: Gaussians along the way to a mode, chosen by ELBO."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from pyro_flowguides.inference.low_rank_laplace import LowRankGaussian, low_rank_laplace

__all__ = ["Gaussian", "LowRankStart", "low_rank_warm_start", "warm_start"]

Density = Callable[[Tensor], Tensor]

#: Standard deviations of the isotropic candidates around the plain start, beside the guide's own.
PLAIN_SCALES = (0.1, 0.3, 1.0)
#: Largest standard deviation along a direction in which the density is not log-concave.
FLAT_SCALE = 1.0
#: What stands for the negative log density where there is none.
OUT_OF_REACH = 1e20


@dataclass(frozen=True)
class Gaussian:
    """A candidate start: location ``(D,)``, lower-triangular scale ``(D, D)``, where it comes from, its ELBO."""

    loc: Tensor
    scale_tril: Tensor
    origin: str
    elbo: float = -math.inf

    def scored(self, density: Density, noise: Tensor) -> Gaussian:
        """The same with its ELBO, over common noise ``(S, D)``; -inf where the density is not finite."""
        with torch.no_grad():
            log_p = density(self.loc + noise @ self.scale_tril.mT)
        entropy = self.scale_tril.diagonal().log().sum() + 0.5 * self.loc.shape[0] * math.log(2 * math.pi * math.e)
        elbo = float(log_p.mean() + entropy)
        return Gaussian(self.loc, self.scale_tril, self.origin, elbo if math.isfinite(elbo) else -math.inf)


def warm_start(
    density: Density, start: Tensor, *, starts: int = 4, iterations: int = 100, draws: int = 128, seed: int = 0
) -> list[Gaussian]:
    r"""The best Gaussian start by ELBO among plain ones and Laplace approximations along L-BFGS paths.

    From the guide's start and some random points around it, L-BFGS climbs the log density; at points along each path
    the Gaussian with the local Hessian's covariance is a candidate, as in Pathfinder, there and at the maximum of the
    local quadratic: a Gaussian target is thus found from any point, however badly it is scaled. Directions in which
    the density is not log-concave there get a bounded scale. Choosing by ELBO takes care of funnels (where the mode
    lies at a degenerate or infinite point, earlier points of the path or the plain start win) and of several modes
    (the best single one wins).

    Args:
        density: log density, ``(S, D) -> (S,)``.
        start: the guide's own location ``(D,)``.
        starts: number of L-BFGS paths.
        iterations: L-BFGS iterations per path.
        draws: draws behind each ELBO, in pairs of opposite sign.
        seed: of the starting points and draws; the global generator is not touched.

    Returns:
        all candidates, best first.

    References:
        L. Zhang, B. Carpenter, A. Gelman, A. Vehtari (2022). Pathfinder: parallel quasi-Newton variational inference.
        arXiv:2108.03782.
    """
    generator = torch.Generator().manual_seed(seed)
    dim = start.shape[0]
    half = torch.randn(draws // 2, dim, generator=generator, dtype=start.dtype, device="cpu").to(start.device)
    noise = torch.cat([half, -half])  # without a mean of its own, which a location could make up for
    eye = torch.eye(dim, dtype=start.dtype, device=start.device)
    candidates = [
        Gaussian(start, scale * eye, f"plain start, scale {scale}").scored(density, noise) for scale in PLAIN_SCALES
    ]
    ends: list[Tensor] = []
    for path in range(starts):
        offset = torch.randn(dim, generator=generator, dtype=start.dtype, device="cpu").to(start.device) if path else 0
        points = _climb(density, start + offset, iterations)
        if any(torch.allclose(points[-1], end, rtol=1e-3, atol=1e-3) for end in ends):
            continue  # the same mode again
        ends.append(points[-1])
        candidates += [
            gaussian.scored(density, noise)
            for point in _spaced(points)
            for gaussian in _laplace(density, point, f"path {path}")
        ]
    candidates.sort(key=lambda candidate: -candidate.elbo)
    return candidates


@dataclass(frozen=True)
class LowRankStart:
    """A candidate start in many dimensions: the Gaussian, where it comes from, its ELBO."""

    gaussian: LowRankGaussian
    origin: str
    elbo: float


def low_rank_warm_start(
    density: Density, start: Tensor, *, iterations: int = 300, draws: int = 32, seed: int = 0
) -> list[LowRankStart]:
    """As :func:`warm_start` where a dense Hessian costs too much: one L-BFGS path, and at its end the low-rank Laplace
    approximation beside the plain starts.

    Returns:
        all candidates, best first.
    """
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(draws // 2, start.shape[0], generator=generator, dtype=start.dtype, device="cpu").to(
        start.device
    )
    noise = torch.cat([half, -half])
    none = start.new_zeros(len(start), 0), start.new_zeros(0)
    found = [
        (LowRankGaussian(start, torch.full_like(start, scale), *none), f"plain start, scale {scale}")
        for scale in PLAIN_SCALES
    ]
    top = _climb(density, start, iterations)[-1]
    with contextlib.suppress(RuntimeError):  # an operation of the model may have no second derivative
        found.append((low_rank_laplace(density, top, seed=seed), "low-rank Laplace"))
    candidates = []
    for gaussian, origin in found:
        with torch.no_grad():
            elbo = float(density(gaussian.draw(noise)).mean() + gaussian.entropy)
        candidates.append(LowRankStart(gaussian, origin, elbo if math.isfinite(elbo) else -math.inf))
    candidates.sort(key=lambda candidate: -candidate.elbo)
    return candidates


def _climb(density: Density, start: Tensor, iterations: int) -> list[Tensor]:
    """The points of an L-BFGS run, as far as they are finite; SciPy's line search copes with bad scaling."""
    points: list[Tensor] = [start.detach().clone()]

    def loss(z: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(z).to(start).requires_grad_()
        try:
            value = -density(point[None]).sum()
            (gradient,) = torch.autograd.grad(value, point)
        except (ValueError, RuntimeError):  # a model may refuse extreme values
            return OUT_OF_REACH, np.zeros_like(z)
        if not bool(value.isfinite() & gradient.isfinite().all()):
            return OUT_OF_REACH, np.zeros_like(z)
        return float(value.detach()), gradient.double().cpu().numpy()

    def note(z: np.ndarray) -> None:
        points.append(torch.from_numpy(z.copy()).to(start))

    options = {"maxiter": iterations, "maxcor": 20, "gtol": 1e-6, "ftol": 1e-12}
    first = start.detach().double().cpu().numpy()
    minimize(loss, first, jac=True, method="L-BFGS-B", callback=note, options=options)
    return points


def _spaced(points: list[Tensor]) -> Iterator[Tensor]:
    """The last point and earlier ones at growing distances from the first: funnels are best met on the way in."""
    last = len(points) - 1
    chosen, step, index = {last}, 1, 1
    while index < last:
        chosen.add(index)
        index, step = index + step, step + index
    for index in sorted(chosen, reverse=True):
        yield points[index]


def _laplace(density: Density, point: Tensor, origin: str) -> Iterator[Gaussian]:
    """Gaussians with the covariance of the local Hessian, non-concave directions bounded: here and a Newton step on."""

    def single(z: Tensor) -> Tensor:
        return density(z[None]).sum()

    try:
        gradient = torch.autograd.functional.jacobian(single, point)
        hessian = torch.autograd.functional.hessian(single, point)
    except RuntimeError:  # an operation of the model may have no second derivative
        return
    if not bool(gradient.isfinite().all() and hessian.isfinite().all()):
        return
    precision, vectors = torch.linalg.eigh(-(hessian + hessian.mT) / 2)
    variance = 1 / precision.clamp(min=1 / FLAT_SCALE**2) if bool((precision <= 0).any()) else 1 / precision
    covariance = (vectors * variance) @ vectors.mT
    scale_tril, info = torch.linalg.cholesky_ex((covariance + covariance.mT) / 2)
    if int(info) == 0:
        yield Gaussian(point, scale_tril, f"{origin}, Laplace")
        yield Gaussian(point + covariance @ gradient, scale_tril, f"{origin}, Laplace after a Newton step")
