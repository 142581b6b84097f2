"""NUTS through a trained flow and plain NUTS, on the centered eight schools.

    python benchmarks/neutra.py

The guide is an ``AutoIAF`` fitted by ``fg.fit`` with its defaults. All chains have the same warm-up and as many draws;
the number of effective draws is the smallest bulk effective sample size over all parameters. Processor times are those
of the chain with its warm-up, and of the fit. Every chain is a row of ``neutra.csv``; an interrupted program resumes
where it stopped. The table ``neutra.md`` is made from all rows.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pyro
import torch
from machine import processor
from posteriordb_models import eight_schools_centered as model
from pyro.infer import MCMC, NUTS
from row_files import append_row, read_rows
from tables import markdown_table
from torch import Tensor

import pyro_flowguides as fg

RESULTS = Path(__file__).parent / "results" / "neutra.csv"
SCHOOLS: dict[str, Tensor] = {
    "y": torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64),
    "sigma": torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64),
}
Chain = dict[str, Any]


def chain_row(fit_seconds: float, chain_seconds: float, draws: dict[str, np.ndarray], divergences: int) -> Chain:
    """Return the row of a chain: divergences, effective draws, seconds, and effective draws per second."""
    ess = smallest_ess(draws)
    return {
        "divergences": divergences,
        "ess": f"{ess:.4g}",
        "fit_seconds": f"{fit_seconds:.4g}",
        "chain_seconds": f"{chain_seconds:.4g}",
        "ess_per_chain_second": f"{ess / chain_seconds:.4g}",
        "ess_per_second": f"{ess / (fit_seconds + chain_seconds):.4g}",
    }


def smallest_ess(draws: dict[str, np.ndarray]) -> float:
    """Return the smallest bulk effective sample size over all parameters; ``(chains, draws, ...)`` each."""
    sizes = az.ess(az.convert_to_dataset(draws), method="bulk")
    return min(float(sizes[name].min()) for name in draws)


def plain(target: float, seed: int, options: argparse.Namespace) -> Chain:
    """Run Pyro's NUTS on the model itself."""
    pyro.set_rng_seed(seed)
    begin = time.process_time()
    kernel = NUTS(model, target_accept_prob=target)
    mcmc = MCMC(kernel, num_samples=options.draws, warmup_steps=options.warmup, disable_progbar=True)
    mcmc.run(**SCHOOLS)
    seconds = time.process_time() - begin
    draws = {name: value.numpy()[None] for name, value in mcmc.get_samples().items()}
    divergences = sum(len(places) for places in mcmc.diagnostics()["divergences"].values())
    return chain_row(0.0, seconds, draws, divergences)


def transported(seed: int, options: argparse.Namespace) -> Chain:
    """Fit a flow, and run NUTS through it."""
    begin = time.process_time()
    guide = fg.AutoIAF(model)
    fg.fit(model, guide, seed=seed, progress=False, **SCHOOLS)
    fitted = time.process_time()
    data = fg.neutra_mcmc(
        model, guide, num_samples=options.draws, warmup_steps=options.warmup, seed=seed, progress=False, **SCHOOLS
    )
    seconds = time.process_time() - fitted
    draws = {name: data["posterior"][name].values for name in ("mu", "tau", "theta")}
    return chain_row(fitted - begin, seconds, draws, int(data["sample_stats"]["diverging"].sum()))


METHODS: dict[str, Callable[[int, argparse.Namespace], Chain]] = {
    "NUTS": lambda seed, options: plain(0.8, seed, options),
    "NUTS, target 0.95": lambda seed, options: plain(0.95, seed, options),
    "NeuTra": transported,
}
#: The columns of the table, by the columns of the rows.
COLUMNS = {
    "divergences": "divergences",
    "ess": "smallest ESS",
    "fit_seconds": "fit, s",
    "chain_seconds": "chain, s",
    "ess_per_chain_second": "ESS / s, chain",
    "ess_per_second": "ESS / s, fit and chain",
}


def write_table(path: Path) -> str:
    """Write the table beside the CSV file, and return its text: medians over the seeds, and the range."""
    rows = read_rows(path)
    first, cells = rows[0], []
    for method in dict.fromkeys(row["method"] for row in rows):
        columns = [[float(row[name]) for row in rows if row["method"] == method] for name in COLUMNS]
        cells.append([method, *map(median_and_range, columns)])
    seeds = len({row["seed"] for row in rows})
    text = f"""# NeuTra on the centered eight schools

`python benchmarks/neutra.py --draws {first["draws"]} --warmup {first["warmup"]} --seeds {seeds}`, {first["date"]},
{first["machine"]}, float64, processor time.

{first["draws"]} draws after {first["warmup"]} steps of warm-up, {seeds} {"seed" if seeds == 1 else "seeds"}. The
smallest ESS is ArviZ's bulk effective sample size, the smallest over mu, tau and the eight theta.

{markdown_table(["method", *COLUMNS.values()], cells)}
"""
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def median_and_range(values: list[float]) -> str:
    median = f"{statistics.median(values):.3g}"
    return median if len(values) == 1 else f"{median} ({min(values):.3g} to {max(values):.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file; its rows are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for seed in range(options.seeds):
        for method, run in METHODS.items():
            key = {"method": method, "seed": str(seed), "draws": str(options.draws), "warmup": str(options.warmup)}
            if not any(key.items() <= row.items() for row in read_rows(options.output)):
                machine = f"torch {torch.__version__}, Pyro {pyro.__version__}, one thread on {processor()}"
                about = {"date": datetime.date.today(), "machine": machine}
                append_row(options.output, {**key, **run(seed, options), **about})
    print(write_table(options.output))


if __name__ == "__main__":
    main()
