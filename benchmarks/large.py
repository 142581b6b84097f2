"""Time and memory of a fit for up to 10,000 latent variables, with narrow networks.

    python benchmarks/large.py

A hierarchical normal model, flows of hidden width 64 and few directions, 8 particles, float32, one thread. For every
flow and dimension, one process takes steps of ``fit``, with the total and with the path gradient, and another runs
``fit`` with 100 steps, warm start and diagnosis included. Memory is the peak of the process beyond its peak after the
same work in 20 dimensions. Rows go to ``large.csv``; table and figure are made from them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pyro
import torch
from machine import processor
from row_files import append_row, read_rows
from speed_ours import make_model
from tables import markdown_table

import pyro_flowguides as fg

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DIMS = (100, 300, 1000, 3000, 10000)
PARTICLES = 8
FIT_STEPS = 100
#: Dimensions of the work that comes before the measured one, so that libraries are loaded.
WARM_UP_DIM = 20
FLOWS: dict[str, dict[str, Any]] = {
    "iaf": {},
    "planar": {},
    "sylvester": {"variant": "householder", "bottleneck": 8, "reflections": 8},
    "realnvp": {},
}
#: Titles of tables and panels, by column of the rows.
PANELS = {
    "step_ms": "step, ms",
    "path_ms": "step with the path gradient, ms",
    "fit_s": f"fit of {FIT_STEPS} steps with diagnosis, s",
    "step_mib": "memory of a step, MiB",
    "fit_mib": "memory of the fit, MiB",
}
RESULTS = Path(__file__).parent / "results" / "large.csv"


# -- one process -------------------------------------------------------------------------------------------------------


def time_steps(flow: str, dim: int, rounds: int) -> dict[str, float]:
    """Return the processor milliseconds of a step by kind of gradient, and the number of parameters."""
    pyro.clear_param_store()
    model = make_model(dim)
    guide = fg.AutoFlow(model, flow, **FLOWS[flow])
    measured: dict[str, float] = {}
    for name, path_gradient in (("step_ms", False), ("path_ms", True)):
        stepper = fg.inference.Stepper(
            model, guide, num_particles=PARTICLES, lr=1e-3, path_gradient=path_gradient, compile=False
        )
        times = []
        for place in range(rounds + 3):
            begin = time.process_time()
            stepper.step()
            if place >= 3:  # the first three warm up
                times.append(1e3 * (time.process_time() - begin))
        measured[name] = statistics.median(times)
        stepper.release()
        del stepper  # frees the moments of Adam
    return {"parameters": sum(value.numel() for value in guide.parameters()), **measured}


def time_fit(flow: str, dim: int, rounds: int) -> dict[str, float]:
    """Return the processor seconds of a short fit."""
    pyro.clear_param_store()
    model = make_model(dim)
    begin = time.process_time()
    result = fg.fit(
        model, fg.AutoFlow(model, flow, **FLOWS[flow]), steps=FIT_STEPS, num_particles=PARTICLES, progress=False
    )
    assert result.diagnosis is not None, result.why_no_verdict
    return {"fit_s": time.process_time() - begin}


KINDS: dict[str, Callable[[str, int, int], dict[str, float]]] = {"step": time_steps, "fit": time_fit}


def peak_memory() -> float:
    """Return the peak memory of this process so far, in MiB.

    On Linux the resource usage of a process begins at that of the process that started it; the status does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text("ascii"))[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(kind: str, flow: str, dim: int, rounds: int) -> None:
    """Measure in this process, and print the result as JSON."""
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    KINDS[kind](flow, WARM_UP_DIM, 1)
    before = peak_memory()
    result = KINDS[kind](flow, dim, rounds)
    print(json.dumps({**result, f"{kind}_mib": peak_memory() - before}))


def measure(flow: str, dim: int, rounds: int) -> dict[str, Any]:
    """Return the row of a flow and a dimension, measured in processes of their own."""
    row: dict[str, Any] = {"flow": flow, "dim": dim}
    for kind in KINDS:
        command = [sys.executable, __file__, "--worker", kind, flow, str(dim), str(rounds)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row |= json.loads(done.stdout.splitlines()[-1])
    rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
    machine = f"torch {torch.__version__}, Pyro {pyro.__version__}, one thread on {processor()}"
    return {**rounded, "date": datetime.date.today(), "machine": machine}


# -- table and figure --------------------------------------------------------------------------------------------------


def format_number(value: float) -> str:
    """Format a number with at least three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def make_tables(rows: list[dict[str, Any]]) -> str:
    """Return a table for every measured quantity: flows down, dimensions across."""
    dims = list(dict.fromkeys(row["dim"] for row in rows))
    tables = []
    for column, title in {"parameters": "parameters", **PANELS}.items():
        cells = {(row["flow"], row["dim"]): format_number(float(row[column])) for row in rows}
        lines = [[flow, *(cells.get((flow, dim), "") for dim in dims)] for flow in FLOWS]
        tables.append(markdown_table([title, *(f"D = {dim}" for dim in dims)], lines))
    return "\n\n".join(tables)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot all numbers against D, both axes logarithmic, with lines of slope one for comparison."""
    figure, axes = plt.subplots(2, 3, figsize=(10, 6.4))
    for axis, (column, label) in zip(axes.flat, PANELS.items(), strict=False):
        for flow in FLOWS:
            points = [(int(row["dim"]), float(row[column])) for row in rows if row["flow"] == flow]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=flow)
        dims = sorted({int(row["dim"]) for row in rows})
        top = max(float(row[column]) for row in rows)
        axis.plot(dims, [top * dim / dims[-1] for dim in dims], color="grey", linestyle=":", label="proportional to D")
        axis.set(xscale="log", yscale="log", xlabel="latent variables D", title=label)
        axis.title.set_fontsize(9)
    axes[1, 2].axis("off")
    axes[1, 2].legend(*axes[0, 0].get_legend_handles_labels(), loc="center")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(path: Path) -> str:
    """Write table and figure beside the CSV file, and return the text."""
    rows = read_rows(path)
    about = f"{rows[-1]['date']}, {rows[-1]['machine']}; {PARTICLES} particles, float32, processor time."
    text = f"# Many latent variables\n\n{about}\n\n{make_tables(rows)}\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(rows, path.with_suffix(".png"))
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="*", default=DIMS)
    parser.add_argument("--flows", nargs="*", default=list(FLOWS), choices=list(FLOWS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file; its rows are kept")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        kind, flow, dim, rounds = options.worker
        work(kind, flow, int(dim), int(rounds))
        return
    done = {(row["flow"], int(row["dim"])) for row in read_rows(options.output)}
    for flow in options.flows:
        for dim in options.dims:
            if (flow, dim) not in done:
                append_row(options.output, measure(flow, dim, options.rounds))
    print(write_report(options.output))


if __name__ == "__main__":
    main()
