"""Bounds and their gradients: importance weighting, dropped particles, guides of every kind."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal
from torch.testing import assert_close

import pyro_flowguides as fg
from pyro_flowguides.inference.density_objective import DensityObjective, make_objective
from pyro_flowguides.inference.flat_adam import flatten
from pyro_flowguides.inference.objective import StepOptions, TraceObjective
from pyro_flowguides.programs.program import Program

Y = torch.tensor([0.7, -1.2], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _double_precision(_fresh_state):
    torch.set_default_dtype(torch.float64)


def gaussian():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=Y)


LOG_Z = float(dist.Normal(0.0, 2**0.5).log_prob(Y).sum())


def with_parameter():
    loc = pyro.param("loc", torch.zeros(2))
    z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=Y)


def make_bound(model=gaussian):
    torch.manual_seed(3)
    guide = fg.AutoFlow(model, "planar", depth=2, init_scale=0.5)
    guide()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return DensityObjective(Program.inspect(model, guide))


def test_importance_weighted_bounds_rise_towards_the_evidence():
    bound, generator = make_bound(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        elbos = [bound(StepOptions(40_000, False, 1.0, k), generator).elbo for k in (1, 2, 8, 100)]
    assert elbos[0] < elbos[1] - 0.02 < elbos[2] - 0.04 < elbos[3]
    assert LOG_Z - 0.05 < elbos[3] < LOG_Z + 0.01


def test_importance_bound_is_the_log_mean_weight_of_each_group():
    bound = make_bound()
    generator = torch.Generator().manual_seed(0)
    z, log_q = bound.draw(bound.noise(12, generator))
    expected = ((bound.density(z) - log_q).reshape(3, 4).logsumexp(-1) - math.log(4)).mean()
    for path in (False, True):
        step = bound(StepOptions(12, path, 1.0, 4), torch.Generator().manual_seed(0))
        assert step.elbo == pytest.approx(float(expected.detach()), abs=1e-10)


def gradients(bound, request, repeats, seed):
    generator, rows = torch.Generator().manual_seed(seed), []
    for _ in range(repeats):
        for parameter in bound.parameters.values():
            parameter.grad = None
        bound(request, generator).loss_or_gradient.backward()
        rows.append(flatten([parameter.grad for parameter in bound.parameters.values()]))
    return torch.stack(rows)


def test_the_plain_importance_gradient_is_that_of_autograd():
    bound = make_bound()
    gradient = gradients(bound, StepOptions(12, False, 1.0, 4), 1, 0)[0]
    z, log_q = bound.draw(bound.noise(12, torch.Generator().manual_seed(0)))
    loss = -((bound.density(z) - log_q).reshape(3, 4).logsumexp(-1)).mean()
    expected = torch.autograd.grad(loss, list(bound.parameters.values()))
    assert_close(gradient, flatten(expected))


@pytest.mark.parametrize("model", [gaussian, with_parameter], ids=["guide only", "with a parameter of the model"])
def test_doubly_reparametrized_gradient_is_unbiased(model):
    """The model's own parameters follow the plain weights: squared ones would be biased."""
    bound = make_bound(model)
    doubly = gradients(bound, StepOptions(2048, True, 1.0, 4), 40, 1)
    plain = gradients(bound, StepOptions(2048, False, 1.0, 4), 40, 2)
    error = ((doubly.var(0) + plain.var(0)) / 40).sqrt()
    t = (doubly.mean(0) - plain.mean(0)) / error
    assert (plain.mean(0) / (plain.std(0) / 40**0.5)).abs().max() > 20  # there is a gradient
    assert t.abs().max() < 5
    assert t.square().mean() < 3


def test_doubly_reparametrized_gradient_vanishes_at_the_solution():
    guide = fg.AutoFlow(gaussian, "planar", depth=1)
    guide()
    with torch.no_grad():
        for parameter in guide.transform.parts[0].parameters():
            parameter.zero_()
        guide.transform.parts[1].logit.fill_(-1e4)  # normal tails
    guide.set_affine(Y / 2, math.sqrt(0.5) * torch.eye(2))
    bound = DensityObjective(Program.inspect(gaussian, guide))
    assert gradients(bound, StepOptions(64, True, 1.0, 8), 1, 0).abs().max() < 1e-10
    assert gradients(bound, StepOptions(64, False, 1.0, 8), 1, 0).abs().max() > 1e-3


