"""CSV files that grow row by row, so that an interrupted program can resume."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

__all__ = ["append_row", "read_rows"]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, or an empty list if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Append a row to a CSV file. The first row also writes the header.

    Raises:
        ValueError: if the file has other columns than the row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = _columns(path) if path.is_file() else list(row)
    if set(columns) != set(row):
        raise ValueError(f"{path} has the columns {columns}, the new row {list(row)}: write to another file")
    is_new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def _columns(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])
