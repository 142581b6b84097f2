"""The models of benchmarks/posteriordb_models.py have the posteriors that posteriordb's reference draws come from."""

from __future__ import annotations

import importlib
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from statistics import NormalDist

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import Tensor
from torch.distributions import biject_to

if "FLOWGUIDES_DATA" not in os.environ:
    pytest.skip("FLOWGUIDES_DATA, the folder that holds posteriordb/, is not set", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
models = importlib.import_module("posteriordb_models")

ROOT = Path(os.environ["FLOWGUIDES_DATA"]) / "posteriordb" / "posterior_database"
NAMES = models.names(ROOT)
CENTERED = "eight_schools-eight_schools_centered"
NONCENTERED = "eight_schools-eight_schools_noncentered"
Sites = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(before)


# ------------------------------------------------------------------------------------- log densities and their check


@cache
def posterior(name: str):
    return models.load(ROOT, name)


def reference_sites(name: str) -> Sites:
    """Return the model's sites at the reference draws, chain after chain: (draws, ...)."""
    sites = posterior(name).from_reference(posterior(name).reference)
    return {site: value.flatten(0, 1) for site, value in sites.items()}


def run(name: str, values: Sites) -> poutine.Trace:
    trace = poutine.trace(poutine.condition(posterior(name).model, values)).get_trace(**posterior(name).data)
    return poutine.util.prune_subsample_sites(trace)


@cache
def latents(name: str) -> dict[str, dict]:
    """Return the trace's node of every latent site."""
    first = {site: value[0] for site, value in reference_sites(name).items()}
    trace = run(name, first)
    return {site: trace.nodes[site] for site in first}


def bijection(name: str, site: str) -> torch.distributions.Transform:
    return biject_to(latents(name)[site]["fn"].support)


def as_matrix(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.reshape(len(part), -1) for part in parts], -1)


def sum_right(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).sum(-1)


def log_joint(name: str, sites: Sites) -> Tensor:
    """Compute log p(sites, data) of all draws at once, in a plate to the left of the model's own: (draws,)."""
    draws = len(next(iter(sites.values())))
    in_plate = {site: bool(latents(name)[site]["cond_indep_stack"]) for site in sites}
    with pyro.plate("particles", draws, dim=-2):
        trace = run(name, {site: x if in_plate[site] else x.unsqueeze(1) for site, x in sites.items()})
    trace.compute_log_prob()
    return sum(sum_right(node["log_prob"]) for node in trace.nodes.values() if node["type"] == "sample")


def log_jacobian(name: str, sites: Sites) -> Tensor:
    """Compute log |d sites / d unconstrained|: (draws,)."""
    maps = {site: bijection(name, site) for site in sites}
    return sum(sum_right(maps[site].log_abs_det_jacobian(maps[site].inv(x), x)) for site, x in sites.items())


@cache
def unconstrained(name: str) -> Sites:
    return {site: bijection(name, site).inv(x) for site, x in reference_sites(name).items()}


def gradient(name: str, function: Callable[[Sites], Tensor]) -> Tensor:
    """Compute d function(sites) / d unconstrained at all reference draws, a few at a time: (draws, D)."""
    parts = []
    for chunk in zip(*(value.split(500) for value in unconstrained(name).values()), strict=True):
        u = {site: x.requires_grad_() for site, x in zip(unconstrained(name), chunk, strict=True)}
        total = function({site: bijection(name, site)(x) for site, x in u.items()}).sum()
        parts.append(as_matrix(torch.autograd.grad(total, list(u.values()), materialize_grads=True)))
    return torch.cat(parts)


@cache
def model_score(name: str) -> Tensor:
    return gradient(name, lambda sites: log_joint(name, sites) + log_jacobian(name, sites))


def stein_z(name: str, score: Tensor) -> Tensor:
    """Return the z-scores of Stein's identities over all reference draws u, from the score of their density.

    E[score] = 0 and E[score (u - E u)^T] = -I, D + D² scalars. Both are linear in the score, so they are evaluated in
    whitened coordinates, where |z| is about 100 times the error of a mean or a scale in posterior standard deviations.
    The standard error is that of the means of 25 successive draws, which allows for slightly dependent draws.
    """
    u = as_matrix(unconstrained(name).values())
    scale = torch.linalg.cholesky(torch.cov(u.T))
    white = torch.linalg.solve_triangular(scale, (u - u.mean(0)).T, upper=False).T
    first = score @ scale
    second = first.unsqueeze(-1) * white.unsqueeze(-2) + torch.eye(u.shape[-1])
    means = torch.cat([first, second.flatten(1)], -1).unflatten(0, (-1, 25)).mean(1)
    return means.mean(0) / (means.std(0) / math.sqrt(len(means)))


def threshold(comparisons: int) -> float:
    """Return the |z| that the worst of all comparisons exceeds for at most one in 10,000 right models (Bonferroni)."""
    return NormalDist().inv_cdf(1 - 1e-4 / (2 * comparisons))


# ------------------------------------------------------------------------------------------------------------- tests


def test_all_ten_posteriors_are_there():
    assert len(NAMES) == len(models.PROGRAMS) == 10


