"""``fg.fit``: exact answers where they are known, and clear messages where there is none."""

import gc
import math
import threading
import time
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal

import pyro_flowguides as fg

X = torch.tensor([[1.0, 0.8], [0.5, 0.9], [-1.5, -1.0], [0.1, -0.4]], dtype=torch.float64)
Y = torch.tensor([1.0, -0.4, -1.2, 0.9], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _double_precision(_fresh_state):
    torch.set_default_dtype(torch.float64)


def regression(x, y):
    """Conjugate: the posterior is normal, the evidence N(y | 0, I/4 + x xᵀ)."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((w * x).sum(-1), 0.5), obs=y)


PRECISION = torch.eye(2, dtype=torch.float64) + 4 * X.mT @ X
MEAN = torch.linalg.solve(PRECISION, 4 * X.mT @ Y)
LOG_Z = float(
    dist.MultivariateNormal(
        torch.zeros(4, dtype=torch.float64), 0.25 * torch.eye(4, dtype=torch.float64) + X @ X.mT
    ).log_prob(Y)
)


def handwritten(x, y):
    loc = pyro.param("loc", torch.zeros(2))
    tril = pyro.param("tril", 0.3 * torch.eye(2), constraint=dist.constraints.lower_cholesky)
    return {"w": pyro.sample("w", dist.MultivariateNormal(loc, scale_tril=tril))}


def as_list(model):
    guide = AutoGuideList(model)
    guide.append(AutoMultivariateNormal(pyro.poutine.block(model, expose=["w"])))
    return guide


def fit(model, guide, *args, **options):
    return fg.fit(model, guide, *args, **{"steps": 300, "num_particles": 16, "progress": False, **options})


# -- exact answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", ["planar", "iaf", "nice"])
def test_conjugate_posterior_is_found_by_flows(flow):
    guide = fg.AutoFlow(regression, flow, depth=2, hidden_dims=[8])
    result = fit(regression, guide, X, Y, steps=150)
    assert result.route.kind == "recorded"
    assert "Laplace" in result.start
    assert_exact(result)


@pytest.mark.parametrize(
    "make",
    [AutoMultivariateNormal, as_list, lambda model: handwritten],
    ids=["AutoMultivariateNormal", "AutoGuideList", "hand-written"],
)
def test_conjugate_posterior_is_found_by_pyros_guides(make):
    result = fit(regression, make(regression), X, Y, steps=300, lr=0.05)
    assert result.route.kind == "traced"
    assert "not a flow guide" in result.route.reason
    assert result.start == ""
    assert_exact(result)


def assert_exact(result):
    diagnosis = result.diagnosis
    assert LOG_Z - 0.02 < diagnosis.elbo < LOG_Z + 4 * diagnosis.elbo_se + 1e-9
    assert diagnosis.verdict == "good"
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([result.guide(X, Y)["w"] for _ in range(400)])
    sd = torch.linalg.inv(PRECISION).diagonal().sqrt()
    assert ((draws.mean(0) - MEAN) / sd).abs().max() < 0.25
    assert (draws.std(0) / sd).log().abs().max() < 0.15


def test_a_mean_field_guide_reaches_its_own_optimum():
    """AutoNormal cannot have the correlation: its best bound is log Z - ½ log(Π P_ii / det P)."""
    result = fit(regression, AutoNormal(regression), X, Y, steps=300, lr=0.05)
    gap = 0.5 * float(PRECISION.diagonal().log().sum() - torch.logdet(PRECISION))
    assert gap > 0.05
    assert result.diagnosis.elbo == pytest.approx(LOG_Z - gap, abs=0.02 + 4 * result.diagnosis.elbo_se)


@pytest.mark.parametrize(("narrow", "compile"), [(1e-2, False), (1e-6, False), (1e-6, True)])
def test_posteriors_of_any_scale_are_fitted_alike(narrow, compile):
    """A posterior as narrow as that of a million observations, beside a coordinate with large numbers."""
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)

    def model():
        fine = pyro.sample("fine", dist.Normal(3.0, narrow))
        coarse = pyro.sample("coarse", dist.Normal(0.0, 1 / narrow))
        pyro.factor("correlation", -0.5 * (fine - 3) / narrow * coarse * narrow)

    result = fg.fit(model, fg.AutoPlanar(model, depth=2), compile=compile, progress=False)
    assert result.diagnosis.elbo == pytest.approx(-0.5 * math.log(1 - 0.25), abs=0.03)
    assert result.diagnosis.verdict == "good"


def test_the_posterior_is_found_without_a_warm_start():
    guide = fg.AutoFlow(regression, "planar", depth=1)
    result = fit(regression, guide, X, Y, steps=300, lr=0.05, warm_start=False)
    assert result.start == ""
    assert result.elbo_history[0] < LOG_Z - 1
    assert result.diagnosis.elbo > LOG_Z - 0.02


@pytest.mark.parametrize("options", [{"path_gradient": False}, {"importance": 4}], ids=str)
def test_other_gradients_and_bounds(options):
    result = fit(regression, fg.AutoFlow(regression, "planar", depth=1), X, Y, steps=150, **options)
    assert result.diagnosis.elbo > LOG_Z - 0.03


# -- seeds and state ---------------------------------------------------------------------------------------------------


def parameters(seed, make=lambda: fg.AutoFlow(regression, "planar", depth=2)):
    pyro.clear_param_store()
    guide = make()
    result = fit(regression, guide, X, Y, steps=40, seed=seed)
    return torch.cat([p.detach().reshape(-1) for p in guide.parameters()]), result


@pytest.mark.parametrize(
    "make", [lambda: fg.AutoFlow(regression, "planar", depth=2), lambda: AutoNormal(regression)], ids=["flow", "Pyro's"]
)
def test_the_seed_decides_whatever_the_global_generator_holds(make):
    torch.manual_seed(1)
    one, first = parameters(5, make)
    torch.manual_seed(2)
    two, second = parameters(5, make)
    other, _ = parameters(6, make)
    assert torch.equal(one, two)
    assert first.elbo_history == second.elbo_history
    assert first.diagnosis.elbo == second.diagnosis.elbo
    assert not torch.equal(one, other)


def test_the_global_generator_is_restored_even_by_a_failure():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    parameters(5)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(fg.FitDivergedError):
        fit(hopeless, fg.AutoFlow(hopeless, "planar", depth=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_easy_model_stops_early_with_a_reason():
    result = fit(regression, fg.AutoFlow(regression, "planar", depth=1), X, Y, steps=1000, num_particles=4)
    assert result.steps < 1000
    assert "the start was within" in result.reason
    assert result.diagnosis.elbo > LOG_Z - 0.02


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def hopeless():
    """Finite when the guide is made, never again."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("poison", x * math.nan if x.requires_grad else 0 * x)


@pytest.mark.parametrize("make", [lambda model: fg.AutoFlow(model, "planar", depth=1), AutoNormal])
def test_a_diverged_fit_names_the_step(make):
    with pytest.raises(fg.FitDivergedError, match="50 steps in a row, up to step 50"):
        fit(hopeless, make(hopeless))


def infinite(data):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("fine", dist.Normal(x, 1.0), obs=data)
    pyro.factor("culprit", -torch.exp(1e4 + x))


@pytest.mark.parametrize("make", [lambda model: fg.AutoFlow(model, "planar", depth=1), AutoNormal])
def test_a_diverged_fit_names_the_site(make):
    with pytest.raises(fg.FitDivergedError, match="not finite at site 'culprit'"):
        fit(infinite, make(infinite), torch.tensor(1.0))


def cliff():
    """N(0, 1) below 0.7, zero density above: overflow there, and derivatives that are not numbers."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("cliff", -1e-300 * (1000 * x).exp())


def test_particles_that_are_not_finite_are_dropped_and_the_fit_survives():
    guide = fg.AutoFlow(cliff, "planar", depth=2, init_scale=0.7, init_loc_fn=lambda site: torch.tensor(0.3))
    guide()
    before = [p.detach().clone() for p in guide.parameters()]
    result = fit(cliff, guide, steps=60, warm_start=False)
    assert result.num_dropped > 10
    assert f"{result.num_dropped} particles dropped" in str(result)
    assert all(math.isfinite(value) for value in result.elbo_history)
    assert all(bool(p.isfinite().all()) for p in guide.parameters())
    assert sum((p - q).abs().sum() for p, q in zip(guide.parameters(), before, strict=True)) > 0.1


def test_minibatches_are_fitted_without_a_verdict():
    data = torch.linspace(0.0, 2.0, 20)

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20, subsample_size=10) as index:
            pyro.sample("y", dist.Normal(x, 1.0), obs=data[index])

    result = fit(model, fg.AutoFlow(model, "planar", depth=1), steps=200, warm_start=False, lr=0.05)
    assert result.diagnosis is None
    assert "No verdict: plate 'data' is subsampled" in str(result)
    with torch.no_grad():
        assert float(result.guide.median()["x"]) == pytest.approx(20 / 21, abs=0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "fit: steps must be at least 1, got 0"),
        ({"num_particles": 0}, "fit: num_particles must be at least 1, got 0"),
        ({"num_particles": 10, "importance": 4}, "importance must divide num_particles"),
        ({"temper": 1.5}, r"temper must lie in \(0, 1\)"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fit(regression, AutoNormal(regression), X, Y, **options)


def test_nothing_to_train_is_refused():
    def guide(x, y):
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match="no parameters to train"):
        fit(regression, guide, X, Y)


# -- several modes -----------------------------------------------------------------------------------------------------

SEPARATION, WEIGHT = 4.0, 0.6


def two_modes():
    """0.6 N(4, 1) + 0.4 N(-4, 1): log Z = 0."""
    x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
    right = math.log(WEIGHT) + dist.Normal(SEPARATION, 1.0).log_prob(x)
    left = math.log(1 - WEIGHT) + dist.Normal(-SEPARATION, 1.0).log_prob(x)
    pyro.factor("density", torch.logaddexp(right, left))


def share(guide, draws=1000):
    with torch.no_grad(), pyro.plate("draws", draws):
        torch.manual_seed(0)
        return float((guide()["x"] > 0).double().mean())


def fit_modes(**options):
    """A fit that starts on the larger mode, without a warm start: only the target differs."""
    guide = fg.AutoFlow(two_modes, "planar", init_loc_fn=lambda site: torch.tensor(SEPARATION), init_scale=1.0)
    return fit(two_modes, guide, steps=600, lr=0.03, warm_start=False, **options)


@pytest.mark.slow
def test_the_plain_bound_loses_a_mode():
    result = fit_modes()
    assert share(result.guide) == 1.0
    assert result.diagnosis.elbo == pytest.approx(math.log(WEIGHT), abs=0.02)


@pytest.mark.slow
def test_tempering_finds_both_modes():
    result = fit_modes(temper=0.05)
    assert share(result.guide) == pytest.approx(WEIGHT, abs=0.1)
    assert result.diagnosis.elbo > -0.1


# -- the result --------------------------------------------------------------------------------------------------------


def test_result():
    guide, begin = fg.AutoFlow(regression, "planar", depth=1), time.perf_counter()
    result = fit(regression, guide, X, Y, steps=60, warm_start=False)
    assert result.steps == len(result.elbo_history) == 60
    assert 0 < result.seconds < time.perf_counter() - begin
    text = str(result)
    assert text.startswith("AutoFlow: 60 steps in ")
    assert "all 60 steps used" in text
    assert str(result.diagnosis) in text
    data = result.to_inference_data(num_samples=50)
    assert data.posterior["w"].shape == (1, 50, 2)
    assert {"log_p", "log_q", "log_weights"} <= set(data.sample_stats.data_vars)
    assert (data.observed_data["y"].values == Y.numpy()).all()


@pytest.mark.parametrize("error", [RuntimeError, torch.linalg.LinAlgError, MemoryError, KeyboardInterrupt])
def test_a_fit_stands_whatever_its_verdict_raises(error):
    """The guide's own draws stay near zero; those of the widened guide, which the verdict draws, go further."""
    is_set_up = False

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if is_set_up and bool((z.abs() > 0.8).any()):
            raise error("far out")
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    guide = fg.AutoPlanar(model, depth=1)
    guide()
    is_set_up = True
    result = fit(model, guide, steps=3, num_particles=2, warm_start=False)
    assert result.steps == 3
    if error in (MemoryError, KeyboardInterrupt):
        assert result.diagnosis is None
        assert "far out" in result.why_no_verdict
    else:  # a draw at which the model fails has the weight NaN
        assert result.diagnosis.num_samples == 4000


# -- one process, many fits --------------------------------------------------------------------------------------------


def gaussian(value, size):
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(size), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.full((size,), value))

    return model


