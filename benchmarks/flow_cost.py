"""Measure the cost of every registered flow with one layer, and of every other layer: forward, gradient, inverse.

    python benchmarks/flow_cost.py --output docs/costs_table.md

Flows and layers are found by the registry and among the classes of ``pyro_flowguides.transforms``. Times are processor
times of one thread, so that other programs on the machine do not count; they are medians of interleaved rounds. The
last columns are ratios to the forward pass of a planar layer in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import processor
from tables import markdown_table
from torch import Tensor

from pyro_flowguides import transforms
from pyro_flowguides.flows import FLOWS, layer_class
from pyro_flowguides.transforms import AmortizedFlow, Compose, ContextFlow, Flow
from pyro_flowguides.transforms.docstrings import Docstring, parse_docstring

__all__ = ["flow_rows", "layer_rows"]

#: The flow whose forward pass is the unit of the ratios.
UNIT = "planar"


# -- flows, layers and their documented costs --------------------------------------------------------------------------


def other_layers() -> dict[str, type[Flow]]:
    """Return the layers by name that are not the layer of a registered flow and are built from the dimension alone."""
    used = {layer_class(name) for name in FLOWS}
    layers = {name: getattr(transforms, name) for name in transforms.__all__}
    return {
        name: layer
        for name, layer in layers.items()
        if inspect.isclass(layer)
        and layer.__name__ == name  # not a helper
        and issubclass(layer, Flow)
        and layer not in {Flow, Compose, *used}
        and "input_dim" in inspect.signature(layer).parameters
    }


def flow_rows() -> list[dict[str, str]]:
    """Return the facts on every registered flow, for a table: name, title, and those of its layer."""
    rows = []
    for name, builder in FLOWS.items():
        layer = layer_class(name)
        rows.append({"name": name, "title": builder.title, **layer_facts(layer)})
    return rows


def layer_rows() -> list[dict[str, str]]:
    """Return the facts on every other layer, for a table."""
    return [layer_facts(layer) for layer in other_layers().values()]


def layer_facts(layer: type[Flow]) -> dict[str, str]:
    """Return class, cost of each direction, direction that takes one pass, way of the context, and reference."""
    docs = parse_docstring(layer.__doc__)
    forward, inverse = split_costs(docs)
    return {
        "layer": layer.__name__,
        "forward": forward,
        "inverse": inverse,
        "cheap direction": layer.cheap_direction,
        "context": context_way(layer),
        "reference": " ".join(docs.sections.get("References", "").split()),
    }


def split_costs(docs: Docstring) -> tuple[str, str]:
    """Return the costs of both directions, from the paragraph of a layer's docstring that begins with "Cost:".

    It has one of the forms "X in both directions; the inverse adds Y", "forward, X; inverse, Y" and "X forward; Y
    inverse", each with or without further sentences.

    Raises:
        ValueError: if there is no such paragraph or it has another form.
    """
    paragraphs = [" ".join(part.split()) for part in docs.body.split("\n\n") if part.startswith("Cost:")]
    text = re.sub(r" \(:\w+:`[^`]*`\)", "", "".join(paragraphs)).replace("``", "`")
    sentence = re.split(r"\. |\.$", text)[0].removeprefix("Cost: ")
    clauses = sentence.split("; ")
    both = [clause.partition("in both directions")[0].rstrip(", ") for clause in clauses if "in both d" in clause]
    if both:
        added = [clause.removeprefix("the inverse adds ") for clause in clauses if "the inverse adds" in clause]
        return both[0], " and ".join(["the same", *added])
    costs = {}
    for direction in ("forward", "inverse"):
        for clause in clauses:
            if clause.startswith(f"{direction}, ") or clause.endswith(f" {direction}"):
                costs[direction] = clause.removeprefix(f"{direction}, ").removesuffix(f" {direction}")
    if len(costs) < 2:
        raise ValueError(f"the cost of each direction is not in the docstring: {docs.summary!r}, {sentence!r}")
    return costs["forward"], costs["inverse"]


def context_way(layer: type[Flow]) -> str:
    """Tell how a context enters the conditional form of a layer."""
    conditional = getattr(transforms, f"Conditional{layer.__name__}", None)
    if conditional is None:
        return "–"
    ways = {AmortizedFlow: "all parameters", ContextFlow: "every layer of the network"}
    return next(text for way, text in ways.items() if issubclass(conditional, way))


# -- measured times ----------------------------------------------------------------------------------------------------


def build_all(input_dim: int) -> dict[str, Flow]:
    """Build every registered flow with one layer, and every other layer, with default options."""
    flows: dict[str, Flow] = {}
    for name, builder in FLOWS.items():
        options = {"depth": 1} if "depth" in inspect.signature(builder).parameters else {}
        flows[name] = builder(input_dim, **options)
    for name, layer in other_layers().items():
        flows[f"`{name}`"] = layer(input_dim)
    return flows


def run_forward(flow: Flow, x: Tensor) -> None:
    with torch.no_grad():
        flow.forward_and_ladj(x)


def run_with_gradient(flow: Flow, x: Tensor) -> None:
    y, ladj = flow.forward_and_ladj(x)
    loss = y.square().sum() + ladj.sum()
    if loss.requires_grad:  # a permutation has no parameters
        loss.backward()


def run_inverse(flow: Flow, x: Tensor) -> None:
    with torch.no_grad():
        flow.inverse_and_ladj(x)


JOBS: dict[str, Callable[[Flow, Tensor], None]] = {
    "forward": run_forward,
    "+ gradient": run_with_gradient,
    "inverse": run_inverse,
}


def measure(input_dim: int, points: int, rounds: int, scale: float) -> dict[str, dict[str, float]]:
    """Return the median milliseconds of every job by flow and job; the weights are moved off the identity first."""
    torch.manual_seed(0)
    flows = build_all(input_dim)
    for flow in flows.values():
        for parameter in flow.parameters():
            parameter.data.add_(scale * torch.randn_like(parameter) / max(1, parameter.shape[-1:].numel()) ** 0.5)
    x = torch.randn(points, input_dim)
    times: dict[str, dict[str, list[float]]] = {name: {job: [] for job in JOBS} for name in flows}
    for round_ in range(rounds + 2):
        for name, flow in flows.items():
            for job, run in JOBS.items():
                start = time.process_time()
                run(flow, x)
                if round_ >= 2:  # the first two warm up
                    times[name][job].append(1e3 * (time.process_time() - start))
    return {name: {job: statistics.median(values) for job, values in jobs.items()} for name, jobs in times.items()}


def write_table(medians: dict[str, dict[str, float]]) -> str:
    """Return the times and their ratios to the unit as a Markdown table."""
    unit = medians[UNIT]["forward"]
    header = ["layer", *(f"{job}, ms" for job in JOBS), *(f"{job}, ratio" for job in JOBS)]
    rows = [
        [name, *(f"{jobs[job]:.2f}" for job in JOBS), *(f"{jobs[job] / unit:.1f}" for job in JOBS)]
        for name, jobs in medians.items()
    ]
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=32, help="dimension D")
    parser.add_argument("--points", type=int, default=1000, help="number of points in one pass")
    parser.add_argument("--rounds", type=int, default=15, help="number of measured rounds")
    parser.add_argument("--scale", type=float, default=1.0, help="scale of the random numbers added to the weights")
    parser.add_argument("--output", type=Path, help="file to write the table to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = write_table(measure(arguments.dim, arguments.points, arguments.rounds, arguments.scale))
    print(text)
    if arguments.output:
        about = (
            f"`python benchmarks/flow_cost.py --dim {arguments.dim} --points {arguments.points} --rounds "
            f"{arguments.rounds} --scale {arguments.scale}`, {datetime.date.today()}, torch {torch.__version__}, one "
            f"core of {processor()}, float32, processor time."
        )
        arguments.output.write_text(f"# Cost of one layer\n\n{about}\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
