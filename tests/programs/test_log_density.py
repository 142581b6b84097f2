"""The log density of a model for a batch of particles, against Pyro's own traces, one particle after the other."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal, init_to_feasible
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch.distributions import biject_to
from torch.testing import assert_close

import pyro_flowguides as fg
from pyro_flowguides.inference.density_objective import DensityObjective, make_objective
from pyro_flowguides.inference.objective import StepOptions, TraceObjective
from pyro_flowguides.programs.batched_run import NotVectorizedError, RunMode
from pyro_flowguides.programs.program import Program


@pytest.fixture(autouse=True)
def _double_precision(_fresh_state):
    torch.set_default_dtype(torch.float64)


def seeded(function):
    """Runs that subsample the same rows every time."""

    def run():
        torch.manual_seed(0)
        return function()

    return run


def constrained():
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(3)))
    corr = pyro.sample("corr", dist.LKJCholesky(3, 2.0))
    low = pyro.sample("low", dist.Uniform(-1.0, 2.0))
    loc = (corr @ weight[..., None]).squeeze(-1)
    pyro.sample("y", dist.Normal(loc + low.unsqueeze(-1), scale.unsqueeze(-1)).to_event(1), obs=torch.arange(3.0))


def nested():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 2, dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu, 2.0))
        with pyro.plate("member", 3, dim=-1):
            eta = pyro.sample("eta", dist.Gamma(2.0, torch.ones(2, 3)))
            pyro.sample("y", dist.Normal(theta, eta), obs=torch.arange(6.0).reshape(2, 3))


def separate_plates():
    with pyro.plate("rows", 4):
        a = pyro.sample("a", dist.Normal(torch.zeros(4), 1.0).expand([4]))
    with pyro.plate("other", 2, dim=-3):
        b = pyro.sample("b", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
        pyro.sample("y", dist.Normal(b.sum(-1), 1.0), obs=torch.ones(2, 1, 1))
    pyro.factor("sum", -a.square().sum(-1, keepdim=True))


DATA = torch.linspace(-1.0, 3.0, 10, dtype=torch.float64)


def minibatch():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=4) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=DATA[index])


def masked():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10), poutine.mask(mask=DATA > 0), poutine.scale(scale=0.3):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=DATA**9)
    pyro.sample("ignored", dist.Normal(mu, 1.0).mask(False), obs=torch.tensor(1.0))
    pyro.deterministic("twice", 2 * mu)
    pyro.deterministic("constant", torch.ones(2))


def missing():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=DATA, obs_mask=DATA > 0)


MODELS = [constrained, nested, separate_plates, minibatch, masked, missing]


def points(guide, count=5):
    return torch.randn(count, guide.latent_dim, generator=torch.Generator().manual_seed(1))


def by_trace(model, guide, z):
    """log p(x, θ(z)) + log|dθ/dz| of one latent vector, from a trace of the model."""
    values, ladj = {}, 0.0
    for site, unconstrained in guide._unpack_latent(z):
        transform = biject_to(site["fn"].support)
        values[site["name"]] = transform(unconstrained)
        ladj = ladj + transform.log_abs_det_jacobian(unconstrained, values[site["name"]]).sum()
    trace = poutine.trace(poutine.condition(model, data=values)).get_trace()
    if "y_unobserved" in values:  # values that the data stand for keep the density of their prior
        ladj = ladj + trace.nodes["y_unobserved"]["fn"].log_prob(values["y_unobserved"])[DATA > 0].sum()
    return trace.log_prob_sum() + ladj


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_is_the_traces_log_density_with_jacobians(model):
    model = seeded(model)
    guide = fg.AutoFlow(model, "planar", depth=1)
    guide()
    density = Program.inspect(model, guide).log_density
    z = points(guide)
    density.check(z)
    expected = torch.stack([by_trace(model, guide, row) for row in z])
    assert len(set(expected.tolist())) == len(z)
    assert_close(density(z), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_the_cheap_route_is_taken(model):
    """Subsampling too: the check compares runs over the same rows."""
    guide = fg.AutoFlow(model, "planar", depth=1)
    guide()
    objective = make_objective(Program.inspect(model, guide))
    assert isinstance(objective, DensityObjective)
    assert objective.route.kind == "batched"


def test_minibatches_are_scaled_to_the_whole():
    """The mean over minibatches is the density of all the data."""
    guide = fg.AutoFlow(minibatch, "planar", depth=1)
    guide()
    density, z = Program.inspect(minibatch, guide).log_density, torch.tensor([[0.4]])
    draws = torch.cat([density(z) for _ in range(600)])
    whole = dist.Normal(0.0, 1.0).log_prob(z).sum() + dist.Normal(0.4, 1.0).log_prob(DATA).sum()
    assert abs(draws.mean() - whole) < 4 * draws.std() / 600**0.5
    assert draws.std() > 1


def test_gradients_are_those_of_the_trace():
    guide = fg.AutoFlow(nested, "planar", depth=1)
    guide()
    z = points(guide).requires_grad_()
    found = torch.autograd.grad(Program.inspect(nested, guide).log_density(z).sum(), z)[0]
    expected = torch.autograd.grad(sum(by_trace(nested, guide, row) for row in z), z)[0]
    assert_close(found, expected)


# -- sites that the guide does not have --------------------------------------------------------------------------------


def mixture():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)))
    pyro.sample("y", dist.Normal(x + 3 * k, 1.0), obs=torch.tensor(2.0))


# x + noise ~ N(0, 2), shifted by 3 in 3 of 10 cases.
MIXTURE_EVIDENCE = (
    0.7 * dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(2.0)).exp()
    + 0.3 * dist.Normal(3.0, 2**0.5).log_prob(torch.tensor(2.0)).exp()
)


def test_a_latent_site_that_nobody_draws_is_refused():
    guide = fg.AutoFlow(poutine.block(mixture, hide=["k"]), "planar", depth=1)
    guide()
    with pytest.raises(ValueError, match=r"'k' is latent in the model and not in the guide.*'enumerate': 'parallel'"):
        make_objective(Program.inspect(mixture, guide))
    with pytest.raises(ValueError, match="'k' is latent in the model and not in the guide"):
        Program.inspect(mixture, guide).log_density(torch.zeros(2, 1))
    with pytest.raises(ValueError, match="'k' is latent"):
        make_objective(Program.inspect(mixture, AutoNormal(poutine.block(mixture, hide=["k"]))))


@pytest.mark.parametrize("make", [fg.AutoPlanar, AutoNormal])
def test_enumerated_sites_are_summed_out(make):
    model = config_enumerate(mixture)
    guide = make(poutine.block(model, hide=["k"]))
    guide()
    objective = make_objective(Program.inspect(model, guide))
    assert isinstance(objective, TraceObjective)
    assert objective.route.kind == "traced"
    with torch.no_grad():
        torch.manual_seed(0)
        found = objective(StepOptions(400), torch.Generator()).elbo
        torch.manual_seed(0)
        x = torch.stack([guide()["x"] for _ in range(400)])
    # The same bound by hand: k summed out, log q from the spread of the draws, which are normal for both guides.
    y = torch.tensor(2.0)
    likelihood = 0.7 * dist.Normal(x, 1.0).log_prob(y).exp() + 0.3 * dist.Normal(x + 3, 1.0).log_prob(y).exp()
    log_q = dist.Normal(x.mean(), x.std()).log_prob(x)
    expected = (dist.Normal(0.0, 1.0).log_prob(x) + likelihood.log() - log_q).mean()
    assert found == pytest.approx(float(expected), abs=0.05)
    assert found < MIXTURE_EVIDENCE.log()


def test_an_enumerated_model_is_fitted_to_its_evidence():
    model = config_enumerate(mixture)
    guide = fg.AutoPlanar(poutine.block(model, hide=["k"]), depth=2)
    result = fg.fit(model, guide, steps=150, num_particles=16, lr=0.05, progress=False)
    assert "summed out" in result.route.reason
    assert result.diagnosis.log_evidence == pytest.approx(float(MIXTURE_EVIDENCE.log()), abs=0.02)
    assert result.diagnosis.gap < 0.1


# -- models that do not broadcast --------------------------------------------------------------------------------------


def whole_sum():
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=torch.tensor(1.0))


def first_index():
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x[0], 1.0), obs=torch.tensor(1.0))


def matrix_product():
    """As one writes a regression first."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", 10):
        pyro.sample("y", dist.Normal(torch.stack([DATA, DATA**2], -1) @ slope, noise), obs=DATA)


