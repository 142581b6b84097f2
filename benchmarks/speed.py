"""The cost of training steps, inverses and fits, next to Pyro, NumPyro, FlowJAX, zuko, normflows and a floor.

    python benchmarks/speed.py --numpyro PYTHON --peers PYTHON

PYTHON is an interpreter with libraries that are not installed here: one with NumPyro and FlowJAX, one with torch,
zuko and normflows. Competitors whose libraries are missing are left out. Every competitor runs in a process of its
own on one thread. Within a setting, they take turns. Processor times are compared by their medians, and by the
medians of the ratios within a round. Compilation is timed separately.

Studies:
    steps    a step of a three-layer IAF on a hierarchical normal model with D latent variables, P particles
    inverse  the inverse of such a flow with random weights, batch of 256
    vae      a step of an MLP VAE with 64 latent variables
    gap      wall time until the ELBO is within 0.1 nat of the known evidence, compilation included

Each study writes ``speed_STUDY.csv``, the table ``speed_STUDY.md`` and the figure ``speed_STUDY.png``.
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
#: Hidden widths of ``AutoIAF`` for every D.
HIDDEN = 64
#: Wall seconds after which a peer that is not near the evidence is stopped.
PATIENCE = 30.0
#: Processor seconds of a turn.
TURN = 0.05
#: Rounds of turns; and smaller numbers of rounds for calls that take longer than some seconds.
ROUNDS, FEWER_ROUNDS = 9, ((1.0, 3), (0.2, 5))


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
    """The settings of a study, those of a quick run, and the facts that workers report in addition to times."""

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
    "vae": Study(vaes(("normal", 100), ("normal", 500), ("iaf", 100), ("iaf", 500)), quick=vaes(("iaf", 100))),
    "gap": Study(
        gaps(("location", 10), ("location", 100), ("scale", 10), ("scale", 100)),
        quick=gaps(("location", 10), ("scale", 10)),
        facts=("near", "seconds", "steps", "gap"),
        timed=False,
    ),
}


def for_worker(study: str, setting: Setting) -> Setting:
    """Return a setting with everything that a worker needs to know."""
    if study != "gap":
        return setting
    return {**setting, "log_evidence": log_evidence(setting["target"], setting["dim"]), "seconds": PATIENCE}


def measure(study: str, setting: Setting, workers: Sequence[Worker], rounds: int) -> list[dict[str, Any]]:
    """Return a row for every worker. They are set up one after the other, and then take turns."""
    setups = {worker.name: worker.ask(setup=for_worker(study, setting)) for worker in workers}
    times = take_turns(setups, workers, rounds) if STUDIES[study].timed else {}
    return [
        {
            **setting,
            "competitor": worker.name,
            "ms": speed_report.median(times.get(worker.name, [])),
            "first": f"{setups[worker.name].get('first', float('nan')):.3g}",
            **{fact: setups[worker.name].get("facts", {}).get(fact, "") for fact in STUDIES[study].facts},
            "left_out": worker.left_out,
            "rounds": " ".join(f"{ms:.4g}" for ms in times.get(worker.name, [])),
        }
        for worker in workers
    ]


def take_turns(
    setups: Mapping[str, Mapping[str, Any]], workers: Sequence[Worker], rounds: int
) -> dict[str, list[float]]:
    """Return the milliseconds per step of every round and worker; none for workers that fail."""
    running = [worker for worker in workers if setups[worker.name]]
    times: dict[str, list[float]] = {worker.name: [] for worker in running}
    slowest = max((setup["call"] for setup in setups.values() if setup), default=0.0)
    for _ in range(next((fewer for limit, fewer in FEWER_ROUNDS if slowest > limit and fewer < rounds), rounds)):
        for worker in list(running):
            answer = worker.ask(run=max(1, round(TURN / max(1e-9, setups[worker.name]["call"]))))
            if answer:
                times[worker.name].append(answer["ms"])
            else:
                running.remove(worker)
                times[worker.name].clear()
    return times


def run(study: str, settings: Sequence[Setting], options: argparse.Namespace) -> Path:
    """Run all settings of a study, and return the path of the file with its rows."""
    interpreters = {"own": sys.executable, "numpyro": options.numpyro, "peers": options.peers}
    if options.device != "cpu":
        del interpreters["numpyro"]
    suffix = "" if options.device == "cpu" else f"_{options.device}"
    path: Path = options.output / f"speed_{study}{suffix}.csv"
    path.unlink(missing_ok=True)
    about = {"date": str(datetime.date.today()), "hardware": hardware(options.device)}
    with tempfile.TemporaryDirectory() as cache:  # an empty cache for the compilers
        names = [name for name in COMPETITORS[study] if not options.only or name in options.only]
        workers = [Worker(study, name, interpreters, options.device, Path(cache)) for name in names]
        try:
            for worker in workers:
                worker.start()
            for setting in settings:
                for row, worker in zip(measure(study, setting, workers, options.rounds), workers, strict=True):
                    versions = ", ".join(f"{name} {version}" for name, version in worker.versions.items())
                    append_row(path, {**row, **about, "versions": versions})
                    summary = ", ".join(f"{key} {row[key]}" for key in ("ms", "first", *STUDIES[study].facts))
                    print(*setting.values(), f"{worker.name}: {row['left_out'] or summary}", flush=True)
        finally:
            for worker in workers:
                worker.stop()
    return path


def hardware(device: str) -> str:
    """Return the names of the processors that run the studies."""
    if device == "cpu":
        return processor()
    import torch

    return f"{torch.cuda.get_device_name()}, {processor()}"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", nargs="*", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--numpyro", default=sys.executable, help="interpreter that has NumPyro and FlowJAX")
    parser.add_argument("--peers", default=sys.executable, help="interpreter that has torch, zuko and normflows")
    parser.add_argument("--only", nargs="*", metavar="COMPETITOR", help="only these, by their names in the tables")
    parser.add_argument("--quick", action="store_true", help="a few settings of every study")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", default="cpu", help="cuda: wall time on a GPU of everything built on torch")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for tables and figures")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    for study in options.studies:
        settings = STUDIES[study].quick if options.quick else STUDIES[study].settings
        print(speed_report.write(study, run(study, settings, options)))


if __name__ == "__main__":
    main()
