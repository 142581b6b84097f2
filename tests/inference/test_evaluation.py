"""Bounds over many draws, a part of them at a time."""

import gc
import importlib
import math
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flowguides as fg
from pyro_flowguides.inference import run
from pyro_flowguides.inference.density_objective import DensityObjective
from pyro_flowguides.inference.evaluation import evaluate
from pyro_flowguides.inference.objective import StepOptions
from pyro_flowguides.programs import chunking as _chunks
from pyro_flowguides.programs.program import Program

DIM = 7


@pytest.fixture(autouse=True)
def _double_precision(_fresh_state):
    torch.set_default_dtype(torch.float64)


def model():
    z = pyro.sample("z", dist.Normal(torch.zeros(DIM), torch.arange(1.0, DIM + 1)).to_event(1))
    pyro.sample("y", dist.StudentT(3.0, z.square().sum(-1), 0.1), obs=torch.tensor(2.0))


def with_holes():
    """Density zero on one side of the origin."""
    z = pyro.sample("z", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
    pyro.factor("hole", torch.where(z[..., 0] > 0, 0.0, -math.inf))


def objective_of(program):
    guide = fg.AutoPlanar(program, init_scale=1.0)
    guide()
    return DensityObjective(Program.inspect(program, guide))


@torch.no_grad()
def whole(objective, particles, importance):
    return objective(StepOptions(particles, False, importance=importance), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("at_once", [1, 40, 100])
@pytest.mark.parametrize("importance", [1, 5])
def test_parts_give_what_all_draws_give(monkeypatch, importance, at_once):
    objective = objective_of(model)
    expected = whole(objective, 1000, importance)
    monkeypatch.setattr(_chunks, "_CHUNK_NUMBERS", 3 * DIM * at_once)
    found = evaluate(objective, 1000, importance)
    assert (found.elbo, found.gap) == pytest.approx((expected.elbo, expected.gap), rel=1e-12, nan_ok=True)
    assert math.isnan(found.gap) == (importance > 1)


def test_particles_that_are_not_finite_do_not_count(monkeypatch):
    objective = objective_of(with_holes)
    expected = whole(objective, 1000, 1)
    monkeypatch.setattr(_chunks, "_CHUNK_NUMBERS", 3 * DIM * 16)
    found = evaluate(objective, 1000)
    assert 100 < found.num_dropped == expected.num_dropped < 900
    assert (found.elbo, found.gap) == pytest.approx((expected.elbo, expected.gap), rel=1e-12)


def test_nothing_finite_is_no_number(monkeypatch):
    objective = objective_of(model)
    monkeypatch.setattr(_chunks, "_CHUNK_NUMBERS", 3 * DIM * 16)
    with torch.no_grad():
        objective.guide.transform.parts[-1].loc.fill_(math.nan)
    found = evaluate(objective, 100)
    assert math.isnan(found.elbo)
    assert found.num_dropped == 100


def test_no_large_batch_in_many_dimensions():
    dim, batches = 20_000, []

    def wide():
        z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
        batches.append(z.shape[0] if z.dim() > 1 else 1)

    objective = objective_of(wide)
    evaluate(objective, 300)
    assert sum(batches) > 300
    assert max(batches) <= 2**22 / (3 * dim)


def test_what_the_steps_held_is_gone_when_the_fit_is_judged(monkeypatch):
    module = importlib.import_module("pyro_flowguides.inference.fitting")
    objectives, left = [], []

    def made(*args):
        objective = module_made(*args)
        objectives.append(weakref.ref(objective))
        return objective

    def judged(*args, **kwargs):
        gc.collect()
        left.append(objectives[0]())
        raise ValueError("not now")

    module_made = run.make_objective
    monkeypatch.setattr(run, "make_objective", made)
    monkeypatch.setattr(module, "diagnose_program", judged)
    result = fg.fit(model, fg.AutoPlanar(model), steps=5, num_particles=4, progress=False)
    assert result.why_no_verdict == "not now"
    assert left == [None]
