"""Default fits against posteriordb's reference draws: how close, how fast, and whether the verdict says so.

    python benchmarks/posteriordb.py --posteriordb PATH                      # every flow, fg.fit as it comes
    python benchmarks/posteriordb.py --posteriordb PATH --peers --nuts       # and what there is to compare with
    python benchmarks/posteriordb.py --posteriordb PATH --numpyro            # also in NumPyro, if it is installed
    python benchmarks/posteriordb.py --report docs                           # table and plot from all results

PATH is a copy of https://github.com/stan-dev/posteriordb. Every posterior and guide is one job in a process of its own:
float64, one thread, nothing tuned. A finished job is one row of the CSV file ``--output``; a run that was interrupted
continues where it stopped. What the columns mean is said in docs/posteriordb.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyro
import torch
from machine import processor
from posteriordb_models import Posterior, load, names
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import InitMessenger
from row_files import append_row, read_rows
from torch import Tensor
from torch.distributions import biject_to
from tqdm import tqdm

import pyro_flowguides as fg
from pyro_flowguides.diagnostics import Diagnosis, WeightedDraws, diagnose_draws, log_weights, resample
from pyro_flowguides.flows import FLOWS

#: Draws of a fitted guide that are compared with the reference draws.
DRAWS = 20_000
#: Draws that the verdict is given on, as in ``fg.diagnose``.
VERDICT_DRAWS = 4000
#: Budget of the peers: that of ``fg.fit`` at its most, and the learning rate of Pyro's tutorials.
PEER_STEPS, PEER_PARTICLES, PEER_RATE = 2000, 32, 1e-2
#: What NUTS has to reach, in posterior standard deviations and in log standard deviations.
NUTS_ERROR, NUTS_WARMUP, NUTS_LEAST = 0.1, 500, 100
NUTS_LABEL = "Pyro NUTS"


def start_at_zero(site: Mapping[str, Any]) -> Tensor:
    """0 in unconstrained space, where Pyro's guides start by default; theirs needs a prior that can be sampled."""
    transform = biject_to(site["fn"].support)
    return transform(torch.zeros(transform.inverse_shape(site["fn"].shape())))


PEERS: dict[str, Callable[..., Any]] = {
    "Pyro AutoNormal": AutoNormal,
    "Pyro AutoMultivariateNormal": AutoMultivariateNormal,
    "Pyro AutoIAFNormal": AutoIAFNormal,
    "Pyro AutoIAFNormal x3": partial(AutoIAFNormal, num_transforms=3),
}
#: NumPyro's guides: class and options. JAX is imported by the jobs that fit them, and by nothing else.
NUMPYRO_PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "NumPyro AutoIAFNormal": ("AutoIAFNormal", {}),  # three flows
    "NumPyro AutoIAFNormal x1": ("AutoIAFNormal", {"num_flows": 1}),
    "NumPyro AutoBNAFNormal": ("AutoBNAFNormal", {}),
}


# -- one job -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A finished job. Errors are the largest over all parameters; ``resampled`` after importance resampling."""

    posterior: str
    guide: str
    seed: int
    limit: str
    elbo: float = math.nan
    elbo_se: float = math.nan
    log_evidence: float = math.nan
    log_evidence_se: float = math.nan
    khat: float = math.nan
    ess_fraction: float = math.nan
    mean_error: float = math.nan
    mean_at: str = ""
    log_sd_error: float = math.nan
    log_sd_at: str = ""
    resampled_mean_error: float = math.nan
    resampled_log_sd_error: float = math.nan
    seconds: float = math.nan
    cpu_seconds: float = math.nan
    steps: int = 0
    verdict: str = ""
    note: str = ""
    date: str = ""
    hardware: str = ""
    versions: str = ""


@dataclass(frozen=True)
class Job:
    """What to run: ``limit`` is empty for the budgets that are reported, and names any other."""

    root: Path
    posterior: str
    guide: str
    seed: int
    steps: int | None
    nuts_seconds: float

    @property
    def limit(self) -> str:
        if self.guide == NUTS_LABEL:
            return f"{self.nuts_seconds:g} s"
        return "" if self.steps is None else f"{self.steps} steps"

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.posterior, self.guide, str(self.seed), self.limit


