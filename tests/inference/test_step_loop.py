"""When steps are compiled, and what the route says of it."""

import itertools
import subprocess
import sys

import pytest

import pyro_flowguides as fg
from pyro_flowguides.inference import compiled_steps, step_loop
from pyro_flowguides.inference.objective import StepOptions
from pyro_flowguides.inference.step_loop import Stepper
from tests.inference.models import DATA, schools


@pytest.fixture(autouse=True)
def _without_compiler(monkeypatch):
    """Run traced graphs as they are."""
    monkeypatch.setattr(compiled_steps, "_compile", lambda graph, inputs: graph)


def make_stepper(**options):
    return Stepper(schools, fg.AutoPlanar(schools, depth=1), *DATA, num_particles=4, **options)


@pytest.mark.parametrize(("seconds_per_step", "kind"), [(1.0, "compiled"), (1e-4, "recorded")])
def test_auto_compiles_where_the_remaining_steps_repay_it(seconds_per_step, kind, monkeypatch):
    """A tenth of a millisecond for each of 1,000 steps is less than compiling takes, a second is more."""
    clock = itertools.count(step=seconds_per_step)
    monkeypatch.setattr(step_loop.time, "perf_counter", lambda: next(clock))
    stepper = make_stepper(compile="auto")
    taken = [stepper.loop.advance(StepOptions(4), [0.01] * 50, num_remaining=1000) for _ in range(30)]
    assert stepper.route.kind == kind
    assert all(len(outcomes) == 1 for outcomes in taken[:20])  # no judgment before some steps have been timed
    assert (len(taken[-1]) > 1) == (kind == "compiled")


def test_auto_does_not_compile_for_the_last_steps(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(step_loop.time, "perf_counter", lambda: next(clock))
    stepper = make_stepper(compile="auto")
    for _ in range(30):
        stepper.step()
    assert stepper.route.kind == "recorded"


def test_the_route_says_how_many_steps_were_compiled(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(step_loop.time, "perf_counter", lambda: next(clock))
    stepper = make_stepper(compile="auto")
    stepper.run(200)
    num_recorded = step_loop.NUM_TIMED_STEPS + 1
    assert stepper.route.kind == "compiled"
    assert stepper.route.reason == f"{200 - num_recorded} of 200 steps; the others recorded"


def test_bounds_that_cannot_be_recorded_are_not_compiled():
    stepper = make_stepper(compile=True, importance=2)
    stepper.run(3)
    assert stepper.route.kind == "batched"


SCRIPT = """
import sys, torch, pyro, pyro.distributions as dist, pyro_flowguides as fg

def model():
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.square(), 1.0).to_event(1), obs=torch.ones(3))

fg.fit(model, fg.AutoIAF(model), steps=300, progress=False)
print(sorted({"torch._inductor", "torch._dynamo"} & sys.modules.keys()))
"""


def test_a_short_fit_on_a_processor_imports_no_compiler():
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_a_fit_with_a_checkpoint_is_not_compiled_by_time(monkeypatch, tmp_path):
    """A resumed fit would compile at other steps, and give other numbers by rounding."""
    clock = itertools.count()
    monkeypatch.setattr(step_loop.time, "perf_counter", lambda: next(clock))
    options = {"steps": 200, "num_particles": 4, "tolerance": 1e-9, "warm_start": False, "progress": False}
    kinds = [
        fg.fit(schools, fg.AutoPlanar(schools, depth=1), *DATA, checkpoint=path, **options).route.kind
        for path in (None, tmp_path / "fit")
    ]
    assert kinds == ["compiled", "recorded"]
