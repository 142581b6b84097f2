"""Models for tests of recording and compiling."""

import pyro
import pyro.distributions as dist
import torch


def schools(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


DATA = (torch.tensor([15.0, 10.0, 16.0]).double(), torch.tensor([28.0, 8.0, -3.0]).double())


def correlated(data):
    """A precision matrix that half of the draws make indefinite."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    precision = torch.eye(2) + slope[..., None, None] * (1 - torch.eye(2))
    with pyro.plate("rows", len(data)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), precision_matrix=precision), obs=data)
