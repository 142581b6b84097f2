"""faults.py of benchmarks/ provokes faults, counts their outcomes, and keeps the rows of other studies."""

import csv
import importlib
import sys
from pathlib import Path

import pyro
import pytest
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg

pytest.importorskip("lightning_fabric")
pytest.importorskip("sklearn")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
faults = importlib.import_module("faults")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Fits of a few steps, one trial of most studies; checkpoints of a fit only."""
    monkeypatch.setattr(faults, "train_vae", lambda path, epochs: [short_fit(path.with_name(name)) for name in FILES])
    monkeypatch.setattr(faults, "fit", short_fit)
    monkeypatch.setattr(faults, "TRIALS", dict(zip(faults.STUDIES, (1, 1, 30, 1, 1), strict=True)))


FILES = ("last.pt", "best.pt")


def short_fit(path, steps=0):
    pyro.clear_param_store()
    fg.fit(
        faults.model,
        AutoNormal(faults.model),
        steps=4,
        num_particles=4,
        checkpoint=path,
        checkpoint_every=2,
        progress=False,
    )


def test_every_study_finds_the_guarantees_kept(tmp_path):
    path = tmp_path / "faults.csv"
    first, *others = [study for study in faults.STUDIES if "VAE" not in study]
    faults.main(["--studies", *others, "--output", str(path)])
    faults.main(["--studies", first, "--output", str(path)])
    rows = {row["study"]: row for row in csv.DictReader(path.read_text("utf-8").splitlines())}
    assert list(rows) == [first, *others]
    assert all(row["different"] == "0" for row in rows.values())
    assert int(rows["kills of fit"]["identical"]) >= 1
    flips = rows["flipped bits"]
    assert int(flips["identical"]) + int(flips["refused"]) == int(flips["trials"]) == 30
    assert rows["full disks"]["identical"] == "1"
    assert rows["fits in one process"]["new_entries"] == "0"
    assert "| flipped bits | 30 |" in path.with_suffix(".md").read_text("utf-8")


def test_another_result_is_counted():
    state = {"a": [1.0, faults.torch.ones(2)], "seconds": 1.0}
    assert faults.is_same(state, {**state, "seconds": 2.0})
    assert not faults.is_same(state, {**state, "a": [1.0, faults.torch.tensor([1.0, 1.0 + 1e-7])]})
    assert not faults.is_same(state, {"a": state["a"], "b": 0})
