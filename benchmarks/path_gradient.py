"""What the path gradient costs: one gradient step of every flow with it, against one with the total gradient.

    python benchmarks/path_gradient.py --output benchmarks/results/path_gradient.md

Draws, log q, the log density of a normal target and the backward pass, at the size of a typical fit and with weights
moved off the identity start. Both take turns; what is measured is the time of the processor.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from pathlib import Path

import torch
from machine import processor
from torch import Tensor

from pyro_flowguides.flows import FLOWS
from pyro_flowguides.transforms import Flow, on_path


def step(flow: Flow, noise: Tensor, path: bool) -> None:
    """The gradient of a draw's log q − log p; the entropy of the base has none."""
    flow.zero_grad()
    log_base = -0.5 * noise.square().sum(-1)
    if path:
        z, ladj, score = flow.forward_and_score(noise, -noise)
        log_q = on_path(log_base - ladj, z, score)
    else:
        z, ladj = flow.forward_and_ladj(noise)
        log_q = log_base - ladj
    log_p = -0.5 * (z / 2 - 1).square().sum(-1)
    (log_q - log_p).mean().backward()


def measure(flow: Flow, noise: Tensor, rounds: int) -> dict[bool, list[float]]:
    """Milliseconds of every round, by whether the path gradient was followed; the first rounds warm up."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for round_ in range(rounds + 5):
        for path in (round_ % 2 == 0, round_ % 2 == 1):
            begin = time.process_time()
            step(flow, noise, path)
            if round_ >= 5:
                times[path].append(1e3 * (time.process_time() - begin))
    return times


def table(dim: int, particles: int, rounds: int, scale: float) -> str:
    lines = ["| flow | total gradient, ms | path gradient, ms | ratio |", "|---|---|---|---|"]
    for name, builder in FLOWS.items():
        torch.manual_seed(0)
        flow = builder(dim)
        assert isinstance(flow, Flow)
        for parameter in flow.parameters():
            parameter.data.add_(scale * torch.randn_like(parameter) / max(1, parameter.shape[-1:].numel()) ** 0.5)
        times = measure(flow, torch.randn(particles, dim), rounds)
        total, path = (statistics.median(times[key]) for key in (False, True))
        ratio = statistics.median(a / b for a, b in zip(times[True], times[False], strict=True))
        lines.append(f"| {name} | {total:.2f} | {path:.2f} | {ratio:.2f} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=10)
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--scale", type=float, default=0.3, help="size of the random weights added to the start")
    parser.add_argument("--output", type=Path, help="file to write the table to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    text = table(arguments.dim, arguments.particles, arguments.rounds, arguments.scale)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(report(arguments, text), encoding="utf-8")


def report(arguments: argparse.Namespace, text: str) -> str:
    options = ("dim", "particles", "rounds", "scale")
    command = " ".join(["python benchmarks/path_gradient.py", *(f"--{o} {getattr(arguments, o)}" for o in options)])
    return f"""# The path gradient's cost

`{command}`, {datetime.date.today()},
torch {torch.__version__}, one thread on {processor()}, float64, processor time.

One gradient step of every flow in its default size: {arguments.particles} draws in {arguments.dim} dimensions, log q, a
normal log density, backward pass. The ratio is the median of the ratios within a round. A fit with a costlier model has
ratios closer to one.

{text}
"""


if __name__ == "__main__":
    main()
