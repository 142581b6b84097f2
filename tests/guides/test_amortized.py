"""AutoAmortizedFlow: the right plate, the right posterior, any local sites, and a module like any other."""

import copy
import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from torch import nn
from torch.distributions import biject_to
from torch.testing import assert_close

import pyro_flowguides as fg
from pyro_flowguides.flows import FLOWS
from tests.guides.zoo import F64, draw, same, shake, values

N, B, M = 12, 5, 3
SMALL = {"depth": 1, "hidden_dims": [8], "global_options": {"depth": 1, "hidden_dims": [8]}}
Y = torch.randn(N, M, dtype=F64, generator=torch.Generator().manual_seed(2)) + 1


def number(value):
    return torch.tensor(value, dtype=F64)


def encoder(dtype=F64, width=M):
    return nn.Sequential(nn.Linear(width, 6), nn.ELU()).to(dtype)


def hierarchy(y, batch=None, size=B):
    """Takes all data and subsamples them, or to the indices given."""
    mu = pyro.sample("mu", dist.Normal(number(0.0), 2.0))
    with pyro.plate("groups", len(y), subsample_size=None if batch is not None else size, subsample=batch) as rows:
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta[..., None] + torch.zeros(M), 1.0).to_event(1), obs=y[rows])


def everything(y):
    hierarchy(y, size=None)


def minibatch(y, indices):
    """Takes the data of a minibatch only."""
    mu = pyro.sample("mu", dist.Normal(number(0.0), 2.0))
    with pyro.plate("groups", N, subsample=indices):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta[..., None] + torch.zeros(M), 1.0).to_event(1), obs=y)


def only_y(indices, y, *_, **__):
    return y[indices] if len(y) != len(indices) else y


def several(y):
    """Two global sites and four local ones, constrained, of all kinds of shapes, in two plates."""
    tau = pyro.sample("tau", dist.HalfNormal(number(1.0)))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3, dtype=F64)))
    with pyro.plate("groups", len(y), subsample_size=B, dim=-1) as rows:
        rate = pyro.sample("rate", dist.Gamma(number(2.0), tau))
        share = pyro.sample("share", dist.Uniform(number(1.0), number(4.0)))
        pyro.sample("simplex", dist.Dirichlet(1 + weights))
        pyro.sample("cholesky", dist.LKJCholesky(3, number(1.0)))
        with pyro.plate("inner", 2, dim=-2):
            pyro.sample("pair", dist.LogNormal(number(0.0), 1.0).expand([2]).to_event(1))
        mean = (rate * share)[..., None] + torch.zeros(M)
        pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y[rows])


def only_local(y):
    with pyro.plate("groups", len(y), subsample_size=B) as rows:
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(theta.sum(-1, keepdim=True) + torch.zeros(M), 1.0).to_event(1), obs=y[rows])


def make(model=hierarchy, flow="iaf", **options):
    return fg.AutoAmortizedFlow(model, encoder(), flow, plate="groups", **{**SMALL, "inputs": only_y, **options})


def ready(model=hierarchy, *args, **options):
    """A guide away from where it starts."""
    guide = make(model, **options)
    guide.setup(*args or (Y,))
    return shake(guide, 0.2)


def traced(program, *args, particles=None, **kwargs):
    with poutine.trace() as tracer:
        if particles is None:
            program(*args, **kwargs)
        else:
            with pyro.plate("particles", particles, dim=-3):
                program(*args, **kwargs)
    tracer.trace.compute_log_prob()
    return tracer.trace


def step(model, guide, *args, elbo=None):
    return SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo or Trace_ELBO()).step(*args or (Y,))


def unchanged(guide, before):
    """Parameters that training has not moved; a conditioner with one input reads none of it."""
    unread = "conditioner.weights.0"
    return [
        name
        for name, p in guide.named_parameters()
        if p.numel() and torch.equal(p, before[name]) and not (name.endswith(unread) and p.shape[1] == 1)
    ]


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
def test_indices_given_to_the_model_are_used(size):
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


