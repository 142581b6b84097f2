"""Predictive, median and quantiles."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_mean, init_to_value
from torch.testing import assert_close

from tests.guides.zoo import F64, SCHOOLS, make_guide, number, regression, regression_data, schools, shake, train, wide


@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
def test_predictive_has_the_shapes_of_a_gaussian_guide(make, parallel):
    """The guide was trained with data; prediction runs the model without them, also for another number of rows."""
    x, y = regression_data()
    new = torch.randn(9)

    def predict(guide):
        train(regression, guide, 2, x, y)
        predictive = Predictive(regression, guide=guide, num_samples=7, parallel=parallel)
        return {name: value.shape for name, value in {**predictive(x), **predictive(new)}.items()}

    shapes = predict(make(regression))
    pyro.clear_param_store()
    assert shapes == predict(AutoMultivariateNormal(regression))
    assert shapes["y"] == (7, 9)


@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
def test_predictive_draws_from_the_posterior_predictive(parallel):
    def model(n, y=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", n):
            return pyro.sample("y", dist.Normal(loc, 0.1), obs=y)

    def start(site):
        return torch.tensor(5.0)

    guide = make_guide("iaf", model, init_loc_fn=start, init_scale=0.5)
    guide.setup(3, torch.zeros(3))
    samples = Predictive(model, guide=guide, num_samples=400, parallel=parallel)(3)
    loc, y = samples["loc"].reshape(-1), samples["y"].reshape(400, 3)
    assert_close(loc.mean().item(), 5.0, atol=0.1, rtol=0)
    assert_close(loc.std().item(), 0.5, atol=0.06, rtol=0)
    assert_close((y - loc[:, None]).std().item(), 0.1, atol=0.01, rtol=0)


def test_predictive_of_local_latents(make):
    guide = make(schools)
    guide.setup(SCHOOLS)
    for parallel in (False, True):
        samples = Predictive(schools, guide=guide, num_samples=6, parallel=parallel)(None)
        assert samples["theta"].shape == (6, 3)
        assert samples["y"].shape == (6, 3)
        assert samples["y"].dtype == F64


def test_predictive_can_be_jit_traced():
    x, y = regression_data()
    guide = make_guide("iaf", regression)
    guide(x, y)
    predictive = Predictive(regression, guide=guide, num_samples=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace_module(predictive, {"call": (x,)}, check_trace=False)
    one, two = traced.call(x), traced.call(x)
    assert [value.shape for value in one] == [value.shape for value in predictive.call(x)]
    assert all((a != b).any() for a, b in zip(one, two, strict=True)), "the draws are not constants of the program"


# -- median and quantiles ----------------------------------------------------------------------------------------------


def test_median_and_quantiles_have_the_shapes_and_types_of_the_sites(make):
    guide = make(schools)
    median, quantiles = guide.median(SCHOOLS), guide.quantiles([0.1, 0.5, 0.9], SCHOOLS)
    assert {name: tuple(value.shape) for name, value in median.items()} == {"mu": (), "tau": (), "theta": (3,)}
    for name, value in quantiles.items():
        assert value.shape == (3, *median[name].shape)
        assert value.dtype == F64
        assert not value.requires_grad
        assert_close(value[1], median[name])
    assert (quantiles["tau"] > 0).all()


def test_quantiles_increase(make):
    guide = make(schools)
    guide.setup(SCHOOLS)
    shake(guide)
    levels = torch.linspace(0.05, 0.95, 10)
    for value in guide.quantiles(levels, SCHOOLS).values():
        assert (value.diff(dim=0) > 0).all()


def test_quantiles_and_median_are_deterministic(make):
    guide = make(schools)
    guide.setup(SCHOOLS)
    before = torch.get_rng_state()
    first = guide.quantiles([0.2, 0.8], SCHOOLS)
    median = guide.median(SCHOOLS)
    assert torch.equal(torch.get_rng_state(), before)
    pyro.set_rng_seed(99)
    assert_close(guide.quantiles([0.2, 0.8], SCHOOLS), first, rtol=0, atol=0)
    assert_close(guide.median(SCHOOLS), median, rtol=0, atol=0)


def test_quantiles_are_those_of_a_known_posterior(make):
    """The initial guide is Gaussian: N(1, 0.5) for x, and the same for log s."""

    def model():
        pyro.sample("x", dist.Normal(number(1.0), 1.0))
        pyro.sample("s", dist.LogNormal(number(1.0), 1.0))

    start = init_to_value(values={"x": number(1.0), "s": number(1.0).exp()})
    guide = make(model, init_loc_fn=start, init_scale=0.5)
    levels = [0.05, 0.25, 0.5, 0.75, 0.95]
    expected = dist.Normal(number(1.0), 0.5).icdf(torch.tensor(levels, dtype=F64))
    found = guide.quantiles(levels)
    assert_close(found["x"], expected, atol=0.04, rtol=0)
    assert_close(found["s"].log(), expected, atol=0.04, rtol=0)
    assert_close(guide.median()["s"].item(), torch.e, atol=0.06, rtol=0)


@pytest.mark.slow
def test_quantiles_of_many_dimensions():
    """There are more numbers than torch.quantile accepts."""
    guide = make_guide("nice", wide(4200), init_loc_fn=init_to_mean, depth=1)
    low, high = guide.quantiles([0.1587, 0.8413])["x"]
    assert_close((high - low) / 2, torch.full((4200,), 0.1), atol=0.02, rtol=0)