def test_fits_in_threads_are_those_of_one_after_the_other():
    targets = [(gaussian(1.0, 2), fg.AutoNICE), (gaussian(-2.0, 3), fg.AutoPlanar), (gaussian(3.0, 1), AutoNormal)]
    results = {}

    def run(number):
        target, guide = targets[number]
        result = fit(target, guide(target), steps=20, num_particles=4)
        results[number] = result.elbo_history, result.diagnosis.elbo

    for number in range(3):
        run(number)
    expected = dict(results)
    results.clear()
    pyro.clear_param_store()
    threads = [threading.Thread(target=run, args=[number]) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected
    assert all(pyro.settings.get(f"validate_{name}") for name in ("poutine", "infer", "distributions_pyro"))


def test_a_fit_leaves_nothing_behind():
    """Neither guide nor parameters wait for a garbage collection, which is rare in a large process."""
    target = gaussian(1.0, 2)

    def guide_of_a_fit():
        return weakref.ref(fit(target, fg.AutoNICE(target, depth=1), steps=10, num_particles=4).guide)

    guide_of_a_fit()  # the first one imports ArviZ
    num_parameters = len(pyro.get_param_store())
    gc.collect()
    gc.disable()
    try:
        assert guide_of_a_fit()() is None
    finally:
        gc.enable()
    assert len(pyro.get_param_store()) == num_parameters
