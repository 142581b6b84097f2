"""Recordings give what the function gives; functions that cannot be replayed are refused."""

import linecache
import math
import resource
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

import pyro_flowguides as fg
from pyro_flowguides.inference.density_objective import DensityObjective
from pyro_flowguides.inference.flat_adam import flatten
from pyro_flowguides.inference.objective import StepOptions
from pyro_flowguides.inference.replay import MAX_OPERATIONS, NotRecordedError, Replay, record
from pyro_flowguides.inference.step_loop import Stepper
from pyro_flowguides.programs.program import Program
from tests.inference.models import DATA, correlated, schools


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
            weight.add_(1.0)  # as an optimizer does; the next replay must read it


def function_with_gradient(function, x):
    with torch.enable_grad():
        return function(x)


def test_constants_and_equal_operations_are_computed_once():
    data = torch.randn(5, dtype=torch.float64)

    def function(x):
        constant = data.exp().cumsum(0)
        return (x * constant + x * constant,)

    replay = recorded(function)
    names = [str(node.target) for node in replay.graph.nodes if node.op == "call_function"]
    assert sorted(names) == ["aten.add.Tensor", "aten.mul.Tensor"]


def test_changes_in_place_are_replayed():
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
        (lambda x: (sum(x * k for k in range(MAX_OPERATIONS)),), "too many"),
    ],
    ids=["branch", "random", "state", "accumulation", "length"],
)
def test_functions_that_cannot_be_replayed_are_refused(function, message):
    with pytest.raises(NotRecordedError, match=message):
        recorded(function)


def evaluate(objective, options):
    """Evaluate an objective; return the evaluation and the gradient of all parameters as one vector."""
    parameters = list(objective.parameters.values())
    evaluation = objective(options, torch.Generator().manual_seed(7))
    if isinstance(evaluation.loss_or_gradient, torch.Tensor):
        gradients = torch.autograd.grad(evaluation.loss_or_gradient, parameters, materialize_grads=True)
        return evaluation, flatten(gradients)
    (gradient,) = evaluation.loss_or_gradient
    return evaluation, gradient


@pytest.mark.parametrize("path_gradient", [True, False], ids=["path", "total"])
@pytest.mark.parametrize("flow", ["iaf", "sylvester", "planar", "realnvp"])
def test_recorded_steps_equal_those_that_run_the_model(flow, path_gradient):
    torch.set_default_dtype(torch.float64)
    guide = fg.AutoFlow(schools, flow)
    guide(*DATA)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    objective = DensityObjective(Program.inspect(schools, guide, DATA))
    options = StepOptions(16, path_gradient, power=0.7)
    evaluation, gradient = evaluate(objective, options)
    assert objective.route.kind == "recorded"
    objective.not_recorded_reason = "this test compares the two"
    expected, expected_gradient = evaluate(objective, options)
    assert objective.route.kind == "batched"
    assert evaluation.elbo == pytest.approx(expected.elbo, rel=1e-12)
    assert evaluation.gap == pytest.approx(expected.gap, rel=1e-9)
    tolerance = 1e-10 * max(1.0, float(expected_gradient.abs().max()))
    assert_close(gradient, expected_gradient, rtol=1e-8, atol=tolerance)


def test_a_model_that_cannot_be_recorded_runs_at_every_step():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        scale = 1.0 if math.isfinite(float(x.detach().sum())) else 2.0
        pyro.sample("y", dist.Normal(x, scale), obs=torch.tensor(1.0))

    result = fg.fit(model, fg.AutoIAF(model), steps=300, progress=False)
    assert result.route.kind == "batched"
    assert "control flow depends on values" in result.route.reason
    assert result.diagnosis.elbo == pytest.approx(float(dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0))), abs=0.05)


