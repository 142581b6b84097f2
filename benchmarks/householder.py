"""The cost of Householder-Sylvester layers: reflections by vectors, and Q as a product of matrices.

    python benchmarks/householder.py

Forward and backward pass of a layer with amortized parameters and D = M, against the same layer whose Q is made by
multiplying D × D reflection matrices, one product for each point. Both take turns; the processor time is measured. Rows
go to ``householder.csv``, and the table ``householder.md`` is made from them.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import processor
from row_files import append_row, read_rows
from tables import markdown_table
from torch import Tensor

from pyro_flowguides.transforms import ConditionalHouseholderSylvester

RESULTS = Path(__file__).parent / "results" / "householder.csv"
DIM, CONTEXT_DIM, BATCH_SIZE, REFLECTIONS = 64, 256, 100, (4, 8, 16)
#: Untimed rounds at the start.
WARM_UP = 3


def by_matrices(x: Tensor, theta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return value and ladj of a Householder-Sylvester layer whose Q is a product of D × D matrices."""
    eye = torch.eye(x.shape[-1])
    q = eye
    for v in theta["vectors"].unbind(-2):
        q = q @ (eye - 2 * v[..., :, None] * v[..., None, :] / (v * v).sum(-1)[..., None, None])
    product = theta["diagonal"] * theta["diagonal_tilde"]
    root = (product * product + 4).sqrt()  # the bound that keeps the layer invertible
    factor = 0.99 / 2 * (1 + product / (2 + root))
    r = theta["triangles"].triu(1) + torch.diag_embed(theta["diagonal"])
    r_tilde = theta["triangles"].tril(-1).mT + torch.diag_embed(factor * theta["diagonal_tilde"])
    inner = r_tilde @ (q.mT @ x[..., None]) + theta["b"][..., None]
    tanh = inner.tanh()
    y = x + (q @ (r @ tanh))[..., 0]
    ladj = ((1 - tanh[..., 0] ** 2) * factor * product).log1p().sum(-1)
    return y, ladj


def with_gradient(value_and_ladj: tuple[Tensor, Tensor]) -> None:
    y, ladj = value_and_ladj
    (y.square().sum() - ladj.sum()).backward()


def make_jobs(dim: int, reflections: int) -> dict[str, Callable[[], None]]:
    """Return the timed passes of one layer.

    Raises:
        AssertionError: if the two forms of the layer do not agree.
    """
    torch.manual_seed(0)
    flow = ConditionalHouseholderSylvester(dim, CONTEXT_DIM, reflections=reflections)
    context, x = torch.randn(BATCH_SIZE, CONTEXT_DIM), torch.randn(BATCH_SIZE, dim)
    wanted = by_matrices(x, flow.theta(context))
    torch.testing.assert_close(flow.condition(context).forward_and_ladj(x), wanted, rtol=1e-3, atol=1e-3)
    return {
        "hypernetwork": lambda: torch.stack([value.sum() for value in flow.theta(context).values()]).sum().backward(),
        "vectors": lambda: with_gradient(flow.condition(context).forward_and_ladj(x)),
        "matrices": lambda: with_gradient(by_matrices(x, flow.theta(context))),
    }


def measure(reflections: int, rounds: int) -> dict[str, Any]:
    """Return the row for a number of reflections: median milliseconds, and the ratio without the hypernetwork."""
    jobs = make_jobs(DIM, reflections)
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for place in range(rounds + WARM_UP):
        for name in jobs if place % 2 else reversed(jobs):
            begin = time.process_time()
            jobs[name]()
            if place >= WARM_UP:
                times[name].append(1e3 * (time.process_time() - begin))
    hypernetwork, vectors, matrices = (statistics.median(times[name]) for name in jobs)
    return {
        "reflections": reflections,
        "hypernetwork_ms": f"{hypernetwork:.2f}",
        "vectors_ms": f"{vectors:.2f}",
        "matrices_ms": f"{matrices:.2f}",
        "ratio": f"{(matrices - hypernetwork) / (vectors - hypernetwork):.1f}",
        "rounds": rounds,
        "date": datetime.date.today(),
        "machine": f"torch {torch.__version__}, one thread on {processor()}",
    }


def write_table(path: Path) -> str:
    """Write the table beside the CSV file, and return its text."""
    rows = read_rows(path)
    header = ["reflections", "hypernetwork, ms", "vectors, ms", "matrices, ms", "flow part: matrices / vectors"]
    names = ("reflections", "hypernetwork_ms", "vectors_ms", "matrices_ms", "ratio")
    text = f"""# Householder reflections: vectors and matrices

`python benchmarks/householder.py --rounds {rows[0]["rounds"]}`, {rows[0]["date"]}, {rows[0]["machine"]}, float32.

Processor time of a forward and backward pass of one amortized Sylvester layer, D = M = {DIM}, batch of {BATCH_SIZE},
medians over interleaved rounds. The flow part is the rest without the hypernetwork.

{markdown_table(header, [[row[name] for name in names] for row in rows])}
"""
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file, written anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.unlink(missing_ok=True)
    for reflections in REFLECTIONS:
        append_row(options.output, measure(reflections, options.rounds))
    print(write_table(options.output))


if __name__ == "__main__":
    main()
