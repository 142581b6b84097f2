"""Log-determinants and round trips, to 1e-8 in every dimension and for weights of every size.

Rounding leaves in any map an error of a small multiple of eps (|y| + |J| |x|) in y, of |J⁻¹| times that in x, and of
eps |J| |J⁻¹| in the determinant of J. An error above 1e-8 is accepted only below ten times this documented bound, and
not at all for families that are well conditioned at every weight.
"""

import copy

import pytest
import torch

from pyro_flowguides.transforms import AdditiveCoupling, AffineCoupling, Householder, Permute, Planar, Radial
from tests.transforms.families import CASES, DIMS, SCALES, jacobian, name

TOLERANCE = 1e-8
ALLOWANCE = 10 * torch.finfo(torch.float64).eps
POINTS = 4
WELL_CONDITIONED = (AdditiveCoupling, AffineCoupling, Householder, Permute, Planar, Radial)


def every_size(test):
    """Run a test for every family in every dimension; the test goes through the scales and names one that fails."""
    for mark in (pytest.mark.parametrize("dim", DIMS), pytest.mark.parametrize("case", CASES, ids=name)):
        test = mark(test)
    return test


def norm(vector):
    return torch.linalg.vector_norm(vector, dim=-1)


class Pair:
    """Points, their images, and the size of the Jacobian between them, computed only if an error exceeds 1e-8."""

    def __init__(self, flow, x, y):
        self.flow, self.x, self.y = flow, x, y

    def forward_jacobian(self):
        return jacobian(lambda v: self.flow.forward_and_ladj(v)[0], self.x)

    def inverse_jacobian(self):
        return jacobian(lambda v: self.flow.inverse_and_ladj(v)[0], self.y)

    def stretch(self):
        """Return |J| and |J⁻¹|, each from the Jacobian of the direction that is more accurate for it."""
        s = torch.linalg.svdvals(self.forward_jacobian())
        t = torch.linalg.svdvals(self.inverse_jacobian())
        return torch.maximum(s[..., 0], 1 / t[..., -1]), torch.maximum(t[..., 0], 1 / s[..., -1])

    def error_in_y(self):
        return norm(self.y) + torch.linalg.svdvals(self.forward_jacobian())[..., 0] * norm(self.x)

    def error_in_x(self):
        stretch, inverse_stretch = self.stretch()
        return inverse_stretch * (norm(self.y) + stretch * norm(self.x))

    def error_in_determinant(self):
        stretch, inverse_stretch = self.stretch()
        return stretch * inverse_stretch


def check(error, allowed, label, *, strict=False):
    __tracebackhide__ = True
    if not bool((error <= TOLERANCE).all()):
        limit = (ALLOWANCE * allowed()).clamp(min=TOLERANCE)
        assert not strict, f"{label}: {error.tolist()}"
        assert bool((error.isfinite() & (error <= limit)).all()), (
            f"{label}: {error.tolist()}, allowed are {limit.tolist()}"
        )


@every_size
def test_log_det_is_that_of_the_autograd_jacobian(case, dim):
    for scale in SCALES:
        flow = case.flow(dim, scale, (POINTS,))
        x, w = torch.randn(POINTS, dim), 2 * torch.randn(POINTS, dim)
        with torch.no_grad():
            y, ladj = flow.forward_and_ladj(x)
            z, inverse_ladj = flow.inverse_and_ladj(w)
        assert ladj.shape == inverse_ladj.shape == (POINTS,)

        forward, inverse = Pair(flow, x, y), Pair(flow, z, w)
        strict = issubclass(case.formula, WELL_CONDITIONED)
        expected = torch.linalg.slogdet(forward.forward_jacobian()).logabsdet
        error = (ladj - expected).abs() / (1 + expected.abs())
        check(error, forward.error_in_determinant, f"forward, scale {scale}", strict=strict)
        expected = -torch.linalg.slogdet(inverse.inverse_jacobian()).logabsdet
        error = (inverse_ladj - expected).abs() / (1 + expected.abs())
        check(error, inverse.error_in_determinant, f"inverse, scale {scale}", strict=strict)


@every_size
def test_inverse_of_forward(case, dim):
    for scale in SCALES:
        flow = case.flow(dim, scale, (POINTS,))
        twin = copy.deepcopy(flow)  # without the cache
        x = torch.randn(POINTS, dim)
        with torch.no_grad():
            y, ladj = flow.forward_and_ladj(x)
            back, inverse_ladj = twin.inverse_and_ladj(y)
        strict = issubclass(case.formula, WELL_CONDITIONED)
        check(norm(back - x), Pair(flow, x, y).error_in_x, f"scale {scale}", strict=strict)
        if strict:
            assert ((inverse_ladj - ladj).abs() <= TOLERANCE * (1 + ladj.abs())).all(), f"scale {scale}"


@every_size
def test_forward_of_inverse(case, dim):
    strict = issubclass(case.formula, WELL_CONDITIONED) or "Sylvester" in case.formula.__name__
    for scale in SCALES:
        flow = case.flow(dim, scale, (POINTS,))
        y = 2 * torch.randn(POINTS, dim)
        with torch.no_grad():
            x, _ = copy.deepcopy(flow).inverse_and_ladj(y)
            image, _ = flow.forward_and_ladj(x)
        check(norm(image - y), Pair(flow, x, y).error_in_y, f"scale {scale}", strict=strict)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_far_points_come_back(case):
    """From far outside what a flow is trained on, relative to their size."""
    flow = case.flow(3, 0.3, (1,))
    for size in (1e-6, 1e3, 1e6):
        y = size * torch.tensor([[1.0, -0.3, 0.7], [-1.0, 1.0, -1.0], [1e-3, 1.0, 0.0]])
        with torch.no_grad():
            x, ladj = flow.inverse_and_ladj(y)
            image, forward_ladj = flow.forward_and_ladj(x)
        assert (norm(image - y) <= TOLERANCE * (1 + norm(y))).all()
        assert ((ladj - forward_ladj).abs() <= 1e-6 * (1 + ladj.abs())).all()


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_log_det_is_not_trivial_at_these_sizes(case):
    """Weights are large enough that a missing or wrong log-determinant shows, unless it is zero by design."""
    flow = case.flow(3, 1.0, (16,))
    ladj = flow.forward_and_ladj(torch.randn(16, 3))[1]
    volume_preserving = issubclass(case.formula, (AdditiveCoupling, Householder, Permute))
    assert (ladj.abs().max() > 1e-2) != volume_preserving
