"""The regression example runs with either guide and ends with a verdict and intervals."""

import runpy
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "examples" / "regression.py"


@pytest.mark.parametrize("guide", ["AutoNormal", "AutoIAF"])
def test_runs_with_either_guide(guide, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(PATH), "--guide", guide, "--steps", "30"])
    runpy.run_path(str(PATH), run_name="__main__")
    printed = capsys.readouterr().out
    assert "Verdict:" in printed
    for name in ("intercept", "slope", "scale", "df"):
        assert f"\n{name} " in printed
