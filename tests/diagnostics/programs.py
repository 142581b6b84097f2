"""Models with known posteriors, and guides for them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

DATA = torch.tensor([1.2, -0.3, 0.8, 2.1, 0.4])
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def gaussian_model(data: Tensor) -> None:
    """z ~ N(0, 2), x_i ~ N(z, 1)."""
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(data)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=data)


def gaussian_posterior(data: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of z given the data."""
    precision = 1 / 4 + len(data)
    return float(data.sum()) / precision, precision**-0.5


def gaussian_evidence(data: Tensor) -> float:
    """log p(x)."""
    covariance = torch.eye(len(data), dtype=torch.float64) + 4.0
    return float(dist.MultivariateNormal(torch.zeros(len(data)).double(), covariance).log_prob(data.double()))


def gaussian_guide(shift: float = 0.0, scale: float = 1.0) -> Callable[[Tensor], None]:
    """The posterior of `gaussian_model`, shifted by some standard deviations and scaled."""

    def guide(data: Tensor) -> None:
        mean, sd = gaussian_posterior(data)
        pyro.sample("z", dist.Normal(mean + shift * sd, scale * sd))

    return guide


def schools_model() -> None:
    """Eight schools, centered, with a log-normal scale."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(1.0, 0.5))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=EFFECTS)


def schools_guide() -> None:
    """A hand-written guide with several sites, which depend on each other."""
    loc = pyro.param("loc", torch.tensor(4.0))
    scale = pyro.param("scale", torch.tensor(3.0), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(loc, scale))
    pyro.sample("tau", dist.LogNormal(1.0, 0.5))
    with pyro.plate("school", 8):
        pyro.sample("theta", dist.Normal(mu, 3.0))


def mixture_model() -> None:
    """Two modes, at -4 and 4, equally heavy; three more coordinates are standard normal."""
    modes = dist.Normal(torch.tensor([-4.0, 4.0]), 1.0)
    pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), modes))
    pyro.sample("rest", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def mixture_guide(loc: float) -> Callable[[], None]:
    """One of the modes of `mixture_model`, exactly."""

    def guide() -> None:
        pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("rest", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    return guide


def clusters_model(data: Tensor) -> None:
    """A mixture whose assignments are to be summed out."""
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(data)):
        cluster = pyro.sample("cluster", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc + 2.0 * cluster, 1.0), obs=data)


def clusters_log_prob(loc: Tensor, data: Tensor) -> Tensor:
    """log p(x, loc) of `clusters_model`, (S,)."""
    first = math.log(0.3) + dist.Normal(loc[:, None], 1.0).log_prob(data)
    second = math.log(0.7) + dist.Normal(loc[:, None] + 2.0, 1.0).log_prob(data)
    return torch.logaddexp(first, second).sum(-1) + dist.Normal(0.0, 3.0).log_prob(loc)
