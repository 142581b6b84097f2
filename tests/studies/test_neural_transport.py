"""NUTS in the space of a trained guide."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.infer.mcmc.util import initialize_model
from torch.testing import assert_close

import pyro_flowguides as fg
from pyro_flowguides.programs.program import Program
from pyro_flowguides.studies.neural_transport import NOISE, _recorded_potential, _Transport, neutra_mcmc

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def in_a_plate():
    """The first latent site stands in a plate, another is scalar and positive."""
    with pyro.plate("members", 3):
        x = pyro.sample("x", dist.Normal(number(0.0), number(1.0)))
    rate = pyro.sample("rate", dist.Gamma(number(2.0), number(1.0)))
    pyro.deterministic("total", x.sum(-1) + rate)
    pyro.sample("y", dist.Exponential(rate), obs=number(0.5))


def log_joint(x, rate):
    parts = dist.Normal(0.0, 1.0).log_prob(x).sum() + dist.Gamma(2.0, 1.0).log_prob(rate)
    return parts + dist.Exponential(rate).log_prob(number(0.5)) + rate.log()


GUIDES = [AutoDiagonalNormal, AutoMultivariateNormal, fg.AutoIAF]


@pytest.mark.parametrize("make", GUIDES)
def test_the_target_counts_every_jacobian_once(make):
    """Pyro's reparametrization counts the flow's once for each member of a plate around the first site."""
    guide = make(in_a_plate, init_scale=0.3)
    guide()
    params, potential, _, _ = initialize_model(_Transport(guide).reparam(in_a_plate))
    assert list(params) == [NOISE]
    noise = torch.randn(4, dtype=torch.float64)
    transform = guide.get_transform()
    latent = transform(noise)
    ladj = transform.log_abs_det_jacobian(noise, latent).sum()
    assert_close(potential({NOISE: noise}), -(log_joint(latent[:3], latent[3].exp()) + ladj))


def draw(model, guide, *args, **options):
    return neutra_mcmc(model, guide, *args, **{"num_samples": 60, "warmup_steps": 60, "progress": False, **options})


def test_groups_shapes_and_statistics():
    guide = AutoDiagonalNormal(in_a_plate)
    guide()
    data = draw(in_a_plate, guide, num_samples=30, warmup_steps=30, num_chains=2)
    assert dict(data["posterior"]["x"].sizes) == {"chain": 2, "draw": 30, "members": 3}
    assert data["posterior"]["rate"].dims == ("chain", "draw")
    assert_close(
        data["posterior"]["total"].values, (data["posterior"]["x"].sum("members") + data["posterior"]["rate"]).values
    )
    stats = data["sample_stats"]
    assert set(stats.data_vars) == {"diverging", "acceptance_rate", "step_size", "lp"}
    assert stats["diverging"].dtype == bool
    assert stats["acceptance_rate"].min() >= 0
    assert stats["acceptance_rate"].mean() > 0.5
    assert (stats["step_size"] > 0).all()
    x, rate = (torch.tensor(data["posterior"][name].values[1, 7]) for name in ("x", "rate"))
    assert_close(stats["lp"].values[1, 7], (log_joint(x, rate) - rate.log()).item())
    assert not np.array_equal(data["posterior"]["x"][0], data["posterior"]["x"][1])
    assert data["observed_data"]["y"].item() == 0.5
    assert data["log_likelihood"]["y"].shape == (2, 30)


def test_seeds_and_what_is_left_behind():
    guide = AutoMultivariateNormal(in_a_plate)
    guide()
    names, state = set(pyro.get_param_store()), torch.get_rng_state()
    first, second, other = (
        draw(in_a_plate, guide, num_samples=5, warmup_steps=5, seed=seed, nuts_options={"max_tree_depth": 2})
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first["posterior"]["x"], second["posterior"]["x"])
    assert not np.array_equal(first["posterior"]["x"], other["posterior"]["x"])
    assert all(parameter.requires_grad for parameter in guide.parameters())
    assert set(pyro.get_param_store()) == names
    assert torch.equal(state, torch.get_rng_state())


def test_an_untrained_guide_still_gives_the_posterior():
    """Gamma(3, 1.5) for the rate: mean 2, sd 1.15; three standard normals beside it."""
    data = draw(in_a_plate, AutoDiagonalNormal(in_a_plate, init_scale=0.5), num_samples=200, warmup_steps=60)
    posterior = data["posterior"]
    assert float(posterior["rate"].mean()) == pytest.approx(2.0, abs=0.35)
    assert float(posterior["rate"].std()) == pytest.approx(2 / 3**0.5, abs=0.35)
    assert float(posterior["x"].mean()) == pytest.approx(0.0, abs=0.15)
    assert float(posterior["x"].std()) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("make", [AutoNormal, AutoLowRankMultivariateNormal, AutoLaplaceApproximation])
def test_guides_without_a_transform_are_refused(make):
    with pytest.raises(TypeError, match=f"{make.__name__} has no transform"):
        draw(in_a_plate, make(in_a_plate))


def test_refusals():
    with pytest.raises(TypeError, match="function has no transform"):
        draw(in_a_plate, in_a_plate)
    with pytest.raises(ValueError, match="num_chains must be at least 1"):
        draw(in_a_plate, AutoMultivariateNormal(in_a_plate), num_chains=0)


def schools(y):
    mu = pyro.sample("mu", dist.Normal(number(0.0), number(5.0)))
    tau = pyro.sample("tau", dist.HalfCauchy(number(5.0)))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, SIGMA), obs=y)


def schools_moments():
    """Mean and sd of mu and log tau, theta and mu integrated out, by quadrature over log tau."""
    log_tau = torch.linspace(-12, 6, 4001, dtype=torch.float64)
    tau = log_tau.exp()
    precision = 1 / (SIGMA.square() + tau[:, None].square())
    total = precision.sum(1) + 1 / 25
    mean, variance = (precision * Y).sum(1) / total, 1 / total
    log_p = dist.HalfCauchy(5.0).log_prob(tau) + log_tau + 0.5 * precision.log().sum(1) - 0.5 * total.log()
    log_p = log_p - 0.5 * ((precision * Y.square()).sum(1) - mean.square() * total)
    weight = log_p.softmax(0)
    mu = (weight * mean).sum()
    mu_sd = ((weight * (variance + mean.square())).sum() - mu.square()).sqrt()
    log = (weight * log_tau).sum()
    log_sd = ((weight * log_tau.square()).sum() - log.square()).sqrt()
    return mu.item(), mu_sd.item(), log.item(), log_sd.item()


@pytest.mark.parametrize("dim", [0, -1], ids=["left", "right"])
def test_a_model_that_counts_dimensions_from_the_left_is_recorded_as_it_is(dim):
    """With a leading dimension of particles, even of one, it would be another density without any error."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = (z.softmax(dim) * torch.tensor([1.0, 5.0])).sum(-1)
        pyro.sample("y", dist.Normal(mean, 0.1), obs=torch.tensor(2.0))

    guide = AutoMultivariateNormal(model)
    guide()
    potential = _recorded_potential(Program.inspect(model, guide))
    transform = guide.get_transform()
    for noise in torch.randn(5, 2):
        z = transform(noise)
        trace = pyro.poutine.trace(pyro.poutine.condition(model, data={"z": z})).get_trace()
        expected = -(trace.log_prob_sum() + transform.log_abs_det_jacobian(noise, z))
        torch.testing.assert_close(potential({NOISE: noise}), expected.detach())