def test_a_subsample_of_all_in_another_order_needs_inputs():
    """Whether the rows are in that order already cannot be known."""
    guide = fg.AutoAmortizedFlow(lambda y, indices: minibatch(y, indices), Pick(), plate="groups")
    guide(Y, torch.arange(N))
    with pytest.raises(ValueError, match=r"another order.*inputs="):
        guide(Y, torch.arange(N).flip(0))


class Pick(nn.Module):
    def forward(self, y, *_):
        return y


def test_the_model_is_run_no_further_than_its_plate():
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
    """log q of all sites, by the change of variables written out here."""
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


def test_the_elbo_is_that_of_the_parts():
    """Against log p and log q put together by hand from the draws of one vectorized run."""
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


# -- the posterior -----------------------------------------------------------------------------------------------------


def gaussian_answer(y, tau=1.0, sigma=1.0, prior=2.0):
    """Mean and covariance of (mu, theta): groups Normal(mu, tau), observations Normal(theta, sigma)."""
    n, m = y.shape
    precision = torch.zeros(n + 1, n + 1, dtype=F64)
    precision[0, 0] = 1 / prior**2 + n / tau**2
    precision[0, 1:] = precision[1:, 0] = -1 / tau**2
    precision[1:, 1:] = torch.eye(n) * (1 / tau**2 + m / sigma**2)
    covariance = precision.inverse()
    linear = torch.cat([number([0.0]), y.sum(1) / sigma**2])
    return covariance @ linear, covariance


def train(model, guide, *args, steps, lr, particles, batches=None, averaged=100):
    """Plain torch, one optimizer; the step size decays to a fiftieth, and the last iterates are averaged."""
    if batches is None:
        guide.setup(*args)
    loss = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    optimizer = torch.optim.Adam(guide.parameters(), lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=lr / 50)
    total = [torch.zeros_like(p) for p in guide.parameters()]
    for taken in range(steps + averaged):
        extra = () if batches is None else (next(batches),)
        optimizer.zero_grad()
        loss.differentiable_loss(model, guide, *args, *extra).backward()
        optimizer.step()
        if taken < steps:
            schedule.step()
        else:
            torch._foreach_add_(total, [p.detach() for p in guide.parameters()])
    with torch.no_grad():
        for parameter, summed in zip(guide.parameters(), total, strict=True):
            parameter.copy_(summed / averaged)


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("flow", FLOWS)
def test_the_path_gradient_runs_through_all_draws_and_no_parameter(flow, particles):
    """Against log p - log q with a copy of q, at the same draws."""
    indices = torch.tensor([3, 8, 1])
    guide = ready(flow=flow, path_gradient=True, depth=1, hidden_dims=[8])
    vectorized = pyro.plate("num_particles_vectorized", particles, dim=-2)

    def gradients(loss):
        guide.zero_grad()
        loss.backward()
        return {name: parameter.grad for name, parameter in guide.named_parameters() if parameter.numel()}

    torch.manual_seed(5)
    with poutine.trace() as q, vectorized:
        guide(Y, indices)
    with poutine.trace() as p, poutine.replay(trace=q.trace), vectorized:
        hierarchy(Y, indices)
    pyro.clear_param_store()  # so that the copy takes the names of the guide
    other = copy.deepcopy(guide)
    with poutine.trace() as scored, poutine.replay(trace=q.trace), vectorized:
        other(Y, indices)
    expected = gradients((scored.trace.log_prob_sum() - p.trace.log_prob_sum()) / particles)
    pyro.clear_param_store()
    torch.manual_seed(5)
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    found = gradients(elbo.differentiable_loss(hierarchy, guide, Y, indices))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        reference = torch.zeros_like(gradient) if expected[name] is None else expected[name]
        assert_close(gradient, reference, msg=lambda text, name=name: f"{name}: {text}")


SIGMA = 2.0


