"""Recording: what is replayed is what the function would do, and what cannot be replayed is refused."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

import pyro_flowguides as fg
from pyro_flowguides.inference import replay as recording
from pyro_flowguides.inference.density_objective import DensityObjective
from pyro_flowguides.inference.flat_adam import FlatAdam, flatten
from pyro_flowguides.inference.replay import NotRecordedError, Replay, record
from pyro_flowguides.inference.objective import StepOptions
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
            weight.add_(1.0)  # as an optimizer does: read anew


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
    objective = DensityObjective(Program.inspect(schools, guide, DATA))
    request = StepOptions(16, path, power=0.7)
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
    objective = DensityObjective(Program.inspect(model, guide))
    step = objective(StepOptions(4), torch.Generator().manual_seed(0))
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


def test_a_matrix_that_cannot_be_factorized_spoils_the_result():
    def function(x):
        factor = torch.linalg.cholesky(x)
        return factor.diagonal().sum(), 2 * x

    replay = Replay(record(function, torch.eye(2), check=[2 * torch.eye(2)]))
    for one, other in zip(replay(4 * torch.eye(2)), (torch.tensor(4.0), 8 * torch.eye(2)), strict=True):
        assert_close(one, other)
    assert all(one.isnan().all() for one in replay(-torch.eye(2)))


def test_particles_without_a_factorization_are_left_out_of_recorded_steps():
    torch.manual_seed(0)
    guide = fg.AutoPlanar(correlated, depth=1, init_scale=0.6)
    data = torch.tensor([[1.0, 0.5], [-0.5, 0.3]])
    guide(data)
    objective, generator = (
        DensityObjective(Program.inspect(correlated, guide, (data,))),
        torch.Generator().manual_seed(0),
    )
    descent = FlatAdam(objective.parameters.values())
    dropped = []
    for _ in range(20):
        ((step, followed),) = objective.descend(StepOptions(4, path=False), generator, descent, [1e-3])
        dropped.append(step.num_dropped)
        assert followed == (step.num_dropped < 4)
    assert max(dropped) > 0
    assert min(dropped) == 0
    assert objective.route == "batched densities, recorded"


def test_auto_compiles_only_what_repays(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(recording.time, "perf_counter", lambda: next(clock))  # a replay takes one second
    replay = Replay(recorded(lambda x: (x + 1,)))
    for _ in range(recording.TIMED):
        assert not replay.compiling_repays(10**6)
        replay(inputs())
    assert replay.compiling_repays(10)
    assert not replay.compiling_repays(0)
