"""Every table of the documentation and of the results has as many cells in each row as in its header."""

from __future__ import annotations

import importlib
import re
import sys
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
markdown_table = importlib.import_module("tables").markdown_table

PAGES = [
    *sorted((ROOT / "docs").glob("**/*.md")),
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
]


def read_tables(text: str) -> list[list[list[str]]]:
    """Return the cells of every table in a Markdown text, separators included."""
    blocks = groupby(text.splitlines(), key=lambda line: line.startswith("|"))
    return [[split_cells(line) for line in lines] for is_table, lines in blocks if is_table]


def split_cells(line: str) -> list[str]:
    """Split a row at its unescaped bars."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_rows_have_the_cells_of_their_header(page):
    for header, separator, *rows in read_tables(page.read_text("utf-8")):
        assert len(separator) == len(header), header
        assert all(re.fullmatch(":?-+:?", cell) for cell in separator), separator
        assert rows, header
        for row in rows:
            assert len(row) == len(header), row


def test_a_written_table_is_read_back():
    rows = [["a", "1"], ["b", ""]]
    ((header, separator, *read),) = read_tables(f"text\n\n{markdown_table(['name', 'value'], rows)}\n\nmore")
    assert (header, len(separator), read) == (["name", "value"], 2, rows)


@pytest.mark.parametrize("row", [["a"], ["a", "1", "2"]])
def test_a_row_of_another_length_is_refused(row):
    with pytest.raises(ValueError, match=rf"2 columns, but a row has {len(row)} cells"):
        markdown_table(["name", "value"], [["b", "2"], row])