def weak(y):
    """Observations so noisy that the groups learn much from each other."""
    mu = pyro.sample("mu", dist.Normal(number(0.0), 2.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta[..., None] + torch.zeros(M), SIGMA).to_event(1), obs=y)


def test_the_joint_posterior_of_a_small_hierarchy():
    """Twelve groups, so that the global variable is uncertain and the groups are correlated through it."""
    guide = make(weak, path_gradient=True)
    train(weak, guide, Y, steps=400, lr=0.02, particles=16)
    mean, covariance = gaussian_answer(Y, sigma=SIGMA)
    draws = guide.sample_all(20_000, Y)
    joint = torch.cat([draws["mu"][:, None], draws["theta"]], -1)
    sd = covariance.diagonal().sqrt()
    assert ((joint.mean(0) - mean) / sd).abs().max() < 0.1
    assert (joint.std(0) / sd - 1).abs().max() < 0.1
    correlation = covariance / sd / sd[:, None]
    assert correlation[0, 1] > 0.25
    assert (joint.T.corrcoef() - correlation).abs().max() < 0.06


def test_without_the_globals_their_posterior_comes_out_too_narrow():
    """What ``condition_on_globals`` is there for: the mean-field answer is sd = tau / sqrt(N), not the marginal one."""
    guide = make(weak, path_gradient=True, condition_on_globals=False)
    train(weak, guide, Y, steps=250, lr=0.02, particles=16)
    narrow = (1 / 4 + N) ** -0.5
    assert guide.sample_all(20_000, Y)["mu"].std() == pytest.approx(narrow, rel=0.07)
    assert narrow < 0.7 * gaussian_answer(Y, sigma=SIGMA)[1][0, 0].sqrt()


@pytest.mark.slow
def test_ten_thousand_groups_subsampled_to_a_hundred():
    """Every local and global marginal within 0.1 standard deviations of the exact one, in mean and in spread."""
    groups, observations, batch_size, sigma = 10_000, 4, 100, 2.0
    y = 3 + torch.randn(groups, 1) + sigma * torch.randn(groups, observations)

    def model(y, batch):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("groups", groups, subsample=batch):
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta[..., None] + torch.zeros(observations), sigma).to_event(1), obs=y[batch])

    def batches():
        """All groups once per epoch, one of every stratum in each batch: little noise from the choice of groups."""
        strata = y.mean(1).argsort().reshape(batch_size, -1)
        while True:
            yield from strata.gather(1, torch.rand(strata.shape).argsort(1)).T

    guide = fg.AutoAmortizedFlow(
        model,
        nn.Linear(observations, 8),
        plate="groups",
        inputs=lambda indices, y, batch: y[indices],
        init_loc_fn=init_to_value(values={"mu": y.mean()}),
        init_scale=0.03,
        path_gradient=True,
        **{**SMALL, "hidden_dims": [16]},
    )
    guide.setup(y, torch.arange(batch_size))
    train(model, guide, y, steps=1100, lr=0.01, particles=16, batches=batches(), averaged=200)

    # The means of the groups are Normal(mu, sqrt(spread)): from them follows mu, and from both theta.
    spread, mean = 1 + sigma**2 / observations, y.mean(1).double()
    mu_sd = (1 / 25 + groups / spread) ** -0.5
    mu_mean = mean.sum() / spread * mu_sd**2
    weight = sigma**2 / observations / spread
    theta_mean = (1 - weight) * mean + weight * mu_mean
    theta_sd = (weight + (weight * mu_sd) ** 2) ** 0.5

    ranked = mean.argsort()
    some = torch.cat([ranked[:100], ranked[50::100], ranked[-100:]])  # the extremes among them
    parts = []
    for _ in range(15):
        with torch.no_grad(), pyro.plate("draws", 2000, dim=-2):
            parts.append(guide(y, some))
    mu, theta = (torch.cat([part[name] for part in parts]).double() for name in ("mu", "theta"))
    assert abs(mu.mean() - mu_mean) < 0.1 * mu_sd
    assert abs(mu.std() / mu_sd - 1) < 0.1
    assert ((theta.mean(0) - theta_mean[some]) / theta_sd).abs().max() < 0.1
    assert (theta.std(0) / theta_sd - 1).abs().max() < 0.1


