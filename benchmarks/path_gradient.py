"""The cost of the path gradient: a gradient step of every flow with it, and with the total gradient.

    python benchmarks/path_gradient.py

A step draws points, evaluates log q and the log density of a normal target, and runs the backward pass, at the size of
a typical fit and with weights moved off the identity start. Both kinds of gradient take turns; the processor time is
measured. Rows go to ``path_gradient.csv``, and the table ``path_gradient.md`` is made from them.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import processor
from row_files import append_row, read_rows
from tables import markdown_table
from torch import Tensor

from pyro_flowguides.flows import FLOWS
from pyro_flowguides.transforms import Flow, with_path_gradient

RESULTS = Path(__file__).parent / "results" / "path_gradient.csv"
#: Untimed rounds at the start.
WARM_UP = 5


def step(flow: Flow, noise: Tensor, path: bool) -> None:
    """Compute the gradient of log q − log p at draws. The entropy of the base has none."""
    flow.zero_grad()
    log_base = -0.5 * noise.square().sum(-1)
    if path:
        z, ladj, score = flow.forward_and_score(noise, -noise)
        log_q = with_path_gradient(log_base - ladj, z, score)
    else:
        z, ladj = flow.forward_and_ladj(noise)
        log_q = log_base - ladj
    log_p = -0.5 * (z / 2 - 1).square().sum(-1)
    (log_q - log_p).mean().backward()


def time_steps(flow: Flow, noise: Tensor, rounds: int) -> dict[bool, list[float]]:
    """Return the milliseconds of every round, with the path gradient (True) and with the total gradient (False)."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for place in range(rounds + WARM_UP):
        for path in (place % 2 == 0, place % 2 == 1):
            begin = time.process_time()
            step(flow, noise, path)
            if place >= WARM_UP:
                times[path].append(1e3 * (time.process_time() - begin))
    return times


def measure(name: str, dim: int, particles: int, rounds: int, scale: float) -> dict[str, Any]:
    """Return the row of a flow. The ratio is the median of the ratios within a round."""
    torch.manual_seed(0)
    flow = FLOWS[name](dim)
    for parameter in flow.parameters():
        parameter.data.add_(scale * torch.randn_like(parameter) / max(1, parameter.shape[-1:].numel()) ** 0.5)
    times = time_steps(flow, torch.randn(particles, dim), rounds)
    ratio = statistics.median(path / total for path, total in zip(times[True], times[False], strict=True))
    return {
        "flow": name,
        "total_ms": f"{statistics.median(times[False]):.2f}",
        "path_ms": f"{statistics.median(times[True]):.2f}",
        "ratio": f"{ratio:.2f}",
        "dim": dim,
        "particles": particles,
        "rounds": rounds,
        "scale": scale,
        "date": datetime.date.today(),
        "machine": f"torch {torch.__version__}, one thread on {processor()}",
    }


def write_table(path: Path) -> str:
    """Write the table beside the CSV file, and return its text."""
    rows = read_rows(path)
    first = rows[0]
    options = " ".join(f"--{name} {first[name]}" for name in ("dim", "particles", "rounds", "scale"))
    header = ["flow", "total gradient, ms", "path gradient, ms", "ratio"]
    cells = [[row["flow"], row["total_ms"], row["path_ms"], row["ratio"]] for row in rows]
    text = f"""# Cost of the path gradient

`python benchmarks/path_gradient.py {options}`, {first["date"]}, {first["machine"]}, float64, processor time.

A gradient step of every flow at its default size: {first["particles"]} draws in {first["dim"]} dimensions, log q, a log
density of a normal target, and the backward pass. The ratio is the median of the ratios within a round. It is closer to
one for models that cost more.

{markdown_table(header, cells)}
"""
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=10)
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--scale", type=float, default=0.3, help="scale of the random weights added to the start")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file, written anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    options.output.unlink(missing_ok=True)
    for name in FLOWS:
        append_row(options.output, measure(name, options.dim, options.particles, options.rounds, options.scale))
    print(write_table(options.output))


if __name__ == "__main__":
    main()