@dataclass(frozen=True)
class Errors:
    """Largest difference from the reference draws: means in their standard deviations, and log standard deviations."""

    mean: float
    mean_at: str
    log_sd: float
    log_sd_at: str

    @property
    def worst(self) -> float:
        return max(self.mean, self.log_sd)


def errors(posterior: Posterior, samples: Mapping[str, Tensor]) -> Errors:
    """How far draws of the model's sites, ``(S, ...)`` each, are from the reference draws."""
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


def prepare(root: Path, posterior: str, seed: int) -> Posterior:
    """Set this process up for a job on a posterior, and load it."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    return load(root, posterior)


def run_job(job: Job) -> Row:
    """Run a job in this process. A failure is a result as well."""
    posterior = prepare(job.root, job.posterior, job.seed)
    run = run_nuts if job.guide == NUTS_LABEL else run_guide
    try:
        found = run(posterior, job)
    except Exception as error:  # whatever a guide raises: the other jobs are to be run all the same
        found = {"verdict": "failed", "note": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    found |= {"date": datetime.date.today().isoformat(), "hardware": processor(), "versions": versions(job.guide)}
    return Row(*job.key[:2], job.seed, job.limit, **found)


#: What a fit gives: weighted draws of the guide, as many as asked for; the verdict; seconds and steps of the fit.
Fit = tuple[Callable[[int], WeightedDraws], Diagnosis, float, int]


def run_guide(posterior: Posterior, job: Job) -> dict[str, Any]:
    fit = fitter(job.guide)
    cpu = time.process_time()
    weigh, diagnosis, seconds, steps = fit(posterior, job)
    found = {"seconds": seconds, "cpu_seconds": time.process_time() - cpu, "steps": steps, "verdict": diagnosis.verdict}
    return found | score(posterior, weigh)


def fitter(guide: str) -> Callable[[Posterior, Job], Fit]:
    """How a guide is fitted. What that takes is imported here, before any clock runs."""
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
    """A guide of Pyro's and plain SVI, all particles at once, the way Pyro's documentation does it."""
    made = PEERS[guide](InitMessenger(start_at_zero)(posterior.model))
    elbo = Trace_ELBO(num_particles=PEER_PARTICLES, max_plate_nesting=1, vectorize_particles=True)
    return made, SVI(posterior.model, made, pyro.optim.Adam({"lr": PEER_RATE}), elbo)


def fit_peer(posterior: Posterior, job: Job) -> Fit:
    steps = job.steps or PEER_STEPS
    begin = time.perf_counter()
    guide, svi = make_peer(posterior, job.guide)
    for _ in range(steps):
        svi.step(**posterior.data)
    seconds = time.perf_counter() - begin
    diagnosis = fg.diagnose(posterior.model, guide, num_samples=VERDICT_DRAWS, **posterior.data)
    return partial(weigh_guide, posterior, guide), diagnosis, seconds, steps


def fit_numpyro(fit: Callable[..., Callable[[int], WeightedDraws]], posterior: Posterior, job: Job) -> Fit:
    """The same in NumPyro, compilation included. The verdict has no defensive check, which needs a Pyro guide."""
    steps = job.steps or PEER_STEPS
    name, options = NUMPYRO_PEERS[job.guide]
    begin = time.perf_counter()
    weigh = fit(posterior, name, options, seed=job.seed, steps=steps, particles=PEER_PARTICLES, rate=PEER_RATE)
    seconds = time.perf_counter() - begin
    return weigh, diagnose_draws(weigh(VERDICT_DRAWS)), seconds, steps


def weigh_guide(posterior: Posterior, guide: Any, num_samples: int) -> WeightedDraws:
    return log_weights(posterior.model, guide, num_samples=num_samples, **posterior.data)


def score(posterior: Posterior, weigh: Callable[[int], WeightedDraws]) -> dict[str, Any]:
    """What draws of a fitted guide are worth, from a number of them that leaves little noise."""
    pyro.set_rng_seed(0)
    weighted = weigh(DRAWS)
    whole = diagnose_draws(weighted)
    raw = errors(posterior, weighted.draws)
    found = {
        "elbo": whole.elbo,
        "elbo_se": whole.elbo_se,
        "log_evidence": whole.log_evidence,
        "log_evidence_se": whole.log_evidence_se,
        "khat": whole.khat,
        "ess_fraction": whole.ess_fraction,
        "mean_error": raw.mean,
        "mean_at": raw.mean_at,
        "log_sd_error": raw.log_sd,
        "log_sd_at": raw.log_sd_at,
    }
    if whole.ess > 0:
        again = errors(posterior, resample(weighted, DRAWS).draws)
        found |= {"resampled_mean_error": again.mean, "resampled_log_sd_error": again.log_sd}
    return found


# -- NUTS --------------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Raised from within a chain to end it."""


