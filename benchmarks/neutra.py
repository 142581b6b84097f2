"""NUTS through a trained flow against plain NUTS, on the centered eight schools.

    python benchmarks/neutra.py --output benchmarks/results/neutra.md

The guide is an ``AutoIAF`` fitted by ``fg.fit`` as it comes. All chains have the same warm-up and number of draws; an
effective draw is the smallest bulk effective sample size over all parameters. Times are those of the processor, so that
what else the machine does matters little: those of the chain with its warm-up, and with the fit.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pyro
import torch
from machine import processor
from posteriordb_models import eight_schools_centered as model
from pyro.infer import MCMC, NUTS
from torch import Tensor

import pyro_flowguides as fg

SCHOOLS: dict[str, Tensor] = {
    "y": torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64),
    "sigma": torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64),
}


@dataclass(frozen=True)
class Chain:
    """One chain: processor seconds of fit and chain, least effective draws, divergences."""

    fit: float
    chain: float
    ess: float
    divergences: int

    @property
    def rate(self) -> float:
        """Effective draws per second of the chain."""
        return self.ess / self.chain

    @property
    def whole_rate(self) -> float:
        """Effective draws per second, the fit included."""
        return self.ess / (self.fit + self.chain)


def least_ess(draws: dict[str, np.ndarray]) -> float:
    """The smallest bulk effective sample size over all parameters; ``(chains, draws, ...)`` each."""
    sizes = az.ess(az.convert_to_dataset(draws), method="bulk")
    return min(float(sizes[name].min()) for name in draws)


def plain(target: float, seed: int, arguments: argparse.Namespace) -> Chain:
    """Pyro's NUTS on the model as it stands."""
    pyro.set_rng_seed(seed)
    begin = time.process_time()
    kernel = NUTS(model, target_accept_prob=target)
    mcmc = MCMC(kernel, num_samples=arguments.draws, warmup_steps=arguments.warmup, disable_progbar=True)
    mcmc.run(**SCHOOLS)
    seconds = time.process_time() - begin
    draws = {name: value.numpy()[None] for name, value in mcmc.get_samples().items()}
    divergences = sum(len(found) for found in mcmc.diagnostics()["divergences"].values())
    return Chain(0.0, seconds, least_ess(draws), divergences)


def transported(seed: int, arguments: argparse.Namespace) -> Chain:
    """The same through a flow that has been fitted first."""
    begin = time.process_time()
    guide = fg.AutoIAF(model)
    fg.fit(model, guide, seed=seed, progress=False, **SCHOOLS)
    fitted = time.process_time()
    data = fg.neutra_mcmc(
        model, guide, num_samples=arguments.draws, warmup_steps=arguments.warmup, seed=seed, progress=False, **SCHOOLS
    )
    seconds = time.process_time() - fitted
    draws = {name: data["posterior"][name].values for name in ("mu", "tau", "theta")}
    return Chain(fitted - begin, seconds, least_ess(draws), int(data["sample_stats"]["diverging"].sum()))


def methods(arguments: argparse.Namespace) -> dict[str, Callable[[int], Chain]]:
    return {
        "NUTS": lambda seed: plain(0.8, seed, arguments),
        "NUTS, target 0.95": lambda seed: plain(0.95, seed, arguments),
        "NeuTra": lambda seed: transported(seed, arguments),
    }


COLUMNS: dict[str, Callable[[Chain], float]] = {
    "divergences": lambda chain: chain.divergences,
    "least ESS": lambda chain: chain.ess,
    "fit, s": lambda chain: chain.fit,
    "chain, s": lambda chain: chain.chain,
    "ESS / s, chain": lambda chain: chain.rate,
    "ESS / s, fit and chain": lambda chain: chain.whole_rate,
}


def table(chains: dict[str, list[Chain]]) -> str:
    """Medians over the seeds, and the smallest and largest value."""
    lines = ["| method | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for method, found in chains.items():
        columns = [[value(chain) for chain in found] for value in COLUMNS.values()]
        cells = [f"{statistics.median(column):.3g} ({min(column):.3g} to {max(column):.3g})" for column in columns]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file to write the table to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    runs = methods(arguments)
    chains: dict[str, list[Chain]] = {name: [] for name in runs}
    for seed in range(arguments.seeds):
        for name, run in runs.items():
            chains[name].append(run(seed))
            print(f"{name:20} {chains[name][-1]}", flush=True)
    text = table(chains)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(report(arguments, text), encoding="utf-8")


def report(arguments: argparse.Namespace, text: str) -> Any:
    command = (
        f"python benchmarks/neutra.py --draws {arguments.draws} --warmup {arguments.warmup} --seeds {arguments.seeds}"
    )
    return f"""# NeuTra on the centered eight schools

`{command}`, {datetime.date.today()}, torch {torch.__version__},
Pyro {pyro.__version__}, one thread on {processor()}, float64, processor time.

{arguments.draws} draws after {arguments.warmup} steps of warm-up, median (least to most) over {arguments.seeds} seeds.
Least ESS: ArviZ's bulk effective sample size, the smallest over mu, tau and the eight theta.

{text}
"""


if __name__ == "__main__":
    main()
