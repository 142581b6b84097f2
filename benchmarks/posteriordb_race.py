"""The time that each guide takes to come within 0.1 nats of the evidence on posteriordb, with reliable weights.

    python benchmarks/posteriordb_race.py --posteriordb PATH --numpyro

``fg.fit`` runs with its defaults until it stops by itself, verdict included. Guides of Pyro and of NumPyro are trained
by plain SVI with the settings of ``posteriordb.py``, and checked every 100 steps, up to 2,000. Their clock stops at the
first check that finds a gap of at most 0.1 nats and a k-hat below 0.7 in 2,000 draws. As the checks are not timed,
"shortest" gives ``fg.fit`` the same advantage: it runs with the smallest of several limits on its steps that is enough.

Times are processor seconds of one thread. They include compilation; import time is excluded for all competitors. The
evidence is the best estimate in ``posteriordb.csv``. With ``--nuts``, Pyro's NUTS runs until its errors are small.

A finished job is a row of the CSV file ``--output``; an interrupted program resumes where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import posteriordb_fits as fits
import posteriordb_report
import pyro
from machine import processor
from posteriordb import run_all, versions
from posteriordb_models import Posterior, names
from posteriordb_nuts import run_nuts
from row_files import append_row, read_rows
from tables import markdown_table

import pyro_flowguides as fg
from pyro_flowguides.diagnostics import Diagnosis, WeightedDraws, diagnose_draws

OURS, SHORTEST = "pyro_flowguides iaf", "pyro_flowguides iaf, shortest"
LIMITS = (100, 200, 400, 1000, 2000)
NUTS = fits.NUTS_LABEL
GAP, KHAT = 0.1, 0.7
#: Steps between checks, steps at which a peer is stopped, and draws for a check.
CHECK_EVERY, MAX_STEPS, NUM_CHECK_SAMPLES = 100, 2000, 2000


@dataclass(frozen=True)
class Result:
    """A finished job: processor seconds until the target was reached, or until the job was stopped."""

    posterior: str
    guide: str
    seed: int
    reached: bool
    cpu_seconds: float
    steps: int
    gap: float
    khat: float
    date: str
    hardware: str


@dataclass(frozen=True)
class Job:
    """A guide to race on a posterior; steps and seconds after which a peer and NUTS are stopped."""

    root: Path
    posterior: str
    guide: str
    seed: int
    log_evidence: float
    nuts_seconds: float
    max_steps: int = MAX_STEPS


def run_job(job: Job) -> Result:
    """Run a job in this process. A failure is a result too."""
    posterior = fits.prepare(job.root, job.posterior, job.seed)
    today, where = datetime.date.today().isoformat(), processor()
    head = job.posterior, job.guide, job.seed
    load_libraries(job.guide)
    try:
        reached, seconds, steps, gap, khat = racer(job.guide)(posterior, job)
    except Exception as error:  # a guide may raise anything, and the other jobs must run
        print(f"{job.posterior}, {job.guide}: {type(error).__name__}: {error}", file=sys.stderr)
        reached, seconds, steps, gap, khat = False, float("nan"), 0, float("nan"), float("nan")
    return Result(*head, reached, seconds, steps, gap, khat, today, where)


def load_libraries(guide: str) -> None:
    """Import the libraries that a competitor would otherwise import while its clock runs."""
    modules = ["arviz", "torch._dynamo", *(["posteriordb_numpyro"] if guide in fits.NUMPYRO_PEERS else [])]
    for module in modules:
        importlib.import_module(module)


#: Whether the target was reached, processor seconds, steps, gap, k-hat.
Outcome = tuple[bool, float, int, float, float]


def racer(guide: str) -> Callable[[Posterior, Job], Outcome]:
    """Return the function that runs a guide."""
    if guide in (OURS, SHORTEST):
        return race_fit if guide == OURS else race_shortest
    if guide == NUTS:
        return race_nuts
    train = train_numpyro if guide in fits.NUMPYRO_PEERS else train_pyro
    return partial(race_peer, train)


def race_fit(posterior: Posterior, job: Job, **options: Any) -> Outcome:
    """Fit until the fit stops by itself."""
    begin = time.process_time()
    guide = fg.AutoIAF(posterior.model)
    result = fg.fit(posterior.model, guide, seed=job.seed, progress=False, **options, **posterior.data)
    seconds = time.process_time() - begin
    pyro.set_rng_seed(0)
    check = diagnose_draws(fits.weigh_guide(posterior, guide, fits.Job.num_samples))
    return is_reached(check, job), seconds, result.steps, job.log_evidence - check.elbo, check.khat


def race_shortest(posterior: Posterior, job: Job) -> Outcome:
    """Fit with the smallest limit on the steps that is enough. Each fit starts anew."""
    for limit in LIMITS:
        outcome = race_fit(posterior, job, steps=limit)
        if outcome[0]:
            break
    return outcome


def race_nuts(posterior: Posterior, job: Job) -> Outcome:
    settings = fits.Job(job.root, job.posterior, NUTS, job.seed, None, job.nuts_seconds)
    chain = run_nuts(posterior, settings)
    return chain["verdict"] == "reached", chain["cpu_seconds"], chain["steps"], float("nan"), float("nan")


def race_peer(train: Callable[[Posterior, Job], Iterator[WeightedDraws]], posterior: Posterior, job: Job) -> Outcome:
    """Train in stretches, with a check after each. Only the training is timed."""
    spent, steps = 0.0, 0
    stretches = train(posterior, job)
    while True:
        begin = time.process_time()
        next(stretches)
        spent += time.process_time() - begin
        steps += CHECK_EVERY
        check = diagnose_draws(next(stretches))
        if is_reached(check, job) or steps >= job.max_steps:
            return is_reached(check, job), spent, steps, job.log_evidence - check.elbo, check.khat


def is_reached(check: Diagnosis, job: Job) -> bool:
    return job.log_evidence - check.elbo <= GAP and check.khat < KHAT


def train_pyro(posterior: Posterior, job: Job) -> Iterator[Any]:
    """Train a guide of Pyro's for a stretch, and return weighted draws, in turns."""
    guide, svi = fits.make_peer(posterior, job.guide)
    while True:
        for _ in range(CHECK_EVERY):
            svi.step(**posterior.data)
        yield None
        yield fits.weigh_guide(posterior, guide, NUM_CHECK_SAMPLES)


