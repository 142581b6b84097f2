"""Single steps are those of ``fit``, for any guide."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch.testing import assert_close

import pyro_flowguides as fg
from pyro_flowguides.inference import Stepper
from pyro_flowguides.inference.schedule import Schedule
from tests.inference.models import DATA, schools


@pytest.fixture(autouse=True)
def _double_precision(_fresh_state):
    torch.set_default_dtype(torch.float64)


def make_guide():
    torch.manual_seed(3)
    pyro.clear_param_store()
    guide = fg.AutoPlanar(schools, depth=1)
    guide(*DATA)
    return guide


def test_steps_are_those_of_fit():
    """While it explores, with its step sizes, from a start far from the posterior."""
    result = fg.fit(schools, make_guide(), *DATA, steps=100, num_particles=8, warm_start=False, progress=False)
    schedule = Schedule(100, 0.01, 8, 0.01)
    stepper = Stepper(schools, make_guide(), *DATA, num_particles=8)
    elbos = []
    for step in range(50):
        stepper.lr = schedule.lr_at(step)
        elbos.append(stepper.step())
    assert elbos == result.elbo_history[:50]


@pytest.mark.parametrize("options", [{}, {"path_gradient": True}, {"importance": 4}], ids=str)
def test_several_steps_are_those_taken_one_by_one(options):
    single, several = (Stepper(schools, make_guide(), *DATA, num_particles=8, **options) for _ in range(2))
    assert several.run(7) == [single.step() for _ in range(7)]
    assert_close(several.adam.snapshot(), single.adam.snapshot(), rtol=0, atol=0)


def test_the_path_gradient_and_the_seed_make_a_difference():
    plain, path, other = (
        Stepper(schools, make_guide(), *DATA, num_particles=8, **options).run(3)
        for options in ({}, {"path_gradient": True}, {"seed": 1})
    )
    assert plain[0] == path[0]
    assert plain[1] != path[1]
    assert plain[0] != other[0]


def handwritten(sigma, y):
    loc = pyro.param("loc", torch.zeros(2))
    pyro.sample("mu", dist.Normal(loc[0], 1.0))
    pyro.sample("tau", dist.LogNormal(loc[1], 0.5))
    with pyro.plate("schools", len(y)):
        pyro.sample("theta", dist.Normal(pyro.param("theta_loc", torch.zeros(3)), 1.0))


@pytest.mark.parametrize("make", [fg.AutoPlanar, AutoNormal, lambda _: handwritten], ids=["flow", "Pyro", "function"])
def test_guides_of_every_kind_are_trained_and_drawn_from(make):
    stepper = Stepper(schools, make(schools), *DATA, lr=0.05)
    before = stepper.elbo()
    stepper.run(200)
    assert stepper.elbo() > before + 1
    assert stepper.elbo() == stepper.elbo()
    draws = stepper.sample(50)
    assert {name: value.shape for name, value in draws.items()} == {"mu": (50,), "tau": (50,), "theta": (50, 3)}
    assert (draws["tau"] > 0).all()
    assert len(draws["mu"].unique()) == 50


def test_a_released_guide_is_like_any_other():
    stepper = Stepper(schools, make_guide(), *DATA)
    stepper.run(3)
    values = [parameter.detach().clone() for parameter in stepper.guide.parameters()]
    stepper.release()
    for parameter, value in zip(stepper.guide.parameters(), values, strict=True):
        assert_close(parameter.detach(), value, rtol=0, atol=0)
        assert parameter.grad is None
    again = Stepper(schools, stepper.guide, *DATA)
    assert math.isfinite(again.step())
