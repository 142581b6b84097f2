"""benchmarks/flow_cost.py has a row for every registered flow and every other layer, measured and documented."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

import pyro_flowguides as fg
from pyro_flowguides.flows import FLOWS
from pyro_flowguides.transforms.docstrings import parse_docstring

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
program = importlib.import_module("flow_cost")


def test_every_registered_flow_has_its_facts():
    rows = program.flow_rows()
    assert [row["name"] for row in rows] == list(FLOWS)
    for row in rows:
        layer = getattr(fg.transforms, row["layer"])
        assert isinstance(FLOWS[row["name"]](3).parts[0], layer)
        assert row["title"] == FLOWS[row["name"]].title
        assert row["cheap direction"] == layer.cheap_direction
        assert re.search(r"\(\d{4}\)\.", row["reference"])
    by_name = {row["name"]: row for row in rows}
    assert by_name["planar"]["forward"] == "O(D)"
    assert by_name["planar"]["inverse"] == "O(D) and four to eight `tanh`"
    assert by_name["sylvester"]["inverse"] == "the same and M scalar equations"
    assert by_name["maf"]["inverse"] == by_name["iaf"]["forward"] == "one network pass"
    assert by_name["iaf"]["context"] == "every layer of the network"
    assert by_name["radial"]["context"] == "all parameters"


def test_every_other_layer_has_its_facts():
    layers = {row["layer"] for row in program.layer_rows()}
    assert {"LULinear", "TriangularSylvester", "Reverse"} <= layers
    assert not layers & {row["layer"] for row in program.flow_rows()}
    assert not layers & {"Flow", "Compose"}


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        ("O(D) in both directions.", ("O(D)", "the same")),
        (
            "O(D) per point, in both directions; the inverse adds\nB bisections. Starts far off.",
            ("O(D) per point", "the same and B bisections"),
        ),
        ("forward, one pass\n(:meth:`~a.b`); inverse, D passes", ("one pass", "D passes")),
        ("O(1) forward; O(2) inverse. Starts at the identity.", ("O(1)", "O(2)")),
    ],
)
def test_costs_in_docstrings(cost, expected):
    assert program.split_costs(parse_docstring(f"A flow.\n\nCost: {cost}\n\nArgs:\n    x: number.")) == expected


@pytest.mark.parametrize("text", ["A flow.", "A flow.\n\nCost: much.", "A flow.\n\nCost: O(D) forward."])
def test_costs_without_both_directions_are_refused(text):
    with pytest.raises(ValueError, match=r"cost of each direction is not in the docstring: 'A flow\."):
        program.split_costs(parse_docstring(text))


def test_the_table_has_a_row_for_everything():
    medians = program.measure(input_dim=4, points=3, rounds=1, scale=0.1)
    lines = program.write_table(medians).splitlines()
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]]
    assert names == [*FLOWS, *(f"`{row['layer']}`" for row in program.layer_rows())]
    assert all(line.count("|") == 8 for line in lines)
    assert lines[2].split(" | ")[4] == "1.0"
    assert {tuple(jobs) for jobs in medians.values()} == {tuple(program.JOBS)}
