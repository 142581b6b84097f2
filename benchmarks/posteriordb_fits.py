"""Fits of one guide to one posterior of posteriordb, and the comparison of its draws with the reference draws."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from posteriordb_models import Posterior, load
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.distributions import biject_to

import pyro_flowguides as fg
from pyro_flowguides.diagnostics import Diagnosis, WeightedDraws, diagnose_draws, log_weights, resample

#: Draws for the verdict, as in ``fg.diagnose``.
NUM_VERDICT_SAMPLES = 4000
#: Budget of the peers: the largest of ``fg.fit``, and the step size of Pyro's tutorials.
PEER_STEPS, PEER_PARTICLES, PEER_LR = 2000, 32, 1e-2
NUTS_LABEL = "Pyro NUTS"


def start_at_zero(site: Mapping[str, Any]) -> Tensor:
    """Return 0 in unconstrained space, where Pyro's guides start. Pyro's own function needs a proper prior."""
    transform = biject_to(site["fn"].support)
    return transform(torch.zeros(transform.inverse_shape(site["fn"].shape())))


PEERS: dict[str, Callable[..., Any]] = {
    "Pyro AutoNormal": AutoNormal,
    "Pyro AutoMultivariateNormal": AutoMultivariateNormal,
    "Pyro AutoIAFNormal": AutoIAFNormal,
    "Pyro AutoIAFNormal x3": partial(AutoIAFNormal, num_transforms=3),
}
#: NumPyro's guides: class and options. Only the jobs that fit them import JAX.
NUMPYRO_PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "NumPyro AutoIAFNormal": ("AutoIAFNormal", {}),  # three flows
    "NumPyro AutoIAFNormal x1": ("AutoIAFNormal", {"num_flows": 1}),
    "NumPyro AutoBNAFNormal": ("AutoBNAFNormal", {}),
}


@dataclass(frozen=True)
class Job:
    """A guide to fit, or a chain to run.

    ``num_samples`` draws of a fitted guide are compared with the reference draws. ``limit`` names the budget, and is
    empty for the one of the report.
    """

    root: Path
    posterior: str
    guide: str
    seed: int
    steps: int | None
    nuts_seconds: float
    num_samples: int = 20_000
    nuts_warmup: int = 500

    @property
    def limit(self) -> str:
        if self.guide == NUTS_LABEL:
            return f"{self.nuts_seconds:g} s"
        return "" if self.steps is None else f"{self.steps} steps"

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.posterior, self.guide, str(self.seed), self.limit


def prepare(root: Path, posterior: str, seed: int) -> Posterior:
    """Set up this process for a job, and load its posterior."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    return load(root, posterior)


# -- fits --------------------------------------------------------------------------------------------------------------

#: The result of a fit: a function that returns weighted draws, the verdict, and seconds and steps of the fit.
Fit = tuple[Callable[[int], WeightedDraws], Diagnosis, float, int]


def run_guide(posterior: Posterior, job: Job) -> dict[str, Any]:
    fit = fitter(job.guide)
    cpu = time.process_time()
    weigh, diagnosis, seconds, steps = fit(posterior, job)
    cpu_seconds = time.process_time() - cpu
    costs = {"seconds": seconds, "cpu_seconds": cpu_seconds, "steps": steps, "verdict": diagnosis.verdict}
    return costs | score(posterior, weigh, job.num_samples)


def fitter(guide: str) -> Callable[[Posterior, Job], Fit]:
    """Return the function that fits a guide. Its libraries are imported here, before any clock runs."""
    if guide in NUMPYRO_PEERS:
        import posteriordb_numpyro

        return partial(fit_numpyro, posteriordb_numpyro.fit)
    return fit_peer if guide in PEERS else fit_flow


def fit_flow(posterior: Posterior, job: Job) -> Fit:
    guide = fg.AutoFlow(posterior.model, job.guide)
    options: dict[str, Any] = {} if job.steps is None else {"steps": job.steps}
    result = fg.fit(posterior.model, guide, seed=job.seed, progress=False, **options, **posterior.data)
    if result.diagnosis is None:
        raise ValueError(result.why_no_verdict)
    return partial(weigh_guide, posterior, guide), result.diagnosis, result.seconds, result.steps


