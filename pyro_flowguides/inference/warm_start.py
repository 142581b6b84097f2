"""Warm start of a flow guide: Gaussians along the way to a mode, of which the one with the highest ELBO is taken."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from pyro_flowguides.guides.autoflow import AutoFlow
from pyro_flowguides.inference.low_rank_laplace import MAX_FLAT_SCALE, Density, LowRankGaussian, low_rank_laplace

__all__ = ["Gaussian", "Start", "low_rank_warm_start", "warm_start"]

#: Standard deviations of the isotropic candidates around the guide's own location.
PLAIN_SCALES = (0.1, 0.3, 1.0)
#: Replaces the negative log density where it is not finite.
LARGE_LOSS = 1e20


@dataclass(frozen=True)
class Gaussian:
    """The normal distribution with location ``(D,)`` and lower-triangular scale ``(D, D)``."""

    loc: Tensor
    scale_tril: Tensor

    @property
    def scale(self) -> Tensor:
        """The diagonal of the scale ``(D,)``."""
        return self.scale_tril.diagonal()

    @property
    def entropy(self) -> Tensor:
        """The differential entropy, in nats."""
        return self.scale.log().sum() + 0.5 * self.loc.shape[0] * math.log(2 * math.pi * math.e)

    def draw(self, noise: Tensor) -> Tensor:
        """Map standard normal noise ``(S, D)`` to draws ``(S, D)``."""
        return self.loc + noise @ self.scale_tril.mT


@dataclass(frozen=True)
class Start:
    """A candidate start: the Gaussian, where it comes from, and its ELBO (-inf where that is not finite)."""

    gaussian: Gaussian | LowRankGaussian
    origin: str
    elbo: float

    def apply_to(self, guide: AutoFlow) -> None:
        """Set the affine part of a guide to the Gaussian."""
        if isinstance(self.gaussian, Gaussian):
            guide.set_affine(self.gaussian.loc, self.gaussian.scale_tril)
        else:
            low_rank = self.gaussian
            guide.set_low_rank_affine(low_rank.loc, low_rank.scale, low_rank.directions, low_rank.log_stretch)


def _ranked(
    gaussians: Iterable[tuple[Gaussian | LowRankGaussian, str]], density: Density, noise: Tensor
) -> list[Start]:
    """Rank Gaussians with their origins by the ELBO over the noise ``(S, D)``."""
    starts = []
    for gaussian, origin in gaussians:
        with torch.no_grad():
            elbo = float(density(gaussian.draw(noise)).mean() + gaussian.entropy)
        starts.append(Start(gaussian, origin, elbo if math.isfinite(elbo) else -math.inf))
    return sorted(starts, key=lambda start: -start.elbo)


def warm_start(
    density: Density, start: Tensor, *, num_paths: int = 4, iterations: int = 100, num_samples: int = 128, seed: int = 0
) -> list[Start]:
    r"""Rank Gaussian starts by ELBO: plain ones, and Laplace approximations along L-BFGS paths.

    From the guide's own location and random points around it, L-BFGS climbs the log density. At points along each path,
    as in Pathfinder, a candidate is the Gaussian with the covariance of the local Hessian; its mean is the point itself
    or the maximum of the local quadratic. A Gaussian target is thus found from any point, however badly it is scaled.
    Directions in which the density is not log-concave get a bounded scale. Ranking by ELBO copes with funnels, whose
    mode lies at a degenerate or infinite point (an earlier point of the path or a plain start wins), and with several
    modes (the best single one wins).

    Args:
        density: log density, ``(S, D) -> (S,)``.
        start: the guide's own location ``(D,)``.
        num_paths: number of L-BFGS paths.
        iterations: L-BFGS iterations per path.
        num_samples: draws for each ELBO, in pairs of opposite sign.
        seed: seed of the starting points and draws; the global generator is not touched.

    Returns:
        all candidates, best first.

    References:
        L. Zhang, B. Carpenter, A. Gelman, A. Vehtari (2022). Pathfinder: parallel quasi-Newton variational inference.
        arXiv:2108.03782.
    """
    generator = torch.Generator().manual_seed(seed)
    dim = start.shape[0]
    noise = _antithetic_noise(num_samples, start, generator)
    eye = torch.eye(dim, dtype=start.dtype, device=start.device)
    gaussians = [(Gaussian(start, scale * eye), f"plain start, scale {scale}") for scale in PLAIN_SCALES]
    ends: list[Tensor] = []
    for path in range(num_paths):
        offset = torch.randn(dim, generator=generator, dtype=start.dtype, device="cpu").to(start.device) if path else 0
        points = _climb(density, start + offset, iterations)
        if any(torch.allclose(points[-1], end, rtol=1e-3, atol=1e-3) for end in ends):
            continue  # the same mode again
        ends.append(points[-1])
        for point in _spaced(points):
            gaussians += _laplace(density, point, f"path {path}")
    return _ranked(gaussians, density, noise)


def low_rank_warm_start(
    density: Density, start: Tensor, *, iterations: int = 300, num_samples: int = 32, seed: int = 0
) -> list[Start]:
    """Rank Gaussian starts by ELBO where a dense Hessian costs too much.

    One L-BFGS path climbs the log density; the candidates are plain starts and the low-rank Laplace approximation at
    the end of the path (:func:`~pyro_flowguides.inference.low_rank_laplace.low_rank_laplace`).

    Args:
        density, start, iterations, num_samples, seed: as for :func:`warm_start`.

    Returns:
        all candidates, best first.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = _antithetic_noise(num_samples, start, generator)
    no_stretch = start.new_zeros(len(start), 0), start.new_zeros(0)
    gaussians = [
        (LowRankGaussian(start, torch.full_like(start, scale), *no_stretch), f"plain start, scale {scale}")
        for scale in PLAIN_SCALES
    ]
    top = _climb(density, start, iterations)[-1]
    with contextlib.suppress(RuntimeError):  # an operation of the model may have no second derivative
        gaussians.append((low_rank_laplace(density, top, seed=seed), "low-rank Laplace"))
    return _ranked(gaussians, density, noise)


