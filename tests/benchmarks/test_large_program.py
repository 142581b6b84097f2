"""benchmarks/large.py measures in processes of its own, keeps the rows it has, and its tables agree with them."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
program = importlib.import_module("large")
append_row = importlib.import_module("row_files").append_row


def test_only_missing_rows_are_measured(tmp_path, capsys):
    path = tmp_path / "large.csv"
    row = {"flow": "planar", "dim": 301, "parameters": 3, **dict.fromkeys(program.PANELS, 1.25)}
    append_row(path, {**row, "date": "2026-01-01", "machine": "a machine"})
    program.main(["--flows", "planar", "--dims", "301", "302", "--rounds", "1", "--output", str(path)])
    kept, measured = csv.DictReader(path.read_text("utf-8").splitlines())
    assert (kept["dim"], kept["step_ms"], kept["machine"]) == ("301", "1.25", "a machine")
    # Eight planar layers, tails, and an affine map with a stretch along 20 directions, which ends 300 dimensions.
    assert (measured["dim"], measured["parameters"]) == ("302", str(8 * (2 * 302 + 1) + 302 + 2 * 302 + 20 * 302 + 20))
    assert 0 < float(measured["step_ms"]) < float(measured["path_ms"]) * 10 < 1e5
    assert 0.01 < float(measured["fit_s"]) < 600
    assert 1 < float(measured["fit_mib"]) < 5000
    text = path.with_suffix(".md").read_text("utf-8")
    assert f"| planar | 3 | {int(measured['parameters']):,} |" in text
    assert f"| planar | 1.25 | {program.format_number(float(measured['step_ms']))} |" in text
    assert "| sylvester |  |  |" in text
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert text in capsys.readouterr().out