def train_numpyro(posterior: Posterior, job: Job) -> Iterator[Any]:
    """Do the same in NumPyro, with a compiled scan for the steps of a stretch."""
    import posteriordb_numpyro

    name, options = fits.NUMPYRO_PEERS[job.guide]
    stretches = posteriordb_numpyro.train_in_stretches(
        posterior, name, options, seed=job.seed, steps=CHECK_EVERY, num_particles=fits.PEER_PARTICLES, lr=fits.PEER_LR
    )
    for weigh in stretches:
        yield None
        yield weigh(NUM_CHECK_SAMPLES)


# -- all jobs ----------------------------------------------------------------------------------------------------------


def make_table(rows: list[dict[str, str]]) -> str:
    """Return the processor seconds by posterior and guide; in brackets the gap and k-hat of those that failed."""
    order = [OURS, SHORTEST, *fits.PEERS, *fits.NUMPYRO_PEERS, NUTS]
    guides = [guide for guide in order if any(row["guide"] == guide for row in rows)]
    lines = []
    for posterior in dict.fromkeys(row["posterior"] for row in rows):
        results = {row["guide"]: row for row in rows if row["posterior"] == posterior}
        lines.append([posterior, *(cell(results.get(guide)) for guide in guides)])
    return markdown_table(["CPU s", *guides], lines)


def cell(row: dict[str, str] | None) -> str:
    if row is None:
        return ""
    if row["reached"] == "True":
        return f"**{float(row['cpu_seconds']):.1f}**"
    text = f"not in {float(row['cpu_seconds']):.0f}"
    return text if row["guide"] == NUTS else f"{text} ({float(row['gap']):.2g}, k-hat {float(row['khat']):.2f})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posteriordb", type=Path, required=True)
    parser.add_argument("--posteriors", type=partial(str.split, sep=","), help="comma-separated; by default all")
    parser.add_argument("--guides", type=partial(str.split, sep=","), help="comma-separated; by default not NumPyro's")
    parser.add_argument("--numpyro", action="store_true", help="also NumPyro's guides, if it is installed")
    parser.add_argument("--nuts", action="store_true", help="also Pyro's NUTS, until its errors are small")
    parser.add_argument("--nuts-seconds", type=float, default=120.0, help="processor time after which NUTS is stopped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evidence", type=Path, default=Path("benchmarks/results/posteriordb.csv"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/posteriordb_race.csv"))
    options = parser.parse_args(argv)
    root = options.posteriordb
    root = root / "posterior_database" if (root / "posterior_database").is_dir() else root
    fits = posteriordb_report.read(options.evidence)
    evidence = {
        name: posteriordb_report.best_log_evidence(rows) for name, rows in fits[~fits["is_chain"]].groupby("posterior")
    }
    guides = options.guides or [OURS, SHORTEST, *fits.PEERS]
    guides += [*(fits.NUMPYRO_PEERS if options.numpyro else ()), *([NUTS] if options.nuts else ())]
    done = {(row["posterior"], row["guide"], row["seed"]) for row in read_rows(options.output)}
    jobs = [
        Job(root, posterior, guide, options.seed, evidence[posterior], options.nuts_seconds)
        for posterior in options.posteriors or names(root)
        for guide in guides
        if (posterior, guide, str(options.seed)) not in done
    ]
    for result in run_all(run_job, jobs, processes=1):
        append_row(options.output, asdict(result))
        print(result, flush=True)
    text = make_table(read_rows(options.output))
    print(text)
    note = f"`benchmarks/posteriordb_race.py`, {datetime.date.today()}, {versions(OURS)}"
    options.output.with_suffix(".md").write_text(f"{note}, one thread of {processor()}.\n\n{text}\n", "utf-8")


if __name__ == "__main__":
    main()
