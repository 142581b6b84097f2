"""The table of flows in the documentation, made from the registry, so that a new flow needs no change of a page."""

from __future__ import annotations

import inspect

from pyro_flowguides.flows import FLOWS

__all__ = ["flow_table"]


def flow_table() -> str:
    """Return a Markdown table of all registered flows: name, autoguide, layers, options with their defaults."""
    lines = ["| name | autoguide | layers | options |", "|---|---|---|---|"]
    for name, builder in FLOWS.items():
        summary = (inspect.getdoc(builder) or "").splitlines()[0].removeprefix("Build a flow of ").rstrip(".")
        _, _, *options = inspect.signature(builder).parameters.values()
        shown = ", ".join(f"`{option.name}={option.default!r}`" for option in options)
        guide = f"{{class}}`~pyro_flowguides.Auto{builder.title}`"
        lines.append(f"| `{name}` | {guide} | {summary} | {shown} |")
    return "\n".join(lines)