def test_sample_all_serves_data_that_the_model_subsamples():
    guide = ready(several)
    draws = guide.sample_all(7, Y)
    shapes = {"rate": (N,), "share": (N,), "simplex": (N, 3), "cholesky": (N, 3, 3), "pair": (2, N, 2)}
    shapes |= {"tau": (), "weights": (3,)}
    assert {name: tuple(value.shape[1:]) for name, value in draws.items()} == shapes
    assert {len(value) for value in draws.values()} == {7}
    assert len(draws["tau"].unique()) == 7
    assert ready(only_local).sample_all(1, Y)["theta"].shape == (1, N, 2)


def test_sample_all_in_parts(monkeypatch):
    monkeypatch.setattr("pyro_flowguides.guides.amortized.ROWS_AT_A_TIME", 3 * N)
    assert ready().sample_all(7, Y)["theta"].shape == (7, N)


def test_medians_and_quantiles():
    guide = ready(several)
    median, quantiles = guide.median(Y), guide.quantiles([0.1, 0.5, 0.9], Y)
    for name, value in guide.sample_all(2, Y).items():
        assert median[name].shape == value.shape[1:]
        assert quantiles[name].shape == (3, *value.shape[1:])
        assert (quantiles[name].diff(dim=0) >= 0).all()
    draws = guide.sample_all(4000, Y)
    for name in ("tau", "rate", "pair"):
        below = (draws[name] < quantiles[name][2]).double().mean(0)
        assert_close(below, torch.full_like(below, 0.9), rtol=0, atol=0.06)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel):
    guide = ready()
    with torch.no_grad():
        samples = Predictive(hierarchy, guide=guide, num_samples=6, parallel=parallel)(Y, torch.arange(B))
    assert samples["mu"].shape[0] == 6
    assert samples["theta"].shape[0] == 6
    assert samples["theta"].shape[-1] == B


def test_it_starts_where_it_is_told():
    guide = make(several, init_loc_fn=init_to_value(values={"tau": number(0.7), "rate": number(2.5).expand(B)}))
    guide.setup(Y)
    median = guide.median(Y)
    assert_close(median["tau"], number(0.7), rtol=0, atol=0.03)
    assert_close(median["rate"], number(2.5).expand(N), rtol=0, atol=0.1)
    precise = make(several, init_scale=1e-3)
    assert precise.sample_all(500, Y)["rate"].log().std(0).max() < 2e-3


# -- a module like any other -------------------------------------------------------------------------------------------


def latent_draw(guide, seed=3):
    return draw(guide, Y, torch.arange(4), seed=seed)


def test_parameters_come_with_the_first_run():
    guide = make()
    for ask in (lambda: list(guide.parameters()), guide.state_dict):
        with pytest.raises(RuntimeError, match=r"guide.setup\(\*args, \*\*kwargs\)"):
            ask()
    guide.setup(Y)
    names = {name.split(".")[0] for name, _ in guide.named_parameters()}
    assert names == {"local", "globals"}
    torch.optim.Adam(guide.parameters())


