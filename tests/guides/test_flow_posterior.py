"""FlowPosterior: its distribution, its context, and its parameters, which are trained in every program."""

import copy
import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import nn
from torch.testing import assert_close

import pyro_flowguides as fg
from pyro_flowguides.flows import FLOWS
from pyro_flowguides.transforms import AmortizedFlow, ContextFlow
from tests.guides.zoo import F64, KINDS, VARIANTS, same, shake, values

D, C, B = 3, 4, 5
SMALL = {"depth": 2, "hidden_dims": [8]}


def make_posterior(kind="iaf", latent_dim=D, **options):
    flow, extra = VARIANTS.get(kind, (kind, {}))
    posterior = fg.FlowPosterior(latent_dim, C, flow, **{**SMALL, **extra, **options})
    return shake(posterior.to(F64), 0.5)


def kinds_with(way):
    """List the kinds whose first layer takes the context in this way."""
    return [kind for kind in KINDS if isinstance(make_posterior(kind).flow.parts[0], way)]


@pytest.fixture(params=KINDS)
def posterior(request):
    return make_posterior(request.param)


def arguments(*batch, dim=D):
    return (
        torch.randn(*batch, dim, dtype=F64, requires_grad=True),
        (0.5 + torch.rand(*batch, dim, dtype=F64)).requires_grad_(),
        torch.randn(*batch, C, dtype=F64, requires_grad=True),
    )


# -- the distribution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [((), (), ()), ((B,), (B,), (B,)), ((), (), (B,)), ((7, 1), (1, B), ())])
def test_batch_shapes(posterior, batches):
    loc, scale, context = (arguments(*batch)[i] for i, batch in enumerate(batches))
    q = posterior(loc, scale, context)
    batch = torch.broadcast_shapes(*batches)
    assert q.batch_shape == batch
    assert q.event_shape == (D,)
    assert q.rsample((2,)).shape == (2, *batch, D)
    assert q.log_prob(q.sample()).shape == batch


@pytest.mark.parametrize("dim", [1, 2])
def test_one_and_two_dimensions(dim):
    for kind in KINDS:
        posterior = make_posterior(kind, dim)
        q = posterior(*arguments(B, dim=dim))
        z = q.rsample()
        assert_close(q.log_prob(z.clone()), q.log_prob(z))


def test_the_density_is_that_of_a_gaussian_pushed_through_the_flow(posterior):
    """Compare with the Jacobian, datum by datum, so that contexts cannot be mixed up."""
    loc, scale, context = arguments(B)
    q = posterior(loc, scale, context)
    z = q.sample()
    for row in range(B):
        flow = posterior.flow.condition(context[row])
        start = flow.inverse_and_ladj(z[row])[0]
        jacobian = torch.autograd.functional.jacobian(lambda x, flow=flow: flow.forward_and_ladj(x)[0], start)
        expected = dist.Normal(loc[row], scale[row]).log_prob(start).sum() - jacobian.slogdet()[1]
        assert_close(q.log_prob(z.clone())[row], expected)
    assert_close(q.log_prob(z), q.log_prob(z.clone()))


def test_it_integrates_to_one():
    posterior = make_posterior("planar", 1)
    grid = torch.linspace(-12, 12, 4001, dtype=F64)
    with torch.no_grad():
        density = posterior(*arguments(dim=1)).log_prob(grid[:, None]).exp()
    assert_close(torch.trapezoid(density, grid), torch.ones((), dtype=F64), rtol=0, atol=1e-6)


def test_expand(posterior):
    loc, scale, context = arguments(B)
    q = posterior(loc, scale, context)
    wide = q.expand([7, B])
    z = wide.rsample()
    assert z.shape == (7, B, D)
    assert len(z.flatten(0, 1).unique(dim=0)) == 7 * B
    assert_close(wide.log_prob(z), torch.stack([posterior(loc, scale, context).log_prob(part.clone()) for part in z]))


