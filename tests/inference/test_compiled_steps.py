"""Compiled steps are the recorded ones, several in one call; where steps cannot be compiled, the route says why."""

import contextlib
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch._inductor
from torch.testing import assert_close

import pyro_flowguides as fg
from pyro_flowguides.inference import compiled_steps, step_loop
from pyro_flowguides.inference.compiled_steps import CapturedSteps, CompiledSteps, LoopedSteps, compile_steps
from pyro_flowguides.inference.flat_adam import FlatAdam, flatten
from pyro_flowguides.inference.objective import StepOptions
from pyro_flowguides.inference.replay import record
from pyro_flowguides.inference.step_loop import Stepper
from tests.inference.models import DATA, correlated, schools

MATRICES = (torch.tensor([[1.0, 0.5], [-0.5, 0.3]], dtype=torch.float64),)


@pytest.fixture(autouse=True)
def _double_precision(_fresh_state):
    torch.set_default_dtype(torch.float64)


def make_stepper(model, args, compile, shake=0.0):
    """Steps of a guide away from its start, with a location that is scaled."""
    torch.manual_seed(3)
    guide = fg.AutoPlanar(model, depth=1, init_scale=0.6)
    guide(*args)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(shake * torch.randn_like(parameter))
    stepper = Stepper(model, guide, *args, compile=compile)
    stepper.adam.set_scale(guide.location, torch.linspace(0.1, 3.0, len(guide.location)))
    return stepper


def take(stepper, options, together=1):
    """Take one step for each of the options, several in one call where neighbors are equal; return their numbers."""
    rows, calls = [], []
    while len(rows) < len(options):
        same = [other for other in options[len(rows) : len(rows) + together] if other == options[len(rows)]]
        outcomes = stepper.loop.advance(options[len(rows)], [0.01] * len(same))
        rows += [(evaluation.elbo, evaluation.gap, evaluation.num_dropped) for evaluation, _ in outcomes]
        calls.append(len(outcomes))
    return rows, calls


