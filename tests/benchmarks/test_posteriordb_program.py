"""benchmarks/posteriordb.py runs, resumes and measures; its report says what the numbers say."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
program = importlib.import_module("posteriordb")
fits = importlib.import_module("posteriordb_fits")
nuts = importlib.import_module("posteriordb_nuts")
report = importlib.import_module("posteriordb_report")
append_row = importlib.import_module("row_files").append_row

needs_data = pytest.mark.skipif("FLOWGUIDES_DATA" not in os.environ, reason="FLOWGUIDES_DATA is not set")
NAME = "eight_schools-eight_schools_noncentered"


# -- the program -------------------------------------------------------------------------------------------------------


def database() -> Path:
    return Path(os.environ["FLOWGUIDES_DATA"]) / "posteriordb"


def job(guide: str, steps: int | None = 20, nuts_seconds: float = 60.0, **options: int):
    return fits.Job(database() / "posterior_database", NAME, guide, 0, steps, nuts_seconds, **options)


@needs_data
def test_a_finished_job_is_not_repeated(tmp_path, capsys):
    output = tmp_path / "results" / "out.csv"
    command = ["--posteriordb", str(database()), "--posteriors", NAME, "--steps", "20", "--output", str(output)]
    program.main([*command, "--guides", "planar", "--report", str(tmp_path / "docs")])
    (row,) = csv.DictReader(output.read_text().splitlines())
    assert (row["posterior"], row["guide"], row["limit"], row["steps"]) == (NAME, "planar", "20 steps", "20")
    assert row["verdict"] in report.VERDICTS
    assert float(row["elbo"]) < float(row["log_evidence"])
    assert 0 < float(row["mean_error"]) < 100
    assert "| planar |" in capsys.readouterr().out
    assert (tmp_path / "docs" / "posteriordb.png").stat().st_size > 10_000
    written = output.read_bytes()
    program.main([*command, "--guides", "planar"])
    assert output.read_bytes() == written


@needs_data
def test_a_peer_is_a_row():
    row = program.run_job(job("Pyro AutoIAFNormal", steps=5, num_samples=500))
    assert (row.steps, row.verdict in report.VERDICTS) == (5, True)
    assert row.elbo < row.log_evidence


@needs_data
def test_a_failure_is_a_row():
    row = program.run_job(job("no such flow"))
    assert row.verdict == "failed"
    assert row.note.startswith("ValueError: unknown flow 'no such flow'")
    assert "\n" not in row.note
    assert math.isnan(row.elbo)


@needs_data
def test_a_chain_is_stopped_when_its_time_is_over():
    row = program.run_job(job(fits.NUTS_LABEL, nuts_seconds=0.2, nuts_warmup=10))
    assert (row.verdict, row.limit) == ("not within 0.2 CPU s", "0.2 s")
    assert row.cpu_seconds < 30


@needs_data
def test_a_chain_is_stopped_when_its_draws_are_close():
    posterior = fits.load(database() / "posterior_database", NAME)
    sites = {name: value.flatten(0, 1) for name, value in posterior.from_reference(posterior.reference).items()}

    watch = nuts.Watch(posterior, math.inf)
    kernel = SimpleNamespace(transforms=dict.fromkeys(sites, torch.distributions.transforms.identity_transform))

    def chain():
        for draw in range(9, 10_000, 10):
            watch(kernel, {name: value[draw] for name, value in sites.items()}, "Sample", draw)

    with pytest.raises(nuts.Stopped):
        chain()
    assert watch.count < 1000
    assert watch.last.worst <= nuts.NUTS_ERROR
    assert fits.errors(posterior, sites).worst == pytest.approx(0, abs=1e-9)
    moved = {**sites, "mu": sites["mu"] + 0.5 * sites["mu"].std()}
    errors = fits.errors(posterior, moved)
    # theta = mu + tau * theta_trans moves as far as mu, which is less in its own standard deviations.
    assert errors.mean == pytest.approx(0.5)
    assert errors.mean_at == "mu"


# -- the report --------------------------------------------------------------------------------------------------------


def row(guide: str, posterior: str = "a-b", **values):
    numbers = {
        "elbo": -1.2,
        "elbo_se": 0.001,
        "log_evidence": -1.0,
        "log_evidence_se": 0.01,
        "khat": 0.3,
        "ess_fraction": 0.9,
        "mean_error": 0.02,
        "mean_at": "mu",
        "log_sd_error": 0.03,
        "log_sd_at": "tau",
        "resampled_mean_error": 0.01,
        "resampled_log_sd_error": 0.01,
        "seconds": 4.0,
        "cpu_seconds": 3.0,
        "steps": 900,
        "verdict": "good",
        "date": "2026-01-01",
        "hardware": "a machine",
        "versions": "torch 2",
    }
    return program.Row(posterior, guide, 0, **({"limit": ""} | numbers | values))


@pytest.fixture
def table(tmp_path):
    rows = [
        row("iaf", elbo=-1.05),
        row("planar", mean_error=0.4, elbo_se=math.nan, elbo=-math.inf),  # called good
        row("radial", log_evidence=-3.0, log_evidence_se=1e-4, khat=0.1, elbo=-3.001, verdict="do not trust"),
        row("maf", log_evidence=5.0, khat=2.0),
        program.Row("a-b", "Pyro AutoNormal", 0, "", verdict="failed", note="ValueError: no"),
        row(fits.NUTS_LABEL, limit="120 s", verdict="reached", note="3 divergences", elbo=math.nan),
        row("iaf", "c-d", khat=0.9, log_evidence=-1.1),
        row("planar", "c-d", khat=0.8, log_evidence=-1.0),
        row("nice", "c-d", limit="20 steps"),
    ]
    for one in rows:
        append_row(tmp_path / "out.csv", dataclasses.asdict(one))
    return report.read(tmp_path / "out.csv")


def find(table, posterior, guide):
    return table[(table["posterior"] == posterior) & (table["guide"] == guide)].iloc[0]


def test_gaps_are_to_the_most_certain_estimate_that_misses_nothing(table):
    assert find(table, "a-b", "iaf")["gap"] == pytest.approx(0.05)  # neither radial's lost mode nor maf's k-hat
    assert find(table, "a-b", "radial")["gap"] == pytest.approx(2.001)
    assert find(table, "a-b", "planar")["gap"] == math.inf
    assert find(table, "c-d", "iaf")["gap"] == pytest.approx(0.2)  # no small k-hat: the smallest


def test_only_wrong_praise_is_a_violation(table):
    assert list(table[table["violation"]]["guide"]) == ["planar"]
    assert "a-b, planar: mean 0.40" in report.summary(table)


def test_other_budgets_are_left_out(table):
    assert "nice" not in set(table["guide"])


def cells(text: str, first: str) -> dict[str, str]:
    """Return a row of the first table with such a row, by its header."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    place = next(place for place, line in enumerate(lines) if line[0] == first)
    header = next(lines[start - 1] for start in range(place, 0, -1) if set(lines[start][0]) == {"-"})
    return dict(zip(header, lines[place], strict=True))


