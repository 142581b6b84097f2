"""The guides and the models under test.

``KINDS`` are all registered flows and their variants, so that a newly registered flow is tested without being named.
"""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO

import pyro_flowguides as fg
from tests.flow_variants import find_variants

F64 = torch.float64
SMALL = {"depth": 2, "hidden_dims": [8]}
VARIANTS = find_variants()
KINDS = [*fg.flows.FLOWS, *VARIANTS]


def make_guide(kind, model, **options):
    flow, extra = VARIANTS.get(kind, (kind, {}))
    return fg.AutoFlow(model, flow, **{**SMALL, **extra, **options})


def shake(guide, size=0.3):
    """Move all parameters away from their start, so that a wrong formula shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in guide.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=F64)
            parameter.add_(size * noise.to(parameter))
    return guide


def train(model, guide, steps, *args, lr=0.01, elbo=None, **kwargs):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), elbo or Trace_ELBO())
    return [svi.step(*args, **kwargs) for _ in range(steps)]


def fit(model, guide, steps, lr=0.05, particles=8):
    """Fit by plain SVI; the learning rate decays along half a cosine."""
    optimizer = pyro.optim.CosineAnnealingLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": lr, "betas": (0.9, 0.99)}, "T_max": steps}
    )
    loss = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, optimizer, loss)
    for _ in range(steps):
        svi.step()
        optimizer.step()
    return guide


def values(module):
    """Copy the parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def same(one, other):
    """Tell whether two dictionaries of tensors are equal."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def draw(guide, *args, seed=7):
    """Draw once under this seed, after a first draw that sets the guide up if necessary."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        guide(*args)
        torch.manual_seed(seed)
        return guide(*args)


# -- models ------------------------------------------------------------------------------------------------------------


def number(value):
    return torch.tensor(value, dtype=F64)


SCHOOLS = torch.tensor([2.8, 0.8, -0.3], dtype=F64)


def schools(y):
    """A model with five latent dimensions, some constrained, some local."""
    mu = pyro.sample("mu", dist.Normal(number(0.0), 2.0))
    tau = pyro.sample("tau", dist.HalfCauchy(number(2.0)))
    with pyro.plate("schools", 3):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        return pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def schools_log_density(z, y):
    """Compute log p(y, z) of :func:`schools` at unconstrained z ``(..., 5)`` by hand."""
    mu, log_tau, theta = z[..., 0], z[..., 1], z[..., 2:]
    tau = log_tau.exp()

    def normal(x, loc, scale):
        return -0.5 * ((x - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)

    one = torch.ones((), dtype=F64)
    prior = normal(mu, 0.0, 2 * one) + math.log(2 / (math.pi * 2)) - torch.log1p((tau / 2) ** 2) + log_tau
    return prior + (normal(theta, mu[..., None], tau[..., None]) + normal(y, theta, one)).sum(-1)


def regression(x, y=None):
    """Regress y on x; without ``y``, predict it."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(slope * x, scale), obs=y)


def regression_data(n=6):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, generator=generator), torch.randn(n, generator=generator)


def without_arguments():
    """A model with three latent dimensions in float32 and no arguments."""
    x = pyro.sample("x", dist.Normal(1.0, 2.0))
    with pyro.plate("pair", 2):
        pyro.sample("s", dist.LogNormal(x, 1.0))


def wide(dim):
    """Return a model with ``dim`` latent dimensions and no arguments."""

    def model():
        return pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1))

    return model
