"""Recording: what is replayed is what the function would do, and what cannot be replayed is refused."""

import contextlib
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch._inductor
from torch.testing import assert_close

import pyro_flowguides as fg
from pyro_flowguides.inference import record as recording
from pyro_flowguides.inference.compiled import CapturedStep, CompiledSteps
from pyro_flowguides.inference.descent import Descent, flatten
from pyro_flowguides.inference.objectives import DensityObjective
from pyro_flowguides.inference.record import NotRecordedError, Replay, record
from pyro_flowguides.inference.steps import Request


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
        (lambda x: (sum(x * k for k in range(recording.MOST_OPERATIONS)),), "too many"),
    ],
    ids=["branch", "random", "state", "accumulation", "length"],
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
    """The step, and the gradient of all parameters as one vector, by the way it is evaluated."""
    parameters = list(objective.parameters.values())
    step = objective(request, torch.Generator().manual_seed(7))
    if isinstance(step.loss, torch.Tensor):
        return step, flatten(torch.autograd.grad(step.loss, parameters, materialize_grads=True))
    (gradient,) = step.loss
    return step, gradient


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
    assert_close(found, expected, rtol=1e-8, atol=1e-10 * max(1.0, float(expected.abs().max())))


def test_a_model_that_cannot_be_recorded_is_run_anew_and_the_result_says_so():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        scale = 1.0 if math.isfinite(float(x.detach().sum())) else 2.0
        pyro.sample("y", dist.Normal(x, scale), obs=torch.tensor(1.0))

    result = fg.fit(model, fg.AutoIAF(model), steps=300, progress=False)
    assert "run anew at every step because its course depends on values" in result.route
    assert result.diagnosis.elbo == pytest.approx(float(dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0))), abs=0.05)


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


# -- replaying ---------------------------------------------------------------------------------------------------------


def test_a_recording_is_replayed_without_python_and_gives_the_same():
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    recording_ = record(lambda x: (weight * x, x.cumsum(0)), inputs(), check=[inputs()], parameters=[weight])
    replay = Replay(recording_)
    for _ in range(3):
        x = inputs()
        for one, other in zip(replay(x, weight), (weight * x, x.cumsum(0)), strict=True):
            assert_close(one, other.detach())
        with torch.no_grad():
            weight.add_(1.0)
    assert replay.run is not recording_


def test_where_nothing_interprets_the_operations_are_run_one_by_one(monkeypatch):
    def fails(*_, **__):
        raise AttributeError("gone")

    monkeypatch.setattr(torch.jit, "trace", fails)
    recording_ = recorded(lambda x: (x.exp(),))
    replay, x = Replay(recording_), inputs()
    assert_close(replay(x)[0], x.exp())
    assert replay.run is recording_
    result = fg.fit(schools, fg.AutoPlanar(schools), *DATA, steps=20, progress=False)
    assert result.route == "batched densities, recorded (operations one by one: gone)"


def test_a_matrix_that_cannot_be_factorised_spoils_the_result():
    def function(x):
        factor = torch.linalg.cholesky(x)
        return factor.diagonal().sum(), 2 * x

    replay = Replay(record(function, torch.eye(2), check=[2 * torch.eye(2)]))
    for one, other in zip(replay(4 * torch.eye(2)), (torch.tensor(4.0), 8 * torch.eye(2)), strict=True):
        assert_close(one, other)
    assert all(one.isnan().all() for one in replay(-torch.eye(2)))


