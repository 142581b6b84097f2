"""Recording: what is replayed is what the function would do, and what cannot be replayed is refused."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

import pyro_flowguides as fg
from pyro_flowguides.inference import record as recording
from pyro_flowguides.inference.objectives import DensityObjective, Request
from pyro_flowguides.inference.record import NotRecordedError, Replay, record


def inputs(size=5):
    return torch.randn(size, dtype=torch.float64)


def recorded(function, check=None):
    return record(function, inputs(), check=[inputs()] if check is None else check)


def test_values_and_derivatives_are_replayed():
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def function(x):
        value = (weight.exp() * x.tanh()).square().sum()
        return value.detach(), *torch.autograd.grad(value, [weight])

    replay = recorded(function)
    for _ in range(2):
        x = inputs()
        with torch.no_grad():
            for one, other in zip(replay(x), function_with_gradient(function, x), strict=True):
                assert_close(one, other)
            weight.add_(1.0)  # as an optimiser does: read anew


def function_with_gradient(function, x):
    with torch.enable_grad():
        return function(x)


def test_constants_are_computed_once_and_equal_things_too():
    """What is made of constants alone leaves no operation."""
    data = torch.randn(5, dtype=torch.float64)

    def function(x):
        constant = data.exp().cumsum(0)
        return (x * constant + x * constant,)

    replay = recorded(function)
    names = [str(node.target) for node in replay.graph.nodes if node.op == "call_function"]
    assert sorted(names) == ["aten.add.Tensor", "aten.mul.Tensor"]


def test_what_is_changed_in_place_is_replayed():
    def function(x):
        y = x.exp()
        view = y[:2]
        y.mul_(2.0)
        return view + 1, y

    replay = recorded(function)
    for _ in range(2):
        x = inputs()
        for one, other in zip(replay(x), function(x), strict=True):
            assert_close(one, other)


def branches(x):
    return (x if x.sum() > 0 else -x,)


def counts(x, calls=[0]):  # noqa: B006
    calls[0] += 1
    return (x * calls[0],)


def accumulates(x, total=torch.zeros(5, dtype=torch.float64)):  # noqa: B008
    return (total.add_(x).clone(),)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (branches, "depends on values"),
        (lambda x: (x + torch.randn(5),), "random"),
        (counts, "differs"),
        (accumulates, "constant in place"),
    ],
    ids=["branch", "random", "state", "accumulation"],
)
def test_what_cannot_be_replayed_is_refused(function, message):
    with pytest.raises(NotRecordedError, match=message):
        recorded(function)


def schools(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


DATA = (torch.tensor([15.0, 10.0, 16.0]).double(), torch.tensor([28.0, 8.0, -3.0]).double())


def gradients(objective, request):
    parameters = list(objective.parameters.values())
    for parameter in parameters:
        parameter.grad = None
    step = objective(request, torch.Generator().manual_seed(7))
    step.backward(parameters)
    return step, [parameter.grad for parameter in parameters]


@pytest.mark.parametrize("path", [True, False], ids=["path", "total"])
@pytest.mark.parametrize("flow", ["iaf", "sylvester", "planar", "realnvp"])
def test_with_the_same_noise_the_step_is_the_same_to_rounding(flow, path):
    torch.set_default_dtype(torch.float64)
    guide = fg.AutoFlow(schools, flow)
    guide(*DATA)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    objective = DensityObjective(schools, guide, DATA, {})
    request = Request(16, path, power=0.7)
    step, found = gradients(objective, request)
    assert objective.route == "batched densities, recorded"
    objective.why_not_recorded = "this test asks for it"
    expected_step, expected = gradients(objective, request)
    assert step.elbo == pytest.approx(expected_step.elbo, rel=1e-12)
    assert step.gap == pytest.approx(expected_step.gap, rel=1e-9)
    for one, other in zip(found, expected, strict=True):
        if other is not None and other.numel():
            assert_close(one, other, rtol=1e-8, atol=1e-10 * max(1.0, float(other.abs().max())))


def test_a_model_that_cannot_be_recorded_is_run_anew_and_the_result_says_so():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        scale = 1.0 if math.isfinite(float(x.detach().sum())) else 2.0
        pyro.sample("y", dist.Normal(x, scale), obs=torch.tensor(1.0))

    result = fg.fit(model, fg.AutoIAF(model), steps=300, progress=False)
    assert "run anew at every step because its course depends on values" in result.route
    assert result.diagnosis.elbo == pytest.approx(float(dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0))), abs=0.05)


def test_gradients_are_nobody_elses():
    """Equal, constant and expanded gradients are replayed from one place: scaling one must not change another."""

    def model():
        a, b = (pyro.param(name, torch.zeros(3)) for name in "ab")
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("linear", 100 * (a.sum() + b.sum()))

    guide = fg.AutoPlanar(model, depth=1)
    guide()
    objective = DensityObjective(model, guide, (), {})
    for _ in range(3):
        objective(Request(4), torch.Generator().manual_seed(0)).backward(list(objective.parameters.values()))
        assert objective.route == "batched densities, recorded"
        found = [objective.parameters[name] for name in "ab"]
        torch.nn.utils.clip_grad_norm_(found, 1.0)
        for parameter in found:
            assert_close(parameter.grad, torch.full((3,), -1 / 6**0.5))


@pytest.mark.parametrize("watched", ["numpy", "subsample"])
def test_what_a_recording_would_miss_is_noticed(watched):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if watched == "numpy":
            pyro.factor("outside", torch.as_tensor(np.sin(x.detach().numpy())))
        else:
            with pyro.plate("rows", 10, subsample_size=5) as rows:
                pyro.sample("y", dist.Normal(x, 1.0), obs=torch.arange(10.0)[rows])

    guide = fg.AutoPlanar(model, depth=1)
    guide()
    objective = DensityObjective(model, guide, (), {})
    step = objective(Request(4), torch.Generator().manual_seed(0))
    assert "run anew at every step" in objective.route
    assert math.isfinite(step.elbo)


def test_parameters_of_the_model_follow_the_recorded_gradient():
    def model():
        loc = pyro.param("loc", torch.tensor(0.0))
        x = pyro.sample("x", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(2.0))

    result = fg.fit(model, fg.AutoIAF(model), steps=1500, progress=False)
    assert result.route == "batched densities, recorded"
    assert pyro.param("loc").item() == pytest.approx(2.0, abs=0.1)


# -- compiling ---------------------------------------------------------------------------------------------------------


def test_a_compiled_step_is_the_recorded_one():
    torch.set_default_dtype(torch.float64)
    guide = fg.AutoPlanar(schools, depth=1)
    guide(*DATA)
    found = []
    for compiling in (False, True):
        objective = DensityObjective(schools, guide, DATA, {}, compiling)
        found.append([gradients(objective, Request(4, path=True))[1] for _ in range(2)])
        assert objective.route == f"batched densities, {'compiled' if compiling else 'recorded'}"
    for one, other in zip(*([gradient for step in steps for gradient in step] for steps in found), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_compiler_that_fails_is_reported_and_the_fit_goes_on(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", fails)
    result = fg.fit(schools, fg.AutoPlanar(schools), *DATA, steps=20, compile=True, progress=False)
    assert result.route == "batched densities, recorded (not compiled: no compiler here)"
    assert result.steps == 20


def test_auto_compiles_only_what_repays(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    clock = iter(range(10**6))
    monkeypatch.setattr(recording.time, "perf_counter", lambda: next(clock))  # a replay takes one second
    for remaining, repays in ((0, False), (10, True)):
        replay = Replay(recorded(lambda x: (x + 1,)), "auto")
        for _ in range(recording.TIMED + 1):
            assert not replay.compiled
            replay(inputs(), remaining=remaining)
        assert replay.compiled is repays


def test_compile_is_checked():
    with pytest.raises(ValueError, match="compile must be"):
        fg.fit(schools, fg.AutoPlanar(schools), *DATA, compile="always")
