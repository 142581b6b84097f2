"""benchmarks/large.py measures a worker of its own, keeps what it has, and its table says what the rows say."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
program = importlib.import_module("large")
append_row = importlib.import_module("row_files").append_row


def row(flow: str, dim: int, value: float) -> dict:
    return {"flow": flow, "dim": dim, "parameters": 10 * dim, **dict.fromkeys(program.PANELS, value)}


def test_rows_that_are_there_are_not_measured_again(tmp_path, monkeypatch, capsys):
    path = tmp_path / "large.csv"
    append_row(path, row("planar", 30, 1.25))
    measured = []
    monkeypatch.setattr(
        program, "measure", lambda flow, dim, rounds: measured.append((flow, dim)) or row(flow, dim, 2.5)
    )
    command = ["large.py", "--flows", "planar", "iaf", "--dims", "30", "60", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    program.main()
    assert measured == [("planar", 60), ("iaf", 30), ("iaf", 60)]
    text = path.with_suffix(".md").read_text("utf-8")
    assert "| planar | 300 | 600 |" in text
    assert "| planar | 1.25 | 2.5 |" in text
    assert "| sylvester |  |  |" in text
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert text in capsys.readouterr().out


def test_a_step_beyond_the_full_rank_limit():
    state = torch.get_rng_state()
    found = program.steps("planar", 301, 1)
    torch.set_rng_state(state)
    assert found["parameters"] == 8 * (2 * 301 + 1) + 301 + 2 * 301 + 20 * 301 + 20
    assert found["step_ms"] > 0
    assert found["path_ms"] > 0
    assert program.held() > 50