def test_values_drawn_before_an_update_are_scored_by_the_new_parameters(posterior):
    loc, scale, context = arguments(B)
    q = posterior(loc, scale, context)
    z = q.rsample()
    before = q.log_prob(z)
    shake(posterior, 0.2)
    assert_close(q.log_prob(z), posterior(loc, scale, context).log_prob(z.clone()))
    assert not torch.allclose(before, q.log_prob(z))


def test_draws_have_the_right_gradient(posterior):
    if posterior.flow.cheap_direction == "inverse":
        pytest.skip("its draws are solved for; their gradient is tested with the transforms")
    inputs = arguments(2)

    def draw(*inputs):
        torch.manual_seed(3)
        return posterior(*inputs).rsample()

    assert torch.autograd.gradcheck(draw, inputs)
    draw(*inputs).sum().backward()
    assert all(p.grad is not None for p in posterior.parameters() if p.numel())


def test_the_context_shifts_every_parameter_of_an_amortized_flow():
    kinds = kinds_with(AmortizedFlow)
    assert {"planar", "radial"} <= set(kinds)
    for kind in kinds:
        for part in make_posterior(kind).flow.parts:
            assert isinstance(part, AmortizedFlow)
            assert set(part.hyper.shapes) == set(part.flow.theta())
            assert part.hyper.network.depth == 2
        linear = make_posterior(kind, hidden_dims=None)
        assert {part.hyper.network.depth for part in linear.flow.parts} == {1}


@pytest.mark.parametrize("kind", kinds_with(ContextFlow))
def test_the_context_enters_every_layer_of_a_conditioner(kind):
    """Each layer's projection lets the context through alone, with those of all other layers at zero."""
    posterior = make_posterior(kind, hidden_dims=[8, 8])
    x = torch.randn(6, D, dtype=F64)
    one, other = torch.randn(2, 6, C, dtype=F64).unbind()
    for part in (part for part in posterior.flow.parts if isinstance(part, ContextFlow)):
        projection = part.hyper.network.weights[-1]
        full = projection.detach().clone()
        rows = dict(zip(part.hyper.shapes, torch.arange(len(full)).split(part.hyper.sizes), strict=True))
        assert list(rows) == [f"bias{layer}" for layer in range(3)]
        for kept in rows.values():
            with torch.no_grad():
                projection.zero_()[kept] = full[kept]
            change = part.condition(one).forward_and_ladj(x)[0] - part.condition(other).forward_and_ladj(x)[0]
            assert (change.abs() > 1e-6).any(-1).all()


# -- initial scale, and the order of steps -----------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 4, 8])
@pytest.mark.parametrize("update", ["affine", "gated"])
def test_iaf_keeps_the_initial_scale(update, depth):
    posterior = fg.FlowPosterior(10, C, "iaf", depth=depth, update=update)
    scale = torch.rand(10) + 0.5
    with torch.no_grad():
        z = posterior(torch.randn(10), scale, torch.randn(20_000, C)).sample()
    assert_close(z.std(0) / scale, torch.ones(10), rtol=0, atol=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_every_flow_starts_near_its_gaussian(kind):
    flow, extra = VARIANTS.get(kind, (kind, {}))
    posterior = fg.FlowPosterior(10, C, flow, **extra)
    loc, scale = torch.randn(10), torch.rand(10) + 0.5
    with torch.no_grad():
        z = posterior(loc, scale, torch.randn(20_000, C)).sample()
    assert_close(z.std(0) / scale, torch.ones(10), rtol=0, atol=0.03)
    assert_close((z.mean(0) - loc) / scale, torch.zeros(10), rtol=0, atol=0.05)


def test_the_order_is_reversed_between_steps():
    posterior = make_posterior("iaf-gated", depth=4)
    orders = [part.flow.conditioner.order.tolist() for part in posterior.flow.parts]
    assert orders == [[0, 1, 2], [2, 1, 0], [0, 1, 2], [2, 1, 0]]


# -- in Pyro -----------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """An encoder of data ``(B, 2)`` with the outputs that a FlowPosterior takes."""

    def __init__(self, latent_dim=D):
        super().__init__()
        self.latent_dim = latent_dim
        self.network = nn.Linear(2, 2 * latent_dim + C, dtype=F64)

    def forward(self, x):
        loc, raw, context = self.network(x).split([self.latent_dim, self.latent_dim, C], -1)
        return loc, nn.functional.softplus(raw), context


DATA = torch.tensor([[0.3, -1.0], [1.2, 0.4], [-0.5, 0.8], [2.0, 0.1], [-1.5, -0.7]], dtype=F64)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(D, dtype=F64), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., :2] + z[..., 2:] ** 2, 0.5).to_event(1), obs=x)