def test_tempering_scales_the_target_alone():
    bound = make_bound()
    z, log_q = bound.draw(bound.noise(16, torch.Generator().manual_seed(0)))
    expected = (0.3 * bound.density(z) - log_q).mean()
    assert bound(StepOptions(16, False, 0.3), torch.Generator().manual_seed(0)).elbo == pytest.approx(
        float(expected.detach())
    )


# -- particles that are not finite -------------------------------------------------------------------------------------


def cliff():
    """Overflows above 0.71 / 0.9: the density is 0 there and its derivative NaN."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("cliff", -1e-300 * (1000 * x).exp())


@pytest.mark.parametrize("importance", [1, 8])
@pytest.mark.parametrize("path", [False, True])
def test_particles_without_a_finite_weight_are_left_out_and_counted(path, importance):
    torch.manual_seed(0)
    guide = fg.AutoFlow(cliff, "planar", depth=1, init_scale=0.6, init_loc_fn=lambda site: torch.tensor(0.0))
    guide()
    bound = DensityObjective(Program.inspect(cliff, guide))
    noise = bound.noise(64, torch.Generator().manual_seed(0))
    z, log_q = bound.draw(noise)
    log_w = (bound.density(z) - log_q).detach()
    finite = log_w.isfinite()
    assert 0 < finite.sum() < 64
    step = bound(StepOptions(64, path, 1.0, importance), torch.Generator().manual_seed(0))
    assert step.num_dropped == 64 - int(finite.sum())
    groups = torch.where(finite, log_w, -torch.inf).reshape(-1, importance).logsumexp(-1) - math.log(importance)
    assert step.elbo == pytest.approx(float(groups[groups.isfinite()].mean()), rel=1e-9)
    step.loss_or_gradient.backward()
    gradient = flatten([parameter.grad for parameter in guide.parameters()])
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 1e-3


def test_the_bound_is_nan_where_no_particle_is_finite():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("never", 0 * x - math.inf)

    guide = fg.AutoFlow(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), "planar", depth=1)
    guide()
    step = DensityObjective(Program.inspect(model, guide))(StepOptions(8), torch.Generator())
    assert math.isnan(step.elbo)
    assert step.num_dropped == 8


# -- guides of any kind ------------------------------------------------------------------------------------------------


def handwritten():
    loc = pyro.param("loc", torch.tensor([0.5, 0.0]))
    scale = pyro.param("scale", torch.tensor([0.5, 2.0]), constraint=dist.constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def hand_elbo(loc, scale):
    """E[log p - log q] for q = N(loc, scale²)."""
    mean = dist.Normal(0.0, 1.0).log_prob(loc) + dist.Normal(loc, 1.0).log_prob(Y) - scale**2
    return float((mean + scale.log() + 0.5 * math.log(2 * math.pi * math.e)).sum())


def test_hand_written_guide():
    bound = make_objective(Program.inspect(gaussian, handwritten))
    assert isinstance(bound, TraceObjective)
    assert bound.route.kind == "traced"
    assert bound.parameters.keys() == {"loc", "scale"}
    torch.manual_seed(0)
    elbos = torch.tensor([bound(StepOptions(100), torch.Generator()).elbo for _ in range(50)])
    expected = hand_elbo(torch.tensor([0.5, 0.0]), torch.tensor([0.5, 2.0]))
    assert elbos.mean() == pytest.approx(expected, abs=4 * float(elbos.std()) / 50**0.5)


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal])
def test_pyros_guides(make):
    guide = make(gaussian, init_scale=0.3, init_loc_fn=lambda site: torch.zeros(2))
    guide()
    bound = make_objective(Program.inspect(gaussian, guide))
    assert bound.route.kind == "traced"
    torch.manual_seed(0)
    elbos = torch.tensor([bound(StepOptions(100), torch.Generator()).elbo for _ in range(50)])
    expected = hand_elbo(torch.zeros(2), torch.full((2,), 0.3))
    assert elbos.mean() == pytest.approx(expected, abs=4 * float(elbos.std()) / 50**0.5)


def test_a_guide_that_does_not_broadcast_runs_one_particle_at_a_time():
    def guide():
        loc = pyro.param("loc", torch.zeros(2))
        z = pyro.sample("u", dist.Normal(loc, 1.0).to_event(1), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(z - z.mean(), event_dim=1))  # the mean over all particles

    bound = make_objective(Program.inspect(gaussian, guide))
    assert bound.route.kind == "sequential"


def test_lists_of_guides_are_evaluated_through_traces():
    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.LogNormal(0.0, 1.0))

    guide = AutoGuideList(model)
    guide.append(fg.AutoPlanar(pyro.poutine.block(model, expose=["a"])))
    guide.append(AutoNormal(pyro.poutine.block(model, expose=["b"])))
    guide()
    bound = make_objective(Program.inspect(model, guide))
    assert bound.route.kind == "traced"
    assert len(bound.parameters) == len(list(guide.parameters()))


@pytest.mark.parametrize("options", [StepOptions(8, importance=4), StepOptions(8, power=0.5)], ids=str)
def test_bounds_that_traces_cannot_give_are_refused(options):
    with pytest.raises(ValueError, match="need a flow guide"):
        make_objective(Program.inspect(gaussian, handwritten))(options, torch.Generator())


# -- models that raise an error at some draws --------------------------------------------------------------------------


def refusing():
    """N(0, 1) times a likelihood; an error if any particle lies above 0.7."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    if bool((x > 0.7).any()):
        raise ValueError("bad point")
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.5))