@pytest.mark.parametrize("model", [hierarchy, several, only_local])
@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "state_dict", "torch.save"])
def test_copies(model, copier):
    guide = ready(model)
    step(model, guide)
    if copier == "state_dict":
        other = make(model)
        with pytest.raises(RuntimeError, match=r"guide\.setup"):
            other.load_state_dict(guide.state_dict())
        other.setup(Y)
        other.load_state_dict(guide.state_dict())
    elif copier == "deepcopy":
        other = copy.deepcopy(guide)
    elif copier == "pickle":
        other = pickle.loads(pickle.dumps(guide))
    else:
        buffer = io.BytesIO()
        torch.save(guide, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert same(draw(guide, Y), draw(other, Y))
    before = values(guide)
    step(model, other)
    assert same(before, values(guide))
    assert not same(before, values(other))


def test_a_copy_before_the_first_run():
    guide = copy.deepcopy(make())
    assert guide(Y)["theta"].shape == (B,)


def test_unpickled_without_its_model():
    guide = ready(lambda y: hierarchy(y))
    other = pickle.loads(pickle.dumps(guide))
    with pytest.raises(RuntimeError, match=r"guide.model = model"):
        other(Y)
    other.model = hierarchy
    assert same(draw(guide, Y), draw(other, Y))


def test_two_guides_are_independent():
    first, second = make(), make()
    step(hierarchy, first)
    kept = values(first)
    second.setup(Y)
    before = values(second)
    for _ in range(2):
        step(hierarchy, second)
    assert same(kept, values(first))
    assert not unchanged(second, before)


def test_a_saved_parameter_store_is_used(tmp_path):
    guide = make()
    step(hierarchy, guide)
    kept = values(guide)
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    fresh = make()
    fresh(Y)
    assert same(kept, values(fresh))


def test_it_follows_the_dtype_of_the_model_and_conversions():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", len(y)):
            pyro.sample("theta", dist.Normal(mu, 1.0))

    single = fg.AutoAmortizedFlow(model, encoder(torch.float32), plate="groups")
    assert {value.dtype for value in single(Y.float()).values()} == {torch.float32}
    for early in (True, False):
        guide = fg.AutoAmortizedFlow(model, encoder(torch.float32), plate="groups")
        if early:
            guide.double()
        guide.setup(Y if early else Y.float())
        guide.double()
        assert {value.dtype for value in guide(Y).values()} == {F64}
        assert {parameter.dtype for parameter in guide.parameters()} == {F64}
    assert {parameter.device.type for parameter in guide.to("meta").parameters()} == {"meta"}


def test_in_a_list_of_guides():
    guide = AutoGuideList(hierarchy)
    guide.append(AutoNormal(poutine.block(hierarchy, expose=["mu"])))
    guide.append(make(poutine.block(hierarchy, hide=["mu"])))
    assert guide(Y)["theta"].shape == (B,)
    assert math.isfinite(step(hierarchy, guide))


def test_with_module_local_parameters():
    with pyro.settings.context(module_local_params=True):
        guide = make()
        guide.setup(Y)
        Trace_ELBO()(hierarchy, guide)(Y).backward()
    assert all(p.grad is not None for p in guide.parameters() if p.numel())
    assert not pyro.get_param_store().keys()


@pytest.mark.gpu
def test_on_a_gpu():
    guide = make().cuda()
    y = Y.cuda()

    def model(y):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
        with pyro.plate("groups", len(y), subsample_size=B, device=y.device) as rows:
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta[..., None].expand(*theta.shape, M), 1.0).to_event(1), obs=y[rows])

    guide.model = model
    assert math.isfinite(step(model, guide, y))
    assert all(value.is_cuda for value in guide(y).values())


# -- errors ------------------------------------------------------------------------------------------------------------


def refused(model, match, *args, error=ValueError, **options):
    with pytest.raises(error, match=match):
        make(model, **options)(*args or (Y,))


def test_a_plate_that_is_not_there():
    with pytest.raises(ValueError, match=r"no plate 'data' with a size. Its plates: \['groups'\]"):
        fg.AutoAmortizedFlow(hierarchy, encoder(), plate="data")(Y)


def test_no_local_sites():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", len(y)):
            pyro.sample("y", dist.Normal(mu + torch.zeros(M), 1.0).to_event(1), obs=y)

    refused(model, "no latent site lies in plate 'groups'. Use AutoFlow")


def test_discrete_sites():
    def model(y):
        with pyro.plate("groups", len(y)):
            pyro.sample("k", dist.Bernoulli(0.5))

    refused(model, "discrete sample site 'k'")

    def with_global(y):
        pyro.sample("k", dist.Bernoulli(0.5))
        only_local(y)

    refused(with_global, "discrete sample site 'k'")