def program(posterior, encoder=None):
    encoder = encoder or Encoder()

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            return pyro.sample("z", posterior(*encoder(x)))

    return guide


ELBOS = {
    "Trace": lambda **options: Trace_ELBO(**options),
    "MeanField": lambda **options: TraceMeanField_ELBO(**options),
    "Renyi": lambda **options: RenyiELBO(alpha=0.5, **options),
    "IWAE": lambda **options: RenyiELBO(alpha=0.0, **options),
}


@pytest.mark.parametrize("vectorize", [False, True], ids=["sequential", "vectorized"])
@pytest.mark.parametrize("elbo", ELBOS)
def test_every_elbo_trains_it(posterior, elbo, vectorize):
    loss = ELBOS[elbo](num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1)
    svi = SVI(model, program(posterior), pyro.optim.Adam({"lr": 0.01}), loss)
    before = values(posterior)
    with pyro.validation_enabled(True):
        losses = [svi.step(DATA) for _ in range(2)]
    assert all(math.isfinite(loss) for loss in losses)
    assert not any(torch.equal(p, before[name]) for name, p in posterior.named_parameters() if p.numel())


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_renyi_bound(alpha):
    guide, particles = program(make_posterior()), 6
    with poutine.trace() as guided, pyro.plate("particles", particles, dim=-2):
        torch.manual_seed(4)
        guide(DATA)
    with poutine.trace() as modeled, poutine.replay(trace=guided.trace), pyro.plate("particles", particles, dim=-2):
        model(DATA)
    for trace in (guided.trace, modeled.trace):
        trace.compute_log_prob()
    z = guided.trace.nodes["z"]
    assert z["value"].shape == (particles, B, D)
    log_p = modeled.trace.nodes["z"]["log_prob"] + modeled.trace.nodes["x"]["log_prob"]
    log_weights = log_p - z["log_prob"]  # Pyro computes one bound per datum
    expected = (((1 - alpha) * log_weights).logsumexp(0) - math.log(particles)).sum()
    torch.manual_seed(4)
    bound = RenyiELBO(alpha, num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    assert -bound.loss(model, guide, DATA) == pytest.approx((expected / (1 - alpha)).item(), rel=1e-8)


def test_a_subsampled_plate_scales_it():
    posterior = make_posterior()

    def guide(x):
        encoder = Encoder()
        with pyro.plate("data", 50, subsample=torch.arange(B)):
            pyro.sample("z", posterior(*encoder(x)))

    trace = poutine.trace(guide).get_trace(DATA)
    trace.compute_log_prob()
    site = trace.nodes["z"]
    assert_close(site["log_prob_sum"], 10 * site["unscaled_log_prob"].sum())


# -- the path gradient -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FLOWS)
def test_the_path_gradient_vanishes_at_the_target(kind):
    posterior = make_posterior(kind, path_gradient=True)
    encoder, data = Encoder(), DATA
    target, target_encoder = copy.deepcopy(posterior), copy.deepcopy(encoder)

    def exact(x):
        with torch.no_grad():
            numbers = target_encoder(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", target(*numbers))

    Trace_ELBO().differentiable_loss(exact, program(posterior, encoder), data).backward()
    gradients = [p.grad for module in (posterior, encoder) for p in module.parameters() if p.numel()]
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-8


def test_the_path_gradient_has_the_mean_of_the_total_gradient():
    total = make_posterior()
    path = make_posterior(path_gradient=True)
    path.load_state_dict(total.state_dict())
    encoder = Encoder()
    loss = Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1)

    def gradient(posterior, seed):
        torch.manual_seed(seed)
        encoder.zero_grad()
        loss.differentiable_loss(model, program(posterior, encoder), DATA).backward()
        return encoder.network.weight.grad

    differences = torch.stack([gradient(total, seed) - gradient(path, seed) for seed in range(100)])
    assert differences.std(0).min() > 0
    assert (differences.mean(0).abs() < 4 * differences.std(0) / 10).all()


# -- parameters --------------------------------------------------------------------------------------------------------


def step(guide):
    return SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(DATA)


def trained(posterior, guide):
    before = values(posterior)
    step(guide)
    return not any(torch.equal(p, before[name]) for name, p in posterior.named_parameters() if p.numel())


def test_it_trains_without_pyro_module():
    posterior = make_posterior()
    assert trained(posterior, program(posterior))
    assert trained(posterior, program(posterior))


def test_pyro_module_keeps_its_names():
    vae = nn.Module()
    vae.encoder, vae.posterior = Encoder(), make_posterior()

    def guide(x):
        pyro.module("vae", vae)
        with pyro.plate("data", len(x)):
            pyro.sample("z", vae.posterior(*vae.encoder(x)))

    assert trained(vae.posterior, guide)
    assert trained(vae.posterior, guide)
    assert {name.split("$$$")[0] for name in pyro.get_param_store()} == {"vae"}
    # Now a program without pyro.module.
    assert trained(vae.posterior, program(vae.posterior))


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.encoder, self.posterior = Encoder(), make_posterior()

    def forward(self, x):
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.posterior(*self.encoder(x)))


