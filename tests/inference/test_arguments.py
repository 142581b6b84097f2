"""Numbers that cannot be meant are refused by name before anything runs."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.inference import Stepper
from pyro_flowguides.inference.run import FitSettings

NOT_COUNTS = [math.nan, math.inf, 1.5, "3", None, True, [1], torch.tensor(2.5)]
NOT_NUMBERS = ["x", None, True, [0.1]]
NOT_FINITE = [math.nan, math.inf, -math.inf]


def model():
    pyro.sample("z", dist.Normal(0.0, 1.0))


def fit(**options):
    return fg.fit(model, AutoNormal(model), **{"steps": 2, "progress": False} | options)


def step(**options):
    return Stepper(model, AutoNormal(model), **options)


def diagnose(**options):
    return fg.diagnose(model, AutoNormal(model), **options)


def vsbc(**options):
    return fg.vsbc(model, AutoNormal, observed=["z"], progress=False, **options)


def compare(**options):
    return fg.compare(model, guides=["planar"], progress=False, **options)


def neutra(**options):
    return fg.neutra_mcmc(model, fg.AutoPlanar(model), progress=False, **options)


COUNTS = [
    *((fit, name) for name in ("steps", "num_particles", "importance", "checkpoint_every", "seed")),
    *((step, name) for name in ("num_particles", "importance", "seed")),
    *((diagnose, name) for name in ("num_samples", "chunk_size")),
    *((vsbc, name) for name in ("replicates", "num_samples", "seed")),
    *((compare, name) for name in ("repeats", "seed")),
    *((neutra, name) for name in ("num_samples", "warmup_steps", "num_chains", "seed")),
]
NUMBERS = [(fit, "lr"), (fit, "tolerance"), (fit, "temper"), (step, "lr")]


#: Arguments for which None stands for a default.
OPTIONAL = {"chunk_size", "temper"}


def pairs(calls, values):
    """Combine calls and arguments with values, except None where it is allowed."""
    return [
        (call, name, value) for call, name in calls for value in values if value is not None or name not in OPTIONAL
    ]


@pytest.mark.parametrize(("call", "name", "value"), pairs(COUNTS, NOT_COUNTS))
def test_counts_are_whole_numbers(call, name, value):
    with pytest.raises(TypeError, match=f": {name} must be a whole number, got "):
        call(**{name: value})


@pytest.mark.parametrize(("call", "name"), [pair for pair in COUNTS if pair[1] != "seed"])
def test_counts_are_large_enough(call, name):
    with pytest.raises(ValueError, match=rf": {name} must be at least \d+, got -1"):
        call(**{name: -1})


@pytest.mark.parametrize(("call", "name", "value"), pairs(NUMBERS, NOT_NUMBERS))
def test_numbers_are_numbers(call, name, value):
    with pytest.raises(TypeError, match=f": {name} must be a number, got "):
        call(**{name: value})


@pytest.mark.parametrize(("call", "name", "value"), pairs(NUMBERS, [*NOT_FINITE, -0.1]))
def test_numbers_are_finite_and_in_their_range(call, name, value):
    with pytest.raises(ValueError, match=f": {name} must .* got {value}"):
        call(**{name: value})


@pytest.mark.parametrize("call", [fit, step])
def test_a_step_size_of_zero_is_refused(call):
    with pytest.raises(ValueError, match="lr must be positive and finite, got 0"):
        call(lr=0)


@pytest.mark.parametrize("call", [fit, step])
def test_particles_form_whole_groups(call):
    with pytest.raises(ValueError, match="importance must divide num_particles, got 4 and 6"):
        call(importance=4, num_particles=6)


def test_a_stepper_checks_what_is_asked_of_it():
    stepper = step(num_particles=2)
    for method in (stepper.run, stepper.elbo, stepper.sample):
        with pytest.raises(TypeError, match=r"Stepper: num_(steps|samples) must be a whole number, got nan"):
            method(math.nan)
    stepper.lr = math.nan
    with pytest.raises(ValueError, match="Stepper: lr must be positive and finite, got nan"):
        stepper.step()
    with pytest.raises(ValueError, match='Stepper: compile must be True, False, "auto" or "gpu", got \'yes\''):
        step(compile="yes")


def test_numbers_of_numpy_and_torch_are_taken():
    stepper = step(num_particles=torch.tensor(2), lr=np.float32(0.1), seed=-1)
    assert len(stepper.run(np.int64(3))) == 3
    settings = FitSettings(np.int64(3), torch.tensor(2), np.float32(0.5), 0, True, 1, None, -1)
    assert settings == FitSettings(3, 2, 0.5, 0.0, True, 1, None, -1)
    assert type(settings.steps) is type(settings.num_particles) is int
    assert type(settings.lr) is type(settings.tolerance) is float
