"""The low-rank Laplace approximation: exact for targets of its form, bounded where no Gaussian fits."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

import pyro_flowguides as fg
from pyro_flowguides.diagnostics import log_weights
from pyro_flowguides.inference.low_rank_laplace import LowRankGaussian, low_rank_laplace
from pyro_flowguides.programs.program import Program
from pyro_flowguides.transforms import HeavyTail, LowRankAffine


@pytest.fixture(autouse=True)
def _double_precision(_fresh_state):
    torch.set_default_dtype(torch.float64)


def gaussian(precision, loc):
    """The log density of N(loc, precision⁻¹), normalized."""
    half_log_det = 0.5 * torch.linalg.slogdet(precision).logabsdet

    def density(z):
        centered = z - loc
        return half_log_det - 0.5 * (centered @ precision * centered + math.log(2 * math.pi)).sum(-1)

    return density


def gap(laplace: LowRankGaussian, precision):
    """The gap of the ELBO, KL(q || p), exactly, for a q at the target's location."""
    root = laplace.draw(torch.eye(len(precision))) - laplace.loc  # rows: images of unit vectors
    cross_entropy = 0.5 * (root @ precision * root).sum() - 0.5 * torch.linalg.slogdet(precision).logabsdet
    return float(cross_entropy + 0.5 * len(precision) * math.log(2 * math.pi) - laplace.entropy)


def badly_scaled(dim, narrow, wide):
    """Scales over four orders of magnitude, some directions narrowed and some widened, none along an axis."""
    scale = torch.empty(dim).uniform_(-5, 5).exp()
    widened = torch.eye(dim) + 0.5 * _low_rank(dim, wide)
    return (torch.linalg.inv(widened) + 0.5 * _low_rank(dim, narrow)) / scale / scale[:, None]


def _low_rank(dim, rank):
    factor = torch.randn(dim, rank)
    return factor @ factor.mT


@pytest.mark.parametrize("dim", [400, 1000])
@pytest.mark.parametrize(("narrow", "wide"), [(10, 0), (0, 10), (8, 8)])
def test_a_target_of_its_form_is_recovered(dim, narrow, wide):
    precision, loc = badly_scaled(dim, narrow, wide), torch.randn(dim)
    laplace = low_rank_laplace(gaussian(precision, loc), loc, rank=20)
    assert torch.equal(laplace.loc, loc)
    assert 0.5 * (precision.diagonal().log().sum() - torch.linalg.slogdet(precision).logabsdet) > 20  # mean field
    assert -1e-6 < gap(laplace, precision) < 1e-4 * dim  # less than another round would gain


@pytest.mark.parametrize(("narrow", "wide"), [(10, 0), (0, 10)])
def test_a_target_of_its_form_is_recovered_from_probes(narrow, wide):
    precision, loc = badly_scaled(400, narrow, wide), torch.randn(400)
    assert gap(low_rank_laplace(gaussian(precision, loc), loc, rank=20, exact_dim=0), precision) < 0.04


def test_too_low_a_rank_takes_the_directions_that_gain_most():
    """Eigenvalues away from one by the factors below; the best gap leaves out those with the least gain."""
    dim, factors = 60, torch.tensor([400.0, 0.01, 30.0, 0.1, 2.0])
    directions = torch.linalg.qr(torch.randn(dim, 5)).Q
    precision = torch.eye(dim) + directions * (factors - 1) @ directions.mT
    laplace = low_rank_laplace(gaussian(precision, torch.zeros(dim)), torch.zeros(dim), rank=3)
    assert_close(laplace.log_stretch.sort().values, -0.5 * torch.tensor([400.0, 30.0, 0.01]).log(), rtol=0.1, atol=0)
    assert gap(laplace, precision) < 0.5 * (0.1 - 1 - math.log(0.1) + 2 - 1 - math.log(2))


def test_full_rank_is_the_laplace_approximation():
    """Of a density that is no Gaussian, away from its mode."""
    dim, point = 5, torch.randn(5)
    weights = torch.randn(dim, dim)

    def density(z):
        return -((z @ weights).cosh().log() + 0.1 * z**2).sum(-1)

    hessian = -torch.autograd.functional.hessian(lambda z: density(z[None])[0], point)
    laplace = low_rank_laplace(density, point, rank=dim)
    assert abs(gap(laplace, hessian)) < 1e-6


def test_draws_and_entropy_are_those_of_the_affine_flow():
    precision = badly_scaled(30, 2, 2)
    laplace = low_rank_laplace(gaussian(precision, torch.ones(30)), torch.ones(30), rank=4)
    flow, noise = LowRankAffine(30, 4), torch.randn(7, 30)
    flow.assign(laplace.loc, laplace.scale, laplace.directions, laplace.log_stretch)
    y, ladj = flow.forward_and_ladj(noise)
    assert_close(laplace.draw(noise), y)
    assert_close(laplace.entropy.expand(7), ladj + 15 * math.log(2 * math.pi * math.e))


