"""Twenty small models with their data, for the benchmark of plain SVI.

They are the models that people try first: regressions on raw and on standardized data, hierarchies, funnels, growth
curves, counts and proportions. Data sets of the literature are written out, so that nothing must be fetched. Every
model broadcasts over batch dimensions to the left of its plate, so that it runs under ``vectorize_particles``.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["MODELS"]

MODELS: dict[str, Callable[[], None]] = {}


def model(function: Callable[[], None]) -> Callable[[], None]:
    """Enter a model into :data:`MODELS` under the function's name."""
    MODELS[function.__name__] = function
    return function


def standardized(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std()


def scalar(name: str, prior: dist.TorchDistribution) -> Tensor:
    """Draw a scalar that broadcasts with the data of a plate at the right."""
    value: Tensor = pyro.sample(name, prior)
    return value


def vector(name: str, prior: dist.TorchDistribution, size: int) -> Tensor:
    """Draw a vector as one site; its batch shape, if any, ends in the dimension of the plate, which is dropped."""
    value: Tensor = pyro.sample(name, prior.expand([size]).to_event(1))
    return value


def linear(weights: Tensor, rows: Tensor) -> Tensor:
    """Return the products of weights ``(..., [1,] K)`` with rows ``(N, K)``, ``(..., N)``."""
    if weights.dim() == 1:
        return rows @ weights
    return (weights * rows).sum(-1)


# ----------------------------------------------------------------------------------------------------- regressions

LINE_X = torch.tensor([10.0, 20, 30, 40, 50, 60, 70])
LINE_Y = torch.tensor([36.0, 64, 97, 121, 158, 181, 219])


@model
def line_raw() -> None:
    """A line through seven points, with priors as wide as the raw data."""
    intercept = scalar("intercept", dist.Normal(0.0, 100.0))
    slope = scalar("slope", dist.Normal(0.0, 100.0))
    sigma = scalar("sigma", dist.HalfNormal(100.0))
    with pyro.plate("points", 7):
        pyro.sample("y", dist.Normal(intercept + slope * LINE_X, sigma), obs=LINE_Y)


@model
def line_standardized() -> None:
    """The same line through standardized data."""
    intercept = scalar("intercept", dist.Normal(0.0, 10.0))
    slope = scalar("slope", dist.Normal(0.0, 10.0))
    sigma = scalar("sigma", dist.HalfCauchy(5.0))
    with pyro.plate("points", 7):
        mean = intercept + slope * standardized(LINE_X)
        pyro.sample("y", dist.Normal(mean, sigma), obs=standardized(LINE_Y))


#: Brownlee's stack loss: air flow, water temperature, acid; the first nine days.
STACK = torch.tensor(
    [
        [80.0, 27, 89],
        [75, 25, 90],
        [62, 24, 87],
        [62, 22, 87],
        [62, 23, 87],
        [58, 18, 80],
        [58, 18, 89],
        [50, 18, 89],
        [56, 20, 82],
    ]
)
STACK_LOSS = torch.tensor([42.0, 37, 28, 18, 18, 14, 13, 11, 12])


@model
def stack_loss() -> None:
    """Four coefficients from nine raw rows."""
    intercept = scalar("intercept", dist.Normal(0.0, 100.0))
    slopes = vector("slopes", dist.Normal(0.0, 10.0), 3)
    sigma = scalar("sigma", dist.HalfNormal(20.0))
    with pyro.plate("days", 9):
        pyro.sample("y", dist.Normal(intercept + linear(slopes, STACK), sigma), obs=STACK_LOSS)


@model
def stack_loss_robust() -> None:
    """The same regression with Student's t errors and standardized predictors."""
    intercept = scalar("intercept", dist.Normal(20.0, 20.0))
    slopes = vector("slopes", dist.Normal(0.0, 10.0), 3)
    sigma = scalar("sigma", dist.HalfNormal(20.0))
    rows = (STACK - STACK.mean(0)) / STACK.std(0)
    with pyro.plate("days", 9):
        pyro.sample("y", dist.StudentT(4.0, intercept + linear(slopes, rows), sigma), obs=STACK_LOSS)


#: The shuttle's O-rings: temperature at launch, and whether there was damage (Dalal, Fowlkes & Hoadley 1989).
TEMPERATURE = torch.tensor(
    [66.0, 70, 69, 68, 67, 72, 73, 70, 57, 63, 70, 78, 67, 53, 67, 75, 70, 81, 76, 79, 75, 76, 58]
)
DAMAGE = torch.tensor([0.0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 1])


@model
def o_rings() -> None:
    """Logistic regression on raw temperatures."""
    intercept = scalar("intercept", dist.Normal(0.0, 20.0))
    slope = scalar("slope", dist.Normal(0.0, 2.0))
    with pyro.plate("launches", 23):
        pyro.sample("damage", dist.Bernoulli(logits=intercept + slope * TEMPERATURE), obs=DAMAGE)


#: AIDS cases in Australia by quarter (Dobson 1990).
CASES = torch.tensor([1.0, 6, 16, 23, 27, 39, 31, 30, 43, 51, 63, 70, 88, 97, 91, 104, 110, 113, 149, 159])


@model
def cases() -> None:
    """Poisson regression on the logarithm of the quarter."""
    intercept = scalar("intercept", dist.Normal(0.0, 10.0))
    slope = scalar("slope", dist.Normal(0.0, 10.0))
    with pyro.plate("quarters", 20):
        rate = (intercept + slope * torch.arange(1.0, 21.0).log()).clamp(max=50.0).exp()
        pyro.sample("cases", dist.Poisson(rate), obs=CASES)


#: Insects that survived two sprays (Beall 1942).
INSECTS = torch.tensor([10.0, 7, 20, 14, 14, 12, 10, 23, 17, 20, 14, 13, 0, 1, 7, 2, 3, 1, 2, 1, 3, 0, 1, 4])


@model
def insects() -> None:
    """Negative binomial counts of two groups."""
    base = scalar("base", dist.Normal(0.0, 5.0))
    effect = scalar("effect", dist.Normal(0.0, 5.0))
    concentration = scalar("concentration", dist.LogNormal(1.0, 1.0))
    group = torch.arange(24) // 12
    with pyro.plate("plots", 24):
        logits = base + effect * group - concentration.log()
        pyro.sample("count", dist.NegativeBinomial(concentration, logits=logits), obs=INSECTS)


# ----------------------------------------------------------------------------------------------------- growth curves


@model
def oxygen_demand() -> None:
    """A saturating curve with two strongly dependent parameters (Bates & Watts 1988)."""
    time = torch.tensor([1.0, 2, 3, 4, 5, 7])
    demand = torch.tensor([8.3, 10.3, 19.0, 16.0, 15.6, 19.8])
    limit = scalar("limit", dist.HalfNormal(50.0))
    rate = scalar("rate", dist.HalfNormal(2.0))
    sigma = scalar("sigma", dist.HalfNormal(10.0))
    with pyro.plate("times", 6):
        pyro.sample("y", dist.Normal(limit * (1 - (-rate * time).exp()), sigma), obs=demand)


@model
def dugongs() -> None:
    """Length of sea cows by age, a curve with an asymptote (Ratkowsky 1983)."""
    age = [1.0, 1.5, 1.5, 1.5, 2.5, 4, 5, 5, 7, 8, 8.5, 9, 9.5, 9.5, 10, 12, 12, 13, 13, 14.5, 15.5, 15.5, 16.5, 17]
    length = [1.80, 1.85, 1.87, 1.77, 2.02, 2.27, 2.15, 2.26, 2.47, 2.19, 2.26, 2.40, 2.39, 2.41, 2.50, 2.32, 2.32]
    length += [2.43, 2.47, 2.56, 2.65, 2.47, 2.64, 2.56]
    limit = scalar("limit", dist.HalfNormal(10.0))
    gap = scalar("gap", dist.HalfNormal(10.0))
    decay = scalar("decay", dist.Uniform(0.5, 1.0))
    sigma = scalar("sigma", dist.HalfNormal(1.0))
    with pyro.plate("animals", 24):
        mean = limit - gap * decay ** torch.tensor(age)
        pyro.sample("length", dist.Normal(mean, sigma), obs=torch.tensor(length))


# ------------------------------------------------------------------------------------------------------- hierarchies

EFFECTS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
ERRORS = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])


