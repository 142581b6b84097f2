"""The posteriors of posteriordb_models.py as NumPyro models, and fits with NumPyro's guides.

    weigh = fit(posterior, "AutoIAFNormal", {}, seed=0, steps=2000, num_particles=32, lr=1e-2)
    weighted = weigh(4000)                                       # draws with their weights, for our diagnostics

Every model has the sites, supports and log joint density of its Pyro counterpart, constants included; the tests compare
them. Importing this file sets JAX to double precision. NumPyro (Phan, Pradhan & Jankowiak 2019, arXiv:1912.11554) comes
with the extra ``benchmarks``.

Compilation takes nearly all of the time, so this file uses what compiles fastest: sequential scans instead of
associative ones, and one compiled call for the start of SVI instead of hundreds of single operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import torch
from jax import Array, lax, random
from jax.nn import logsumexp
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO, autoguide, init_to_feasible
from numpyro.infer.util import log_density
from posteriordb_models import Posterior
from torch import Tensor

from pyro_flowguides.diagnostics.weights import WeightedDraws, log_weight

numpyro.enable_x64()

#: Draws that are weighted at once.
CHUNK = 1000

# ---------------------------------------------------------------------------------------------------------- models


def flat(support: constraints.Constraint, *event_shape: int) -> dist.ImproperUniform:
    return dist.ImproperUniform(support, (), event_shape)


def restricted(name: str, base: dist.Distribution, support: constraints.Constraint) -> Array:
    """Sample a site with the density of ``base`` on ``support``, unnormalized."""
    value = numpyro.sample(name, flat(support, *base.event_shape))
    numpyro.factor(f"{name}_density", base.log_prob(value))
    return value


def eight_schools_centered(y: Array, sigma: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(y: Array, sigma: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        theta_trans = numpyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * theta_trans, sigma), obs=y)


def ar_k(y: Array, K: int) -> None:
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([K]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    lags = jnp.stack([y[K - lag : len(y) - lag] for lag in range(1, K + 1)], -1)
    with numpyro.plate("time", len(lags)):
        numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y[K:])


def garch11(y: Array, sigma1: float) -> None:
    mu = numpyro.sample("mu", flat(constraints.real))
    alpha0 = numpyro.sample("alpha0", flat(constraints.positive))
    alpha1, beta1, _ = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))
    shocks = alpha0 + alpha1 * (y[:-1] - mu) ** 2
    variance = geometric_filter(jnp.concatenate([jnp.array([sigma1**2]), shocks]), beta1)
    with numpyro.plate("time", len(y)):
        numpyro.sample("y", dist.Normal(mu, jnp.sqrt(variance)), obs=y)


def geometric_filter(x: Array, decay: Array) -> Array:
    """h[t] = x[t] + decay h[t-1]."""

    def step(h: Array, x: Array) -> tuple[Array, Array]:
        h = x + decay * h
        return h, h

    return lax.scan(step, jnp.zeros(()), x)[1]


def gp_regr(x: Array, y: Array) -> None:
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    kernel = alpha**2 * jnp.exp(-0.5 * ((x - x[:, None]) / rho) ** 2)
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros_like(x), kernel + sigma * jnp.eye(len(x))), obs=y)


def hmm_example(y: Array) -> None:
    theta1 = numpyro.sample("theta1", dist.Dirichlet(jnp.ones(2)))
    theta2 = numpyro.sample("theta2", dist.Dirichlet(jnp.ones(2)))
    means = dist.Normal(jnp.array([3.0, 10.0]), 1.0).to_event(1)
    mu = restricted("mu", means, constraints.positive_ordered_vector)
    emissions = dist.Normal(mu, 1.0).log_prob(y[:, None])
    transitions = jnp.log(jnp.stack([theta1, theta2]))

    def step(forward: Array, emission: Array) -> tuple[Array, None]:
        return logsumexp(forward[:, None] + transitions, 0) + emission, None

    numpyro.factor("y", logsumexp(lax.scan(step, emissions[0] - jnp.log(2.0), emissions[1:])[0]))


def low_dim_gauss_mix(y: Array) -> None:
    means = dist.Normal(0.0, 2.0).expand([2]).to_event(1)
    mu = restricted("mu", means, constraints.ordered_vector)
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    components = dist.Categorical(probs=jnp.stack([theta, 1 - theta]))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.MixtureSameFamily(components, dist.Normal(mu, sigma)), obs=y)


def regression(predictors: list[Array], y: Array, sigma_prior: dist.Distribution) -> None:
    design = jnp.stack([jnp.ones_like(y), *predictors], -1)
    beta = numpyro.sample("beta", flat(constraints.real_vector, design.shape[-1]))
    sigma = numpyro.sample("sigma", sigma_prior)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(design @ beta, sigma), obs=y)


def kidscore_interaction(kid_score: Array, mom_hs: Array, mom_iq: Array) -> None:
    regression([mom_hs, mom_iq, mom_hs * mom_iq], kid_score, dist.HalfCauchy(2.5))


def logmesquite_logvash(
    weight: Array, diam1: Array, diam2: Array, canopy_height: Array, total_height: Array, group: Array
) -> None:
    area, shape = diam1 * diam2, diam1 / diam2
    logs = [jnp.log(x) for x in (area * canopy_height, area, shape, total_height)]
    regression([*logs, group], jnp.log(weight), flat(constraints.positive))


def nes(
    partyid7: Array, real_ideo: Array, race_adj: Array, age_discrete: Array, educ1: Array, gender: Array, income: Array
) -> None:
    ages = [(age_discrete == group).astype(age_discrete.dtype) for group in (2, 3, 4)]
    regression([real_ideo, race_adj, *ages, educ1, gender, income], partyid7, flat(constraints.positive))


COUNTERPARTS = {
    model.__name__: model
    for model in (
        ar_k,
        eight_schools_centered,
        eight_schools_noncentered,
        garch11,
        gp_regr,
        hmm_example,
        kidscore_interaction,
        logmesquite_logvash,
        low_dim_gauss_mix,
        nes,
    )
}
"""The models of this file by the names of their Pyro counterparts."""


def counterpart(posterior: Posterior) -> Callable[[], None]:
    """Return the NumPyro model of a posterior, with its data."""
    data = {k: jnp.asarray(v.numpy()) if isinstance(v, Tensor) else v for k, v in posterior.data.items()}
    return partial(COUNTERPARTS[posterior.model.__name__], **data)


# ------------------------------------------------------------------------------------------------------------ fits


def fit(
    posterior: Posterior, guide: str, options: dict[str, Any], *, seed: int, steps: int, num_particles: int, lr: float
) -> Callable[[int], WeightedDraws]:
    """Train a guide of NumPyro's by plain SVI, all steps in one compiled scan, from 0 in unconstrained space.

    Args:
        posterior: the posterior.
        guide: name of the guide's class.
        options: options of that class.
        seed: seed of training and draws.
        steps, num_particles, lr: of the training.

    Returns:
        a function that takes a number and returns as many weighted draws of the trained guide.
    """
    return next(
        train_in_stretches(posterior, guide, options, seed=seed, steps=steps, num_particles=num_particles, lr=lr)
    )


def train_in_stretches(
    posterior: Posterior, guide: str, options: dict[str, Any], *, seed: int, steps: int, num_particles: int, lr: float
) -> Iterator[Callable[[int], WeightedDraws]]:
    """Train as :func:`fit` does, for another ``steps`` steps at each iteration."""
    model = counterpart(posterior)
    fitted = getattr(autoguide, guide)(model, init_loc_fn=init_to_feasible, **options)
    svi = SVI(model, fitted, numpyro.optim.Adam(lr), Trace_ELBO(num_particles=num_particles))
    training, drawing = random.split(random.key(seed))
    state = jax.jit(svi.init)(training)

    @jax.jit
    def advance(state: Any) -> Any:
        return lax.scan(lambda state, _: (svi.update(state)[0], None), state, length=steps)[0]

    while True:
        state = jax.block_until_ready(advance(state))
        yield partial(weigh, model, fitted, svi.get_params(state), drawing)


def weigh(
    model: Callable[[], None], guide: autoguide.AutoContinuous, params: dict[str, Array], key: Array, num_samples: int
) -> WeightedDraws:
    def draw(key: Array) -> tuple[dict[str, Array], Array, Array]:
        log_q, trace = log_density(handlers.seed(guide, key), (), {}, params)
        sites = {name: site["value"] for name, site in trace.items() if _is_latent(site)}
        return sites, log_density(model, (), {}, sites)[0], log_q

    keys = random.split(random.fold_in(key, num_samples), num_samples)
    sites, log_p, log_q = jax.tree.map(_as_tensor, jax.jit(partial(lax.map, draw, batch_size=CHUNK))(keys))
    return WeightedDraws(draws=sites, log_p=log_p, log_q=log_q, log_w=log_weight(log_p, log_q))


def _is_latent(site: dict[str, Any]) -> bool:
    return site["type"] == "sample" and not site["infer"].get("is_auxiliary", False)


def _as_tensor(x: Array) -> Tensor:
    return torch.from_numpy(np.array(x))
