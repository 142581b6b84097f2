"""Export to ArviZ, and plots."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from pyro.infer.reparam import AutoReparam, LocScaleReparam
from torch import Tensor

import pyro_flowguides as fg
from pyro_flowguides.diagnostics import arviz_compat, log_weights, plot_khat, plot_pairs, plot_ppc, to_inference_data
from tests.diagnostics import programs
from tests.diagnostics.programs import DATA, EFFECTS

az = arviz_compat.load()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.fixture(name="schools")
def _schools() -> Any:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return to_inference_data(
        programs.schools_model, programs.schools_guide, num_samples=60, coords={"school": list("ABCDEFGH")}
    )


def test_groups_dimensions_and_coordinates(schools: Any) -> None:
    assert arviz_compat.group_names(schools) == {
        "posterior",
        "sample_stats",
        "posterior_predictive",
        "log_likelihood",
        "observed_data",
        "prior",
        "prior_predictive",
    }
    assert schools["posterior"]["theta"].dims == ("chain", "draw", "school")
    assert schools["posterior"]["mu"].dims == ("chain", "draw")
    assert schools["posterior"].sizes["draw"] == 60
    assert list(schools["posterior"]["school"].values) == list("ABCDEFGH")
    assert schools["observed_data"]["y"].dims == ("school",)
    assert schools["log_likelihood"]["y"].dims == ("chain", "draw", "school")
    assert schools["prior_predictive"]["y"].shape == (1, 60, 8)
    assert set(schools["prior"].data_vars) == {"mu", "tau", "theta"}
    np.testing.assert_array_equal(schools["observed_data"]["y"], EFFECTS.numpy())


def test_sample_stats_are_consistent(schools: Any) -> None:
    stats = schools["sample_stats"]
    assert set(stats.data_vars) == {"log_p", "log_q", "log_weights"}
    np.testing.assert_allclose(stats["log_weights"], stats["log_p"] - stats["log_q"])


def test_log_likelihood_of_each_datum(schools: Any) -> None:
    theta = torch.tensor(schools["posterior"]["theta"].values[0])
    expected = dist.Normal(theta, programs.ERRORS).log_prob(EFFECTS)
    np.testing.assert_allclose(schools["log_likelihood"]["y"][0], expected, rtol=1e-4, atol=1e-4)


def test_predictive_draws_have_the_right_spread() -> None:
    data = to_inference_data(programs.gaussian_model, programs.gaussian_guide(), DATA, num_samples=2000)
    mean, sd = programs.gaussian_posterior(DATA)
    posterior, prior = data["posterior_predictive"]["x"].values, data["prior_predictive"]["x"].values
    assert posterior.mean() == pytest.approx(mean, abs=0.1)
    assert posterior.std() == pytest.approx((sd**2 + 1) ** 0.5, rel=0.05)
    assert prior.mean() == pytest.approx(0, abs=0.2)
    assert prior.std() == pytest.approx(5**0.5, rel=0.05)
    assert np.unique(posterior[0, 0]).size == len(DATA)


def test_loo_is_that_of_the_posterior() -> None:
    data = to_inference_data(programs.gaussian_model, programs.gaussian_guide(), DATA, num_samples=1000)
    loo = az.loo(data, pointwise=True)
    exact = 0.0
    for i in range(len(DATA)):
        mean, sd = programs.gaussian_posterior(torch.cat([DATA[:i], DATA[i + 1 :]]))
        exact += float(dist.Normal(mean, (sd**2 + 1) ** 0.5).log_prob(DATA[i]))
    assert float(getattr(loo, "elpd_loo", getattr(loo, "elpd", np.nan))) == pytest.approx(exact, abs=0.2)


def test_netcdf_round_trip(schools: Any, tmp_path: Path) -> None:
    pytest.importorskip("h5netcdf", reason="no NetCDF backend is installed")
    schools.to_netcdf(tmp_path / "fit.nc")
    loaded = az.from_netcdf(tmp_path / "fit.nc")
    for group in arviz_compat.group_names(schools):
        for name, values in schools[group].data_vars.items():
            np.testing.assert_array_equal(loaded[group][name].values, values.values)
            assert loaded[group][name].dims == values.dims
            assert loaded[group][name].dtype == values.dtype
    assert loaded["posterior"].attrs["guide"] == "schools_guide"
    loaded.close()


def test_attributes_tell_the_origin(schools: Any) -> None:
    attrs = schools["posterior"].attrs
    assert attrs["inference_library"] == "pyro_flowguides"
    assert attrs["inference_library_version"]
    assert attrs["guide"] == "schools_guide"
    assert attrs["draws"] == "from the guide"
    assert attrs["created_at"].startswith("20")
    assert attrs == {**schools.attrs, **attrs}


def test_all_kinds_of_guides_are_exported_with_their_name() -> None:
    for make in (autoguide.AutoNormal, autoguide.AutoMultivariateNormal, autoguide.AutoIAFNormal, fg.AutoIAF):
        data = to_inference_data(programs.schools_model, make(programs.schools_model), num_samples=30)
        assert data["posterior"].attrs["guide"] == make.__name__
        assert set(data["posterior"].data_vars) == {"mu", "tau", "theta"}


def test_resampled_draws_follow_the_posterior() -> None:
    guide = programs.gaussian_guide(0.8)
    data = to_inference_data(programs.gaussian_model, guide, DATA, num_samples=2000, resample=True)
    mean, sd = programs.gaussian_posterior(DATA)
    assert float(data["posterior"]["z"].mean()) == pytest.approx(mean, abs=0.15 * sd)
    assert data["posterior"].attrs["draws"] == "importance-resampled"
    assert data["posterior"].sizes["draw"] == 2000


def test_improper_priors_are_left_out_with_a_reason() -> None:
    def model(data: Tensor) -> None:
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(data)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    data = to_inference_data(model, programs.gaussian_guide(), DATA, num_samples=50)
    assert "prior" not in arviz_compat.group_names(data)
    assert "prior_predictive" not in arviz_compat.group_names(data)
    assert "site 'z' is improper" in data["posterior"].attrs["prior_predictive"]
    assert "posterior_predictive" in arviz_compat.group_names(data)


def test_nested_plates_events_and_deterministic_sites() -> None:
    def model() -> None:
        with pyro.plate("row", 3, dim=-2), pyro.plate("column", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.deterministic("total", z.sum((-3, -2)), event_dim=1)
        with pyro.plate("row_again", 3, dim=-2):
            pyro.sample("w", dist.Normal(0.0, 1.0))

    def guide() -> None:
        with pyro.plate("row", 3, dim=-2), pyro.plate("column", 2, dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("row_again", 3, dim=-2):
            pyro.sample("w", dist.Normal(0.0, 1.0))

    data = to_inference_data(model, guide, num_samples=30)
    posterior = data["posterior"]
    assert posterior["z"].dims == ("chain", "draw", "row", "column", "z_dim_2")
    assert posterior["w"].dims == ("chain", "draw", "row_again", "w_dim_1")
    assert posterior["total"].shape == (1, 30, 4)
    np.testing.assert_allclose(posterior["total"], posterior["z"].sum(("row", "column")), rtol=1e-5, atol=1e-5)
    assert "posterior_predictive" not in arviz_compat.group_names(data)


def test_sequential_plates_and_scalar_data() -> None:
    def model(data: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        for i in pyro.plate("data", len(data)):
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=data[i])

    data = to_inference_data(model, programs.gaussian_guide(), DATA, num_samples=30)
    assert data["observed_data"]["x3"].shape == ()
    assert data["log_likelihood"]["x3"].shape == data["posterior_predictive"]["x3"].shape == (1, 30)


def test_a_plate_named_draw_is_renamed() -> None:
    def model(data: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        with pyro.plate("draw", len(data)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    data = to_inference_data(model, programs.gaussian_guide(), DATA, num_samples=30)
    assert data["log_likelihood"]["x"].dims == ("chain", "draw", "draw_plate")


def test_labels_must_fit_a_dimension() -> None:
    with pytest.raises(ValueError, match="no dimension 'person'"):
        to_inference_data(
            programs.gaussian_model, programs.gaussian_guide(), DATA, num_samples=30, coords={"person": "abcde"}
        )
    with pytest.raises(ValueError, match="2 labels for dimension 'data' of size 5"):
        to_inference_data(
            programs.gaussian_model, programs.gaussian_guide(), DATA, num_samples=30, coords={"data": "ab"}
        )


def test_enumerated_sites_leave_out_the_log_likelihood() -> None:
    def guide(data: Tensor) -> None:
        pyro.sample("loc", dist.Normal(0.0, 1.0))

    data = to_inference_data(programs.clusters_model, guide, DATA, num_samples=30)
    assert set(data["posterior"].data_vars) == {"loc"}
    assert data["posterior_predictive"]["x"].shape == (1, 30, 5)
    assert "cluster" in data["posterior"].attrs["log_likelihood"]


def test_models_that_cannot_take_many_draws_and_discrete_data() -> None:
    def model(data: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        scale = 1.0 if float(rate.mean()) > 2 else 2.0  # does not vectorize
        with pyro.plate("data", len(data)):
            pyro.sample("x", dist.Poisson(rate * scale), obs=data)

    def guide(data: Tensor) -> None:
        pyro.sample("rate", dist.LogNormal(0.5, 0.5))

    counts = torch.tensor([1.0, 4.0, 2.0])
    assert not log_weights(model, guide, counts, num_samples=30).vectorized
    data = to_inference_data(model, guide, counts, num_samples=30)
    assert data["posterior_predictive"]["x"].shape == (1, 30, 3)
    rate = torch.tensor(data["posterior"]["rate"].values[0])[:, None]
    expected = dist.Poisson(rate * torch.where(rate > 2, 1.0, 2.0)).log_prob(counts)
    np.testing.assert_allclose(data["log_likelihood"]["x"][0], expected, rtol=1e-5, atol=1e-5)


def test_types_are_kept() -> None:
    def model() -> None:
        pyro.sample("double", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("flag", dist.Bernoulli(0.5))
        pyro.sample("half", dist.Delta(torch.tensor(0.5, dtype=torch.float16)))
        pyro.sample("count", dist.Categorical(torch.ones(3)))

    data = to_inference_data(model, model, num_samples=30)["posterior"]
    assert data["double"].dtype == np.float64
    assert data["half"].dtype == np.float32
    assert data["count"].dtype == np.int64


def test_plots(schools: Any) -> None:
    weighted = log_weights(programs.gaussian_model, programs.gaussian_guide(0.5), DATA, num_samples=300)
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    figures = [
        plot_khat(weighted),
        plot_khat(weighted.log_w),
        plot_khat(schools),
        plot_pairs(schools, ["mu", "tau"]),
        plot_ppc(schools, num_samples=5),
    ]
    for figure in figures:
        assert figure.axes
        figure.savefig("/dev/null", format="png")
    assert pyplot.get_fignums() == before
    assert len(figures[0].axes) == 2


def test_plots_of_unsuitable_data() -> None:
    data = to_inference_data(programs.gaussian_model, programs.gaussian_guide(), DATA, num_samples=30, resample=True)
    with pytest.raises(ValueError, match="resampled"):
        plot_khat(data)
    with pytest.raises(ValueError, match="at least 25"):
        plot_khat(torch.randn(10))
    without_data = to_inference_data(programs.mixture_model, programs.mixture_guide(4.0), num_samples=30)
    with pytest.raises(ValueError, match="no posterior predictive"):
        plot_ppc(without_data)


def test_a_model_that_fails_at_a_draw_leaves_out_what_depends_on_it() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if bool((z > 1.0).any()):
            raise ValueError("bad point")
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.5))

    torch.manual_seed(0)
    data = to_inference_data(model, autoguide.AutoNormal(model, init_scale=1.0), num_samples=50)
    assert data["posterior"]["z"].shape == (1, 50)
    assert data["sample_stats"]["log_p"].isnull().sum() == (data["posterior"]["z"] > 1.0).sum() > 0
    assert data["posterior"].attrs["log_likelihood"] == "left out, as are deterministic sites: ValueError: bad point"


REPARAMETRIZED = {
    "LocScaleReparam": lambda model: poutine.reparam(model, config={"theta": LocScaleReparam(0.0)}),
    "AutoReparam": lambda model: AutoReparam()(model),
}


@pytest.mark.parametrize("name", REPARAMETRIZED)
def test_reparametrized_sites_are_functions_of_latent_ones(name: str) -> None:
    def schools(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 10.0), obs=y)

    y = torch.tensor([28.0, 8.0, -3.0, 7.0])
    model = REPARAMETRIZED[name](schools)
    data = to_inference_data(model, autoguide.AutoNormal(model), y, num_samples=50)
    posterior = data["posterior"]
    assert {"mu", "tau", "theta"} <= set(posterior.data_vars)
    assert posterior["theta"].dims == ("chain", "draw", "school")
    if name == "LocScaleReparam":
        shift = posterior["tau"] * posterior["theta_decentered"]
        assert np.allclose(posterior["theta"] - posterior["mu"], shift, atol=1e-4)
    for group in ("observed_data", "log_likelihood", "posterior_predictive"):
        assert list(data[group].data_vars) == ["y"]
    log_likelihood = dist.Normal(torch.tensor(posterior["theta"].values), 10.0).log_prob(y).numpy()
    assert np.allclose(data["log_likelihood"]["y"], log_likelihood, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of so few draws
        assert "elpd" in str(arviz_compat.load().loo(data))


def test_missing_data_have_no_log_likelihood() -> None:
    is_observed = torch.tensor([True, False, True])

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y, obs_mask=is_observed)

    data = to_inference_data(model, autoguide.AutoNormal(model), torch.tensor([1.0, 99.0, 2.0]), num_samples=30)
    log_likelihood = data["log_likelihood"]["y_observed"]
    assert (log_likelihood[..., 1] == 0).all()
    expected = dist.Normal(torch.tensor(data["posterior"]["z"].values), 1.0).log_prob(torch.tensor(2.0)).numpy()
    assert np.allclose(log_likelihood[..., 2], expected, atol=1e-5)
    imputed = data["posterior"]["y"]  # of data and imputed values
    assert (imputed[..., 0] == 1).all()
    assert np.array_equal(imputed[..., 1], data["posterior"]["y_unobserved"][..., 1])
