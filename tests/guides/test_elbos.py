"""Every ELBO of Pyro has the right value for every guide and trains it, vectorized or not, traced or not."""

import functools
import math

import pyro
import pytest
import torch
from pyro import infer
from torch.testing import assert_close

from tests.guides.zoo import F64, SCHOOLS, schools, schools_log_density, shake, train, values

Enum = functools.partial(infer.TraceEnum_ELBO, strict_enumeration_warning=False)
JitEnum = functools.partial(infer.JitTraceEnum_ELBO, strict_enumeration_warning=False)
ELBOS = {
    "Trace": infer.Trace_ELBO,
    "TraceMeanField": infer.TraceMeanField_ELBO,
    "TraceGraph": infer.TraceGraph_ELBO,
    "TraceEnum": Enum,
    "Renyi": infer.RenyiELBO,
}
# All four pass with Pyro's AutoMultivariateNormal.
JIT = {
    "Trace": infer.JitTrace_ELBO,
    "TraceMeanField": infer.JitTraceMeanField_ELBO,
    "TraceGraph": infer.JitTraceGraph_ELBO,
    "TraceEnum": JitEnum,
}


PARTICLES = 4


def log_weights(guide, noise):
    """Compute log p - log q at the draws of the noise by hand, log q from the Jacobian by autograd."""
    flow = guide.get_transform()
    latents, log_q = [], []
    for row in noise:
        jacobian = torch.autograd.functional.jacobian(lambda x: flow.forward_and_ladj(x)[0], row)
        latents.append(flow.forward_and_ladj(row)[0])
        log_q.append(torch.distributions.Normal(0.0, 1.0).log_prob(row).sum() - torch.linalg.slogdet(jacobian)[1])
    return schools_log_density(torch.stack(latents), SCHOOLS) - torch.stack(log_q)


def shaken(make, **options):
    guide = make(schools, **options)
    guide.setup(SCHOOLS)
    return shake(guide)


@pytest.mark.parametrize("vectorize", [False, True], ids=["sequential", "vectorized"])
def test_loss_is_the_one_computed_by_hand(make, vectorize):
    guide = shaken(make)
    pyro.set_rng_seed(3)
    rows = [torch.randn(5, dtype=F64) for _ in range(PARTICLES)]
    pyro.set_rng_seed(3)
    weights = log_weights(guide, torch.randn(PARTICLES, 5, dtype=F64) if vectorize else rows).detach()
    for name, elbo in ELBOS.items():
        # Renyi's default is alpha = 0, the importance-weighted bound.
        expected = weights.logsumexp(0) - math.log(PARTICLES) if name == "Renyi" else weights.mean()
        pyro.set_rng_seed(3)
        loss = elbo(num_particles=PARTICLES, vectorize_particles=vectorize, max_plate_nesting=1)
        assert loss.loss(schools, guide, SCHOOLS) == pytest.approx(-expected.item(), rel=1e-9), name


@pytest.mark.parametrize("elbo", ELBOS)
def test_training_moves_every_parameter_and_lowers_the_loss(make, elbo):
    guide = make(schools)
    loss = ELBOS[elbo](num_particles=8, vectorize_particles=True, max_plate_nesting=1)

    def evaluate():
        pyro.set_rng_seed(3)
        return loss.loss(schools, guide, SCHOOLS)

    guide.setup(SCHOOLS)
    start, before = values(guide), evaluate()
    train(schools, guide, 10, SCHOOLS, elbo=loss)
    still = [name for name, value in values(guide).items() if value.numel() and torch.equal(value, start[name])]
    assert not still
    assert evaluate() < before - 0.3


def loss_and_gradients(elbo, guide, runs=1):
    """Return those of the last of several runs, all after one seed."""
    pyro.set_rng_seed(11)
    for _ in range(runs):
        guide.zero_grad()
        loss = elbo.loss_and_grads(schools, guide, SCHOOLS)
    return loss, {name: parameter.grad.clone() for name, parameter in guide.named_parameters() if parameter.numel()}


@pytest.mark.parametrize("elbo", JIT)
def test_jit_gives_the_same_loss_and_gradients(make, elbo):
    guide = shaken(make, depth=1)
    options = {"num_particles": 2, "vectorize_particles": True, "max_plate_nesting": 1}
    plain, jit = ELBOS[elbo](**options), JIT[elbo](**options, ignore_jit_warnings=True)
    # Pyro traces JitTraceMeanField_ELBO at every call: one run finds parameters, one traces, and the third counts.
    runs = 3 if elbo == "TraceMeanField" else 1
    # The optimizer of TorchScript takes seconds, and sometimes fails on profiles from other tests.
    with torch.jit.optimized_execution(False):
        jit.loss_and_grads(schools, guide, SCHOOLS)
        for _ in range(3 if elbo == "Trace" else 1):  # TorchScript rewrites a program at its second and third run
            shake(guide, 0.1)  # use other parameters than in tracing
            found, expected = loss_and_gradients(jit, guide), loss_and_gradients(plain, guide, runs)
            assert_close(found, expected, rtol=1e-7, atol=1e-9)