def correlated(data):
    """A precision matrix that half of the draws make indefinite."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    precision = torch.eye(2) + slope[..., None, None] * (1 - torch.eye(2))
    with pyro.plate("rows", len(data)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), precision_matrix=precision), obs=data)


def test_particles_without_a_factorisation_are_left_out_of_recorded_steps():
    torch.manual_seed(0)
    guide = fg.AutoPlanar(correlated, depth=1, init_scale=0.6)
    data = torch.tensor([[1.0, 0.5], [-0.5, 0.3]])
    guide(data)
    objective, generator = DensityObjective(correlated, guide, (data,), {}), torch.Generator().manual_seed(0)
    descent = Descent(objective.parameters.values())
    dropped = []
    for _ in range(20):
        ((step, followed),) = objective.descend(Request(4, path=False), generator, descent, [1e-3])
        dropped.append(step.dropped)
        assert followed == (step.dropped < 4)
    assert max(dropped) > 0
    assert min(dropped) == 0
    assert objective.route == "batched densities, recorded"


# -- compiling ---------------------------------------------------------------------------------------------------------


def descended(model, args, compiling, requests, scale=1.0):
    """Bounds and parameters after some steps down."""
    torch.manual_seed(3)
    guide = fg.AutoPlanar(model, depth=1, init_scale=0.6)
    guide(*args)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    objective, generator = DensityObjective(model, guide, args, {}, compiling), torch.Generator().manual_seed(0)
    descent = Descent(objective.parameters.values())
    steps = [taken for request in requests for taken in objective.descend(request, generator, descent, [0.01])]
    assert objective.route == f"batched densities, {'compiled' if compiling else 'recorded'}"
    return [(step.elbo, step.gap, step.dropped) for step, _ in steps], descent.values()[0], guide


def test_compiled_steps_are_the_recorded_ones():
    torch.set_default_dtype(torch.float64)
    requests = [Request(4, path=True, power=0.5 + 0.1 * step) for step in range(5)]
    (recorded_steps, one, _), (compiled_steps, other, guide) = (
        descended(schools, DATA, compiling, requests) for compiling in (False, True)
    )
    for step, expected in zip(compiled_steps, recorded_steps, strict=True):
        assert step == pytest.approx(expected, rel=1e-9)
    assert_close(other, one, rtol=1e-9, atol=1e-9)
    assert_close(flatten(list(guide.parameters())).detach(), other, rtol=0, atol=0)


def test_compiled_steps_leave_out_the_same_particles():
    torch.set_default_dtype(torch.float64)
    data = torch.tensor([[1.0, 0.5], [-0.5, 0.3]]).double()
    requests = [Request(4, path=False)] * 10
    (recorded_steps, one, _), (compiled_steps, other, _) = (
        descended(correlated, (data,), compiling, requests, 0.0) for compiling in (False, True)
    )
    assert [step[2] for step in recorded_steps] == [step[2] for step in compiled_steps]
    assert 0 < sum(step[2] > 0 for step in compiled_steps) < 10
    assert_close(other, one, rtol=1e-9, atol=1e-9)


def test_a_call_takes_many_compiled_steps_and_stops_where_one_cannot_be_taken():
    torch.set_default_dtype(torch.float64)
    data = torch.tensor([[1.0, 0.5], [-0.5, 0.3]])
    request = Request(4, path=False)
    (one_by_one, expected, _) = descended(correlated, (data,), False, [request] * 60, 0.0)
    torch.manual_seed(3)
    guide = fg.AutoPlanar(correlated, depth=1, init_scale=0.6)
    guide(data)
    objective = DensityObjective(correlated, guide, (data,), {}, True)
    descent, generator = Descent(objective.parameters.values()), torch.Generator().manual_seed(0)
    found, calls = [], []
    while len(found) < 60:
        taken = objective.descend(request, generator, descent, [0.01] * (60 - len(found)))
        found += [(step.elbo, step.gap, step.dropped) for step, _ in taken]
        calls.append(len(taken))
    assert objective.route == "batched densities, compiled"
    assert max(calls) > 3
    assert all(parameter._version > 1 for parameter in guide.parameters())
    assert sum(step[2] > 0 for step in found) in range(1, len(calls) + 1)
    for step, other in zip(found, one_by_one, strict=True):
        assert step == pytest.approx(other, rel=1e-9)
    assert_close(descent.values()[0], expected, rtol=1e-9, atol=1e-9)


def test_a_compiled_fit_takes_the_steps_of_a_recorded_one():
    torch.set_default_dtype(torch.float64)
    settings = {"steps": 330, "particles": 4, "progress": False}
    recorded_fit, compiled_fit = (
        fg.fit(schools, fg.AutoPlanar(schools, depth=1), *DATA, compile=compiling, **settings)
        for compiling in (False, True)
    )
    assert compiled_fit.route == "batched densities, compiled"
    assert compiled_fit.steps == recorded_fit.steps
    assert compiled_fit.elbo_history == pytest.approx(recorded_fit.elbo_history, rel=1e-6)


class Graph:
    """What a CUDA graph does, by running the function once more."""

    def replay(self):
        for place, value in zip(self.found, self.run(*self.places), strict=True):
            place.copy_(value)


def test_a_captured_step_works_at_fixed_places(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    torch.set_default_dtype(torch.float64)
    generator, power = torch.Generator().manual_seed(0), torch.tensor(0.7)
    draws = torch.randn(5, 4, 5, generator=generator)
    found = []
    for captured in (False, True):
        torch.manual_seed(3)
        guide = fg.AutoPlanar(schools, depth=1, init_scale=0.6)
        guide(*DATA)
        objective = DensityObjective(schools, guide, DATA, {}, True)
        descent = Descent(objective.parameters.values())
        (before,) = ([value.clone() for value in state] for state in descent.state())
        module = objective._record(draws[0], Request(4, path=False))
        if captured:
            step = CapturedStep(module, descent, draws[0], power)
            step.graph.found, step.graph.run, step.graph.places = step.found, step.compiled, step.places
            for value, old in zip(descent.state()[0], before, strict=True):
                value.copy_(old)  # this stand-in for a capture took a step
        else:
            step = CompiledSteps(module, descent, draws[0], power, together=1)
        moments = [step([draw], power, rates=[0.01 * place]).clone() for place, draw in enumerate(draws, 1)]
        found.append([*moments, *descent.state()[0]])
    assert_close(found[1], found[0], rtol=0, atol=0)


def steep(zero):
    """A finite density whose gradient is not a number: that of a root, at zero, times zero."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("root", (zero * x).abs().sqrt())