class Layer(PyroModule):
    """A prior that was expanded while distributions validated their arguments."""

    def __init__(self):
        super().__init__()
        self.layer = PyroModule[torch.nn.Linear](1, 3)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3, 1]).to_event(2))
        self.layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    def forward(self):
        mean = self.layer(DATA[:, None]).tanh().sum(-1)
        with pyro.plate("data", 10):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=DATA)


@pytest.mark.parametrize(
    "make",
    [lambda: whole_sum, lambda: first_index, lambda: matrix_product, Layer],
    ids=["whole_sum", "first_index", "matrix_product", "Layer"],
)
def test_models_for_one_particle_are_mapped_over_particles(make):
    model = make()
    guide = fg.AutoFlow(model, "planar", depth=1)
    guide()
    density, z = Program.inspect(model, guide).log_density, points(guide).requires_grad_()
    density.check(z)
    expected = torch.stack([by_trace(model, guide, row) for row in z])
    assert_close(density(z), expected, rtol=1e-10, atol=1e-10)
    assert_close(torch.autograd.grad(density(z).sum(), z), torch.autograd.grad(expected.sum(), z))
    result = fg.fit(model, guide, steps=20, progress=False)
    assert result.route.kind == "recorded"


def test_a_distribution_validates_again_after_its_density_was_taken():
    prior = dist.Normal(torch.zeros(2), 1.0, validate_args=True).expand([3, 2]).to_event(2)

    def model():
        pyro.sample("x", prior)

    guide = fg.AutoFlow(model, "planar", depth=1)
    guide()
    Program.inspect(model, guide).log_density(points(guide))
    with pytest.raises(ValueError, match="value"):
        prior.log_prob(torch.full((3, 2), torch.nan))


