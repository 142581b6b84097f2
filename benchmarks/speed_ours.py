"""Competitors of speed.py that need this package or Pyro: ``fit``, Pyro's SVI and inverses."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal
from speed_gap import LR, NEAR, Target, until_near
from speed_torch import FLOWS, observations, round_trip
from speed_torch import LR as STEP_LR
from speed_workers import Job, LeftOut, not_below
from torch import Tensor

import pyro_flowguides as fg

#: Largest number of compiled steps in one call.
STEPS_PER_CALL = 50

Model = Callable[[], None]
pyro.enable_validation(False)
# The modules that an optimizer loads at first use are no part of the first step.
torch.optim.Adam([torch.zeros(1, requires_grad=True)], fused=True)


# -- the targets -------------------------------------------------------------------------------------------------------


def make_model(dim: int, target: str = "location") -> Model:
    """Return a model with a location, or the logarithm of a scale, and dim - 1 group means, each observed once."""
    data = observations(dim)
    zero, one = data.new_zeros(()), data.new_ones(())

    def hierarchical() -> None:
        loc = pyro.sample("loc", dist.Normal(zero, one))
        with pyro.plate("groups", len(data)):
            mean = pyro.sample("mean", dist.Normal(loc, one))
            pyro.sample("y", dist.Normal(mean, 0.5 * one), obs=data)

    def unknown_scale() -> None:
        log_scale = pyro.sample("log_scale", dist.Normal(zero, one))
        with pyro.plate("groups", len(data)):
            mean = pyro.sample("mean", dist.Normal(zero, log_scale.exp()))
            pyro.sample("y", dist.Normal(mean, 0.5 * one), obs=data)

    return {"location": hierarchical, "scale": unknown_scale}[target]


# -- a training step ---------------------------------------------------------------------------------------------------


def our_steps(dim: int, particles: int, hidden: int, compiling: bool = False) -> Job:
    """Take the steps that ``fit`` takes while it explores; compiled ones several in one call, as ``fit`` does."""
    model = make_model(dim)
    guide = fg.AutoIAF(model, hidden_dim=[hidden, hidden], num_transforms=FLOWS)
    stepper = fg.inference.Stepper(model, guide, num_particles=particles, lr=STEP_LR, compile=compiling)
    if not compiling:
        return Job(stepper.step)
    stepper.run(STEPS_PER_CALL)
    if stepper.route.kind != "compiled":
        raise LeftOut(str(stepper.route))
    return Job(lambda: stepper.run(STEPS_PER_CALL), STEPS_PER_CALL)


def pyro_steps(dim: int, particles: int, hidden: int) -> Job:
    """Train Pyro's guide in Pyro's loop."""
    pyro.clear_param_store()
    model = make_model(dim)
    guide = AutoIAFNormal(model, hidden_dim=not_below(dim, hidden), num_transforms=FLOWS)
    return Job(_svi(model, guide, particles, STEP_LR).step)


def _svi(model: Model, guide: Any, num_particles: int, lr: float) -> SVI:
    elbo = Trace_ELBO(num_particles, max_plate_nesting=1, vectorize_particles=True)
    return SVI(model, guide, pyro.optim.Adam({"lr": lr}), elbo)


# -- inverses ----------------------------------------------------------------------------------------------------------


def _flow(dim: int, hidden: int) -> Any:
    flow: Any = fg.flows.iaf(dim, depth=FLOWS, hidden_dims=(hidden, hidden))
    return flow


def our_inverse(dim: int, batch: int, hidden: int) -> Job:
    flow = _flow(dim, hidden)
    return round_trip(flow, lambda x: flow.forward_and_ladj(x)[0], lambda y: flow.inverse_and_ladj(y)[0], dim, batch)


def sequential_inverse(dim: int, batch: int, hidden: int) -> Job:
    """Invert the same flow by D passes of every network, one coordinate after the other."""
    flow = _flow(dim, hidden)

    def inverse(y: Tensor) -> Tensor:
        for layer in reversed(flow.parts):
            theta, x = layer.theta(), torch.zeros_like(y)
            for i in layer.conditioner.order.tolist():
                log_scale, shift = layer.affine_map(x, theta)
                x[:, i] = (y[:, i] - shift[:, i]) * (-log_scale[:, i]).exp()
            y = x
        return y

    return round_trip(flow, lambda x: flow.forward_and_ladj(x)[0], inverse, dim, batch)


# -- time to the evidence ----------------------------------------------------------------------------------------------


def our_gap(
    dim: int, target: str, log_evidence: float, seconds: float, compiling: bool | Literal["auto"] = False
) -> Job:
    """Run ``fit`` until it stops by itself."""
    model = make_model(dim, target)
    facts: dict[str, Any] = {}

    def call() -> None:
        result = fg.fit(model, fg.AutoIAF(model), num_particles=Target.num_particles, compile=compiling, progress=False)
        assert result.diagnosis is not None
        gap = log_evidence - result.diagnosis.elbo
        facts.update(near=gap < NEAR, seconds=result.seconds, steps=result.steps, gap=gap)

    return Job(call, warm_up=0, facts=lambda: facts)


def pyro_gap(dim: int, target: str, log_evidence: float, seconds: float) -> Job:
    """Train by Pyro's SVI until near the evidence, with the default widths of Pyro's guide, D."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    begin = time.perf_counter()
    model = make_model(dim, target)
    guide = AutoIAFNormal(model, num_transforms=FLOWS)
    svi = _svi(model, guide, Target.num_particles, LR)
    check = Trace_ELBO(Target.num_samples, max_plate_nesting=1, vectorize_particles=True)
    spent = time.perf_counter() - begin

    def train() -> None:
        for _ in range(Target.check_every):
            svi.step()

    @torch.no_grad()
    def elbo() -> float:
        return -float(check.loss(model, guide))

    return until_near(train, elbo, log_evidence, seconds - spent, spent)
