"""Flow guides in plain SVI, without a warm start, on raw data."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

import pyro_flowguides as fg
from pyro_flowguides.transforms.conditioner import ConditionerFlow

X = torch.tensor([10.0, 20, 30, 40, 50, 60, 70])
Y = torch.tensor([36.0, 64, 97, 121, 158, 181, 219])


def line():
    intercept = pyro.sample("intercept", dist.Normal(0.0, 100.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 100.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(100.0))
    with pyro.plate("points", 7):
        pyro.sample("y", dist.Normal(intercept + slope * X, sigma), obs=Y)


@pytest.fixture
def single_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("num_particles", [1, 16])
@pytest.mark.parametrize("flow", fg.flows.FLOWS)
def test_draws_stay_in_range_far_from_the_solution(flow, num_particles, single_precision):
    """Seven raw points and wide priors: the first gradients are huge, and every step moves all weights at once."""
    for seed in range(2):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide = fg.AutoFlow(line, flow)
        elbo = Trace_ELBO(num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1)
        svi = SVI(line, guide, pyro.optim.ClippedAdam({"lr": 0.02}), elbo)
        losses = [svi.step() for _ in range(25)]
        assert all(abs(loss) < float("inf") for loss in losses)
        with torch.no_grad():
            draws = guide.get_posterior().sample((1000,))
        assert draws.abs().max() < 100


def test_a_warm_start_opens_the_gain_and_it_is_saved(tmp_path):
    def gains(guide):
        flows = [module for module in guide.get_transform().modules() if isinstance(module, ConditionerFlow)]
        return [round(flow.theta()["gain"].item(), 2) for flow in flows]

    guide = fg.AutoIAF(line)
    assert gains(guide) == [0.05] * 3
    fg.fit(line, guide, steps=50, compile=False)
    trained = gains(guide)
    assert all(gain > 0.9 for gain in trained)
    fresh = fg.AutoIAF(line)
    fresh.load_state_dict(guide.state_dict())
    assert gains(fresh) == trained
