"""Sites of every kind, and every composition of models and guides that Pyro's autoguides serve."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiscreteParallel, AutoGuideList, AutoNormal, init_to_mean
from pyro.nn import PyroModule, PyroSample
from torch.testing import assert_close

import pyro_flowguides as fg
from tests.guides.zoo import KINDS, fit, make_guide, number, shake, train, values, wide

SITES = {
    "real": dist.Normal(number(1.0), 2.0),
    "real vector": dist.MultivariateNormal(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)),
    "positive": dist.Gamma(number(2.0), number(3.0)),
    "interval": dist.Uniform(number(-2.0), number(3.0)),
    "unit interval": dist.Beta(number(2.0), number(2.0)),
    "half line": dist.Pareto(number(1.5), number(3.0)),
    "simplex": dist.Dirichlet(torch.ones(3, dtype=torch.float64)),
    "ordered": dist.TransformedDistribution(
        dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1), [dist.transforms.OrderedTransform()]
    ),
    "LKJ Cholesky factor": dist.LKJCholesky(3, number(2.0)),
    "LKJ correlation": dist.LKJ(3, number(2.0)),
    "improper real": dist.ImproperUniform(constraints.real, (), ()),
    "improper positive": dist.ImproperUniform(constraints.positive, (2,), ()),
    "improper ordered": dist.ImproperUniform(constraints.ordered_vector, (), (3,)),
    "improper simplex": dist.ImproperUniform(constraints.simplex, (), (3,)),
}


@pytest.mark.parametrize("site", SITES)
def test_draws_lie_in_the_support_and_carry_their_density(site):
    prior = SITES[site]

    def model():
        pyro.sample("x", prior)

    guide = make_guide("iaf", model)
    guide.setup()
    shake(guide)
    trace = poutine.trace(guide).get_trace()
    value, latent = trace.nodes["x"]["value"], trace.nodes["_AutoFlow_latent"]["value"]
    assert value.shape == prior.shape()
    assert prior.support.check(value).all()
    # The density of the site is that of the latent vector divided by the Jacobian of the map to the support.
    to_support = torch.distributions.biject_to(prior.support)
    free = latent.reshape(to_support.inverse_shape(prior.shape()))
    expected = -to_support.log_abs_det_jacobian(free, value).sum()
    assert_close(trace.log_prob_sum(lambda name, _: name == "x"), expected)
    assert_close(value, to_support(free))


def test_all_sites_at_once_train_under_every_guide(make):
    def model():
        for name in ("real vector", "interval", "simplex", "ordered", "LKJ Cholesky factor", "improper simplex"):
            value = pyro.sample(name, SITES[name])
            pyro.factor(f"{name} factor", -0.5 * value.square().sum())

    guide = make(model)
    losses = train(model, guide, 6, elbo=Trace_ELBO(num_particles=3))
    assert all(map(math.isfinite, losses))
    assert all(torch.isfinite(value).all() for value in values(guide).values())


@pytest.mark.parametrize("init_loc_fn", ["feasible", "mean", "median", "sample", "uniform"])
def test_initial_location(make, init_loc_fn):
    chosen = {}

    def remember(site):
        initialize = getattr(pyro.infer.autoguide, f"init_to_{init_loc_fn}")
        chosen[site["name"]] = initialize(site)
        return chosen[site["name"]]

    def model():
        pyro.sample("x", dist.Normal(number(100.0), 3.0))
        pyro.sample("s", dist.Gamma(number(50.0), number(0.5)))

    guide = make(model, init_loc_fn=remember, init_scale=1e-3)
    median = guide.median()
    assert_close(median["x"], chosen["x"].double(), atol=1e-2, rtol=0)
    assert_close(median["s"], chosen["s"].double(), rtol=1e-2, atol=0)


def test_initial_scale_is_the_standard_deviation_of_every_coordinate(make):
    guide = make(wide(4), init_scale=0.02)
    guide.setup()
    draws = guide.get_posterior().sample((4000,))
    assert_close(draws.std(0), torch.full((4,), 0.02), rtol=0.1, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_one_latent_dimension(kind):
    """In one dimension every guide draws, scores, inverts, trains and has quantiles."""
    posterior_mean, posterior_sd = 1.0 * 4 / 5, (4 / 5) ** 0.5

    def model():
        x = pyro.sample("x", dist.Normal(number(0.0), 2.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=number(1.0))

    guide = make_guide(kind, model, init_scale=1.0)
    fit(model, guide, 80, particles=64)  # with 8, the noise of training comes near the tolerance
    low, median, high = guide.quantiles([0.1587, 0.5, 0.8413])["x"]
    assert_close(median.item(), posterior_mean, atol=0.15, rtol=0)
    assert_close((high - low).item() / 2, posterior_sd, atol=0.15, rtol=0)
    draws = guide.get_posterior().sample((5,))
    assert_close(guide.get_transform().inverse_and_ladj(draws)[0].shape, (5, 1))


def test_subsampled_observations(make):
    """A plate of observations may be subsampled; one guide serves batches of several sizes."""
    data = torch.randn(20) + 3.0

    def model(batch_size):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(data), subsample_size=batch_size):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=pyro.subsample(data, event_dim=0))

    guide = make(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(num_particles=4, vectorize_particles=True))
    for batch_size in [5, 10, 20, None] * 10:
        svi.step(batch_size)
    assert guide.latent_dim == 1
    assert abs(guide.median(None)["loc"] - data.mean()) < 0.3


def test_local_latents_in_nested_plates(make):
    def model():
        with pyro.plate("rows", 2, dim=-2):
            row = pyro.sample("row", dist.Normal(0.0, 1.0))
            with pyro.plate("columns", 3, dim=-1):
                cell = pyro.sample("cell", dist.Normal(row, 1.0))
        assert row.shape[-2:] == (2, 1)
        assert cell.shape[-2:] == (2, 3)

    guide = make(model)
    loss = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=2)
    assert torch.isfinite(torch.tensor(loss.loss(model, guide)))
    with pyro.plate("particles", 5, dim=-3):
        draws = guide()
    assert draws["row"].shape == (5, 2, 1)
    assert draws["cell"].shape == (5, 2, 3)


# -- compositions of models --------------------------------------------------------------------------------------------


def test_nested_models_and_pyro_modules(make):
    class Linear(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[torch.nn.Linear](2, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))

        def forward(self, x):
            return self.linear(x).squeeze(-1)

    class Outer(PyroModule):
        def __init__(self):
            super().__init__()
            self.inner = Linear()

        def forward(self, x, y=None):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            mean = self.inner(x)
            with pyro.plate("data", len(x)):
                return pyro.sample("y", dist.Normal(mean, scale), obs=y)

    model = Outer()
    guide = make(model)
    bias = model.inner.linear.bias.detach().clone()
    train(model, guide, 3, torch.randn(5, 2), torch.randn(5))
    assert {name: value.shape for name, value in guide(torch.randn(5, 2), torch.randn(5)).items()} == {
        "inner.linear.weight": (1, 2),
        "scale": (),
    }
    assert not torch.equal(model.inner.linear.bias, bias), "the model's own parameters train beside the guide's"


def test_blocked_model_leaves_the_hidden_site_alone(make):
    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("c", dist.Bernoulli(0.5))

    guide = make(poutine.block(model, expose=["b"]))
    assert guide().keys() == {"b"}
    assert guide.latent_dim == 2


def mixture(data):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(data)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(locs[..., assignment], scale), obs=data)


MIXTURE = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])


def test_guide_list_of_four_kinds_under_enumeration(make):
    """A flow, a Delta, a Normal and an enumerated discrete site train in one guide."""
    guide = AutoGuideList(mixture)
    guide.append(make(poutine.block(mixture, expose=["locs"])))
    guide.append(AutoDelta(poutine.block(mixture, expose=["weights"])))
    guide.append(AutoNormal(poutine.block(mixture, expose=["scale"])))
    guide.append(AutoDiscreteParallel(poutine.block(mixture, expose=["assignment"])))
    guide(MIXTURE)
    start = values(guide)
    train(mixture, guide, 3, MIXTURE, elbo=TraceEnum_ELBO(max_plate_nesting=1))
    moved = [name for name, value in values(guide).items() if not torch.equal(value, start[name])]
    assert {name.split(".")[0] for name in moved} == {"0", "1", "2", "3"}
    assert guide(MIXTURE).keys() == {"locs", "weights", "scale", "assignment"}


def test_guide_list_of_a_flow_over_all_but_the_discrete_site(make):
    guide = AutoGuideList(mixture)
    guide.append(make(poutine.block(mixture, hide=["assignment"])))
    guide.append(AutoDiscreteParallel(poutine.block(mixture, expose=["assignment"])))
    losses = train(mixture, guide, 8, MIXTURE, lr=0.03, elbo=TraceEnum_ELBO(max_plate_nesting=1))
    assert sum(losses[-3:]) < sum(losses[:3])


def test_guide_list_gives_medians_and_quantiles(make):
    def model():
        pyro.sample("x", dist.Normal(2.0, 1.0))
        with pyro.plate("pair", 2):
            pyro.sample("s", dist.LogNormal(0.0, 1.0))

    start = {"init_loc_fn": init_to_mean, "init_scale": 1e-4}
    guide = AutoGuideList(model)
    guide.append(make(poutine.block(model, expose=["s"]), **start))
    guide.append(AutoNormal(poutine.block(model, expose=["x"]), **start))
    guide()
    mean = torch.tensor(0.5).exp()
    assert_close(guide.median(), {"s": mean.expand(2), "x": torch.tensor(2.0)}, atol=5e-3, rtol=0)
    assert {name: value.shape for name, value in guide.quantiles([0.1, 0.9]).items()} == {"s": (2, 2), "x": (2,)}


def test_two_flows_in_one_list_are_independent_of_each_other(make):
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(torch.ones(2), 1.0).to_event(1))

    guide, start = AutoGuideList(model), {"init_loc_fn": init_to_mean, "init_scale": 1e-4}
    guide.append(make(poutine.block(model, expose=["x"]), **start))
    guide.append(make(poutine.block(model, expose=["y"]), **start))
    train(model, guide, 1, lr=0.0)
    assert_close(guide.median(), {"x": torch.zeros(2), "y": torch.ones(2)}, atol=5e-3, rtol=0)


# -- the affine part and the builder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [4, 301], ids=["full rank", "diagonal"])
def test_set_affine(dim):
    """A warm start makes the guide a Gaussian, full-rank up to 300 dimensions."""
    guide = make_guide("nice", wide(dim), depth=1)
    guide.setup()
    with torch.no_grad():
        guide.get_transform().parts[1].logit.fill_(-1e4)
    generator = torch.Generator().manual_seed(0)
    loc = torch.randn(dim, generator=generator)
    scale = torch.randn(dim, dim, generator=generator).tril(-1) / dim + 0.5 * torch.eye(dim)
    guide.set_affine(loc, scale)
    if dim == 301:
        scale = scale.diagonal().diag()
    x = torch.randn(6, dim, generator=generator)
    expected = dist.MultivariateNormal(loc, scale_tril=scale).log_prob(x)
    assert_close(guide.get_posterior().log_prob(x), expected, rtol=1e-4, atol=1e-3)


def test_a_builder_in_place_of_a_name():
    guide = fg.AutoFlow(wide(3), fg.flows.iaf, depth=1)
    guide.setup()
    assert len(guide.get_transform().parts[0].parts) == 1
