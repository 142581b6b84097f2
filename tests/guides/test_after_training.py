"""A trained guide can be called without data, for other sizes and in forecasts; a failed set-up can be repeated."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.forecast import Forecaster, ForecastingModel
from pyro.infer import Predictive
from pyro.infer.autoguide import init_to_value
from torch.testing import assert_close

import pyro_flowguides as fg
from tests.guides.zoo import make_guide, number, regression, regression_data, train


@pytest.fixture(params=["iaf", "maf", "sylvester"])
def make(request):
    return lambda model, **options: make_guide(request.param, model, **options)


@pytest.fixture
def trained(make):
    guide = make(regression)
    train(regression, guide, 2, *regression_data())
    return guide


def test_a_trained_guide_draws_without_the_arguments_of_the_model(trained):
    sites = trained(*regression_data()).keys()
    assert trained().keys() == trained(None).keys() == sites
    drawn = Predictive(trained, num_samples=3)()
    assert sites <= drawn.keys()
    assert all(drawn[name].shape[0] == 3 for name in sites)


def test_other_structures_are_still_refused_after_a_call_without_arguments():
    def model(n):
        pyro.sample("x", dist.Normal(torch.zeros(n), 1.0).to_event(1))

    guide = fg.AutoIAF(model)
    guide(3)
    guide()
    with pytest.raises(ValueError, match="has shape"):
        guide(4)


def test_a_loaded_guide_predicts_for_other_data_sizes(make, trained):
    fresh = make(regression)
    fresh.load_state_dict(trained.state_dict())
    predicted = Predictive(regression, guide=fresh, num_samples=5, parallel=True)(torch.randn(4))
    assert predicted["y"].shape == (5, 4)
    assert Predictive(regression, guide=fresh, num_samples=5)(torch.randn(9))["y"].shape == (5, 9)
    state, again = trained.state_dict(), fresh.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_a_state_names_its_sites():
    def other():
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("b", dist.Normal(0.0, 1.0))

    def one():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    state = fg.AutoIAF(one).state_dict()
    uncalled, called = fg.AutoIAF(other), fg.AutoIAF(other)
    uncalled.load_state_dict(state)
    with pytest.raises(ValueError, match=r"for the latent sites 'a' \(\), 'w' \(2,\); the model has 'w' \(2,\)"):
        uncalled()
    called()
    with pytest.raises(RuntimeError, match=r"for the latent sites 'a' \(\), 'w' \(2,\); the model has 'w' \(2,\), 'b'"):
        called.load_state_dict(state)
    del state["_extra_state"]  # as earlier versions saved it
    fresh = fg.AutoIAF(one)
    fresh.load_state_dict(state)
    assert fresh().keys() == {"a", "w"}


class Trend(ForecastingModel):
    def model(self, zero_data, covariates):
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([covariates.shape[-1]]).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(-2.0, 1.0).expand([1]).to_event(1))
        with self.time_plate:
            drift = pyro.sample("drift", dist.Normal(0.0, 0.1).expand([1]).to_event(1))
        self.predict(dist.Normal(0.0, scale), (weight * covariates).sum(-1, keepdim=True) + drift.cumsum(-2))


@pytest.mark.parametrize("kind", [fg.AutoIAF, fg.AutoSylvester])
def test_forecasts(kind):
    model, covariates = Trend(), torch.randn(9, 2)
    data = covariates[:6].sum(-1, keepdim=True)
    forecaster = Forecaster(model, data, covariates[:6], guide=kind(model), num_steps=2, log_every=0)
    assert forecaster(data, covariates, num_samples=4).shape == (4, 3, 1)


def test_the_median_of_an_untrained_guide_is_its_start(make):
    def model():
        pyro.sample("x", dist.Normal(number(0.0), 3.0).expand([2]).to_event(1))
        pyro.sample("s", dist.Gamma(number(2.0), number(0.5)))

    start = {"x": torch.tensor([100.0, -0.3]).double(), "s": number(7.0)}
    median = make(model, init_loc_fn=init_to_value(values=start), init_scale=0.5).median()
    for name, value in start.items():
        assert_close(median[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "bad",
    [dist.Poisson(number(3.0)), dist.ProjectedNormal(torch.ones(2)), dist.LogNormal(number(0.0), 1.0).expand([2])],
    ids=["discrete", "sphere", "start not finite"],
)
def test_a_set_up_that_failed_can_be_repeated(make, bad):
    def model(prior):
        pyro.sample("x", prior)

    def start(site):
        return torch.zeros(site["fn"].shape(), dtype=torch.float64)

    guide = make(model, init_loc_fn=start)
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="'x'"):
        guide(bad)
    assert guide(dist.Normal(number(0.0), 1.0))["x"].shape == ()


def test_a_set_up_that_failed_in_the_builder_can_be_repeated():
    widths = iter([3, 2])
    guide = fg.AutoFlow(regression, lambda input_dim: fg.flows.get_flow("planar")(next(widths)))
    with pytest.raises(ValueError, match="input_dim 2"):
        guide(*regression_data())
    assert guide(*regression_data()).keys() == {"slope", "scale"}
