"""Competitors of speed.py on JAX: NumPyro's AutoIAFNormal and FlowJAX's masked autoregressive flow, float32."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array, lax, random
from jax.example_libraries import stax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoIAFNormal
from speed_gap import LR, Target, until_near
from speed_workers import Job, not_below

FLOWS = 3
STEP_LR = 1e-3
#: Steps in one compiled scan, fewer in many dimensions.
SCAN, SHORT_SCAN = 100, 10


def hierarchical(data: Array) -> None:
    loc = numpyro.sample("loc", dist.Normal(0.0, 1.0))
    with numpyro.plate("groups", len(data)):
        mean = numpyro.sample("mean", dist.Normal(loc, 1.0))
        numpyro.sample("y", dist.Normal(mean, 0.5), obs=data)


def unknown_scale(data: Array) -> None:
    log_scale = numpyro.sample("log_scale", dist.Normal(0.0, 1.0))
    with numpyro.plate("groups", len(data)):
        mean = numpyro.sample("mean", dist.Normal(0.0, jnp.exp(log_scale)))
        numpyro.sample("y", dist.Normal(mean, 0.5), obs=data)


MODELS = {"location": hierarchical, "scale": unknown_scale}


def observations(dim: int) -> Array:
    return jnp.linspace(-1.0, 1.0, dim - 1)


def make_svi(target: str, dim: int, num_particles: int, hidden: int, lr: float) -> tuple[SVI, Any]:
    """Return NumPyro's SVI for a guide with three flows, and its first state."""
    model = partial(MODELS[target], observations(dim))
    guide = AutoIAFNormal(model, num_flows=FLOWS, hidden_dims=not_below(dim, hidden), nonlinearity=stax.Elu)
    svi = SVI(model, guide, numpyro.optim.Adam(lr), Trace_ELBO(num_particles=num_particles))
    return svi, jax.jit(svi.init)(random.key(0))


def compile_steps(svi: SVI, length: int) -> Callable[[Any], Any]:
    """Return a compiled function that takes ``length`` steps."""
    if length == 1:
        return jax.jit(lambda state: svi.update(state)[0])
    return jax.jit(lambda state: lax.scan(lambda s, _: (svi.update(s)[0], None), state, None, length)[0])


class _Stepper:
    """A compiled function of the state, called until its result is ready."""

    def __init__(self, step: Callable[[Any], Any], state: Any) -> None:
        self.step, self.state = step, state

    def __call__(self) -> None:
        self.state = jax.block_until_ready(self.step(self.state))


def numpyro_steps(dim: int, particles: int, hidden: int, scan: bool = False) -> Job:
    svi, state = make_svi("location", dim, particles, hidden, STEP_LR)
    length = 1 if not scan else SCAN if dim <= 100 else SHORT_SCAN
    return Job(_Stepper(compile_steps(svi, length), state), steps=length, warm_up=3)


def flowjax_steps(dim: int, particles: int, hidden: int) -> Job:
    """Train FlowJAX's flow with its loss and training step. Draws take one pass."""
    import equinox as eqx
    import optax
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow
    from flowjax.train.losses import ElboLoss
    from flowjax.train.train_utils import step
    from paramax import NonTrainable

    data = observations(dim)

    def log_joint(z: Array) -> Array:
        log_p = dist.Normal(0.0, 1.0).log_prob(z[0]) + dist.Normal(z[0], 1.0).log_prob(z[1:]).sum()
        return log_p + dist.Normal(z[1:], 0.5).log_prob(data).sum()

    flow = masked_autoregressive_flow(
        random.key(0),
        base_dist=Normal(jnp.zeros(dim)),
        flow_layers=FLOWS,
        nn_width=hidden,
        nn_depth=2,
        nn_activation=jax.nn.silu,
        invert=False,
    )
    params, static = eqx.partition(flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, NonTrainable))
    optimizer, loss = optax.adam(STEP_LR), ElboLoss(log_joint, particles)

    def advance_once(state: Any) -> Any:
        params, opt_state, key = state
        key, now = random.split(key)
        params, opt_state, _ = step(params, static, now, optimizer=optimizer, opt_state=opt_state, loss_fn=loss)
        return params, opt_state, key

    return Job(_Stepper(advance_once, (params, optimizer.init(params), random.key(1))), warm_up=3)


def numpyro_gap(dim: int, target: str, log_evidence: float, seconds: float) -> Job:
    """Train by SVI, one compiled scan at a time, until near the evidence, with NumPyro's default widths, D."""
    begin = time.perf_counter()
    svi, state = make_svi(target, dim, Target.num_particles, dim, LR)
    stepper = _Stepper(compile_steps(svi, Target.check_every), state)
    spent = time.perf_counter() - begin
    check = Trace_ELBO(num_particles=Target.num_samples)

    @jax.jit
    def negative_elbo(key: Array, params: Any) -> Array:
        return check.loss(key, params, svi.model, svi.guide)

    def elbo() -> float:
        return -float(negative_elbo(random.key(2), svi.get_params(stepper.state)))

    return until_near(stepper, elbo, log_evidence, seconds - spent, spent)
