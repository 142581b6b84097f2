"""A program is refused at the start if Pyro's validation refuses it at every draw, and not if at some draws only."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value

import pyro_flowguides as fg
from pyro_flowguides.programs.program import Program

DATA = torch.linspace(-1.0, 2.0, 10)


def in_a_plate(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("data", 10):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def data_as_a_column():
    in_a_plate(DATA[:, None])


def latent_without_an_event():
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
    pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))


def data_without_a_plate():
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    pyro.sample("y", dist.Normal(mean, 1.0), obs=DATA)


def observe(value, distribution, prior=dist.Gamma(2.0, 2.0)):  # noqa: B008
    def model():
        rate = pyro.sample("rate", prior)
        pyro.sample("y", distribution(rate), obs=torch.tensor(value))

    return model


SHAPE, SUPPORT = "invalid log_prob shape", "to be within the support"
REFUSED = {
    "data as a column": (data_as_a_column, SHAPE),
    "latent without an event": (latent_without_an_event, SHAPE),
    "data without a plate": (data_without_a_plate, SHAPE),
    "Bernoulli 3": (observe(3.0, dist.Bernoulli, dist.Beta(1.0, 1.0)), SUPPORT),
    "Poisson -1": (observe(-1.0, dist.Poisson), SUPPORT),
    "missing value": (observe(float("nan"), lambda rate: dist.Normal(rate, 1.0)), SUPPORT),
    "negative scale": (observe(1.0, lambda rate: dist.Gamma(-0.5, rate)), "Expected parameter concentration"),
}


@pytest.mark.parametrize("is_enabled", [True, False], ids=["validation on", "validation off"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_pyro_refuses_is_refused_with_its_message(case, is_enabled):
    model, message = REFUSED[case]
    with pyro.validation_enabled(True), pytest.raises(ValueError, match=message):
        SVI(model, AutoNormal(model), pyro.optim.Adam({}), Trace_ELBO()).step()
    with pyro.validation_enabled(is_enabled):
        with pytest.raises(ValueError, match=message):
            fg.diagnose(model, AutoNormal(model), num_samples=30)
        with pytest.raises(ValueError, match=message):
            fg.fit(model, fg.AutoPlanar(model), steps=1, progress=False)
        assert pyro.poutine.util.is_validation_enabled() is is_enabled
        assert dist.Normal(0.0, 1.0)._validate_args is is_enabled


def test_guide_of_another_shape_is_refused():
    def model():
        with pyro.plate("groups", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    with pytest.raises(ValueError, match="shapes disagree at site 'z'"):
        fg.diagnose(model, guide, num_samples=30)


def test_user_may_switch_the_check_of_values_off():
    def model():
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        pyro.sample("pixel", dist.Bernoulli(p, validate_args=False), obs=torch.tensor(0.3))

    assert list(Program.inspect(model, AutoNormal(model)).observed) == ["pixel"]


def test_masked_values_are_not_checked():
    y = torch.tensor([0.5, float("nan"), 1.0])

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), pyro.poutine.mask(mask=~y.isnan()):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    assert list(Program.inspect(model, AutoNormal(model)).observed) == ["y"]


@pytest.mark.parametrize(
    "distribution",
    [
        lambda z: dist.Normal(torch.zeros(6), z),
        lambda z: dist.Uniform(torch.zeros(6), 1.0 + z.exp()),
        lambda z: dist.Normal(z.sqrt(), 1.0),
    ],
    ids=["negative scale", "support too small", "undefined"],
)
def test_errors_of_draws_are_no_fault_of_the_program(distribution):
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        pyro.sample("y", distribution(z).to_event(1), obs=torch.full((6,), 2.0))

    guide = fg.AutoPlanar(model, init_loc_fn=init_to_value(values={"z": torch.ones(6)}), init_scale=3.0)
    with pytest.raises(ValueError, match="Expected"):
        SVI(model, guide, pyro.optim.Adam({}), Trace_ELBO()).step()
    assert list(Program.inspect(model, guide).latents) == ["z"]


def test_refused_program_uses_up_no_random_numbers():
    guide = AutoNormal(in_a_plate)
    guide(DATA)
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    with pytest.raises(ValueError, match=SHAPE):
        Program.inspect(in_a_plate, guide, (DATA[:, None],))
    assert torch.equal(torch.randn(4), expected)