def test_a_model_with_a_branch_is_not_recorded():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("f", z.sum() if float(z[..., 0].sum()) > 0 else -z.sum())

    guide = AutoMultivariateNormal(model)
    guide()
    assert _recorded_potential(Program.inspect(model, guide)) is None


@pytest.mark.slow
def test_eight_schools_without_divergences():
    torch.set_default_dtype(torch.float64)
    guide = fg.AutoIAF(schools)
    fg.fit(schools, guide, Y, progress=False)
    data = neutra_mcmc(schools, guide, Y, num_samples=500, progress=False)
    assert int(data["sample_stats"]["diverging"].sum()) == 0
    mu, mu_sd, log, log_sd = schools_moments()
    posterior = data["posterior"]
    log_tau = np.log(posterior["tau"])
    assert float(posterior["mu"].mean()) == pytest.approx(mu, abs=0.2 * mu_sd)
    assert float(posterior["mu"].std()) == pytest.approx(mu_sd, rel=0.2)
    assert float(log_tau.mean()) == pytest.approx(log, abs=0.2 * log_sd)
    assert math.log(float(log_tau.std()) / log_sd) == pytest.approx(0, abs=0.2)


def cliff():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("cliff", torch.where(z > 0, -1e5, 0.0))


FIXED_STEP = {"num_samples": 20, "warmup_steps": 5}


@pytest.mark.parametrize(("step_size", "words"), [(1e6, "all 20 draws diverged"), (0.5, r"\d+ of 20 draws diverged")])
def test_divergent_draws_are_reported(step_size, words):
    options = {"step_size": step_size, "adapt_step_size": False}
    with pytest.warns(UserWarning, match=f"neutra_mcmc: {words}"):
        draw(cliff, fg.AutoPlanar(cliff, depth=1), **FIXED_STEP, nuts_options=options)


def test_no_divergence_gives_no_warning():
    options = {"step_size": 0.3, "adapt_step_size": False}
    data = draw(in_a_plate, AutoDiagonalNormal(in_a_plate), **FIXED_STEP, nuts_options=options)
    assert not data["sample_stats"]["diverging"].any()
