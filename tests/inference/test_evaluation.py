"""Bounds over many draws, evaluated in chunks."""

import gc
import math
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flowguides as fg
from pyro_flowguides.inference.density_objective import DensityObjective, evaluate
from pyro_flowguides.inference.objective import StepOptions
from pyro_flowguides.inference.replay import Replay
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


def make_objective(program):
    guide = fg.AutoPlanar(program, init_scale=1.0)
    guide()
    return DensityObjective(Program.inspect(program, guide))


@torch.no_grad()
def in_one_chunk(objective, num_samples, importance):
    options = StepOptions(num_samples, path_gradient=False, importance=importance)
    return objective(options, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("chunk_size", [1, 40, 100])
@pytest.mark.parametrize("importance", [1, 5])
def test_chunks_give_what_all_draws_give(importance, chunk_size):
    objective = make_objective(model)
    expected = in_one_chunk(objective, 1000, importance)
    evaluation = evaluate(objective, 1000, importance, chunk_size=chunk_size)
    assert (evaluation.elbo, evaluation.gap) == pytest.approx((expected.elbo, expected.gap), rel=1e-12, nan_ok=True)
    assert math.isnan(evaluation.gap) == (importance > 1)


def test_particles_that_are_not_finite_do_not_count():
    objective = make_objective(with_holes)
    expected = in_one_chunk(objective, 1000, 1)
    evaluation = evaluate(objective, 1000, chunk_size=16)
    assert 100 < evaluation.num_dropped == expected.num_dropped < 900
    assert (evaluation.elbo, evaluation.gap) == pytest.approx((expected.elbo, expected.gap), rel=1e-12)


def test_the_bound_is_nan_where_no_particle_is_finite():
    objective = make_objective(model)
    with torch.no_grad():
        objective.guide.location.fill_(math.nan)
    evaluation = evaluate(objective, 100, chunk_size=16)
    assert math.isnan(evaluation.elbo)
    assert evaluation.num_dropped == 100


def test_chunks_are_small_in_many_dimensions():
    dim, batches = 20_000, []

    def wide():
        z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
        batches.append(z.shape[0] if z.dim() > 1 else 1)

    evaluate(make_objective(wide), 300)
    assert sum(batches) > 300
    assert max(batches) <= 2**22 / (3 * dim)


def test_recordings_are_freed_before_the_diagnosis(monkeypatch):
    """The last runs of the model are those of the diagnosis."""
    alive, num_recordings = weakref.WeakSet(), []
    create = Replay.__init__

    def create_and_register(self, *args):
        create(self, *args)
        alive.add(self)

    def counting():
        if alive:
            gc.collect()
        num_recordings.append(len(alive))
        model()

    monkeypatch.setattr(Replay, "__init__", create_and_register)
    options = {"steps": 5, "num_particles": 4, "warm_start": False, "progress": False}
    result = fg.fit(counting, fg.AutoPlanar(counting), **options)
    assert result.diagnosis is not None
    assert max(num_recordings) > 0
    assert num_recordings[-1] == 0
