"""The regression example: it prints a verdict and intervals with either guide."""

import runpy
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "examples" / "regression.py"


@pytest.mark.parametrize("guide", ["AutoNormal", "AutoIAF"])
def test_prints_a_verdict_and_intervals(guide, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(PATH), "--guide", guide, "--steps", "30"])
    runpy.run_path(str(PATH), run_name="__main__")
    printed = capsys.readouterr().out
    assert "Verdict:" in printed
    for name in ("intercept", "slope", "scale", "df"):
        assert f"\n{name} " in printed
