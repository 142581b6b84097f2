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

    columns = ["layer", "forward", "inverse", "context enters", "paper"]
    flows = [[f"`{row['name']}`", guide_link(row["title"]), *layer_cells(row)] for row in flow_rows()]
    layers = [layer_cells(row) for row in layer_rows()]
    return {
        "flows": markdown_table(["name", "autoguide", *columns], flows),
        "layers": markdown_table(columns, layers),
    }


def guide_link(title: str) -> str:
    return f"{{class}}`~pyro_flowguides.guides.Auto{title}`"


def layer_cells(row: dict[str, str]) -> list[str]:
    link = f"{{class}}`~pyro_flowguides.transforms.{row['layer']}`"
    papers = [f"[arXiv:{number}](https://arxiv.org/abs/{number})" for number in arxiv_numbers(row["reference"])]
    return [link, row["forward"], row["inverse"], row["context"], ", ".join(papers)]


def arxiv_numbers(reference: str) -> list[str]:
    return re.findall(r"arXiv:(\d{4}\.\d{4,5})", reference)
