"""What one layer of each flow costs: forward, with gradient, and inverse, at default sizes.

    python benchmarks/flow_cost.py --output docs/costs_table.md

Processor time of one thread, so that other programs on the machine do not count; interleaved rounds, medians. The last
columns are ratios to a planar layer's forward pass in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pyro_flowguides import transforms as T
from pyro_flowguides.transforms import Flow

LAYERS: dict[str, Callable[[int], Flow]] = {
    "planar": T.Planar,
    "radial": T.Radial,
    "sylvester, orthogonal": T.OrthogonalSylvester,
    "sylvester, householder": T.HouseholderSylvester,
    "sylvester, triangular": T.TriangularSylvester,
    "iaf": T.InverseAutoregressive,
    "maf": T.MaskedAutoregressive,
    "nice": T.AdditiveCoupling,
    "realnvp": T.AffineCoupling,
    "householder": T.Householder,
    "LU linear": T.LULinear,
    "QR linear": T.QRLinear,
    "lower triangular affine": T.LowerTriangularAffine,
}


def with_gradient(flow: Flow, x: Tensor) -> None:
    y, ladj = flow.forward_and_ladj(x)
    (y.square().sum() + ladj.sum()).backward()


def forward(flow: Flow, x: Tensor) -> None:
    with torch.no_grad():
        flow.forward_and_ladj(x)


def inverse(flow: Flow, x: Tensor) -> None:
    with torch.no_grad():
        flow.inverse_and_ladj(x)


JOBS: dict[str, Callable[[Flow, Tensor], None]] = {"forward": forward, "+ gradient": with_gradient, "inverse": inverse}


def measure(input_dim: int, points: int, rounds: int, scale: float) -> dict[tuple[str, str], float]:
    """Median milliseconds of every job of every layer, rounds interleaved; weights moved off the identity start."""
    torch.manual_seed(0)
    flows = {name: layer(input_dim) for name, layer in LAYERS.items()}
    for flow in flows.values():
        for parameter in flow.parameters():
            parameter.data.add_(scale * torch.randn_like(parameter) / max(1, parameter.shape[-1:].numel()) ** 0.5)
    x = torch.randn(points, input_dim)
    times: dict[tuple[str, str], list[float]] = {(name, job): [] for name in flows for job in JOBS}
    for round_ in range(rounds + 2):
        for name, flow in flows.items():
            for job, run in JOBS.items():
                start = time.process_time()
                run(flow, x)
                if round_ >= 2:  # the first two warm up
                    times[name, job].append(1e3 * (time.process_time() - start))
    return {key: statistics.median(values) for key, values in times.items()}


def processor() -> str:
    """The model's name where the system tells it, else the architecture."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(medians: dict[tuple[str, str], float]) -> str:
    unit = medians["planar", "forward"]
    lines = [
        "| layer | " + " | ".join(f"{job}, ms" for job in JOBS) + " | " + " | ".join(f"{job}, ratio" for job in JOBS)
    ]
    lines[0] += " |"
    lines.append("|---" * (1 + 2 * len(JOBS)) + "|")
    for name in LAYERS:
        row = [medians[name, job] for job in JOBS]
        cells = [f"{value:.2f}" for value in row] + [f"{value / unit:.1f}" for value in row]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="size of the random weights added to the identity start"
    )
    parser.add_argument("--output", type=Path, help="file to write the table to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    medians = measure(arguments.dim, arguments.points, arguments.rounds, arguments.scale)
    text = table(medians)
    print(text)
    if arguments.output:
        about = (
            f"`python benchmarks/flow_cost.py --dim {arguments.dim} --points {arguments.points} --rounds "
            f"{arguments.rounds} --scale {arguments.scale}`, {datetime.date.today()}, torch {torch.__version__}, one "
            f"core ({processor()}), float32, processor time."
        )
        arguments.output.write_text(f"# Cost of one layer\n\n{about}\n\n{text}\n")


if __name__ == "__main__":
    main()