@pytest.mark.parametrize("operation", ["numpy", "subsample"])
def test_operations_that_a_recording_would_miss_are_detected(operation):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if operation == "numpy":
            pyro.factor("outside", torch.as_tensor(np.sin(x.detach().numpy())))
        else:
            with pyro.plate("rows", 10, subsample_size=5) as rows:
                pyro.sample("y", dist.Normal(x, 1.0), obs=torch.arange(10.0)[rows])

    stepper = Stepper(model, fg.AutoPlanar(model, depth=1), num_particles=4)
    assert math.isfinite(stepper.step())
    assert stepper.route.kind == "batched"
    assert stepper.route.reason.startswith("not recorded")


def test_parameters_of_the_model_follow_the_recorded_gradient():
    def model():
        loc = pyro.param("loc", torch.tensor(0.0))
        x = pyro.sample("x", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(2.0))

    result = fg.fit(model, fg.AutoIAF(model), steps=1500, progress=False)
    assert result.route.kind == "recorded"
    assert pyro.param("loc").item() == pytest.approx(2.0, abs=0.1)


# -- replaying ---------------------------------------------------------------------------------------------------------


def test_a_replay_without_python_gives_the_same():
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    recording = record(lambda x: (weight * x, x.cumsum(0)), inputs(), check=[inputs()], parameters=[weight])
    replay = Replay(recording)
    for _ in range(3):
        x = inputs()
        for one, other in zip(replay(x, weight), (weight * x, x.cumsum(0)), strict=True):
            assert_close(one, other.detach())
        with torch.no_grad():
            weight.add_(1.0)
    assert replay.run is not recording


def test_operations_run_one_by_one_where_torchscript_fails(monkeypatch):
    def fail(*_, **__):
        raise AttributeError("gone")

    monkeypatch.setattr(torch._C, "_create_graph_by_tracing", fail)
    recording = recorded(lambda x: (x.exp(),))
    replay, x = Replay(recording), inputs()
    assert_close(replay(x)[0], x.exp())
    assert replay.run is recording
    result = fg.fit(schools, fg.AutoPlanar(schools), *DATA, steps=20, progress=False)
    assert result.route.kind == "recorded"
    assert "gone" in result.route.reason


def test_outputs_are_nan_where_a_matrix_cannot_be_factorized():
    def function(x):
        factor = torch.linalg.cholesky(x)
        return factor.diagonal().sum(), 2 * x

    replay = Replay(record(function, torch.eye(2), check=[2 * torch.eye(2)]))
    for one, other in zip(replay(4 * torch.eye(2)), (torch.tensor(4.0), 8 * torch.eye(2)), strict=True):
        assert_close(one, other)
    assert all(one.isnan().all() for one in replay(-torch.eye(2)))


def test_particles_without_a_factorization_are_left_out_of_recorded_steps():
    torch.manual_seed(0)
    data = torch.tensor([[1.0, 0.5], [-0.5, 0.3]])
    stepper = Stepper(correlated, fg.AutoPlanar(correlated, depth=1, init_scale=0.6), data, compile=False)
    num_dropped = []
    for _ in range(20):
        ((evaluation, was_taken),) = stepper.loop.advance(StepOptions(4, path_gradient=False), [1e-3])
        num_dropped.append(evaluation.num_dropped)
        assert was_taken == (evaluation.num_dropped < 4)
    assert max(num_dropped) > 0
    assert min(num_dropped) == 0
    assert stepper.route.kind == "recorded"


def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_replays_that_are_no_longer_used_are_freed():
    """torch.jit.trace keeps every trace: 2 MiB of each of these."""

    def long(x):
        for number in range(300):
            x = torch.tanh(x + number)
        return (x,)

    texts = len(linecache.cache)
    recording, sizes = recorded(long), []
    assert len(linecache.cache) == texts
    for _ in range(13):
        Replay(recording)(inputs())
        sizes.append(resident_mib())
    assert sizes[12] - sizes[6] < 4


def test_a_function_that_fails_at_the_inputs_of_the_check_is_not_recorded():
    runs = []

    def function(x):
        runs.append(x)
        if len(runs) > 1:
            raise ValueError("bad point")
        return [2 * x]

    with pytest.raises(NotRecordedError, match="bad point"):
        record(function, torch.ones(3), check=[torch.ones(3)])
