"""Default fits on posteriordb: distance from the reference draws, time, and whether the verdict agrees.

    python benchmarks/posteriordb.py --posteriordb PATH                      # every flow, fitted by fg.fit
    python benchmarks/posteriordb.py --posteriordb PATH --peers --nuts       # also Pyro's guides, and NUTS
    python benchmarks/posteriordb.py --posteriordb PATH --numpyro            # also NumPyro's guides, if installed
    python benchmarks/posteriordb.py --report docs                           # tables and figure from all results

PATH is a copy of https://github.com/stan-dev/posteriordb. Every posterior and guide is a job in a process of its own:
float64, one thread, default options. A finished job is a row of the CSV file ``--output``; an interrupted program
resumes where it stopped. docs/posteriordb.md explains the columns.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import math
import multiprocessing
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyro
import torch
from machine import processor
from posteriordb_fits import NUMPYRO_PEERS, NUTS_LABEL, PEERS, Job, prepare, run_guide
from posteriordb_models import names
from posteriordb_nuts import run_nuts
from row_files import append_row, read_rows
from tqdm import tqdm

from pyro_flowguides.flows import FLOWS

# -- one job -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A finished job. Errors are the largest over all parameters, ``resampled`` ones those after resampling."""

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


def run_job(job: Job) -> Row:
    """Run a job in this process. A failure is a result too."""
    posterior = prepare(job.root, job.posterior, job.seed)
    run = run_nuts if job.guide == NUTS_LABEL else run_guide
    try:
        results = run(posterior, job)
    except Exception as error:  # a guide may raise anything, and the other jobs must run
        results = {"verdict": "failed", "note": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    results |= {"date": datetime.date.today().isoformat(), "hardware": processor(), "versions": versions(job.guide)}
    return Row(*job.key[:2], job.seed, job.limit, **results)


# -- all jobs ----------------------------------------------------------------------------------------------------------


@cache
def versions(guide: str) -> str:
    """Return the versions of all libraries that fit a guide."""
    names = [f"Python {platform.python_version()}", f"torch {torch.__version__}", f"Pyro {pyro.__version__}"]
    if guide in NUMPYRO_PEERS:
        names += [f"NumPyro {importlib.metadata.version('numpyro')}", f"JAX {importlib.metadata.version('jax')}"]
    return ", ".join([*names, f"pyro_flowguides {importlib.metadata.version('pyro-flowguides')}{_commit()}"])


def _commit() -> str:
    """Return the commit of the package, if git is available."""
    command = ["git", "-C", str(Path(__file__).parent), "log", "-1", "--format=%h", "--", "../pyro_flowguides"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
    return f" ({commit})" if commit else ""


def run_all(run: Callable[[Any], Any], jobs: Iterable[Any], processes: int) -> Iterator[Any]:
    """Run every job in a new process; if the system can fork, in a copy of one that has imported all libraries."""
    os.environ |= {"OMP_NUM_THREADS": "1", "NPROC": "1"}  # NPROC: threads of XLA
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    # Optimizers import the last of these at their first use.
    context.set_forkserver_preload(["pyro_flowguides", "arviz", "pandas", "torch._dynamo"])
    with context.Pool(processes, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(run, jobs, chunksize=1)


def finished(path: Path) -> set[tuple[str, ...]]:
    """Return the keys of the jobs that have a row."""
    return {(row["posterior"], row["guide"], row["seed"], row["limit"]) for row in read_rows(path)}


def describe(row: Row) -> str:
    """Return a line about a finished job. The report compares with the best evidence of all guides."""
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
    """Return the requested jobs, guide by guide."""
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
    parser.add_argument("--posteriordb", type=Path, help="folder of posteriordb; without it, nothing is run")
    parser.add_argument("--posteriors", type=listed, help="comma-separated; by default all that have a model")
    parser.add_argument(
        "--guides", type=listed, default=list(FLOWS), help="comma-separated flows or peers; by default all flows"
    )
    parser.add_argument("--peers", action="store_true", help="also Pyro's guides, by plain SVI with the same budget")
    parser.add_argument("--numpyro", action="store_true", help="also NumPyro's flow guides with the same budget")
    parser.add_argument("--nuts", action="store_true", help="also Pyro's NUTS, until its errors are small")
    parser.add_argument("--nuts-seconds", type=float, default=120.0, help="processor time after which NUTS is stopped")
    parser.add_argument("--steps", type=int, help="fewer steps, to try the program; the report ignores them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at once; no more than cores if times matter")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/posteriordb.csv"))
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write tables and figure to FOLDER")
    arguments = parser.parse_args(argv)
    all_guides = [*FLOWS, *PEERS, *NUMPYRO_PEERS]
    if unknown := set(arguments.guides) - set(all_guides):
        parser.error(f"unknown guides {', '.join(sorted(unknown))}; known guides: {', '.join(all_guides)}")
    needs_numpyro = arguments.numpyro or not NUMPYRO_PEERS.keys().isdisjoint(arguments.guides)
    if needs_numpyro and importlib.util.find_spec("numpyro") is None:
        parser.error("NumPyro's guides need numpyro and jax: pip install 'pyro-flowguides[benchmarks]'")
    if arguments.posteriordb is None and arguments.report is None:
        parser.error("pass --posteriordb to run, --report to write a report, or both")
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
