"""Time and memory of a fit against the number of latent variables: up to 10,000, with networks narrower than that.

    python benchmarks/large.py

A hierarchical normal model, flows of hidden width 64 and few directions, 8 particles, float32, one thread. For every
flow and dimension one process takes steps of ``fit``, with the total and with the path gradient, and another runs
``fit`` with 100 steps, warm start and diagnosis included. Memory is the most that the process held, beyond what it held
after the same in 20 dimensions. Rows go to ``large.csv``; table and figure are made from it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pyro
import torch
from machine import processor
from row_files import append_row, read_rows
from speed_ours import make_model

import pyro_flowguides as fg

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DIMS = (100, 300, 1000, 3000, 10000)
PARTICLES = 8
FIT_STEPS = 100
SMALL = 20
FLOWS: dict[str, dict[str, Any]] = {
    "iaf": {},
    "planar": {},
    "sylvester": {"variant": "householder", "bottleneck": 8, "reflections": 8},
    "realnvp": {},
}
#: What is shown, by column of the rows.
PANELS = {
    "step_ms": "step, ms",
    "path_ms": "step with the path gradient, ms",
    "fit_s": f"fit of {FIT_STEPS} steps with diagnosis, s",
    "step_mib": "memory of a step, MiB",
    "fit_mib": "memory of the fit, MiB",
}
RESULTS = Path(__file__).parent / "results" / "large.csv"


# -- one process -------------------------------------------------------------------------------------------------------


def steps(flow: str, dim: int, rounds: int) -> dict[str, float]:
    """Milliseconds of processor time of a step, by kind of gradient; and the number of parameters."""
    pyro.clear_param_store()
    model = make_model(dim)
    guide = fg.AutoFlow(model, flow, **FLOWS[flow])
    measured: dict[str, float] = {}
    for name, path_gradient in (("step_ms", False), ("path_ms", True)):
        stepper = fg.inference.Stepper(
            model, guide, num_particles=PARTICLES, lr=1e-3, path_gradient=path_gradient, compile=False
        )
        times = []
        for round_ in range(rounds + 3):
            begin = time.process_time()
            stepper.step()
            if round_ >= 3:
                times.append(1e3 * (time.process_time() - begin))
        measured[name] = statistics.median(times)
        stepper.release()
        del stepper  # and with it the moments of Adam
    return {"parameters": sum(value.numel() for value in guide.parameters()), **measured}


def whole_fit(flow: str, dim: int, rounds: int) -> dict[str, float]:
    """Seconds of processor time of a short fit."""
    pyro.clear_param_store()
    model = make_model(dim)
    begin = time.process_time()
    result = fg.fit(
        model, fg.AutoFlow(model, flow, **FLOWS[flow]), steps=FIT_STEPS, num_particles=PARTICLES, progress=False
    )
    assert result.diagnosis is not None, result.why_no_verdict
    return {"fit_s": time.process_time() - begin}


KINDS: dict[str, Callable[[str, int, int], dict[str, float]]] = {"step": steps, "fit": whole_fit}


def held() -> float:
    """The most memory that this process held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def worker(kind: str, flow: str, dim: int, rounds: int) -> None:
    """Measure, and print what was found."""
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    KINDS[kind](flow, SMALL, 1)
    before = held()
    found = KINDS[kind](flow, dim, rounds)
    print(json.dumps({**found, f"{kind}_mib": held() - before}))


def measure(flow: str, dim: int, rounds: int) -> dict[str, Any]:
    row: dict[str, Any] = {"flow": flow, "dim": dim}
    for kind in KINDS:
        command = [sys.executable, __file__, "--worker", kind, flow, str(dim), str(rounds)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row |= json.loads(done.stdout.splitlines()[-1])
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


# -- table and figure --------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """With three digits at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: list[dict[str, Any]]) -> str:
    dims = list(dict.fromkeys(row["dim"] for row in rows))
    lines = []
    for column, label in {"parameters": "parameters", **PANELS}.items():
        lines += [f"| {label} | {' | '.join(f'D = {dim}' for dim in dims)} |", "|---" * (len(dims) + 1) + "|"]
        for flow in FLOWS:
            cells = {row["dim"]: number(float(row[column])) for row in rows if row["flow"] == flow}
            lines.append(f"| {flow} | {' | '.join(cells.get(dim, '') for dim in dims)} |")
        lines.append("")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """All numbers against D, both axes logarithmic, with lines of slope one to compare."""
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


def report(path: Path) -> str:
    rows = read_rows(path)
    about = f"{datetime.date.today()}, torch {torch.__version__}, Pyro {pyro.__version__}, one thread on {processor()}"
    text = f"# Many latent variables\n\n{about}; {PARTICLES} particles, float32, processor time.\n\n{table(rows)}"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(rows, path.with_suffix(".png"))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="*", default=DIMS)
    parser.add_argument("--flows", nargs="*", default=list(FLOWS), choices=list(FLOWS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file; rows that it has are kept")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, flow, dim, rounds = arguments.worker
        worker(kind, flow, int(dim), int(rounds))
        return
    done = {(row["flow"], int(row["dim"])) for row in read_rows(arguments.output)}
    for flow in arguments.flows:
        for dim in arguments.dims:
            if (flow, dim) not in done:
                append_row(arguments.output, measure(flow, dim, arguments.rounds))
    print(report(arguments.output))


if __name__ == "__main__":
    main()