def test_the_document_counts_and_lists(table, tmp_path):
    report.write(table, tmp_path)
    text = (tmp_path / "posteriordb_table.md").read_text()
    assert cells(text, "iaf") == {
        **{"guide": "iaf", "run": "2", "gap ≤ 0.1": "1", "k-hat < 0.7": "1", "mean ≤ 0.1": "2", "log sd ≤ 0.1": "2"},
        **{"all four": "1", "median s": "4.0", "longest s": "4.0", "median CPU s": "3.0", "longest CPU s": "3.0"},
        **{"verdict good / usable / no": "2 / 0 / 0", "failed": "0", "violations": "0"},
    }
    assert cells(text, "planar")["violations"] == "1"
    assert cells(text, "Pyro AutoNormal")["failed"] == "1"
    gaps = {"posterior": "a-b", "iaf": "**0.050**", "planar": "inf", "radial": "2.001", "maf": "0.200"}
    assert cells(text, "a-b") == {**gaps, "Pyro AutoNormal": "failed"}
    assert cells(text, "c-d")["radial"] == "not run"
    assert "good (**violation**)" in text
    assert (
        "Pyro NUTS: reached; 4.0 s (CPU 3.0 s), 900 draws, mean error 0.020, log sd error 0.030, 3 divergences." in text
    )
    assert "a machine; torch 2" in text
    assert (tmp_path / "posteriordb.png").stat().st_size > 10_000