class Watch:
    """A hook for MCMC that stops a chain when its draws are close to the reference draws, or its CPU time is over."""

    def __init__(self, posterior: Posterior, limit: float) -> None:
        self.posterior, self.limit = posterior, limit
        self.begin = time.process_time()
        self.draws: dict[str, list[Tensor]] = {}
        self.found: Errors | None = None
        self.count, self.next = 0, NUTS_LEAST

    def __call__(self, kernel: NUTS, params: Mapping[str, Tensor], stage: str, step: int) -> None:
        if stage.startswith("Sample"):
            for name, value in params.items():
                self.draws.setdefault(name, []).append(kernel.transforms[name].inv(value).detach())
            self.count += 1
        if self.count >= self.next:
            self.next = math.ceil(1.1 * self.count)
            self.found = self.errors()
            if self.found.worst <= NUTS_ERROR:
                raise Stopped
        if time.process_time() - self.begin > self.limit:
            raise Stopped

    def errors(self) -> Errors:
        return errors(self.posterior, {name: torch.stack(values) for name, values in self.draws.items()})


def run_nuts(posterior: Posterior, job: Job) -> dict[str, Any]:
    """One chain, stopped at the first check that finds it as close to the reference draws as asked for."""
    begin, cpu = time.perf_counter(), time.process_time()
    watch = Watch(posterior, job.nuts_seconds)
    kernel = NUTS(posterior.model, init_strategy=start_at_zero, max_plate_nesting=1)
    mcmc = MCMC(kernel, num_samples=10**6, warmup_steps=NUTS_WARMUP, disable_progbar=True, hook_fn=watch)
    with contextlib.suppress(Stopped):
        mcmc.run(**posterior.data)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    last = watch.errors() if watch.count > 1 else Errors(math.inf, "", math.inf, "")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "steps": watch.count,
        "mean_error": last.mean,
        "mean_at": last.mean_at,
        "log_sd_error": last.log_sd,
        "log_sd_at": last.log_sd_at,
        "verdict": "reached" if last.worst <= NUTS_ERROR else f"not within {job.nuts_seconds:g} CPU s",
        "note": f"{len(kernel._divergences)} divergences",
    }


# -- all jobs ----------------------------------------------------------------------------------------------------------


@cache
def versions(guide: str) -> str:
    found = [f"Python {platform.python_version()}", f"torch {torch.__version__}", f"Pyro {pyro.__version__}"]
    if guide in NUMPYRO_PEERS:
        found += [f"NumPyro {importlib.metadata.version('numpyro')}", f"JAX {importlib.metadata.version('jax')}"]
    return ", ".join([*found, f"pyro_flowguides {importlib.metadata.version('pyro-flowguides')}{_commit()}"])


