"""The path gradient: same values, no noise where q is the target, unbiased elsewhere, for every registered flow."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from torch.testing import assert_close

import pyro_flowguides as fg
from pyro_flowguides.guides.distributions import PathDistribution
from pyro_flowguides.inference.density_objective import DensityObjective
from pyro_flowguides.inference.flat_adam import unflatten
from pyro_flowguides.inference.objective import StepOptions
from pyro_flowguides.programs.program import Program
from pyro_flowguides.transforms import with_path_gradient

DIM, CONTEXT = 3, 2
SMALL = {"depth": 2, "hidden_dims": [8]}


@pytest.fixture(autouse=True)
def _double_precision(_fresh_state):
    torch.set_default_dtype(torch.float64)


def shaken(module, size=1.0):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, size)
    return module


@pytest.fixture(params=[False, True], ids=["plain", "conditional"])
def conditional(request):
    return request.param


@pytest.fixture(params=fg.flows.FLOWS)
def family(request, conditional):
    """A flow far from the identity, at a batch of contexts if it is conditional; and its module."""
    module = shaken(fg.flows.FLOWS[request.param](DIM, CONTEXT if conditional else 0, **SMALL))

    def flow(of=module):
        return of.condition(contexts) if conditional else of

    contexts = torch.randn(16, CONTEXT)
    return module, flow


def log_normal(x):
    return -0.5 * x.square().sum(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)


def largest(module):
    return max(float(p.grad.abs().max()) for p in module.parameters() if p.grad is not None and p.numel())


def test_values_are_those_of_the_forward_pass(family):
    _, flow = family
    noise = torch.randn(16, DIM)
    y, ladj = flow().forward_and_ladj(noise)
    path_y, path_ladj, _ = flow().forward_and_score(noise, -noise)
    assert_close(path_y, y, rtol=0, atol=0)
    assert_close(path_ladj, ladj, rtol=1e-12, atol=1e-12)


def test_values_and_derivatives_are_those_of_the_inverse(family):
    """The density on the path, as a function of y, is the density: its gradient too."""
    _, flow = family
    y = flow().forward_and_ladj(torch.randn(16, DIM))[0].detach()
    gradients = []
    for known in (False, True):
        point = y.clone().requires_grad_()
        x, ladj = flow().inverse_and_ladj(point)
        if known:
            x, ladj = flow().inverse_at(point, x.detach(), detach_parameters=True)
        gradients.append(torch.autograd.grad((log_normal(x) - ladj).sum(), point)[0])
    assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-6 * float(gradients[0].abs().max()))


def test_no_gradient_in_any_sample_where_q_is_the_target(family):
    module, flow = family
    frozen = copy.deepcopy(module).requires_grad_(False)
    noise = torch.randn(16, DIM)
    y, ladj, score = flow().forward_and_score(noise, -noise)
    log_q = with_path_gradient(log_normal(noise) - ladj, y, score)
    target_x, target_ladj = flow(frozen).inverse_at(y, noise, detach_parameters=True)
    log_w = (log_normal(target_x) - target_ladj) - log_q
    # Either half alone has a gradient, and rounding leaves a share of it.
    log_q.sum().backward(retain_graph=True)
    half = largest(module)
    assert half > 1e-3
    for sample in log_w:
        module.zero_grad()
        sample.backward(retain_graph=True)
        assert largest(module) < 1e-10 * max(1.0, half)


@pytest.mark.parametrize("flow", fg.flows.FLOWS)
def test_pyro_sees_no_gradient_in_any_draw_where_the_guide_is_the_target(flow):
    transform = shaken(fg.flows.FLOWS[flow](DIM, **SMALL), 0.7)
    frozen = copy.deepcopy(transform).requires_grad_(False)

    def normal():
        return dist.Normal(torch.zeros(DIM), torch.ones(DIM)).to_event(1)

    def model():
        pyro.sample("z", dist.TransformedDistribution(normal(), [frozen.with_cache(0)]))

    def guide():
        pyro.module("flow", transform)
        pyro.sample("z", kind(normal(), [transform]))

    found = {}
    for kind in (PathDistribution, dist.TransformedDistribution):
        transform.zero_grad()
        infer.Trace_ELBO().differentiable_loss(model, guide).backward()
        found[kind] = largest(transform)
    assert found[PathDistribution] < 1e-8
    assert found[dist.TransformedDistribution] > 1e-3


# -- against the total gradient, on a model with a known answer --------------------------------------------------------

Y = torch.tensor([0.7, -1.2, 2.0], dtype=torch.float64)


def gaussian():
    """Posterior N(y / 2, 1/2) in each of three coordinates."""
    z = pyro.sample("z", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=Y)


LOG_Z = float(dist.Normal(0.0, 2**0.5).log_prob(Y).sum())


def shaken_guide(flow, path_gradient=True):
    pyro.clear_param_store()
    torch.manual_seed(3)
    guide = fg.AutoFlow(gaussian, flow, init_scale=0.5, path_gradient=path_gradient, **SMALL)
    guide.setup()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return guide


def gradients(guide, loss, repeats):
    """Independent estimates of the whole gradient, ``(repeats, parameters)``."""

    def backward():
        loss().backward()

    return repeated(guide, backward, repeats)


def repeated(guide, backward, repeats):
    rows = []
    for _ in range(repeats):
        guide.zero_grad()
        backward()
        rows.append(torch.cat([p.grad.reshape(-1) for p in guide.parameters()]))
    return torch.stack(rows)


def set_gradients(parameters, loss_or_gradient):
    """Set the gradients of parameters from a loss, or from the gradient as one vector."""
    parameters = list(parameters)
    if isinstance(loss_or_gradient, torch.Tensor):
        return loss_or_gradient.backward()
    for parameter, gradient in zip(parameters, unflatten(loss_or_gradient[0], parameters), strict=True):
        parameter.grad = gradient.clone()


def assert_same_mean(one, other):
    """Welch's statistic for every parameter: none is extreme, and all together are as large as chance makes them."""
    error = (one.var(0) / len(one) + other.var(0) / len(other)).sqrt()
    t = (one.mean(0) - other.mean(0)) / error.clamp(min=1e-12)
    assert t.abs().max() < 7
    assert t.square().mean() < 3