@pytest.mark.parametrize("compiling", [False, True], ids=["recorded", "compiled"])
def test_a_finite_bound_without_a_finite_gradient_is_not_followed(compiling):
    guide, zero = fg.AutoPlanar(steep, depth=1), torch.zeros(())
    guide(zero)
    objective = DensityObjective(steep, guide, (zero,), {}, compiling)
    descent, generator = Descent(objective.parameters.values()), torch.Generator().manual_seed(0)
    before = descent.values()[0]
    ((step, followed),) = objective.descend(Request(4), generator, descent, [0.1])
    assert objective.route == f"batched densities, {'compiled' if compiling else 'recorded'}"
    assert math.isfinite(step.elbo)
    assert not followed
    assert_close(descent.values()[0], before, rtol=0, atol=0)


def test_a_compiler_that_fails_is_reported_and_the_fit_goes_on(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch._inductor, "compile", fails)
    result = fg.fit(schools, fg.AutoPlanar(schools), *DATA, steps=20, compile=True, progress=False)
    assert result.route == "batched densities, recorded (not compiled: no compiler here)"
    assert result.steps == 20


def test_auto_compiles_only_what_repays(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(recording.time, "perf_counter", lambda: next(clock))  # a replay takes one second
    replay = Replay(recorded(lambda x: (x + 1,)))
    for _ in range(recording.TIMED):
        assert not replay.compiling_repays(10**6)
        replay(inputs())
    assert replay.compiling_repays(10)
    assert not replay.compiling_repays(0)


def test_compile_is_checked():
    with pytest.raises(ValueError, match="compile must be"):
        fg.fit(schools, fg.AutoPlanar(schools), *DATA, compile="always")
