"""Compiled steps are the recorded ones, taken many at a time; what cannot be compiled is said."""

import contextlib
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch._inductor
from torch.testing import assert_close

import pyro_flowguides as fg
from pyro_flowguides.inference import compiled_steps as compiled
from pyro_flowguides.inference import density_objective as objectives
from pyro_flowguides.inference.compiled_steps import CapturedSteps
from pyro_flowguides.inference.density_objective import DensityObjective
from pyro_flowguides.inference.flat_adam import Descent, flatten
from pyro_flowguides.inference.steps import Request
from pyro_flowguides.programs.program import Program
from tests.inference.models import DATA, correlated, schools


def descended(model, args, compiling, requests, scale=1.0):
    """Bounds and parameters after some steps down."""
    torch.manual_seed(3)
    guide = fg.AutoPlanar(model, depth=1, init_scale=0.6)
    guide(*args)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    objective, generator = (
        DensityObjective(Program.inspect(model, guide, args), compiling),
        torch.Generator().manual_seed(0),
    )
    descent = Descent(objective.parameters.values())
    descent.measure(guide.location, torch.linspace(0.1, 3.0, len(guide.location)))
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


def test_with_many_parameters_steps_are_taken_one_by_one(monkeypatch):
    monkeypatch.setattr(compiled, "FEW_PARAMETERS", 0)
    torch.set_default_dtype(torch.float64)
    requests = [Request(4, path=False)] * 5
    (one_by_one, expected, _), (found, other, _) = (
        descended(schools, DATA, compiling, requests) for compiling in (False, True)
    )
    for step, wanted in zip(found, one_by_one, strict=True):
        assert step == pytest.approx(wanted, rel=1e-9)
    assert_close(other, expected, rtol=1e-9, atol=1e-9)


def test_a_call_takes_many_compiled_steps_and_stops_where_one_cannot_be_taken():
    torch.set_default_dtype(torch.float64)
    data = torch.tensor([[1.0, 0.5], [-0.5, 0.3]])
    request = Request(4, path=False)
    (one_by_one, expected, _) = descended(correlated, (data,), False, [request] * 60, 0.0)
    torch.manual_seed(3)
    guide = fg.AutoPlanar(correlated, depth=1, init_scale=0.6)
    guide(data)
    objective = DensityObjective(Program.inspect(correlated, guide, (data,)), True)
    descent, generator = Descent(objective.parameters.values()), torch.Generator().manual_seed(0)
    descent.measure(guide.location, torch.linspace(0.1, 3.0, len(guide.location)))
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
    settings = {"steps": 330, "num_particles": 4, "progress": False}
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


@pytest.fixture
def _stand_in_for_graphs(monkeypatch):
    """The first descent is as before when steps have been captured from it, which takes a step with this stand-in."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())

    def capture(recording, descent, *inputs):
        (before,) = ([value.clone() for value in state] for state in descent.state())
        steps = CapturedSteps(recording, descent, *inputs)
        steps.graph.found, steps.graph.run, steps.graph.places = steps.found, steps._one_by_one, steps.places
        for value, old in zip(descent.state()[0], before, strict=True):
            value.copy_(old)
        return steps

    monkeypatch.setattr(objectives, "attempts", lambda _: [capture])


@pytest.mark.usefixtures("_stand_in_for_graphs")
@pytest.mark.parametrize("model", [schools, correlated])
def test_captured_steps_work_at_fixed_places_and_stop_where_one_cannot_be_taken(model):
    """Also fewer steps than were captured, at other step sizes and powers."""
    torch.set_default_dtype(torch.float64)
    data = DATA if model is schools else (torch.tensor([[1.0, 0.5], [-0.5, 0.3]]).double(),)
    requests = [Request(4, path=False, power=power) for power in (0.7, 0.8, 1.0) for _ in range(20)]
    (one_by_one, expected, _) = descended(model, data, False, requests, 0.0)
    torch.manual_seed(3)
    guide = fg.AutoPlanar(model, depth=1, init_scale=0.6)
    guide(*data)
    objective = DensityObjective(Program.inspect(model, guide, data), True)
    descent, generator = Descent(objective.parameters.values()), torch.Generator().manual_seed(0)
    descent.measure(guide.location, torch.linspace(0.1, 3.0, len(guide.location)))
    found, calls = [], []
    while len(found) < 60:
        left = 20 - len(found) % 20
        taken = objective.descend(requests[len(found)], generator, descent, [0.01] * left)
        found += [(step.elbo, step.gap, step.dropped) for step, _ in taken]
        calls.append(len(taken))
    assert not objective.why_not_compiled
    assert len(calls) == 3 if model is schools else 3 < len(calls) < 60
    for step, other in zip(found, one_by_one, strict=True):
        assert step == pytest.approx(other, rel=1e-9)
    assert_close(descent.values()[0], expected, rtol=1e-9, atol=1e-9)


def steep(zero):
    """A finite density whose gradient is not a number: that of a root, at zero, times zero."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("root", (zero * x).abs().sqrt())


@pytest.mark.parametrize("compiling", [False, True], ids=["recorded", "compiled"])
def test_a_finite_bound_without_a_finite_gradient_is_not_followed(compiling):
    guide, zero = fg.AutoPlanar(steep, depth=1), torch.zeros(())
    guide(zero)
    objective = DensityObjective(Program.inspect(steep, guide, (zero,)), compiling)
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


def test_compile_is_checked():
    with pytest.raises(ValueError, match="compile must be"):
        fg.fit(schools, fg.AutoPlanar(schools), *DATA, compile="always")