@pytest.mark.parametrize("flow", ["planar", "radial", "sylvester", "iaf", "realnvp", "nice", "maf"])
def test_unbiased_through_the_density_objective(flow):
    guide = shaken_guide(flow)
    objective = DensityObjective(Program.inspect(gaussian, guide))
    generator = torch.Generator().manual_seed(1)

    def estimates(path):
        def backward():
            evaluation = objective(StepOptions(256, path_gradient=path), generator)
            set_gradients(objective.parameters.values(), evaluation.loss_or_gradient)

        return repeated(guide, backward, 40)

    path, total = estimates(True), estimates(False)
    assert path.mean(0).norm() > 10 * (path.var(0).sum() / len(path)).sqrt()  # there is a gradient to be wrong about
    assert_same_mean(path, total)


@pytest.mark.parametrize("elbo", [infer.Trace_ELBO, infer.TraceGraph_ELBO, infer.TraceMeanField_ELBO])
@pytest.mark.parametrize("vectorized", [True, False], ids=["vectorized", "sequential"])
def test_unbiased_through_pyros_bounds(elbo, vectorized):
    particles, repeats = (256, 40) if vectorized else (2, 25)
    bound = elbo(particles, max_plate_nesting=0, vectorize_particles=vectorized)

    def estimates(guide):
        def loss():
            # TraceGraph_ELBO has no differentiable loss: it runs backward itself.
            if elbo is not infer.TraceGraph_ELBO:
                return bound.differentiable_loss(gaussian, guide)
            bound.loss_and_grads(gaussian, guide)
            return torch.zeros((), requires_grad=True)

        return gradients(guide, loss, repeats)

    path, total = estimates(shaken_guide("sylvester")), estimates(shaken_guide("sylvester", path_gradient=False))
    assert not torch.equal(path[0], total[0])
    assert_same_mean(path, total)


@pytest.mark.parametrize("flow", fg.flows.FLOWS)
@pytest.mark.parametrize("vectorized", [True, False], ids=["vectorized", "sequential"])
def test_values_of_pyros_bound_are_unchanged(flow, vectorized):
    bound = infer.Trace_ELBO(4, max_plate_nesting=0, vectorize_particles=vectorized)
    losses = []
    for path_gradient in (True, False):
        guide = shaken_guide(flow, path_gradient)
        for evaluate in (bound.loss, bound.differentiable_loss):
            torch.manual_seed(5)
            losses.append(torch.as_tensor(evaluate(gaussian, guide)).item())
    assert losses == pytest.approx(losses[:1] * 4, rel=1e-9)


def test_without_it_the_gradient_is_that_of_the_plain_distribution():
    guide = shaken_guide("iaf", path_gradient=False)
    transform = guide.get_transform()
    torch.manual_seed(5)
    found = gradients(guide, lambda: infer.Trace_ELBO().differentiable_loss(gaussian, guide), 1)[0]

    def by_hand():
        torch.manual_seed(5)
        z, ladj = transform.forward_and_ladj(noise)
        joint = dist.Normal(0.0, 1.0).log_prob(z).sum() + dist.Normal(z, 1.0).log_prob(Y).sum()
        return log_normal(noise) - ladj - joint

    torch.manual_seed(5)
    noise = torch.randn(DIM)
    assert_close(found, gradients(guide, by_hand, 1)[0])


def test_no_noise_left_at_the_solution():
    """At the exact posterior the path gradient vanishes draw by draw, the total one only on average."""
    sizes = {}
    for path_gradient in (True, False):
        pyro.clear_param_store()
        guide = fg.AutoFlow(gaussian, fg.transforms.ElementwiseAffine, path_gradient=path_gradient)
        guide.setup()
        guide.set_affine(Y / 2, math.sqrt(0.5) * torch.eye(DIM))
        with torch.no_grad():
            guide.get_transform().parts[1].logit.fill_(-1e4)  # normal tails
        loss = infer.Trace_ELBO().differentiable_loss
        sizes[path_gradient] = gradients(guide, lambda loss=loss, guide=guide: loss(gaussian, guide), 3)
        assert -loss(gaussian, guide).item() == pytest.approx(LOG_Z, abs=1e-6)
    assert sizes[True].abs().max() < 1e-10
    assert sizes[False].abs().amax(-1).min() > 1e-2


def test_traced_programs_get_the_total_gradient_and_train():
    found = []
    for path_gradient in (True, False):
        guide = shaken_guide("planar", path_gradient)
        bound = infer.JitTrace_ELBO(8, 0, vectorize_particles=True, ignore_jit_warnings=True)
        svi = infer.SVI(gaussian, guide, pyro.optim.Adam({"lr": 0.02}), bound)
        torch.manual_seed(2)
        losses = [svi.step() for _ in range(60)]
        found.append(torch.cat([p.detach().reshape(-1) for p in guide.parameters()]))
        assert sum(losses[-10:]) < sum(losses[:10]) - 5
    assert_close(found[0], found[1], rtol=0, atol=0)
