"""AutoAmortizedFlow: the plate of the data, and local sites of every kind."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import biject_to
from torch.testing import assert_close

import pyro_flowguides as fg
from pyro_flowguides.flows import FLOWS
from tests.guides.hierarchies import (
    B,
    N,
    Y,
    everything,
    hierarchy,
    make,
    minibatch,
    number,
    only_local,
    ready,
    several,
    step,
    traced,
    unchanged,
)
from tests.guides.zoo import F64, shake, values

# -- the plate ---------------------------------------------------------------------------------------------------------


def test_model_and_guide_share_the_subsample():
    guide = ready()
    one = traced(guide, Y)
    with poutine.replay(trace=one):
        other = traced(hierarchy, Y)
    indices = one.nodes["groups"]["value"]
    assert torch.equal(indices, other.nodes["groups"]["value"])
    assert len(indices) == B
    assert torch.equal(other.nodes["y"]["value"], Y[indices])
    assert not torch.equal(indices, traced(guide, Y).nodes["groups"]["value"])
    for trace, name in [(one, "theta"), (one, f"_{guide._pyro_name}_latent"), (other, "theta"), (other, "y")]:
        site = trace.nodes[name]
        assert_close(site["log_prob_sum"], site["unscaled_log_prob"].sum() * N / B)


@pytest.mark.parametrize("size", [2, B, N])
def test_indices_passed_to_the_model_are_used(size):
    guide = ready()
    indices = torch.randperm(N)[:size]
    trace = traced(guide, Y, indices)
    assert torch.equal(trace.nodes["groups"]["value"], indices)
    assert trace.nodes["theta"]["value"].shape == (size,)
    minibatches = ready(minibatch, Y[indices], indices)
    assert torch.equal(traced(minibatches, Y[indices], indices).nodes["groups"]["value"], indices)
    for model, other, data in [(hierarchy, guide, Y), (minibatch, minibatches, Y[indices])]:
        assert math.isfinite(step(model, other, data, indices))


def test_the_posterior_of_a_datum_does_not_depend_on_the_minibatch():
    guide = ready()
    mu = number([0.3])

    def loc(indices):
        with poutine.condition(data={f"_{guide._modules['globals']._pyro_name}_latent": mu}):
            trace = traced(guide, Y, torch.tensor(indices))
        base = trace.nodes[f"_{guide._pyro_name}_latent"]["fn"].base_dist
        return base.base_dist.loc[:, 0]

    assert_close(loc([1, 4, 7])[1], loc([4, 2])[0])


def test_without_a_subsample():
    guide = make(everything, inputs=None)
    assert guide(Y)["theta"].shape == (N,)
    assert math.isfinite(step(everything, guide))
    assert guide(Y[:3])["theta"].shape == (3,)


def test_arguments_with_a_row_per_datum_are_cut_to_the_subsample():
    seen = []

    class Spy(nn.Module):
        def forward(self, x, y, other, number):
            seen.append((x, y, other, number))
            return y

    def model(x, y, other, number):
        with pyro.plate("groups", N, subsample_size=B):
            pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))

    x, other = torch.arange(N), torch.ones(4)
    guide = fg.AutoAmortizedFlow(model, Spy(), plate="groups")
    trace = traced(guide, x, Y, other=other, number=N)
    indices = trace.nodes["groups"]["value"]
    assert torch.equal(seen[-1][0], indices)
    assert torch.equal(seen[-1][1], Y[indices])
    assert seen[-1][2] is other
    assert seen[-1][3] == N


def test_a_reordering_of_all_data_needs_inputs():
    """The guide cannot know whether the arguments are in that order already."""
    guide = fg.AutoAmortizedFlow(lambda y, indices: minibatch(y, indices), Pick(), plate="groups")
    guide(Y, torch.arange(N))
    with pytest.raises(ValueError, match=r"another order.*inputs="):
        guide(Y, torch.arange(N).flip(0))


class Pick(nn.Module):
    def forward(self, y, *_):
        return y


def test_the_model_runs_only_up_to_its_plate():
    calls = []

    def model(y):
        calls.append("before")
        hierarchy(y)
        calls.append("after")

    guide = make(model)
    guide(Y)
    calls.clear()
    guide(Y)
    assert calls == ["before"]


# -- several sites -----------------------------------------------------------------------------------------------------

SHAPES = {"rate": (B,), "share": (B,), "simplex": (B, 3), "cholesky": (B, 3, 3), "pair": (2, B, 2)}


@pytest.mark.parametrize("particles", [None, 4])
def test_every_site_has_its_shape_and_support(particles):
    guide = ready(several)
    trace = traced(guide, Y, particles=particles)
    for name, shape in {**SHAPES, "tau": (), "weights": (3,)}.items():
        site = trace.nodes[name]
        expected = shape
        if particles:
            event = site["fn"].event_dim
            batch = shape[: len(shape) - event]
            expected = (4, *(1,) * (2 - len(batch)), *batch, *shape[len(shape) - event :])
        assert site["value"].shape == expected
    with poutine.replay(trace=trace), pyro.validation_enabled(True):
        if particles:
            with pyro.plate("particles", particles, dim=-3):
                several(Y)
        else:
            several(Y)
    assert (trace.nodes["share"]["value"] > 1).all()
    assert (trace.nodes["share"]["value"] < 4).all()


@pytest.mark.parametrize("particles", [None, 4])
def test_the_density_of_constrained_sites_is_that_of_the_transformed_rows(particles):
    """Compute log q of all sites by the change of variables, written out here."""
    guide = ready(several)
    trace = traced(guide, Y, particles=particles)
    latent = trace.nodes[f"_{guide._pyro_name}_latent"]["value"]
    assert latent.shape[-1] == 1 + 1 + 2 + 3 + 4
    columns = dict(zip(SHAPES, latent.split([1, 1, 2, 3, 4], -1), strict=True))
    priors = {"rate": dist.Gamma(1.0, 1.0), "share": dist.Uniform(1.0, 4.0), "simplex": dist.Dirichlet(torch.ones(3))}
    priors |= {"cholesky": dist.LKJCholesky(3, 1.0)}
    for name, prior in priors.items():
        transform = biject_to(prior.support)
        rows = columns[name] if prior.event_dim else columns[name][..., 0]
        value = transform(rows)
        assert_close(trace.nodes[name]["value"], value)
        assert_close(trace.nodes[name]["log_prob"] * B / N, -transform.log_abs_det_jacobian(rows, value))
    pair = columns["pair"].exp().unflatten(-1, (2, 2))  # (..., 1, B, inner, event)
    pair = pair.transpose(-2, -3) if particles is None else pair.squeeze(-4).transpose(-2, -3)
    assert_close(trace.nodes["pair"]["value"], pair)
    assert_close(trace.nodes["pair"]["log_prob"] * B / N, -pair.log().sum(-1))


ELBOS = {
    "Trace": lambda **options: Trace_ELBO(**options),
    "MeanField": lambda **options: TraceMeanField_ELBO(**options),
    "Graph": lambda **options: TraceGraph_ELBO(**options),
    "Renyi": lambda **options: RenyiELBO(alpha=0.5, **options),
}


@pytest.mark.parametrize("vectorize", [False, True], ids=["sequential", "vectorized"])
@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("model", [hierarchy, several, only_local])
def test_every_elbo_trains_it(model, elbo, vectorize):
    guide = make(model)
    guide.setup(Y)
    before = values(guide)
    loss = ELBOS[elbo](num_particles=3, vectorize_particles=vectorize, max_plate_nesting=2)
    with pyro.validation_enabled(True):
        losses = [step(model, guide, elbo=loss) for _ in range(2)]
    assert all(math.isfinite(loss) for loss in losses)
    assert not unchanged(guide, before)


@pytest.mark.parametrize("flow", FLOWS)
def test_every_flow(flow):
    options = {"depth": 1, "hidden_dims": [8]}
    guide = make(flow=flow, global_flow=flow, **options)
    assert math.isfinite(step(hierarchy, guide))
    shake(guide)
    trace = traced(guide, Y)
    site = trace.nodes[f"_{guide._pyro_name}_latent"]
    assert_close(site["fn"].log_prob(site["value"].clone()), site["unscaled_log_prob"])


def test_the_elbo_is_the_mean_log_weight():
    """Compare with log p and log q summed by hand over the draws of one vectorized run."""
    guide = ready(several)
    loss = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=2)
    torch.manual_seed(1)
    value = -loss.loss(several, guide, Y)
    torch.manual_seed(1)
    with poutine.trace() as q, pyro.plate("num_particles_vectorized", 4, dim=-3):
        guide(Y)
    with poutine.trace() as p, poutine.replay(trace=q.trace), pyro.plate("num_particles_vectorized", 4, dim=-3):
        several(Y)
    assert value == pytest.approx(((p.trace.log_prob_sum() - q.trace.log_prob_sum()) / 4).item(), rel=1e-8)


def test_a_site_in_an_outer_plate():
    def model(y):
        with pyro.plate("outer", 2, dim=-2), pyro.plate("groups", len(y), subsample_size=B, dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))

    guide = make(model)
    assert guide(Y)["z"].shape == (2, B)
    assert math.isfinite(step(model, guide))


def test_a_plate_to_the_left_of_another():
    def model(y):
        with pyro.plate("groups", len(y), subsample_size=B, dim=-2):
            pyro.sample("a", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            with pyro.plate("inner", 4, dim=-1):
                pyro.sample("b", dist.Normal(torch.zeros((), dtype=F64), 1.0))

    guide = make(model)
    assert {name: tuple(value.shape) for name, value in guide(Y).items()} == {"a": (B, 1), "b": (B, 4)}
    loss = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=2)
    assert math.isfinite(step(model, guide, elbo=loss))