def branching():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("f", -x.abs() if float(x) > 0 else -2 * x.abs())


def in_numpy():
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("f", -torch.as_tensor(np.abs(x.detach().numpy()).sum()))


@pytest.mark.parametrize("model", [branching, in_numpy], ids=lambda model: model.__name__)
def test_models_that_cannot_take_a_batch_are_run_one_particle_at_a_time(model):
    guide = fg.AutoFlow(model, "planar", depth=1)
    guide()
    program = Program.inspect(model, guide)
    with pytest.raises(NotVectorizedError, match=r"under a plate of draws, .*; mapped over the draws, "):
        program.log_density.check(points(guide, 3))
    assert program.mode is RunMode.SINGLE
    objective = make_objective(program)
    assert isinstance(objective, TraceObjective)
    assert objective.route.kind == "sequential"


@pytest.mark.parametrize(
    "make", [lambda model: fg.AutoFlow(model, "planar", depth=1, init_loc_fn=init_to_feasible), AutoNormal]
)
def test_their_bound_is_right(make):
    """A sum over all particles runs without an error under a plate of them, and is wrong."""
    guide = make(whole_sum)
    guide()
    objective = make_objective(Program.inspect(whole_sum, guide))
    assert isinstance(objective, DensityObjective) or objective.route.kind == "sequential"
    with torch.no_grad():
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        found = torch.tensor([objective(StepOptions(4), generator).elbo for _ in range(60)])
    # Both guides start at N(0, 0.01 I): E[log p - log q] in closed form.
    variance = 0.01
    entropy = 3 * 0.5 * (torch.tensor(2 * torch.pi * variance).log() + 1)
    prior = 3 * (dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0)) - variance / 2)
    likelihood = dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.0)) - 3 * variance / 2
    assert found.mean() == pytest.approx(float(entropy + prior + likelihood), abs=4 * float(found.std()) / 60**0.5)


def test_a_matrix_that_cannot_be_factorized_costs_one_particle_only():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        zero = torch.zeros_like(x[..., 0])
        covariance = torch.stack([torch.stack([x[..., 0], zero], -1), torch.stack([zero, zero + 1], -1)], -2)
        pyro.sample("y", dist.MultivariateNormal(x, covariance), obs=torch.ones(2))

    guide = fg.AutoFlow(model, "planar", depth=1, init_loc_fn=lambda site: torch.ones(2))
    guide()
    density = Program.inspect(model, guide).log_density
    z = torch.tensor([[1.0, 0.3], [-1.0, 0.3], [2.0, 0.1], [0.5, 0.0]])
    found = density(z)
    assert found.isnan().tolist() == [False, True, False, False]
    good = torch.tensor([0, 2, 3])
    assert_close(found[good], density(z[good]))


# -- parameters of the model -------------------------------------------------------------------------------------------


def with_parameter():
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    x = pyro.sample("x", dist.Normal(loc, 1.0))
    with pyro.plate("data", 10):
        pyro.sample("y", dist.Normal(x, scale), obs=DATA)


class WithModule(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.tensor(0.0))
        self.scale = PyroParam(torch.tensor(1.0), dist.constraints.positive)
        self.x = PyroSample(lambda module: dist.Normal(module.loc, 1.0))

    def forward(self):
        x = self.x
        with pyro.plate("data", 10):
            pyro.sample("y", dist.Normal(x, self.scale), obs=DATA)


@pytest.mark.parametrize("make", [lambda: with_parameter, WithModule], ids=["param", "PyroModule"])
def test_parameters_of_the_model_are_trained_to_the_largest_evidence(make):
    """Maximum likelihood: the prior's location goes to the mean of the data."""
    model = make()
    guide = fg.AutoFlow(model, "planar", depth=1)
    result = fg.fit(model, guide, steps=200, num_particles=8, lr=0.1, progress=False)
    assert result.route.kind == "recorded"
    loc, scale = pyro.param("loc").detach(), pyro.param("scale").detach()
    assert float(loc) == pytest.approx(float(DATA.mean()), abs=0.05)
    # The evidence is N(mean | loc, 1 + s²/n) times a term in s alone: at loc = mean, maximize over s numerically.
    sds = torch.linspace(0.8, 2.0, 1201)
    residual = (DATA - DATA.mean()).square().sum()
    evidence = -0.5 * (1 + sds**2 / 10).log() - 9 * sds.log() - residual / (2 * sds**2)
    assert float(scale) == pytest.approx(float(sds[evidence.argmax()]), abs=0.05)
