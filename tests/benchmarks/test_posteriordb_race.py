"""benchmarks/posteriordb_race.py stops its clocks at the target, and resumes where it stopped."""

import csv
import importlib
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
race = importlib.import_module("posteriordb_race")

needs_data = pytest.mark.skipif("FLOWGUIDES_DATA" not in os.environ, reason="FLOWGUIDES_DATA is not set")
NAME = "gp_pois_regr-gp_regr"
EVIDENCE = Path(race.__file__).parent / "results" / "posteriordb.csv"


def job(guide, log_evidence, **options):
    root = Path(os.environ["FLOWGUIDES_DATA"]) / "posteriordb" / "posterior_database"
    return race.Job(root, NAME, guide, 0, log_evidence, 60.0, **options)


@needs_data
@pytest.mark.parametrize("guide", [race.OURS, race.SHORTEST, "Pyro AutoNormal"])
def test_a_guide_is_stopped_at_the_target(guide):
    """The evidence is that of the committed results, and the gap is measured from it."""
    (row,) = [
        row
        for row in csv.DictReader(EVIDENCE.read_text().splitlines())
        if (row["posterior"], row["guide"]) == (NAME, "iaf")
    ]
    result = race.run_job(job(guide, float(row["log_evidence"])))
    assert result.reached
    assert -0.1 < result.gap <= race.GAP
    assert result.steps <= 1000
    assert 0.05 < result.cpu_seconds < 120


@needs_data
def test_a_guide_is_stopped_at_the_last_step():
    result = race.run_job(job("Pyro AutoNormal", 1e6, max_steps=200))
    assert not result.reached
    assert result.steps == 200
    assert result.gap > 1e5


def test_the_table_shows_who_reached_the_target():
    reached = {"reached": "True", "cpu_seconds": "1.23", "gap": "0.05", "khat": "0.1"}
    missed = {"reached": "False", "cpu_seconds": "30.2", "gap": "12.3", "khat": "0.9"}
    rows = [{"posterior": "a", "guide": race.OURS, **reached}, {"posterior": "a", "guide": "Pyro AutoNormal", **missed}]
    assert race.make_table(rows).splitlines()[-1] == "| a | **1.2** | not in 30 (12, k-hat 0.90) |"


@needs_data
def test_the_program_resumes_where_it_stopped(tmp_path, capsys):
    database, output = Path(os.environ["FLOWGUIDES_DATA"]) / "posteriordb", tmp_path / "race.csv"
    command = ["--posteriordb", str(database), "--posteriors", NAME, "--guides", "Pyro AutoNormal"]
    command += ["--evidence", str(EVIDENCE), "--output", str(output)]
    race.main(command)
    (row,) = csv.DictReader(output.read_text().splitlines())
    assert (row["posterior"], row["guide"], row["reached"]) == (NAME, "Pyro AutoNormal", "True")
    table = output.with_suffix(".md").read_text("utf-8")
    assert f"| {NAME} | **" in table
    assert "Result(" in capsys.readouterr().out
    race.main(command)
    assert len(output.read_text().splitlines()) == 2
    assert "Result(" not in capsys.readouterr().out