def test_inside_a_pyro_module():
    guide = Guide()
    assert trained(guide.posterior, guide)
    assert trained(guide.posterior, guide)
    assert {name.split(".")[0] for name in pyro.get_param_store()} <= {"encoder$$$network", "posterior$$$flow"}


def test_with_module_local_parameters():
    with pyro.settings.context(module_local_params=True):
        guide = Guide()
        Trace_ELBO()(model, guide)(DATA).backward()
    assert all(p.grad is not None for p in guide.parameters() if p.numel())
    assert not pyro.get_param_store().keys()


def test_two_posteriors_are_independent():
    first, second = make_posterior(), make_posterior()
    assert trained(first, program(first))
    before = values(first)
    assert trained(second, program(second))
    assert same(before, values(first))
    assert trained(copy.deepcopy(first), program(copy.deepcopy(first))) is False  # the program holds another copy
    clone = copy.deepcopy(first)
    assert trained(clone, program(clone))
    assert same(before, values(first))


def test_a_frozen_posterior_is_not_trained():
    posterior = make_posterior().requires_grad_(False)
    before = values(posterior)
    step(program(posterior))
    assert same(before, values(posterior))


def test_a_saved_parameter_store_is_used(tmp_path):
    posterior, encoder = make_posterior(), Encoder()
    step(program(posterior, encoder))
    kept = values(posterior)
    assert not same(kept, values(make_posterior()))
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    fresh = make_posterior()
    poutine.trace(program(fresh)).get_trace(DATA)
    assert same(kept, values(fresh))


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "state_dict", "torch.save"])
def test_copies_give_the_same_distribution(posterior, copier):
    step(program(posterior))
    if copier == "state_dict":
        other = copy.deepcopy(posterior)
        shake(other)
        other.load_state_dict(posterior.state_dict())
    elif copier == "deepcopy":
        other = copy.deepcopy(posterior)
    elif copier == "pickle":
        other = pickle.loads(pickle.dumps(posterior))
    else:
        buffer = io.BytesIO()
        torch.save(posterior, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    inputs = arguments(B)
    z = posterior(*inputs).sample()
    assert_close(other(*inputs).log_prob(z), posterior(*inputs).log_prob(z))
    assert not set(map(id, other.parameters())) & set(map(id, posterior.parameters()))
    assert trained(other, program(other))


def test_it_has_parameters_from_the_start_and_moves(posterior):
    assert sum(p.numel() for p in posterior.parameters()) > 0
    assert {p.dtype for p in posterior.float().parameters()} == {torch.float32}
    inputs = [value.detach().float() for value in arguments(B)]
    assert posterior(*inputs).sample().dtype == torch.float32
    assert {p.device.type for p in posterior.to("meta").parameters()} == {"meta"}


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((B, 2), (B, D), (B, C)), r"loc must have shape \(..., 3\), got \(5, 2\).*latent_dim"),
        (((B, D), (B, 1), (B, C)), r"scale must have shape \(..., 3\), got \(5, 1\)"),
        (((B, D), (), (B, C)), r"scale must have shape \(..., 3\), got \(\)"),
        (((B, D), (B, D), (B, 5)), r"context must have shape \(..., 4\), got \(5, 5\).*context_dim"),
        (((B, D), (B, D), (6, C)), r"do not broadcast: loc \(5, 3\), scale \(5, 3\), context \(6, 4\)"),
    ],
)
def test_arguments_of_other_shapes_are_refused(shapes, words):
    posterior = make_posterior()
    with pytest.raises(ValueError, match=words):
        posterior(*(torch.ones(shape, dtype=F64) for shape in shapes))


