"""The tables of flows and layers in the documentation, made from the registry and the docstrings of the layers.

A new flow appears in them without a change of any page.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

__all__ = ["flow_tables"]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def flow_tables() -> dict[str, str]:
    """Return the Markdown tables of the registered flows and of all other layers."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    from flow_cost import flow_rows, layer_rows
    from tables import markdown_table

    columns = ["forward", "inverse", "context enters", "arXiv"]
    flows = [[f"`{row['name']}`", class_link(f"guides.Auto{row['title']}"), *cells(row)] for row in flow_rows()]
    layers = [[class_link(f"transforms.{row['layer']}"), *cells(row)] for row in layer_rows()]
    return {
        "flows": markdown_table(["name", "autoguide", *columns], flows),
        "layers": markdown_table(["layer", *columns], layers),
    }


def class_link(name: str) -> str:
    return f"{{class}}`~pyro_flowguides.{name}`"


def cells(row: dict[str, str]) -> list[str]:
    """Return the cells that both tables share: the costs, the way of the context, and links to the papers."""
    papers = re.findall(r"arXiv:(\d{4}\.\d{4,5})", row["reference"])
    links = [f"[{number}](https://arxiv.org/abs/{number})" for number in papers]
    return [row["forward"], row["inverse"], row["context"], ", ".join(links)]
