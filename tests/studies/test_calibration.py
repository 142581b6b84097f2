"""Variational simulation-based calibration with known guides of a known posterior, and the symmetry test itself."""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal
from scipy import stats

import pyro_flowguides as fg
from pyro_flowguides.studies import VSBC, vsbc
from pyro_flowguides.studies.calibration import symmetry_test

DATA = torch.zeros(3)


def conjugate(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def fixed(shift=0.0, stretch=1.0):
    """Return a factory of guides that are the exact posterior, shifted by some of its sd and stretched."""

    def make(model):
        y = poutine.trace(model).get_trace(DATA).nodes["y"]["value"]

        def guide(_):
            nothing = 0 * pyro.param("nothing", torch.tensor(0.0))
            pyro.sample("z", dist.Normal(y.sum() / 4 + 0.5 * shift + nothing, 0.5 * stretch))

        return guide

    return make


def study(guide, model=conjugate, *args, **options):
    defaults = {
        "replicates": 40,
        "num_samples": 200,
        "fit_options": {"steps": 2, "num_particles": 1},
        "progress": False,
    }
    return vsbc(model, guide, *(args or (DATA,)), **{**defaults, **options})


def test_the_exact_posterior_gives_uniform_p():
    result = study(fixed(), replicates=100)
    assert result.p["z"].shape == (100,)
    assert stats.kstest(result.p["z"].numpy(), "uniform").pvalue > 0.01
    assert result.p_values["z"] > 0.05
    assert result.biased == []
    assert result.table["width"][0] == ""


@pytest.mark.parametrize(("shift", "direction"), [(-1.0, "too low"), (1.0, "too high")])
def test_a_biased_guide_is_flagged_with_its_direction(shift, direction):
    result = study(fixed(shift))
    assert result.p_values["z"] < 0.01
    assert result.biased == ["z"]
    assert result.table["bias"][0] == direction
    assert direction in str(result)


@pytest.mark.parametrize(("stretch", "width"), [(0.3, "too narrow"), (4.0, "too wide")])
def test_a_wrong_spread_is_symmetric_and_shown_as_width(stretch, width):
    result = study(fixed(stretch=stretch))
    assert result.p_values["z"] > 0.01
    assert result.table["width"][0] == width


@pytest.mark.parametrize("guide", [AutoDiagonalNormal, fg.AutoPlanar])
def test_fitted_guides(guide):
    options = {"steps": 80, "lr": 0.1, "num_particles": 8}
    result = study(guide, replicates=5, fit_options=options)
    assert result.errors == ()
    assert result.biased == []
    assert 0.1 < result.p["z"].mean() < 0.9


def two_sites(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.3))
    pyro.deterministic("twice", 2 * w)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((w * x).sum(-1), s), obs=y)


@pytest.mark.parametrize("y", [None, torch.zeros(5)])
def test_shapes_labels_and_observed(y):
    x = torch.arange(10.0).reshape(5, 2) / 5
    result = study(AutoDiagonalNormal, two_sites, x, replicates=4, observed=["y"], y=y)
    assert {name: value.shape for name, value in result.p.items()} == {"w": (4, 2), "s": (4,)}
    assert {name: value.shape for name, value in result.p_values.items()} == {"w": (2,), "s": ()}
    assert set(result.table["marginal"]) == {"w[0]", "w[1]", "s"}
    assert sum(axes.has_data() for axes in result.plot().axes) == 3


def test_the_seed_determines_p_and_nothing_outside_changes():
    pyro.param("nothing", torch.tensor(7.0))
    state = torch.get_rng_state()
    first, second, other = (study(fixed(), replicates=3, seed=seed).p["z"] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert pyro.param("nothing").item() == 7.0
    assert torch.equal(state, torch.get_rng_state())


def test_replicates_that_fail_are_left_out():
    makers = itertools.cycle([fixed(), lambda model: 1 / 0])
    result = study(lambda model: next(makers)(model), replicates=6)
    assert result.replicates == 3
    assert len(result.errors) == 3
    assert "3 failed" in str(result)


def test_it_is_an_error_if_the_first_replicates_fail():
    with pytest.raises(RuntimeError, match=r"first 3 replicates failed.*division by zero"):
        study(lambda model: 1 / 0)


def improper(y):
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def with_factor(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("y", -((y - z) ** 2))


def subsampled(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3, subsample_size=2) as index:
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def without_data(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0))


def two_outcomes(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y[0])
    pyro.sample("other", dist.Normal(z, 1.0), obs=y[1])


@pytest.mark.parametrize(
    ("model", "options", "match"),
    [
        (improper, {}, "prior of site 'z' is improper"),
        (with_factor, {}, "'y' is a factor"),
        (subsampled, {}, "plate 'data' is subsampled to 2 of 3"),
        (without_data, {}, "no site of the model holds data"),
        (two_outcomes, {"observed": ["y"]}, "'other' holds data but is not among observed"),
        (conjugate, {"observed": ["y", "yy"]}, "no site 'yy': did you mean 'y'"),
        (conjugate, {"replicates": 1}, "at least 2"),
    ],
)
def test_refusals(model, options, match):
    with pytest.raises(ValueError, match=match):
        study(AutoDiagonalNormal, model, **options)


# -- the test ----------------------------------------------------------------------------------------------------------


def test_the_statistic_is_that_of_kolmogorov_and_smirnov():
    generator = np.random.default_rng(0)
    for size, ties in itertools.product((1, 7, 50), (False, True)):
        p = generator.beta(2, 1, size)
        p = np.round(p, 1) if ties else p
        expected = stats.ks_2samp(p, np.round(1 - p, 12) if ties else 1 - p).statistic
        assert symmetry_test(torch.tensor(p))[0] == pytest.approx(expected)


def test_the_p_value_is_exact():
    """Over all ways to place eight distances on either side of 1/2."""
    distances = torch.linspace(0.05, 0.45, 8, dtype=torch.float64)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)), dtype=torch.float64)
    tests = [symmetry_test(0.5 + row * distances) for row in signs]
    statistics = np.array([statistic for statistic, _ in tests])
    for statistic, p_value in tests:
        assert p_value == pytest.approx((statistics >= statistic - 1e-9).mean())


def test_a_constant_half_is_symmetric():
    assert symmetry_test(torch.full((5,), 0.5)) == (0.0, 1.0)


def test_only_the_first_of_many_marginals_are_shown():
    p = torch.rand(50, 20, dtype=torch.float64)
    text = str(VSBC({"z": p}, num_samples=100))
    assert "... and 8 more" in text
    assert len(VSBC({"z": p}, num_samples=100).plot().axes) == 12
