"""Known posteriors, fitted by short runs of plain SVI."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

from tests.guides.zoo import F64, fit, make_guide, number


def elbo(model, guide, draws=4000):
    """Return the estimate and its standard error, from the log weights of independent draws."""
    loss = Trace_ELBO(num_particles=draws // 10, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        parts = torch.tensor([-loss.loss(model, guide) for _ in range(10)], dtype=F64)
    return parts.mean().item(), parts.std().item() / math.sqrt(10)


# -- a Gaussian posterior ----------------------------------------------------------------------------------------------

FEATURES = torch.stack([torch.ones(6, dtype=F64), number([0.2, 0.5, 0.8, 1.1, 1.4, 1.7])], -1)
TARGET = FEATURES @ number([0.5, 1.0]) + number([0.09, -0.15, 0.24, 0.03, -0.27, 0.06])
NOISE = 0.5


def linear():
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
    mean = weights @ FEATURES.mT
    pyro.sample("y", dist.Normal(mean, NOISE).to_event(1), obs=TARGET)


def linear_answer():
    """Return log Z and the mean and covariance of the posterior."""
    covariance = FEATURES @ FEATURES.mT + NOISE**2 * torch.eye(len(TARGET), dtype=F64)
    log_z = dist.MultivariateNormal(torch.zeros(len(TARGET), dtype=F64), covariance).log_prob(TARGET)
    posterior = (torch.eye(2, dtype=F64) + FEATURES.mT @ FEATURES / NOISE**2).inverse()
    return log_z.item(), posterior @ FEATURES.mT @ TARGET / NOISE**2, posterior


def test_correlated_gaussian_posterior(make):
    log_z, mean, covariance = linear_answer()
    assert covariance[0, 1] / covariance.diagonal().prod().sqrt() < -0.8
    guide = fit(linear, make(linear, init_scale=0.3), 160, lr=0.08)
    found, error = elbo(linear, guide)
    assert found > log_z - 0.05
    assert found < log_z + 4 * error + 1e-6
    with torch.no_grad():
        draws = guide.get_posterior().sample((20_000,))
    torch.testing.assert_close(draws.mean(0), mean, atol=0.08, rtol=0)
    torch.testing.assert_close(draws.mT.cov(), covariance, atol=0.05, rtol=0)


# -- a bent posterior --------------------------------------------------------------------------------------------------


def banana():
    """Draw x ~ N(0, 1), y | x ~ N(x², 0.3): normalized, so log Z = 0."""
    x = pyro.sample("x", dist.Normal(number(0.0), 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.3))


@pytest.fixture(scope="module")
def gaussian_gap():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    found, _ = elbo(banana, fit(banana, AutoMultivariateNormal(banana), 250, particles=16))
    return -found


@pytest.mark.parametrize(
    ("kind", "options", "lr"),
    [
        ("iaf", {"depth": 3, "hidden_dims": [32, 32]}, 0.02),
        ("sylvester", {"depth": 4}, 0.05),
        ("planar", {"depth": 8}, 0.05),
    ],
    ids=["iaf", "sylvester", "planar"],
)
def test_banana_is_fitted_clearly_better_than_by_a_gaussian(kind, options, lr, gaussian_gap):
    guide = fit(banana, make_guide(kind, banana, **options), 250, lr, particles=16)
    found, error = elbo(banana, guide)
    assert gaussian_gap > 0.6
    assert -4 * error < -found < 0.5 * gaussian_gap


# -- far from the origin and narrow ------------------------------------------------------------------------------------


def narrow():
    """A model with a prior at 100 with sd 0.1 and a posterior with sd 0.001."""
    x = pyro.sample("x", dist.Normal(number(100.0), 0.1))
    pyro.sample("y", dist.Normal(x, 0.001), obs=number(100.05))


def test_guide_starts_near_a_prior_far_from_the_origin(make):
    guide = make(narrow)
    guide.setup()
    with torch.no_grad():
        start = guide.get_posterior().sample((1000,))
    assert abs(start.mean().item() - 100) < 0.3
    assert start.std().item() < 0.3


@pytest.mark.parametrize("kind", ["iaf", "nice"])
def test_guide_reaches_a_scale_below_any_clip(kind):
    precision = 1 / 0.1**2 + 1 / 0.001**2
    mean, sd = (100.0 / 0.1**2 + 100.05 / 0.001**2) / precision, precision**-0.5
    log_z = dist.Normal(number(100.0), math.hypot(0.1, 0.001)).log_prob(number(100.05)).item()
    guide = fit(narrow, make_guide(kind, narrow, depth=1, init_scale=0.01), 400)
    with torch.no_grad():
        draws = guide.get_posterior().sample((4000,))
    assert abs(draws.mean().item() - mean) < 0.3 * sd
    assert draws.std().item() == pytest.approx(sd, rel=0.25)
    found, error = elbo(narrow, guide)
    assert log_z - 0.1 < found < log_z + 4 * error + 1e-6