# The centered model's score has no variance (it grows as 1 / tau): it is compared with the non-centered one below.
@pytest.mark.parametrize("name", [name for name in NAMES if name != CENTERED])
def test_reference_draws_satisfy_steins_identities(name):
    z = stein_z(name, model_score(name))
    assert z.abs().max() < threshold(len(z))


def test_centered_schools_are_the_noncentered_ones():
    centered, noncentered = reference_sites(CENTERED), reference_sites(NONCENTERED)
    jacobian = 8 * centered["tau"].log()
    torch.testing.assert_close(log_joint(CENTERED, centered) + jacobian, log_joint(NONCENTERED, noncentered))


def replace(site: str, right: dist.Distribution, wrong: dist.Distribution) -> Callable[[Sites], Tensor]:
    return lambda sites: sum_right(wrong.log_prob(sites[site]) - right.log_prob(sites[site]))


# Plausible mistakes, as the term that each adds to the log density.
MISTAKES: dict[str, tuple[str, Callable[[Sites], Tensor]]] = {
    "half-Cauchy scale 10 for 5": (NONCENTERED, replace("tau", dist.HalfCauchy(5.0), dist.HalfCauchy(10.0))),
    "no Jacobian of sigma": ("mesquite-logmesquite_logvash", lambda x: -x["sigma"].log()),
    "flat sigma": ("kidiq-kidscore_interaction", lambda x: -dist.HalfCauchy(2.5).log_prob(x["sigma"])),
    "no Jacobian of the simplex": ("garch-garch11", lambda x: -x["weights"].log().sum(-1)),
    "beta1 uniform given alpha1": ("garch-garch11", lambda x: -(1 - x["weights"][:, 0]).log()),
    "gamma rate 5 for 4": ("gp_pois_regr-gp_regr", replace("rho", dist.Gamma(25.0, 4.0), dist.Gamma(25.0, 5.0))),
    "half-normal scale 2 for 1": ("gp_pois_regr-gp_regr", replace("sigma", dist.HalfNormal(1.0), dist.HalfNormal(2.0))),
    "no prior on mu[2]": ("hmm_example-hmm_example", lambda x: -dist.Normal(10.0, 1.0).log_prob(x["mu"][:, 1])),
    "flat theta": ("low_dim_gauss_mix-low_dim_gauss_mix", lambda x: -dist.Beta(5.0, 5.0).log_prob(x["theta"])),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_steins_identities_expose_a_wrong_model(mistake):
    name, added = MISTAKES[mistake]
    z = stein_z(name, model_score(name) + gradient(name, added))
    assert z.abs().max() > threshold(len(z))


@pytest.mark.parametrize("name", NAMES)
def test_vectorized_log_density_is_that_of_a_loop(name):
    sites = {site: value[::1500] for site, value in reference_sites(name).items()}
    loop = [run(name, {site: value[i] for site, value in sites.items()}).log_prob_sum() for i in range(7)]
    torch.testing.assert_close(log_joint(name, sites), torch.stack(loop))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_vectorized_elbo_and_its_gradient_are_finite(name, dtype):
    torch.set_default_dtype(dtype)
    start = {site: value.mean(0).to(dtype) for site, value in reference_sites(name).items()}  # supports are convex
    guide = AutoNormal(posterior(name).model, init_loc_fn=init_to_value(values=start), init_scale=0.01)
    loss = Trace_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=1).differentiable_loss
    value = loss(posterior(name).model, guide, **posterior(name).data)
    value.backward()
    assert value.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in guide.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_reference_names_come_back_from_the_sites(name):
    reference = posterior(name).reference
    back = posterior(name).to_reference(reference_sites(name))
    assert list(back) == list(reference)
    for parameter, draws in reference.items():
        assert draws.shape == (10, 1000)
        torch.testing.assert_close(back[parameter], torch.from_numpy(draws).flatten())


@pytest.mark.parametrize(
    "name", ["arK-arK", NONCENTERED, "hmm_example-hmm_example", "low_dim_gauss_mix-low_dim_gauss_mix"]
)
def test_models_with_proper_priors_can_be_sampled(name):
    prior = Predictive(poutine.uncondition(posterior(name).model), num_samples=3)(**posterior(name).data)
    assert set(posterior(name).to_reference(prior)) == set(posterior(name).reference)
    for site, node in latents(name).items():
        assert node["fn"].support.check(prior[site]).all()


def test_a_restricted_distribution_samples_only_its_support():
    normal = dist.Normal(0.0, 2.0).expand([4]).to_event(1)
    ordered = models.Restricted(normal, constraints.ordered_vector).expand([50])
    draws = ordered.sample()
    assert draws.shape == (50, 4)
    assert ordered.support.check(draws).all()
    torch.testing.assert_close(ordered.log_prob(draws), normal.log_prob(draws))


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown posterior 'kidiq'; known posteriors: .*kidiq-kidscore_interaction"):
        models.load(ROOT, "kidiq")


def test_a_wrong_root_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no posteriordb at .*elsewhere"):
        models.load(tmp_path / "elsewhere", "arK-arK")


def test_a_missing_file_is_named(tmp_path):
    shutil.copytree(ROOT / "posteriors", tmp_path / "posteriors")
    shutil.copytree(ROOT / "data" / "info", tmp_path / "data" / "info")
    with pytest.raises(FileNotFoundError, match=r"file is missing: .*arK\.json\.zip"):
        models.load(tmp_path, "arK-arK")