def _commit() -> str:
    """The commit that was run, as far as git knows."""
    command = ["git", "-C", str(Path(__file__).parent), "log", "-1", "--format=%h", "--", "../pyro_flowguides"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
    return f" ({found})" if found else ""


def run_all(run: Callable[[Any], Any], jobs: Iterable[Any], processes: int) -> Iterator[Any]:
    """A fresh process for every job; where the system can fork, from one that has imported everything already."""
    os.environ |= {"OMP_NUM_THREADS": "1", "NPROC": "1"}  # NPROC: threads of XLA
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["pyro_flowguides", "arviz", "pandas", "torch._dynamo"])  # the last by optimizers
    with context.Pool(processes, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(run, jobs, chunksize=1)


def finished(path: Path) -> set[tuple[str, ...]]:
    """The keys of the jobs whose rows ``path`` holds."""
    return {(row["posterior"], row["guide"], row["seed"], row["limit"]) for row in read_rows(path)}


def describe(row: Row) -> str:
    """A line about a finished job. The gap to the best evidence of all guides stands in the report."""
    head = f"{row.posterior:42} {row.guide:28}"
    if row.verdict == "failed":
        return f"{head} failed: {row.note}"
    return (
        f"{head} gap ≥ {row.log_evidence - row.elbo:7.3f}  k-hat {row.khat:5.2f}  ESS {100 * row.ess_fraction:3.0f} %  "
        f"mean {row.mean_error:.3f} ({row.resampled_mean_error:.3f})  log sd {row.log_sd_error:.3f} "
        f"({row.resampled_log_sd_error:.3f})  {row.seconds:5.1f} s, CPU {row.cpu_seconds:5.1f} s  {row.steps} steps  "
        f"{row.verdict}"
    )


def plan(arguments: argparse.Namespace) -> list[Job]:
    """The jobs that were asked for, guide after guide."""
    root = arguments.posteriordb
    root = root / "posterior_database" if (root / "posterior_database").is_dir() else root
    guides = [*arguments.guides, *(PEERS if arguments.peers else ()), *(NUMPYRO_PEERS if arguments.numpyro else ())]
    return [
        Job(root, posterior, guide, arguments.seed, arguments.steps, arguments.nuts_seconds)
        for guide in [*guides, *[NUTS_LABEL] * arguments.nuts]
        for posterior in arguments.posteriors or names(root)
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = partial(str.split, sep=",")
    parser.add_argument("--posteriordb", type=Path, help="folder of posteriordb; without it nothing is run")
    parser.add_argument("--posteriors", type=listed, help="comma-separated; all that have a model by default")
    parser.add_argument(
        "--guides", type=listed, default=list(FLOWS), help="comma-separated names of flows or of peers; all flows"
    )
    parser.add_argument("--peers", action="store_true", help="also Pyro's own guides, by plain SVI on the same budget")
    parser.add_argument("--numpyro", action="store_true", help="also NumPyro's flow guides on the same budget")
    parser.add_argument("--nuts", action="store_true", help="also the time that Pyro's NUTS takes for such errors")
    parser.add_argument("--nuts-seconds", type=float, default=120.0, help="processor time at which to give NUTS up")
    parser.add_argument("--steps", type=int, help="fewer steps, to try the program; results are kept apart")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at once; times mean little beyond the cores")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/posteriordb.csv"))
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write table and plot of all results there")
    arguments = parser.parse_args(argv)
    known = [*FLOWS, *PEERS, *NUMPYRO_PEERS]
    if unknown := set(arguments.guides) - set(known):
        parser.error(f"unknown guides {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    needs_numpyro = arguments.numpyro or not NUMPYRO_PEERS.keys().isdisjoint(arguments.guides)
    if needs_numpyro and importlib.util.find_spec("numpyro") is None:
        parser.error("NumPyro's guides need numpyro and jax: pip install 'pyro-flowguides[benchmarks]'")
    if arguments.posteriordb is None and arguments.report is None:
        parser.error("give --posteriordb to run, --report to write a report, or both")
    if arguments.posteriordb is not None:
        done = finished(arguments.output)
        todo = [job for job in plan(arguments) if job.key not in done]
        for row in tqdm(run_all(run_job, todo, arguments.jobs), total=len(todo), disable=None):
            append_row(arguments.output, asdict(row))
            tqdm.write(describe(row), file=sys.stdout)
            sys.stdout.flush()
    if arguments.output.is_file():
        import posteriordb_report

        table = posteriordb_report.read(arguments.output)
        print(posteriordb_report.summary(table))
        if arguments.report is not None:
            posteriordb_report.write(table, arguments.report)


if __name__ == "__main__":
    main()