def exact(x):
    return dist.Normal(0.0, 1.0).log_prob(x) + dist.Normal(x, 1.0).log_prob(torch.tensor(0.5))


def test_particles_at_which_the_model_fails_are_left_out_and_counted():
    guide = fg.AutoFlow(refusing, "planar", depth=1, init_scale=0.6, init_loc_fn=lambda site: torch.tensor(0.0))
    guide()
    bound = DensityObjective(Program.inspect(refusing, guide))
    z, log_q = bound.draw(bound.noise(64, torch.Generator().manual_seed(0)))
    expected = (exact(z[:, 0]) - log_q)[z[:, 0] <= 0.7].detach()
    assert 0 < len(expected) < 60
    step = bound(StepOptions(64), torch.Generator().manual_seed(0))
    assert step.num_dropped == 64 - len(expected)
    assert step.elbo == pytest.approx(float(expected.mean()), rel=1e-5)
    step.loss_or_gradient.backward()
    assert flatten([parameter.grad for parameter in guide.parameters()]).isfinite().all()


def test_traces_leave_out_particles_at_which_the_model_fails():
    guide = AutoNormal(refusing, init_scale=0.6, init_loc_fn=lambda site: torch.tensor(0.0))
    guide()
    torch.manual_seed(0)  # of the first two particles that run together, one lies above 0.7
    bound = make_objective(Program.inspect(refusing, guide))
    assert bound.route.kind == "traced"
    steps = [bound(StepOptions(32), torch.Generator()) for _ in range(20)]
    assert sum(step.num_dropped for step in steps) >= 20  # each step of 32 particles has one above 0.7
    assert all(math.isfinite(step.elbo) for step in steps)


def test_failing_draws_are_undefined_in_a_diagnosis():
    guide = AutoNormal(refusing, init_scale=0.6, init_loc_fn=lambda site: torch.tensor(0.0))
    torch.manual_seed(0)
    weighted = fg.diagnostics.log_weights(refusing, guide, num_samples=200)
    x = weighted.draws["x"]
    assert torch.equal(weighted.log_p.isnan(), x > 0.7)
    torch.testing.assert_close(weighted.log_p[x <= 0.7], exact(x[x <= 0.7]).double(), rtol=1e-5, atol=1e-5)
    assert weighted.vectorized


def test_a_model_that_always_fails_is_no_matter_of_draws():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, torch.ones(3) @ torch.ones(2)), obs=torch.tensor(0.5))

    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        Program.inspect(model, AutoNormal(refusing))