def assert_same_steps(stepper, other, rows, other_rows):
    for row, expected in zip(rows, other_rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-9)
    assert_close(stepper.adam.snapshot(), other.adam.snapshot(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", [LoopedSteps, CompiledSteps])
def test_compiled_steps_are_the_recorded_ones(form, monkeypatch):
    monkeypatch.setattr(step_loop, "compile_steps", form)
    options = [StepOptions(4, path_gradient=True, power=0.5 + 0.1 * step) for step in range(5)]
    recorded, compiled = (make_stepper(schools, DATA, compile, shake=1.0) for compile in (False, True))
    (rows, _), (expected, _) = take(compiled, options), take(recorded, options)
    assert (recorded.route.kind, compiled.route.kind) == ("recorded", "compiled")
    assert_same_steps(compiled, recorded, rows, expected)
    parameters = flatten(list(compiled.guide.parameters())).detach()
    assert_close(parameters, compiled.adam.snapshot()[0], rtol=0, atol=0)


def test_one_call_takes_many_compiled_steps_and_stops_before_one_that_is_not_finite():
    options = [StepOptions(4, path_gradient=False)] * 60
    recorded, compiled = (make_stepper(correlated, MATRICES, compile) for compile in (False, True))
    (expected, _), (rows, calls) = take(recorded, options), take(compiled, options, together=60)
    assert compiled.route.kind == "compiled"
    assert max(calls) > 3
    assert all(parameter._version > 1 for parameter in compiled.guide.parameters())
    assert sum(num_dropped > 0 for _, _, num_dropped in rows) in range(1, len(calls) + 1)
    assert_same_steps(compiled, recorded, rows, expected)
    assert torch.equal(compiled.generator.get_state(), recorded.generator.get_state())  # later steps see the same noise


def test_a_compiled_fit_takes_the_steps_of_a_recorded_one():
    settings = {"steps": 330, "num_particles": 4, "progress": False}
    recorded, compiled = (
        fg.fit(schools, fg.AutoPlanar(schools, depth=1), *DATA, compile=compile, **settings)
        for compile in (False, True)
    )
    assert (recorded.route.kind, compiled.route.kind) == ("recorded", "compiled")
    assert compiled.steps == recorded.steps
    assert compiled.elbo_history == pytest.approx(recorded.elbo_history, rel=1e-6)


# -- the form of compiled steps ----------------------------------------------------------------------------------------


def quadratic(size):
    """A recorded step down a parabola in many parameters."""
    parameter, one = torch.zeros(size, requires_grad=True), torch.ones(())

    def function(noise, power):
        loss = power * (parameter - noise.mean()).square().mean()
        return torch.stack([-loss.detach(), noise.sum()]), *torch.autograd.grad(loss, parameter)

    recording = record(function, torch.randn(4), one, check=(torch.randn(4), one), parameters=[parameter])
    return recording, FlatAdam([parameter]), torch.randn(4), one


@pytest.fixture
def _without_compiler(monkeypatch):
    """Run traced graphs as they are."""
    monkeypatch.setattr(compiled_steps, "_compile", lambda graph, inputs: graph)


@pytest.mark.usefixtures("_without_compiler")
@pytest.mark.parametrize(("num_parameters", "form"), [(2**17, LoopedSteps), (2**17 + 1, CompiledSteps)])
def test_the_compiled_function_loops_over_steps_of_few_parameters(num_parameters, form):
    inputs = quadratic(num_parameters)
    compiled = compile_steps(*inputs)
    assert type(compiled) is form
    assert (compiled.steps_per_call > 1) == (form is LoopedSteps)


@pytest.mark.usefixtures("_without_compiler")
def test_where_a_loop_cannot_be_compiled_single_steps_are(monkeypatch):
    def fail(*_):
        raise RuntimeError("no loops here")

    monkeypatch.setattr(compiled_steps, "LoopedSteps", fail)
    assert type(compile_steps(*quadratic(3))) is CompiledSteps


# -- CUDA graphs -------------------------------------------------------------------------------------------------------


class Graph:
    """A stand-in for a CUDA graph, which runs the captured function again."""

    def replay(self):
        for place, value in zip(self.outputs, self.run(*self.inputs), strict=True):
            place.copy_(value)


@pytest.fixture
def _stand_in_for_graphs(monkeypatch):
    """Capturing takes a step with this stand-in, so the state of the optimizer is restored after it."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())

    def capture(recording, adam, *inputs):
        (before,) = ([value.clone() for value in state] for state in adam.state())
        steps = CapturedSteps(recording, adam, *inputs)
        graph = steps.graph
        graph.run, graph.inputs, graph.outputs = steps._unrolled, steps.static_inputs, steps.static_outputs
        for value, old in zip(adam.state()[0], before, strict=True):
            value.copy_(old)
        return steps

    monkeypatch.setattr(step_loop, "compile_steps", capture)


@pytest.mark.usefixtures("_stand_in_for_graphs")
@pytest.mark.parametrize("model", [schools, correlated])
def test_captured_steps_use_fixed_memory_and_stop_before_one_that_is_not_finite(model):
    """Also fewer steps than were captured, at other powers."""
    data = DATA if model is schools else MATRICES
    options = [StepOptions(4, path_gradient=False, power=power) for power in (0.7, 0.8, 1.0) for _ in range(20)]
    recorded, captured = (make_stepper(model, data, compile) for compile in (False, True))
    (expected, _), (rows, calls) = take(recorded, options), take(captured, options, together=20)
    assert captured.route.kind == "compiled"
    assert len(calls) == 3 if model is schools else 3 < len(calls) < 60
    assert_same_steps(captured, recorded, rows, expected)


# -- where steps are not taken or not compiled -------------------------------------------------------------------------


def steep(zero):
    """A finite density whose gradient is not a number: that of a root, at zero, times zero."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("root", (zero * x).abs().sqrt())


@pytest.mark.parametrize("compile", [False, True])
def test_no_step_is_taken_where_the_bound_is_finite_and_its_gradient_is_not(compile):
    stepper = Stepper(steep, fg.AutoPlanar(steep, depth=1), torch.zeros(()), compile=compile, num_particles=4)
    before = stepper.adam.snapshot()
    assert math.isfinite(stepper.step())
    assert_close(stepper.adam.snapshot(), before, rtol=0, atol=0)


def test_a_compiler_that_fails_is_reported_and_the_fit_goes_on(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch._inductor, "compile", fail)
    result = fg.fit(schools, fg.AutoPlanar(schools), *DATA, steps=20, compile=True, progress=False)
    assert result.route.kind == "recorded"
    assert "no compiler here" in result.route.reason
    assert result.steps == 20


def test_compile_is_checked():
    with pytest.raises(ValueError, match="compile must be"):
        fg.fit(schools, fg.AutoPlanar(schools), *DATA, compile="always")
