"""Plain SVI with every flow as the guide: does it crash, and how far does it fall behind a Gaussian guide?

    python benchmarks/svi.py --seeds 5 --jobs 2

Every model of ``svi_models.py`` is trained for 1,000 steps by :class:`pyro.infer.SVI`, as Pyro's tutorials do it:
with one particle and with 16 vectorized ones, by Adam at a step size of 0.01 and by ClippedAdam at 0.02. A run crashes
if a step raises, or if the loss or the bound at the end is not finite. The bound is the mean of log p − log q over
4,000 draws of the trained guide. AutoMultivariateNormal runs beside the flows, with the same seeds.

Rows go to ``svi.csv``; runs that it holds are not repeated. The table ``svi.md`` is made from them.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import multiprocessing
import statistics
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import pyro
import torch
from machine import processor
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from row_files import append_row, read_rows
from svi_models import MODELS
from tables import markdown_table

import pyro_flowguides as fg

RESULTS = Path(__file__).parent / "results" / "svi.csv"
GAUSSIAN = "multivariate normal"
OPTIMIZERS = {
    "Adam 0.01": lambda: pyro.optim.Adam({"lr": 0.01}),
    "ClippedAdam 0.02": lambda: pyro.optim.ClippedAdam({"lr": 0.02}),
}
NUM_SAMPLES = 4000
#: A flow may end this number of nats below the Gaussian guide.
ALLOWED_LOSS = 2.0


class Run(NamedTuple):
    """One training run."""

    model: str
    guide: str
    num_particles: int
    optimizer: str
    seed: int


def train(run: Run, steps: int) -> tuple[float, int | None]:
    """Return the final bound, and the step at which the run crashed if it did."""
    pyro.clear_param_store()
    pyro.set_rng_seed(run.seed)
    model = MODELS[run.model]
    guide = AutoMultivariateNormal(model) if run.guide == GAUSSIAN else fg.AutoFlow(model, run.guide)
    vectorized = run.num_particles > 1
    elbo = Trace_ELBO(run.num_particles, vectorize_particles=vectorized, max_plate_nesting=1)
    svi = SVI(model, guide, OPTIMIZERS[run.optimizer](), elbo)
    step = 0
    try:
        for step in range(steps):
            if not abs(svi.step()) < float("inf"):
                return float("nan"), step
        with torch.no_grad():
            elbo = Trace_ELBO(NUM_SAMPLES, vectorize_particles=True, max_plate_nesting=1)
            bound = -elbo.loss(model, guide)
    except (ValueError, RuntimeError):
        return float("nan"), step
    return bound, None if abs(bound) < float("inf") else steps


def measure(job: tuple[Run, int]) -> dict[str, object]:
    """Return the row of a run."""
    run, steps = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    begin = time.process_time()
    bound, crashed_at = train(run, steps)
    return {
        **run._asdict(),
        "steps": steps,
        "bound": f"{bound:.3f}",
        "crashed_at": "" if crashed_at is None else crashed_at,
        "cpu_seconds": f"{time.process_time() - begin:.2f}",
        "date": datetime.date.today(),
        "machine": f"torch {torch.__version__}, one thread on {processor()}",
    }


def write_table(path: Path) -> str:
    """Write the table beside the CSV file, and return its text."""
    rows = read_rows(path)
    by_run = {tuple(row[name] for name in Run._fields): row for row in rows}
    cells, behind_by_optimizer = [], dict.fromkeys(OPTIMIZERS, 0)
    for guide in dict.fromkeys(row["guide"] for row in rows):
        mine = [row for row in rows if row["guide"] == guide]
        crashes, differences = 0, []
        for row in mine:
            gaussian = by_run[tuple(GAUSSIAN if name == "guide" else row[name] for name in Run._fields)]
            if gaussian["crashed_at"]:
                continue
            if row["crashed_at"]:
                crashes += 1
                continue
            differences.append(float(row["bound"]) - float(gaussian["bound"]))
            behind_by_optimizer[row["optimizer"]] += differences[-1] < -ALLOWED_LOSS
        counts = [len(mine), sum(bool(row["crashed_at"]) for row in mine), crashes]
        counts.append(sum(difference < -ALLOWED_LOSS for difference in differences))
        cells.append(
            [guide, *map(str, counts), f"{min(differences, default=math.nan):.1f}", f"{_median(differences):.2f}"]
        )
    header = ["guide", "runs", "crashes", "crashes where the Gaussian has none", "more than 2 nats behind it"]
    header += ["worst difference, nats", "median difference, nats"]
    first, models = rows[0], ", ".join(dict.fromkeys(row["model"] for row in rows))
    behind = ", ".join(f"{count} with {optimizer}" for optimizer, count in behind_by_optimizer.items())
    text = f"""# Flows as guides in plain SVI

`python benchmarks/svi.py`, {first["date"]}, {first["machine"]}.

Number of seeds: {len({row["seed"] for row in rows})}. 1 and 16 particles, {first["steps"]} steps, no warm start.
Differences are of the bound at the end to that of AutoMultivariateNormal in the same setting with the same seed;
positive where the flow is better. More than 2 nats behind are {behind}. Models: {models}.

{markdown_table(header, cells)}
"""
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated names; by default all")
    parser.add_argument(
        "--guides", default=",".join([GAUSSIAN, *fg.flows.FLOWS]), help="by default the Gaussian and all flows"
    )
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file")
    options = parser.parse_args()
    done = {tuple(row[name] for name in Run._fields) for row in read_rows(options.output)}
    everything = itertools.product(
        range(options.seeds), options.models.split(","), options.guides.split(","), (1, 16), OPTIMIZERS
    )
    runs = [Run(model, guide, particles, optimizer, seed) for seed, model, guide, particles, optimizer in everything]
    jobs = [(run, options.steps) for run in runs if tuple(map(str, run)) not in done]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for row in pool.imap_unordered(measure, jobs):
            append_row(options.output, row)
    print(write_table(options.output))


if __name__ == "__main__":
    main()
