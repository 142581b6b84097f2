"""Hierarchical models with a plate of local variables, and amortized guides for them."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_flowguides as fg
from tests.guides.zoo import F64, shake

N, B, M = 12, 5, 3
SMALL = {"depth": 1, "hidden_dims": [8], "global_options": {"depth": 1, "hidden_dims": [8]}}
Y = torch.randn(N, M, dtype=F64, generator=torch.Generator().manual_seed(2)) + 1


def number(value):
    return torch.tensor(value, dtype=F64)


def encoder(dtype=F64, width=M):
    return nn.Sequential(nn.Linear(width, 6), nn.ELU()).to(dtype)


def hierarchy(y, batch=None, size=B):
    """Take all data and subsample them, at random or to the indices passed."""
    mu = pyro.sample("mu", dist.Normal(number(0.0), 2.0))
    with pyro.plate("groups", len(y), subsample_size=None if batch is not None else size, subsample=batch) as rows:
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta[..., None] + torch.zeros(M), 1.0).to_event(1), obs=y[rows])


def everything(y):
    hierarchy(y, size=None)


def minibatch(y, indices):
    """Take the data of a minibatch only."""
    mu = pyro.sample("mu", dist.Normal(number(0.0), 2.0))
    with pyro.plate("groups", N, subsample=indices):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta[..., None] + torch.zeros(M), 1.0).to_event(1), obs=y)


def only_y(indices, y, *_, **__):
    return y[indices] if len(y) != len(indices) else y


def several(y):
    """Two global sites and five local ones in two plates, constrained, of many shapes."""
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
    """Build a guide and move its parameters away from their start."""
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
    """List the parameters that training has not moved, except weights of a conditioner that reads no input."""
    unread = "conditioner.weights.0"
    return [
        name
        for name, p in guide.named_parameters()
        if p.numel() and torch.equal(p, before[name]) and not (name.endswith(unread) and p.shape[1] == 1)
    ]
