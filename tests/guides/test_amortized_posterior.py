"""AutoAmortizedFlow finds known posteriors, follows the path gradient and draws for all data."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import init_to_value
from torch import nn
from torch.testing import assert_close

import pyro_flowguides as fg
from pyro_flowguides.flows import FLOWS
from tests.guides.hierarchies import SMALL, B, M, N, Y, hierarchy, make, number, only_local, ready, several
from tests.guides.zoo import F64


def gaussian_answer(y, tau=1.0, sigma=1.0, prior=2.0):
    """Return mean and covariance of (mu, theta): groups Normal(mu, tau), observations Normal(theta, sigma)."""
    n, m = y.shape
    precision = torch.zeros(n + 1, n + 1, dtype=F64)
    precision[0, 0] = 1 / prior**2 + n / tau**2
    precision[0, 1:] = precision[1:, 0] = -1 / tau**2
    precision[1:, 1:] = torch.eye(n) * (1 / tau**2 + m / sigma**2)
    covariance = precision.inverse()
    linear = torch.cat([number([0.0]), y.sum(1) / sigma**2])
    return covariance @ linear, covariance


def train(model, guide, *args, steps, lr, particles, batches=None, averaged=100):
    """Train with Adam; the learning rate decays to a fiftieth, and the last iterates are averaged."""
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
    """Compare with the gradient of log p - log q at the same draws, q a copy that is not differentiated."""
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
    """Make observations so noisy that the groups learn much from each other."""
    mu = pyro.sample("mu", dist.Normal(number(0.0), 2.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta[..., None] + torch.zeros(M), SIGMA).to_event(1), obs=y)


def test_the_joint_posterior_of_a_small_hierarchy():
    """With twelve groups the global variable is uncertain, and the groups are correlated through it."""
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


def test_without_condition_on_globals_their_posterior_is_too_narrow():
    """The standard deviation is then that of the mean-field posterior, tau / sqrt(N), not the marginal one."""
    guide = make(weak, path_gradient=True, condition_on_globals=False)
    train(weak, guide, Y, steps=250, lr=0.02, particles=16)
    narrow = (1 / 4 + N) ** -0.5
    assert guide.sample_all(20_000, Y)["mu"].std() == pytest.approx(narrow, rel=0.07)
    assert narrow < 0.7 * gaussian_answer(Y, sigma=SIGMA)[1][0, 0].sqrt()


@pytest.mark.slow
def test_ten_thousand_groups_subsampled_to_a_hundred():
    """All marginals agree with the exact ones within 0.1 standard deviations, in mean and in spread."""
    groups, observations, batch_size, sigma = 10_000, 4, 100, 2.0
    y = 3 + torch.randn(groups, 1) + sigma * torch.randn(groups, observations)

    def model(y, batch):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("groups", groups, subsample=batch):
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta[..., None] + torch.zeros(observations), sigma).to_event(1), obs=y[batch])

    def batches():
        """Yield all groups once per epoch, one of every stratum in each batch, for little noise from the choice."""
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

    # The means of the groups are Normal(mu, sqrt(spread)). They determine mu; mu and they determine theta.
    spread, mean = 1 + sigma**2 / observations, y.mean(1).double()
    mu_sd = (1 / 25 + groups / spread) ** -0.5
    mu_mean = mean.sum() / spread * mu_sd**2
    weight = sigma**2 / observations / spread
    theta_mean = (1 - weight) * mean + weight * mu_mean
    theta_sd = (weight + (weight * mu_sd) ** 2) ** 0.5

    ranked = mean.argsort()
    some = torch.cat([ranked[:100], ranked[50::100], ranked[-100:]])  # includes the extremes
    parts = []
    for _ in range(15):
        with torch.no_grad(), pyro.plate("draws", 2000, dim=-2):
            parts.append(guide(y, some))
    mu, theta = (torch.cat([part[name] for part in parts]).double() for name in ("mu", "theta"))
    assert abs(mu.mean() - mu_mean) < 0.1 * mu_sd
    assert abs(mu.std() / mu_sd - 1) < 0.1
    assert ((theta.mean(0) - theta_mean[some]) / theta_sd).abs().max() < 0.1
    assert (theta.std(0) / theta_sd - 1).abs().max() < 0.1


def test_sample_all_covers_data_that_the_model_subsamples():
    guide = ready(several)
    draws = guide.sample_all(7, Y)
    shapes = {"rate": (N,), "share": (N,), "simplex": (N, 3), "cholesky": (N, 3, 3), "pair": (2, N, 2)}
    shapes |= {"tau": (), "weights": (3,)}
    assert {name: tuple(value.shape[1:]) for name, value in draws.items()} == shapes
    assert {len(value) for value in draws.values()} == {7}
    assert len(draws["tau"].unique()) == 7
    assert ready(only_local).sample_all(1, Y)["theta"].shape == (1, N, 2)


def test_sample_all_of_more_rows_than_one_pass_computes():
    many = 100_000
    y = torch.randn(many, M, dtype=F64)
    draws = ready().sample_all(7, y)
    assert draws["theta"].shape == (7, many)
    assert len(draws["mu"].unique()) == 7
    assert len(draws["theta"][:, 0].unique()) == 7


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


def test_initial_location_and_scale():
    guide = make(several, init_loc_fn=init_to_value(values={"tau": number(0.7), "rate": number(2.5).expand(B)}))
    guide.setup(Y)
    median = guide.median(Y)
    assert_close(median["tau"], number(0.7), rtol=0, atol=0.03)
    assert_close(median["rate"], number(2.5).expand(N), rtol=0, atol=0.1)
    precise = make(several, init_scale=1e-3)
    assert precise.sample_all(500, Y)["rate"].log().std(0).max() < 2e-3