def test_scales_are_bounded_where_there_is_no_mode():
    """A saddle, a flat and a linear coordinate, one of tiny curvature, and one that is as it should be."""

    def density(z):
        saddle, bowl, _, slope, faint, sound = z.unbind(-1)
        return 50 * saddle**2 - 0.005 * bowl**2 + slope - 1e-20 * faint**2 - 2 * sound**2 + 0.001 * saddle**2

    laplace = low_rank_laplace(density, torch.zeros(6), rank=6)
    spread = laplace.draw(torch.eye(6)).square().sum(0).sqrt()
    assert_close(spread, torch.tensor([0.1, 10.0, 1.0, 1.0, 1.0, 0.5]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("exact_dim", [4096, 0])
@pytest.mark.parametrize("dim", [3, 400])
def test_a_linear_density_leaves_unit_scales(dim, exact_dim):
    laplace = low_rank_laplace(lambda z: z.sum(-1), torch.zeros(dim), rank=2, exact_dim=exact_dim)
    assert torch.equal(laplace.scale, torch.ones(dim))
    assert torch.equal(laplace.log_stretch, torch.zeros(2))


@pytest.mark.parametrize("exact_dim", [4096, 0])
def test_flat_coordinates_take_no_directions(exact_dim):
    """Although there are many of them, the other coordinates are fitted."""
    precision = badly_scaled(200, 3, 3)
    density = gaussian(precision, torch.zeros(200))

    def partly_flat(z):
        return density(z[:, :200]) + z[:, 200:].sum(-1)

    laplace = low_rank_laplace(partly_flat, torch.zeros(300), rank=10, exact_dim=exact_dim)
    assert torch.equal(laplace.scale[200:], torch.ones(100))
    curved = LowRankGaussian(laplace.loc[:200], laplace.scale[:200], laplace.directions[:200], laplace.log_stretch)
    assert gap(curved, precision) < 0.1


def test_an_unidentified_direction_is_not_stretched_by_rounding():
    """Only the sum of two coordinates enters: their difference is flat, with an eigenvalue of either sign."""
    laplace = low_rank_laplace(lambda z: -((3 * z[:, 0] + 3 * z[:, 1]) ** 2) - z[:, 2] ** 2, torch.zeros(3), rank=3)
    assert laplace.draw(torch.eye(3)).abs().max() < 1.0


@pytest.mark.parametrize("exact_dim", [4096, 0])
def test_single_precision(exact_dim):
    precision = badly_scaled(400, 5, 0)
    single, point = precision.float(), torch.zeros(400, dtype=torch.float32)
    laplace = low_rank_laplace(lambda z: -0.5 * (z @ single * z).sum(-1), point, exact_dim=exact_dim)
    assert {value.dtype for value in vars(laplace).values()} == {torch.float32}
    assert gap(LowRankGaussian(*(value.double() for value in vars(laplace).values())), precision) < 0.1


def test_probes_depend_on_the_seed_alone():
    precision = badly_scaled(200, 2, 1)
    density, state = gaussian(precision, torch.zeros(200)), torch.get_rng_state()
    one, same, other = (low_rank_laplace(density, torch.zeros(200), 5, seed=seed, exact_dim=0) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.scale, same.scale)
    assert not torch.equal(one.scale, other.scale)


def test_refusals():
    with pytest.raises(ValueError, match=r"rank must lie in 1\.\.3, got 4"):
        low_rank_laplace(lambda z: -z.square().sum(-1), torch.zeros(3), rank=4)
    with pytest.raises(ValueError, match=r"rank must lie in 1\.\.160, got 161"):
        low_rank_laplace(lambda z: -z.square().sum(-1), torch.zeros(300), rank=161)
    with pytest.raises(RuntimeError, match="not finite"):
        low_rank_laplace(lambda z: -z.abs().pow(1.5).sum(-1), torch.zeros(3), rank=2)


def test_a_guide_set_to_the_approximation_is_the_posterior_of_a_linear_model():
    """All weights equal the evidence, up to the gap at which the approximation stops."""
    dim, design = 320, torch.randn(12, 320)
    response = design @ torch.randn(dim)

    def model():
        weights = pyro.sample("weights", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
        pyro.sample("response", dist.Normal((weights[..., None, :] * design).sum(-1), 2.0).to_event(1), obs=response)

    guide = fg.AutoNICE(model, depth=1)
    guide.setup()
    precision = torch.eye(dim) + design.mT @ design / 4
    mode = torch.linalg.solve(precision, design.mT @ response / 4)
    laplace = low_rank_laplace(Program.inspect(model, guide).log_density, mode, rank=12)
    guide.set_low_rank_affine(*vars(laplace).values())
    with torch.no_grad():
        for part in guide.get_transform().parts:
            if isinstance(part, HeavyTail):
                part.logit.fill_(-1e4)
    weights = log_weights(model, guide, num_samples=100).log_w
    evidence = dist.MultivariateNormal(torch.zeros(12), 4 * torch.eye(12) + design @ design.mT).log_prob(response)
    assert -0.05 < weights.mean() - evidence < 0.05
    assert weights.std() < 0.2