@model
def schools_centered() -> None:
    """Eight schools (Rubin 1981), whose posterior is a funnel."""
    mu = scalar("mu", dist.Normal(0.0, 5.0))
    tau = scalar("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=EFFECTS)


@model
def schools_noncentered() -> None:
    """Eight schools with standardized effects."""
    mu = scalar("mu", dist.Normal(0.0, 5.0))
    tau = scalar("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * effect, ERRORS), obs=EFFECTS)


@model
def pumps() -> None:
    """Failures of ten pumps, a hierarchy of gamma rates (Gaver & O'Muircheartaigh 1987)."""
    failures = torch.tensor([5.0, 1, 5, 14, 3, 19, 1, 1, 4, 22])
    hours = torch.tensor([94.3, 15.7, 62.9, 125.8, 5.24, 31.4, 1.05, 1.05, 2.1, 10.5])
    alpha = scalar("alpha", dist.Exponential(1.0))
    beta = scalar("beta", dist.Gamma(0.1, 1.0))
    with pyro.plate("pumps", 10):
        rate = pyro.sample("rate", dist.Gamma(alpha, beta))
        pyro.sample("failures", dist.Poisson(rate * hours), obs=failures)


@model
def hospitals() -> None:
    """Deaths in twelve hospitals, a hierarchy of logits (Spiegelhalter et al. 1996)."""
    operations = torch.tensor([47.0, 148, 119, 810, 211, 196, 148, 215, 207, 97, 256, 360])
    deaths = torch.tensor([0.0, 18, 8, 46, 8, 13, 9, 31, 14, 8, 29, 24])
    mu = scalar("mu", dist.Normal(0.0, 10.0))
    sigma = scalar("sigma", dist.HalfNormal(5.0))
    with pyro.plate("hospitals", 12):
        logit = pyro.sample("logit", dist.Normal(mu, sigma))
        pyro.sample("deaths", dist.Binomial(operations, logits=logit), obs=deaths)


@model
def plants() -> None:
    """Weights of plants under three treatments, each with its own mean (Dobson 1983)."""
    weight = torch.tensor(
        [
            [4.17, 5.58, 5.18, 6.11, 4.50, 4.61, 5.17, 4.53, 5.33, 5.14],
            [4.81, 4.17, 4.41, 3.59, 5.87, 3.83, 6.03, 4.89, 4.32, 4.69],
            [6.31, 5.12, 5.54, 5.50, 5.37, 5.29, 4.92, 6.15, 5.80, 5.26],
        ]
    ).flatten()
    mu = scalar("mu", dist.Normal(0.0, 10.0))
    tau = scalar("tau", dist.HalfNormal(5.0))
    means = pyro.sample("means", dist.Normal(mu[..., None], tau[..., None]).expand([*mu.shape, 3]).to_event(1))
    sigma = scalar("sigma", dist.HalfNormal(5.0))
    with pyro.plate("plants", 30):
        of_plant = means[..., torch.arange(30) // 10].squeeze(-2) if means.dim() > 1 else means[torch.arange(30) // 10]
        pyro.sample("weight", dist.Normal(of_plant, sigma), obs=weight)


# ------------------------------------------------------------------------------------------------------- time series

#: Annual flow of the Nile at Aswan from 1871 on.
NILE = torch.tensor([1120.0, 1160, 963, 1210, 1160, 1160, 813, 1230, 1370, 1140, 995, 935, 1110, 994, 1020])


@model
def nile() -> None:
    """A local level: a random walk observed with noise, with a scale for either."""
    walk = scalar("walk", dist.HalfNormal(1.0))
    noise = scalar("noise", dist.HalfNormal(1.0))
    steps = vector("steps", dist.Normal(0.0, 1.0), 15)
    with pyro.plate("years", 15):
        level = (walk[..., None] * steps).cumsum(-1).squeeze(-2) if steps.dim() > 1 else walk * steps.cumsum(-1)
        pyro.sample("flow", dist.Normal(level, noise), obs=standardized(NILE))


@model
def autoregression() -> None:
    """A stationary first-order autoregression of the same series."""
    series = standardized(NILE)
    coefficient = scalar("coefficient", dist.Uniform(-1.0, 1.0))
    sigma = scalar("sigma", dist.HalfNormal(1.0))
    with pyro.plate("years", 14):
        pyro.sample("flow", dist.Normal(coefficient * series[:-1], sigma), obs=series[1:])


# ------------------------------------------------------------------------------------------------------------ shapes


@model
def funnel() -> None:
    """Neal's funnel in five dimensions (Neal 2003)."""
    v = scalar("v", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(0.0, (v / 2).exp()[..., None]).expand([*v.shape, 4]).to_event(1))


@model
def banana() -> None:
    """A banana: a normal variable and another around its square (Haario et al. 1999)."""
    x = scalar("x", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(0.5 * x.square(), 0.5))


@model
def scales() -> None:
    """Ten normal variables whose scales go from 0.01 to 100."""
    pyro.sample("x", dist.Normal(1.0, torch.logspace(-2, 2, 10)).to_event(1))


@model
def shares() -> None:
    """Shares of four kinds among twelve, on the simplex."""
    p = pyro.sample("p", dist.Dirichlet(torch.full((4,), 0.5)))
    pyro.sample("counts", dist.Multinomial(12, p), obs=torch.tensor([0.0, 1, 3, 8]))