def _antithetic_noise(num_samples: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw pairs of opposite sign ``(S, D)``: their mean is zero, so that no location can make up for it."""
    shape = (num_samples // 2, len(like))
    half = torch.randn(shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)
    return torch.cat([half, -half])


def _climb(density: Density, start: Tensor, iterations: int) -> list[Tensor]:
    """Return the points of an L-BFGS run, with SciPy's line search, which copes with bad scaling."""
    points: list[Tensor] = [start.detach().clone()]

    def loss(z: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(z).to(start).requires_grad_()
        try:
            value = -density(point[None]).sum()
            (gradient,) = torch.autograd.grad(value, point)
        except (ValueError, RuntimeError):  # a model may refuse extreme values
            return LARGE_LOSS, np.zeros_like(z)
        if not bool(value.isfinite() & gradient.isfinite().all()):
            return LARGE_LOSS, np.zeros_like(z)
        return float(value.detach()), gradient.double().cpu().numpy()

    def add_point(z: np.ndarray) -> None:
        points.append(torch.from_numpy(z.copy()).to(start))

    options = {"maxiter": iterations, "maxcor": 20, "gtol": 1e-6, "ftol": 1e-12}
    first = start.detach().double().cpu().numpy()
    minimize(loss, first, jac=True, method="L-BFGS-B", callback=add_point, options=options)
    return points


def _spaced(points: list[Tensor]) -> Iterator[Tensor]:
    """Yield the last point, then earlier ones at growing distances from the first: the way into a funnel matters."""
    last = len(points) - 1
    chosen, step, index = {last}, 1, 1
    while index < last:
        chosen.add(index)
        index, step = index + step, step + index
    for index in sorted(chosen, reverse=True):
        yield points[index]


def _laplace(density: Density, point: Tensor, origin: str) -> Iterator[tuple[Gaussian, str]]:
    """Yield Gaussians with the covariance of the local Hessian, non-concave directions bounded.

    The first has its mean at the point, the second at the end of a Newton step.
    """

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
    if bool((precision <= 0).any()):
        precision = precision.clamp(min=1 / MAX_FLAT_SCALE**2)
    covariance = (vectors * (1 / precision)) @ vectors.mT
    scale_tril, info = torch.linalg.cholesky_ex((covariance + covariance.mT) / 2)
    if int(info) == 0:
        yield Gaussian(point, scale_tril), f"{origin}, Laplace"
        yield Gaussian(point + covariance @ gradient, scale_tril), f"{origin}, Laplace after a Newton step"
