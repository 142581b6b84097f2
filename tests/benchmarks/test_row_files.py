"""CSV files of results grow row by row, and refuse rows with other columns."""

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
row_files = importlib.import_module("row_files")


def test_rows_are_read_back_as_text(tmp_path):
    path = tmp_path / "folder" / "rows.csv"
    assert row_files.read_rows(path) == []
    row_files.append_row(path, {"name": 'a, "b"', "value": 1.5})
    row_files.append_row(path, {"value": "", "name": "ü"})
    assert row_files.read_rows(path) == [{"name": 'a, "b"', "value": "1.5"}, {"name": "ü", "value": ""}]


@pytest.mark.parametrize("row", [{"name": "a"}, {"name": "a", "value": 1, "date": "today"}])
def test_other_columns_are_refused(tmp_path, row):
    path = tmp_path / "rows.csv"
    row_files.append_row(path, {"name": "a", "value": 1})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="write to another file"):
        row_files.append_row(path, row)
    assert path.read_bytes() == before