def make_peer(posterior: Posterior, guide: str) -> tuple[Any, SVI]:
    """Return a guide of Pyro's and plain SVI with vectorized particles, as in Pyro's documentation."""
    autoguide = PEERS[guide](InitMessenger(start_at_zero)(posterior.model))
    elbo = Trace_ELBO(num_particles=PEER_PARTICLES, max_plate_nesting=1, vectorize_particles=True)
    return autoguide, SVI(posterior.model, autoguide, pyro.optim.Adam({"lr": PEER_LR}), elbo)


def fit_peer(posterior: Posterior, job: Job) -> Fit:
    steps = job.steps or PEER_STEPS
    begin = time.perf_counter()
    guide, svi = make_peer(posterior, job.guide)
    for _ in range(steps):
        svi.step(**posterior.data)
    seconds = time.perf_counter() - begin
    diagnosis = fg.diagnose(posterior.model, guide, num_samples=NUM_VERDICT_SAMPLES, **posterior.data)
    return partial(weigh_guide, posterior, guide), diagnosis, seconds, steps


def fit_numpyro(fit: Callable[..., Callable[[int], WeightedDraws]], posterior: Posterior, job: Job) -> Fit:
    """Fit a guide of NumPyro's, compilation included. The verdict lacks the defensive check, which needs Pyro."""
    steps = job.steps or PEER_STEPS
    name, options = NUMPYRO_PEERS[job.guide]
    begin = time.perf_counter()
    weigh = fit(posterior, name, options, seed=job.seed, steps=steps, num_particles=PEER_PARTICLES, lr=PEER_LR)
    seconds = time.perf_counter() - begin
    return weigh, diagnose_draws(weigh(NUM_VERDICT_SAMPLES)), seconds, steps


def weigh_guide(posterior: Posterior, guide: Any, num_samples: int) -> WeightedDraws:
    return log_weights(posterior.model, guide, num_samples=num_samples, **posterior.data)


# -- scores ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Errors:
    """The largest differences from the reference draws: of means, in standard deviations, and of their logarithms."""

    mean: float
    mean_at: str
    log_sd: float
    log_sd_at: str

    @property
    def worst(self) -> float:
        return max(self.mean, self.log_sd)


def errors(posterior: Posterior, samples: Mapping[str, Tensor]) -> Errors:
    """Compare draws of the model's sites, ``(S, ...)`` each, with the reference draws."""
    means, log_sds = {}, {}
    for name, draws in posterior.to_reference(samples).items():
        reference = torch.as_tensor(posterior.reference[name]).flatten()
        sd = float(reference.std())
        means[name] = _or_infinity(abs(float(draws.mean() - reference.mean())) / sd)
        log_sds[name] = _or_infinity(abs(float((draws.std() / sd).log())))
    mean_at, log_sd_at = (max(values, key=values.__getitem__) for values in (means, log_sds))
    return Errors(means[mean_at], mean_at, log_sds[log_sd_at], log_sd_at)


def _or_infinity(error: float) -> float:
    return math.inf if math.isnan(error) else error


def score(posterior: Posterior, weigh: Callable[[int], WeightedDraws], num_samples: int) -> dict[str, Any]:
    """Compare many draws of a fitted guide with the reference draws, before and after resampling."""
    pyro.set_rng_seed(0)
    weighted = weigh(num_samples)
    diagnosis = diagnose_draws(weighted)
    own = errors(posterior, weighted.draws)
    scores = {
        "elbo": diagnosis.elbo,
        "elbo_se": diagnosis.elbo_se,
        "log_evidence": diagnosis.log_evidence,
        "log_evidence_se": diagnosis.log_evidence_se,
        "khat": diagnosis.khat,
        "ess_fraction": diagnosis.ess_fraction,
        "mean_error": own.mean,
        "mean_at": own.mean_at,
        "log_sd_error": own.log_sd,
        "log_sd_at": own.log_sd_at,
    }
    if diagnosis.ess > 0:
        resampled = errors(posterior, resample(weighted, num_samples).draws)
        scores |= {"resampled_mean_error": resampled.mean, "resampled_log_sd_error": resampled.log_sd}
    return scores
