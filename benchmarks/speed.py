"""What one training step costs: ours, recorded and compiled, beside Pyro's SVI and a hand-written loop.

    python benchmarks/speed.py --output benchmarks/results/speed.md

A hierarchical normal model with D latent variables and its three-layer IAF posterior, P particles, float32, one thread.
All competitors of a setting run in one process, in turns, and what is compared is the processor time of a step: medians
and ratios. Compilation is timed apart.
"""

from __future__ import annotations

import argparse
import datetime
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from machine import processor
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal
from torch import Tensor

import pyro_flowguides as fg
from pyro_flowguides.inference.objectives import DensityObjective, Request

SETTINGS = ((2, 32), (10, 1), (10, 32), (10, 256), (100, 32), (500, 32))
FLOWS = 3
RATE = 1e-3


def make_model(dim: int) -> Callable[[], None]:
    """A global location and dim - 1 group means, each observed once."""
    data = torch.linspace(-1.0, 1.0, dim - 1)

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", dim - 1):
            mean = pyro.sample("mean", dist.Normal(loc, 1.0))
            pyro.sample("y", dist.Normal(mean, 0.5), obs=data)

    return model


def pyro_svi(model: Callable[[], None], particles: int) -> Callable[[], object]:
    """Pyro's guide and training loop, validation off."""
    guide = AutoIAFNormal(model, num_transforms=FLOWS)
    elbo = Trace_ELBO(particles, max_plate_nesting=1, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": RATE}), elbo)
    return svi.step


def ours(model: Callable[[], None], particles: int, path: bool, compiling: bool) -> Callable[[], object]:
    """The inner step of ``fit``: objective, clipping, Adam."""
    guide = fg.AutoIAF(model)
    guide()
    objective = DensityObjective(model, guide, (), {}, compiling)
    parameters = list(objective.parameters.values())
    optimiser = torch.optim.Adam(parameters, lr=RATE, fused=True)
    generator, request = torch.Generator().manual_seed(0), Request(particles, path)

    def step() -> None:
        objective(request, generator).backward(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimiser.step()

    return step


def by_hand(dim: int, particles: int) -> Callable[[], object]:
    """The same flow without Pyro, without guide and with the density written out: what a loop of one's own costs."""
    flow: Any = fg.flows.iaf(dim)
    parameters = list(flow.parameters())
    optimiser = torch.optim.Adam(parameters, lr=RATE, fused=True)
    data, half_log = torch.linspace(-1.0, 1.0, dim - 1), 0.5 * math.log(2 * math.pi)

    def log_normal(x: Tensor, loc: Tensor | float, scale: float) -> Tensor:
        return -0.5 * ((x - loc) / scale).square() - math.log(scale) - half_log

    def step() -> None:
        noise = torch.randn(particles, dim)
        z, ladj = flow.forward_and_ladj(noise)
        loc, mean = z[:, :1], z[:, 1:]
        log_p = log_normal(loc[:, 0], 0.0, 1.0) + (log_normal(mean, loc, 1.0) + log_normal(data, mean, 0.5)).sum(-1)
        loss = -(log_p + ladj).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


@dataclass(frozen=True)
class Competitor:
    """A way to take a step, and whether it may be left out."""

    make: Callable[[Callable[[], None], int, int], Callable[[], object]]
    compiles: bool = False


COMPETITORS: dict[str, Competitor] = {
    "Pyro SVI": Competitor(lambda model, dim, particles: pyro_svi(model, particles)),
    "by hand, eager": Competitor(lambda model, dim, particles: by_hand(dim, particles)),
    "fit": Competitor(lambda model, dim, particles: ours(model, particles, False, False)),
    "fit, path gradient": Competitor(lambda model, dim, particles: ours(model, particles, True, False)),
    "fit, compiled": Competitor(lambda model, dim, particles: ours(model, particles, False, True), compiles=True),
    "fit, path gradient, compiled": Competitor(
        lambda model, dim, particles: ours(model, particles, True, True), compiles=True
    ),
}


@dataclass(frozen=True)
class Cell:
    """Milliseconds of every round, and seconds until the first step was done."""

    rounds: list[float]
    first: float

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def measure(dim: int, particles: int, rounds: int, names: list[str]) -> dict[str, Cell]:
    """All competitors in turns, several steps per turn."""
    model, steps, first = make_model(dim), {}, {}
    for name in names:
        pyro.clear_param_store()
        begin = time.perf_counter()
        steps[name] = COMPETITORS[name].make(model, dim, particles)
        steps[name]()
        first[name] = time.perf_counter() - begin
        for _ in range(5):
            steps[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.process_time()
            for _ in range(5):
                step()
            times[name].append(1e3 * (time.process_time() - begin) / 5)
    return {name: Cell(times[name], first[name]) for name in names}


def table(found: dict[tuple[int, int], dict[str, Cell]], names: list[str]) -> str:
    """Milliseconds, and in brackets how many times less than Pyro's SVI."""
    settings = [f"D={dim}, P={particles}" for dim, particles in found]
    lines = [f"| step, ms | {' | '.join(settings)} |", "|---" * (len(settings) + 1) + "|"]
    for name in names:
        cells = []
        for cell in found.values():
            ratio = statistics.median(a / b for a, b in zip(cell["Pyro SVI"].rounds, cell[name].rounds, strict=True))
            cells.append(f"{cell[name].median:.2f} ({ratio:.1f}x)")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"| first step, s | {' | '.join(settings)} |", "|---" * (len(settings) + 1) + "|"]
    for name in names:
        lines.append(f"| {name} | {' | '.join(f'{cell[name].first:.1f}' for cell in found.values())} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dims", type=int, nargs="*", help="only these numbers of latent variables")
    parser.add_argument("--no-compile", action="store_true", help="leave out what has to be compiled")
    parser.add_argument("--output", type=Path, help="file to write the tables to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    names = [name for name, one in COMPETITORS.items() if not (one.compiles and arguments.no_compile)]
    found = {}
    for dim, particles in SETTINGS:
        if arguments.dims and dim not in arguments.dims:
            continue
        found[dim, particles] = measure(dim, particles, arguments.rounds, names)
        print(dim, particles, {name: round(cell.median, 2) for name, cell in found[dim, particles].items()}, flush=True)
    text = table(found, names)
    print(text)
    if arguments.output:
        about = (
            f"{datetime.date.today()}, torch {torch.__version__}, Pyro {pyro.__version__}, one thread on {processor()}"
        )
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(
            f"# Cost of a training step\n\n{about}; float32, processor time.\n\n{text}\n", "utf-8"
        )


if __name__ == "__main__":
    main()