def test_another_subsampled_plate():
    def model(y):
        with pyro.plate("groups", len(y), subsample_size=B, dim=-1), pyro.plate("inner", 6, subsample_size=2, dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))

    refused(model, "site 'z' lies in plate 'groups' and in plate 'inner', which is subsampled too")

    def elsewhere(y):
        with pyro.plate("other", 6, subsample_size=2):
            pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        only_local(y)

    refused(elsewhere, "site 'z' lies in plate 'other', which is subsampled to 2 of 6")


def test_a_sequential_plate():
    def model(y):
        for i in pyro.plate("groups", len(y)):
            pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))

    refused(model, "sequential", error=NotImplementedError)


def test_supports_that_vary():
    def by_datum(y):
        with pyro.plate("groups", len(y)):
            pyro.sample("z", dist.Uniform(torch.zeros(len(y), dtype=F64), 1 + y[:, 0] ** 2))

    refused(by_datum, "support of site 'z' differs from datum to datum")

    def by_site(y):
        high = pyro.sample("high", dist.LogNormal(number(0.0), 1.0))
        with pyro.plate("groups", len(y)):
            pyro.sample("z", dist.Uniform(number(0.0), high))

    refused(by_site, "support of site 'z' depends on other latent variables")


def test_a_structure_that_changes():
    def model(y, wide=False):
        with pyro.plate("groups", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(3 if wide else 2, dtype=F64), 1.0).to_event(1))

    guide = make(model)
    guide(Y)
    for _ in range(2):
        with pytest.raises(ValueError, match="latent sites in plate 'groups' have other names, shapes"):
            guide(Y, wide=True)


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, y):
        return self.value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(N, 2, dtype=F64), r"shape \(5, C\).*plate 'groups', got shape \(12, 2\).*inputs="),
        (torch.ones(B, dtype=F64), r"got shape \(5,\)"),
        ((torch.ones(B, 2), torch.ones(B, 2)), "got tuple"),
        (torch.ones(B, 2), "encoder returns torch.float32, the local variables are torch.float64"),
    ],
)
def test_what_an_encoder_must_not_return(value, words):
    with pytest.raises(ValueError, match=words):
        fg.AutoAmortizedFlow(hierarchy, Constant(value), plate="groups")(Y)


def test_a_mended_encoder_is_used():
    features = Constant(torch.ones(N, 2, dtype=F64))
    guide = fg.AutoAmortizedFlow(hierarchy, features, plate="groups")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"shape \(5, C\)"):
            guide(Y)
    features.value = torch.ones(B, 2, dtype=F64)
    assert guide(Y)["theta"].shape == (B,)


def test_an_encoder_that_changes_its_width():
    features = Constant(torch.ones(B, 2, dtype=F64))
    guide = fg.AutoAmortizedFlow(hierarchy, features, plate="groups")
    guide(Y)
    features.value = torch.ones(B, 3, dtype=F64)
    with pytest.raises(ValueError, match="returned 3 features, and 2 when"):
        guide(Y)


def test_an_encoder_with_other_arguments():
    with pytest.raises(TypeError, match=r"could not be called with the model's arguments.*inputs="):
        fg.AutoAmortizedFlow(hierarchy, encoder(), plate="groups")(Y, torch.arange(B))


def test_options_that_make_no_sense():
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module"):
        fg.AutoAmortizedFlow(hierarchy, lambda y: y, plate="groups")
    with pytest.raises(ValueError, match="init_scale must be positive"):
        make(init_scale=0.0)
    with pytest.raises(ValueError, match="did you mean 'iaf'"):
        make(flow="iaff")
    with pytest.raises(ValueError, match="did you mean 'maf'"):
        make(global_flow="mafff")


def test_the_error_of_other_guides_leads_here():
    with pytest.raises(ValueError, match="AutoAmortizedFlow"):
        fg.AutoFlow(hierarchy, "iaf")(Y)
