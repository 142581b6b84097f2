"""A diverged fit says where and why."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.inference.divergence import explain_divergence
from pyro_flowguides.programs.program import Program

ONE = torch.tensor(1.0)


def observe(distribution, data=ONE):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", distribution(z), obs=data)

    return model


def factor(value):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", value(z))

    return model


CAUSES = {
    "data": (
        observe(lambda z: dist.Normal(z, 1.0).expand([3]).to_event(1), torch.tensor([1.0, math.inf, 2.0])),
        "site 'y': 1 of its 3 data are not finite. Remove or mask them",
    ),
    "covariate": (observe(lambda z: dist.Normal(z * math.nan, 1.0)), "site 'y': loc of its Normal is NaN. Start"),
    "impossible": (
        observe(lambda z: dist.Uniform(0.0, z.exp()), 1000 * ONE),
        "site 'y': its data are impossible, outside the support of its Uniform. Check the data",
    ),
    "overflow": (
        observe(lambda z: dist.Normal((100 + z).exp(), 1.0)),
        "site 'y': loc of its Normal is infinite (overflow in float32). Use double precision",
    ),
    "overflow in the density": (
        observe(lambda z: dist.Normal(1e30 + z, 1.0)),
        "site 'y': it is infinite (a density of zero, or overflow in float32). Use double precision",
    ),
    "factor": (factor(lambda z: z / 0 * 0), "site 'penalty': the factor is NaN"),
    "gradient": (
        observe(lambda z: dist.Normal(z + (z - z).sqrt(), 1.0)),
        "the gradient of the log density of site 'y' with respect to 'z' is NaN. Look for a root",
    ),
    "finite": (observe(lambda z: dist.Normal(z, 1.0)), "all numbers are finite. Start elsewhere"),
}


@pytest.mark.parametrize("case", CAUSES)
def test_the_cause_and_its_remedy_are_named(case):
    model, expected = CAUSES[case]
    with pyro.validation_enabled(False):
        guide = AutoNormal(model, init_loc_fn=lambda site: torch.tensor(0.0))
        guide()
        explanation = explain_divergence(Program.inspect(model, guide), 8)
    assert expected in explanation
    assert case == "finite" or "at 8 of 8 further draws" in explanation


@pytest.mark.parametrize("make", [fg.AutoPlanar, AutoNormal])
def test_a_model_that_fails_too_often_is_named_with_site_step_share_and_remedy(make):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if bool((z > -3.0).any()) and len(calls) > 60:
            raise ValueError("bad point")
        calls.append(z)

    calls: list[torch.Tensor] = []
    with pytest.raises(fg.FitDivergedError) as raised:
        fg.fit(model, make(model), steps=200, num_particles=4, warm_start=False, compile=False, progress=False)
    for part in (
        "50 steps in a row, up to step",
        "particles dropped in all",
        "of 4 further draws of the guide, the model fails after site 'z' (ValueError: bad point)",
        "Make the model defined at all values",
    ):
        assert part in str(raised.value)


def test_values_of_the_guide_that_are_not_finite_are_named():
    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", ONE) * torch.nan, 1.0))

    with pyro.validation_enabled(False):
        program = Program.inspect(observe(lambda z: dist.Normal(0.0, 1.0)), guide)
        assert "the guide's value of site 'z' is NaN" in explain_divergence(program, 4)
