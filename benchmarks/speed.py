"""What training steps, inverses and whole fits cost: ours beside Pyro, NumPyro, FlowJAX, zuko, normflows and the floor.

    python benchmarks/speed.py --numpyro PYTHON --peers PYTHON

PYTHON are interpreters with the libraries that are not installed here: one with NumPyro and FlowJAX, one with torch,
zuko and normflows. What cannot be imported is left out. Every competitor runs in a process of its own on one thread.
Within a setting they take turns, and what is compared is processor time: medians, and medians of the ratios within a
round. Compilation is timed apart.

Studies:
    steps    a step of a three-layer IAF on a hierarchical normal model with D latent variables, P particles
    inverse  the inverse of such a flow with random weights, batch of 256
    vae      a step of an MLP VAE with 64 latent variables
    gap      wall time until the ELBO is within 0.1 nat of the known evidence, compilation included

Each writes ``speed_STUDY.csv``, the table ``speed_STUDY.md`` and the figure ``speed_STUDY.png``.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import speed_report
from machine import processor
from row_files import append_row
from speed_gap import log_evidence
from speed_workers import COMPETITORS, Worker

RESULTS = Path(__file__).parent / "results"
Setting = dict[str, Any]
#: Hidden widths of ``AutoIAF``, whatever D.
HIDDEN = 64
#: Wall seconds after which a peer is given up that is not near the evidence.
PATIENCE = 30.0
#: Processor seconds of a turn; and rounds, fewer where a single call takes longer than so many seconds.
TURN, ROUNDS, FEWER_ROUNDS = 0.05, 9, ((1.0, 3), (0.2, 5))


def steps(*settings: tuple[int, int, int]) -> list[Setting]:
    return [{"dim": dim, "particles": particles, "hidden": hidden} for dim, particles, hidden in settings]


def inverses(*dims: int) -> list[Setting]:
    return [{"dim": dim, "batch": 256, "hidden": HIDDEN} for dim in dims]


def vaes(*settings: tuple[str, int]) -> list[Setting]:
    return [{"posterior": posterior, "batch": batch} for posterior, batch in settings]


def gaps(*settings: tuple[str, int]) -> list[Setting]:
    return [{"target": target, "dim": dim} for target, dim in settings]


@dataclass(frozen=True)
class Study:
    """The settings in which competitors take part, those of a quick run, and facts that workers tell beside times."""

    settings: Sequence[Setting]
    quick: Sequence[Setting]
    facts: tuple[str, ...] = ()
    timed: bool = True


STUDIES = {
    "steps": Study(
        steps(
            *((2, 32, HIDDEN), (10, 1, HIDDEN), (10, 32, HIDDEN), (10, 256, HIDDEN), (100, 32, HIDDEN)),
            *((500, 32, HIDDEN), (500, 256, HIDDEN), (1000, 32, HIDDEN), (10000, 32, HIDDEN)),
            *((10, 32, 10), (100, 32, 100), (500, 32, 500)),
        ),
        quick=steps((10, 32, HIDDEN), (100, 32, HIDDEN)),
    ),
    "inverse": Study(
        inverses(10, 100, 500), quick=inverses(10, 100), facts=("error32", "largest32", "error64", "largest64")
    ),
    "vae": Study(
        vaes(("normal", 100), ("normal", 500), ("iaf", 100), ("iaf", 500)),
        quick=vaes(("iaf", 100)),
    ),
    "gap": Study(
        gaps(("location", 10), ("location", 100), ("scale", 10), ("scale", 100)),
        quick=gaps(("location", 10), ("scale", 10)),
        facts=("near", "seconds", "steps", "gap"),
        timed=False,
    ),
}


def told(study: str, setting: Setting) -> Setting:
    """What a worker has to know of a setting."""
    if study != "gap":
        return setting
    return {**setting, "log_evidence": log_evidence(setting["target"], setting["dim"]), "seconds": PATIENCE}


def measure(study: str, setting: Setting, workers: Sequence[Worker], rounds: int) -> list[dict[str, Any]]:
    """A row for every worker: set up one after the other, then in turns."""
    found = {worker.name: worker.ask(setup=told(study, setting)) for worker in workers}
    running = [worker for worker in workers if found[worker.name]]
    times: dict[str, list[float]] = {worker.name: [] for worker in workers}
    if STUDIES[study].timed and running:
        slowest = max(answer["call"] for answer in found.values() if answer)
        for _ in range(next((most for limit, most in FEWER_ROUNDS if slowest > limit and most < rounds), rounds)):
            for worker in list(running):
                answer = worker.ask(run=max(1, round(TURN / max(1e-9, found[worker.name]["call"]))))
                if answer:
                    times[worker.name].append(answer["ms"])
                else:
                    running.remove(worker)
                    times[worker.name].clear()
    return [
        {
            **setting,
            "competitor": worker.name,
            "ms": speed_report.median(times[worker.name]),
            "first": f"{found[worker.name].get('first', float('nan')):.3g}",
            **{fact: found[worker.name].get("facts", {}).get(fact, "") for fact in STUDIES[study].facts},
            "left_out": worker.left_out,
            "rounds": " ".join(f"{ms:.4g}" for ms in times[worker.name]),
        }
        for worker in workers
    ]


def run(study: str, arguments: argparse.Namespace, about: Mapping[str, str]) -> Path:
    """All settings of a study; the file with the rows."""
    interpreters = {"own": sys.executable, "numpyro": arguments.numpyro, "peers": arguments.peers}
    if arguments.device != "cpu":
        del interpreters["numpyro"]
    suffix = "" if arguments.device == "cpu" else f"_{arguments.device}"
    path: Path = arguments.output / f"speed_{study}{suffix}.csv"
    path.unlink(missing_ok=True)
    settings = STUDIES[study].quick if arguments.quick else STUDIES[study].settings
    with tempfile.TemporaryDirectory() as cache:  # so that compilation starts from nothing
        names = [name for name in COMPETITORS[study] if not arguments.only or name in arguments.only]
        workers = [Worker(study, name, interpreters, arguments.device, Path(cache)) for name in names]
        try:
            for worker in workers:
                worker.start()
            for setting in settings:
                for row, worker in zip(measure(study, setting, workers, arguments.rounds), workers, strict=True):
                    versions = ", ".join(f"{name} {version}" for name, version in worker.versions.items())
                    append_row(path, {**row, **about, "versions": versions})
                    told_of = ", ".join(f"{key} {row[key]}" for key in ("ms", "first", *STUDIES[study].facts))
                    print(*setting.values(), f"{worker.name}: {row['left_out'] or told_of}", flush=True)
        finally:
            for worker in workers:
                worker.stop()
    return path


def hardware(device: str) -> str:
    if device == "cpu":
        return processor()
    import torch

    return f"{torch.cuda.get_device_name()}, {processor()}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", nargs="*", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--numpyro", default=sys.executable, help="interpreter that has NumPyro and FlowJAX")
    parser.add_argument("--peers", default=sys.executable, help="interpreter that has torch, zuko and normflows")
    parser.add_argument("--only", nargs="*", metavar="COMPETITOR", help="only these, by their names in the tables")
    parser.add_argument("--quick", action="store_true", help="a few settings of every study")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", default="cpu", help="cuda: wall time of what runs on torch there")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for tables and figures")
    given = parser.parse_args(arguments)
    about = {"date": str(datetime.date.today()), "hardware": hardware(given.device)}
    for study in given.studies:
        path = run(study, given, about)
        print(speed_report.write(study, path))


if __name__ == "__main__":
    main()