def test_a_scale_that_is_not_positive_is_refused():
    loc, scale, context = arguments(B)
    with pyro.validation_enabled(True), pytest.raises(ValueError, match="scale"):
        make_posterior()(loc, -scale, context)


def test_invalid_options():
    with pytest.raises(ValueError, match="did you mean 'iaf'"):
        fg.FlowPosterior(D, C, "iaff")
    with pytest.raises(ValueError, match="context_dim must be at least 1"):
        fg.FlowPosterior(D, 0)
    with pytest.raises(ValueError, match="latent_dim must be at least 1"):
        fg.FlowPosterior(0, C)
    with pytest.raises(ValueError, match="conditional flow with input_dim 3 and context_dim 4, got Compose with 3"):
        fg.FlowPosterior(D, C, lambda input_dim, context_dim: fg.flows.iaf(input_dim))
    with pytest.raises(TypeError, match=r"FlowPosterior: unknown option 'dept', did you mean 'depth'\?"):
        fg.FlowPosterior(D, C, "planar", dept=3)


def test_builders_in_place_of_a_name():
    def builder(input_dim, context_dim, *, depth):
        return fg.transforms.ConditionalCompose(
            [fg.transforms.ConditionalPlanar(input_dim, context_dim) for _ in range(depth)]
        )

    posterior = fg.FlowPosterior(D, C, builder, depth=3).to(F64)
    assert len(posterior.flow.parts) == 3
    assert posterior(*arguments(B)).sample().shape == (B, D)
    single = fg.FlowPosterior(D, C, fg.transforms.ConditionalPlanar).to(F64)
    assert single(*arguments(B)).sample().shape == (B, D)


@pytest.mark.gpu
def test_on_a_gpu(posterior):
    posterior.cuda()
    inputs = [value.detach().cuda() for value in arguments(B)]
    q = posterior(*inputs)
    z = q.rsample((2,))
    assert z.is_cuda
    assert_close(q.log_prob(z.clone()), q.log_prob(z))
