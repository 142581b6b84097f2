"""How long each guide takes to come within 0.1 nats of the evidence, with even weights, on posteriordb's posteriors.

    python benchmarks/posteriordb_race.py --posteriordb PATH --numpyro

``fg.fit`` runs as it comes, to its own end, verdict included; and, as the others are told when to stop, with the least
of some limits on its steps that gets there ("shortest"). Guides of Pyro and of NumPyro are trained by plain SVI
with the settings of ``posteriordb.py``, and looked at every 100 steps, 2,000 at most: the clock stops at
the first look that finds a gap of at most 0.1 nats and a k-hat below 0.7 in 2,000 draws. Looks are not counted, and
nobody's imports are; compilation is. Times are processor seconds of one thread. The evidence is the best estimate of
``posteriordb.csv``, whose rows also say how long Pyro's NUTS takes to errors of 0.1; with ``--nuts`` it runs again, in
turn with the rest.

A finished job is one row of the CSV file ``--output``; an interrupted program goes on where it stopped.
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

import posteriordb
import posteriordb_report
import pyro
from machine import processor
from posteriordb_models import Posterior, names
from row_files import append_row, read_rows

import pyro_flowguides as fg
from pyro_flowguides.diagnostics import Diagnosis, WeightedDraws, diagnose_draws

OURS, SHORTEST = "pyro_flowguides iaf", "pyro_flowguides iaf, shortest"
LIMITS = (100, 200, 400, 1000, 2000)
NUTS = posteriordb.NUTS_LABEL
GAP, KHAT = 0.1, 0.7
LOOK_EVERY, MOST_STEPS, LOOK_DRAWS = 100, 2000, 2000


@dataclass(frozen=True)
class Result:
    """A finished job: processor seconds until it was there, or until it was given up."""

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
    root: Path
    posterior: str
    guide: str
    seed: int
    log_evidence: float
    nuts_seconds: float


def run_job(job: Job) -> Result:
    posterior = posteriordb.prepare(job.root, job.posterior, job.seed)
    today, where = datetime.date.today().isoformat(), processor()
    head = job.posterior, job.guide, job.seed
    load_libraries(job.guide)
    try:
        reached, seconds, steps, gap, khat = racer(job.guide)(posterior, job)
    except Exception as error:  # whatever a guide raises: the others are to run all the same
        print(f"{job.posterior}, {job.guide}: {type(error).__name__}: {error}", file=sys.stderr)
        reached, seconds, steps, gap, khat = False, float("nan"), 0, float("nan"), float("nan")
    return Result(*head, reached, seconds, steps, gap, khat, today, where)


def load_libraries(guide: str) -> None:
    """Those that the competitors import when they first need them: the verdict, optimizers, and NumPyro."""
    modules = ["arviz", "torch._dynamo", *(["posteriordb_numpyro"] if guide in posteriordb.NUMPYRO_PEERS else [])]
    for module in modules:
        importlib.import_module(module)


Outcome = tuple[bool, float, int, float, float]


def racer(guide: str) -> Callable[[Posterior, Job], Outcome]:
    if guide in (OURS, SHORTEST):
        return race_fit if guide == OURS else race_shortest
    if guide == NUTS:
        return race_nuts
    advance = advance_numpyro if guide in posteriordb.NUMPYRO_PEERS else advance_pyro
    return partial(race_peer, advance)


def race_fit(posterior: Posterior, job: Job, **options: Any) -> Outcome:
    begin = time.process_time()
    guide = fg.AutoIAF(posterior.model)
    result = fg.fit(posterior.model, guide, seed=job.seed, progress=False, **options, **posterior.data)
    seconds = time.process_time() - begin
    pyro.set_rng_seed(0)
    look = diagnose_draws(posteriordb.weigh_guide(posterior, guide, posteriordb.DRAWS))
    return there(look, job), seconds, result.steps, job.log_evidence - look.elbo, look.khat


def race_shortest(posterior: Posterior, job: Job) -> Outcome:
    """The fit with the least limit that is enough, each of them begun anew."""
    for limit in LIMITS:
        outcome = race_fit(posterior, job, steps=limit)
        if outcome[0]:
            break
    return outcome


def race_nuts(posterior: Posterior, job: Job) -> Outcome:
    settings = posteriordb.Job(job.root, job.posterior, NUTS, job.seed, None, job.nuts_seconds)
    found = posteriordb.run_nuts(posterior, settings)
    return found["verdict"] == "reached", found["cpu_seconds"], found["steps"], float("nan"), float("nan")


def race_peer(advance: Callable[[Posterior, Job], Iterator[WeightedDraws]], posterior: Posterior, job: Job) -> Outcome:
    """Look after every stretch of training; the clock runs in between."""
    spent, steps = 0.0, 0
    stretches = advance(posterior, job)
    while True:
        begin = time.process_time()
        next(stretches)
        spent += time.process_time() - begin
        steps += LOOK_EVERY
        look = diagnose_draws(next(stretches))
        if there(look, job) or steps >= MOST_STEPS:
            return there(look, job), spent, steps, job.log_evidence - look.elbo, look.khat


def there(look: Diagnosis, job: Job) -> bool:
    return job.log_evidence - look.elbo <= GAP and look.khat < KHAT


def advance_pyro(posterior: Posterior, job: Job) -> Iterator[Any]:
    """Train, and hand weighted draws out, in turns."""
    guide, svi = posteriordb.make_peer(posterior, job.guide)
    while True:
        for _ in range(LOOK_EVERY):
            svi.step(**posterior.data)
        yield None
        yield posteriordb.weigh_guide(posterior, guide, LOOK_DRAWS)


def advance_numpyro(posterior: Posterior, job: Job) -> Iterator[Any]:
    """The same in NumPyro, a compiled scan over the steps of a stretch."""
    import posteriordb_numpyro

    name, options = posteriordb.NUMPYRO_PEERS[job.guide]
    particles, rate = posteriordb.PEER_PARTICLES, posteriordb.PEER_RATE
    stretches = posteriordb_numpyro.stretches(
        posterior, name, options, seed=job.seed, steps=LOOK_EVERY, particles=particles, rate=rate
    )
    for weigh in stretches:
        yield None
        yield weigh(LOOK_DRAWS)


# -- all jobs ----------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, str]]) -> str:
    """Processor seconds by posterior and guide; in brackets the gap of those that did not get there."""
    known = [OURS, SHORTEST, *posteriordb.PEERS, *posteriordb.NUMPYRO_PEERS, NUTS]
    guides = [guide for guide in known if any(row["guide"] == guide for row in rows)]
    lines = [f"| CPU s | {' | '.join(guides)} |", "|---" * (len(guides) + 1) + "|"]
    for posterior in dict.fromkeys(row["posterior"] for row in rows):
        found = {row["guide"]: row for row in rows if row["posterior"] == posterior}
        lines.append(f"| {posterior} | {' | '.join(cell(found.get(guide)) for guide in guides)} |")
    return "\n".join(lines)


def cell(row: dict[str, str] | None) -> str:
    if row is None:
        return ""
    if row["reached"] == "True":
        return f"**{float(row['cpu_seconds']):.1f}**"
    short = f"not in {float(row['cpu_seconds']):.0f}"
    return short if row["guide"] == NUTS else f"{short} ({float(row['gap']):.2g}, k-hat {float(row['khat']):.2f})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posteriordb", type=Path, required=True)
    parser.add_argument("--posteriors", type=partial(str.split, sep=","), help="comma-separated; by default all")
    parser.add_argument("--guides", type=partial(str.split, sep=","), help="comma-separated; by default all of Pyro's")
    parser.add_argument("--numpyro", action="store_true", help="NumPyro's guides too, if it is installed")
    parser.add_argument("--nuts", action="store_true", help="Pyro's NUTS too, until its errors are below 0.1")
    parser.add_argument("--nuts-seconds", type=float, default=120.0, help="processor time at which to give NUTS up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evidence", type=Path, default=Path("benchmarks/results/posteriordb.csv"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/posteriordb_race.csv"))
    options = parser.parse_args(argv)
    root = options.posteriordb
    root = root / "posterior_database" if (root / "posterior_database").is_dir() else root
    known = posteriordb_report.read(options.evidence)
    evidence = {
        name: posteriordb_report.best_log_evidence(rows)
        for name, rows in known[~known["is_chain"]].groupby("posterior")
    }
    guides = options.guides or [OURS, SHORTEST, *posteriordb.PEERS]
    guides += [*(posteriordb.NUMPYRO_PEERS if options.numpyro else ()), *([NUTS] if options.nuts else ())]
    done = {(row["posterior"], row["guide"], row["seed"]) for row in read_rows(options.output)}
    jobs = [
        Job(root, posterior, guide, options.seed, evidence[posterior], options.nuts_seconds)
        for posterior in options.posteriors or names(root)
        for guide in guides
        if (posterior, guide, str(options.seed)) not in done
    ]
    for result in posteriordb.run_all(run_job, jobs, processes=1):
        append_row(options.output, asdict(result))
        print(result, flush=True)
    text = table(read_rows(options.output))
    print(text)
    note = f"`benchmarks/posteriordb_race.py`, {datetime.date.today()}, {posteriordb.versions(OURS)}"
    options.output.with_suffix(".md").write_text(f"{note}, one thread of {processor()}.\n\n{text}\n", "utf-8")


if __name__ == "__main__":
    main()
