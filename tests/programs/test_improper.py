"""Masked latent sites, improper priors and angles: every direction of a posterior has a density, or is refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.programs import Program

X = torch.tensor([-1.0, -0.3, 0.1, 0.4, 1.2, 2.0])
Y = torch.tensor([-0.7, 0.2, 9.0, 0.9, 2.2, 9.0])
IS_OBSERVED = Y < 9


def regression(x, y, is_observed):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y, obs_mask=is_observed)
    return slope


def padded(lengths):
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("sequences", len(lengths)):
        for step in range(3):
            with poutine.mask(mask=step < lengths):
                state = pyro.sample(f"state{step}", dist.Normal(level, 1.0))
                pyro.sample(f"data{step}", dist.Normal(state, 1.0), obs=torch.ones(len(lengths)))


def evidence_of_regression():
    """The evidence of the rows with data."""
    x, y = X[IS_OBSERVED], Y[IS_OBSERVED]
    covariance = torch.eye(len(x)) + x[:, None] * x
    return dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(y).item()


def posterior_of_slope():
    x, y = X[IS_OBSERVED], Y[IS_OBSERVED]
    return (x @ y / (1 + x @ x)).item(), 1 / (1 + x @ x).item()


def evidence_of_padded(lengths):
    total = int(lengths.sum())
    covariance = 2 * torch.eye(total) + torch.ones(total, total)
    return dist.MultivariateNormal(torch.zeros(total), covariance).log_prob(torch.ones(total)).item()


CASES = [
    (regression, (X, Y, IS_OBSERVED), evidence_of_regression()),
    (padded, (torch.tensor([1, 3]),), evidence_of_padded(torch.tensor([1, 3]))),
]


@pytest.mark.parametrize(("model", "args", "evidence"), CASES)
def test_masked_latents_have_the_density_of_their_prior(model, args, evidence):
    result = fg.fit(model, fg.AutoPlanar(model, depth=1), *args, steps=50, progress=False)
    assert result.diagnosis.log_evidence == pytest.approx(evidence, abs=0.02)
    assert result.diagnosis.elbo == pytest.approx(evidence, abs=0.05)


def test_imputed_values_follow_the_prior_at_the_posterior_slope():
    guide = fg.AutoPlanar(regression, depth=1)
    fg.fit(regression, guide, X, Y, IS_OBSERVED, steps=50, progress=False)
    draws = fg.importance_resample(regression, guide, X, Y, IS_OBSERVED, num_samples=4000)
    mean, variance = posterior_of_slope()
    assert draws["slope"].mean().item() == pytest.approx(mean, abs=0.05)
    assert draws["y_unobserved"][:, 5].mean().item() == pytest.approx(2 * mean, abs=0.1)
    assert draws["y_unobserved"][:, 5].var().item() == pytest.approx(1 + 4 * variance, rel=0.15)


def test_pyros_guides_are_judged_by_the_same_density():
    guide = AutoNormal(regression)
    result = fg.fit(regression, guide, X, Y, IS_OBSERVED, steps=20, progress=False)
    assert result.diagnosis.elbo < evidence_of_regression() < result.diagnosis.elbo + 20


def test_a_guide_with_the_same_mask_stays_as_it_is():
    mean, variance = posterior_of_slope()

    def guide(x, y, is_observed):
        slope = pyro.sample("slope", dist.Normal(mean, variance**0.5))
        with pyro.plate("rows", len(x)), poutine.mask(mask=~is_observed):
            pyro.sample("y_unobserved", dist.Normal(slope * x, 1.0))

    weighted = fg.diagnostics.log_weights(regression, guide, X, Y, IS_OBSERVED, num_samples=100)
    assert weighted.log_w.tolist() == pytest.approx([evidence_of_regression()] * 100, abs=1e-4)  # the exact posterior


def test_a_masked_prior_that_data_inform_stays_flat():
    def model():
        with poutine.mask(mask=False):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))

    def guide():
        pyro.sample("z", dist.Normal(2.0, 1.0))

    assert Program.inspect(model, guide).model is model
    weighted = fg.diagnostics.log_weights(model, guide, num_samples=100)
    assert torch.allclose(weighted.log_w, torch.zeros(100, dtype=torch.float64), atol=1e-5)  # a flat prior has mass 1


def test_a_mask_of_the_distribution_counts_as_a_mask():
    def model():
        with pyro.plate("n", 2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, 3), 1.0).to_event(1).mask(torch.tensor([True, False])))
        pyro.sample("x", dist.Normal(z[0].sum(), 1.0), obs=torch.tensor(2.0))

    diagnosis = fg.fit(model, fg.AutoPlanar(model, depth=1), steps=50, progress=False).diagnosis
    assert diagnosis.log_evidence == pytest.approx(dist.Normal(0.0, 2.0).log_prob(torch.tensor(2.0)).item(), abs=0.02)


def test_inspecting_a_masked_program_uses_no_random_numbers():
    guide = AutoNormal(regression)
    guide(X, Y, IS_OBSERVED)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Program.inspect(regression, guide, (X, Y, IS_OBSERVED))
    assert torch.equal(torch.rand(3), expected)


def mixed():
    with pyro.plate("n", 3), poutine.mask(mask=torch.tensor([True, False, False])):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z[1], 1.0), obs=torch.tensor(2.0))


def improper(support):
    def model():
        z = pyro.sample("z", dist.ImproperUniform(support, (3,), ()).to_event(1))
        pyro.sample("x", dist.Normal(z[:2].sum(), 1.0), obs=torch.tensor(2.0))

    return model


def angle():
    with pyro.plate("n", 2):
        z = pyro.sample("z", dist.VonMises(0.0, 2.0))
    pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=torch.tensor(2.0))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (mixed, "site 'z' is masked, and the rest of the model depends on some of its masked values"),
        (improper(dist.constraints.real), "nothing in the model depends on 1 of 3 values of site 'z'"),
        (improper(dist.constraints.positive), "whose prior is improper.*Give the site a proper prior"),
        (angle, r"site 'z' is an angle or a direction \(VonMises\).*Uniform\(-pi, pi\)"),
    ],
)
def test_what_has_no_density_is_refused(model, words):
    with pytest.raises(ValueError, match=words):
        fg.fit(model, fg.AutoPlanar(model), steps=1, progress=False)


@pytest.mark.parametrize(("model", "words"), [(mixed, "site 'z' is masked"), (angle, "site 'z' is an angle")])
def test_what_has_no_density_is_refused_with_pyros_guides_too(model, words):
    with pytest.raises(ValueError, match=words):
        fg.diagnose(model, AutoNormal(model))


def test_a_flow_guide_refuses_an_angle_in_plain_inference():
    with pytest.raises(ValueError, match="AutoIAF: site 'z' is an angle"):
        fg.AutoIAF(angle)()


def test_the_remedies_for_angles_work():
    def bounded():
        z = pyro.sample("z", dist.Uniform(-math.pi, math.pi))
        pyro.factor("prior", dist.VonMises(0.0, 2.0).log_prob(z) + math.log(2 * math.pi))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5))

    def model():
        z = pyro.sample("z", dist.VonMises(0.0, 2.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5))

    def guide():
        pyro.sample("z", dist.VonMises(0.2, 2.5))

    grid = torch.linspace(-math.pi, math.pi, 2001)
    density = (dist.VonMises(0.0, 2.0).log_prob(grid) + dist.Normal(grid, 1.0).log_prob(torch.tensor(0.5))).exp()
    evidence = torch.trapezoid(density, grid).log().item()
    by_hand = fg.diagnostics.log_weights(model, guide, num_samples=2000)
    assert fg.diagnostics.log_mean_weight(by_hand.log_w)[0] == pytest.approx(evidence, abs=0.02)
    fitted = fg.fit(bounded, fg.AutoPlanar(bounded, depth=2), steps=200, progress=False)
    assert fitted.diagnosis.log_evidence == pytest.approx(evidence, abs=0.03)


def test_an_improper_prior_on_a_bounded_support_is_proper():
    def model():
        pyro.sample("free", dist.ImproperUniform(dist.constraints.unit_interval, (), ()))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))

    assert set(Program.inspect(model, fg.AutoPlanar(model)).latents) == {"free", "z"}
