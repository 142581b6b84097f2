"""benchmarks/speed.py runs at a tiny size, its workers answer, and its tables agree with its rows."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
program = importlib.import_module("speed")
report = importlib.import_module("speed_report")
workers = importlib.import_module("speed_workers")
gap = importlib.import_module("speed_gap")
append_row = importlib.import_module("row_files").append_row
TINY = {"dim": 3, "particles": 32, "hidden": 64}


# -- workers -----------------------------------------------------------------------------------------------------------


def talk(study: str, name: str, *requests: object) -> list[dict]:
    command = [sys.executable, str(BENCHMARKS / "speed_workers.py"), study, name]
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    environment = {**os.environ, **workers.ONE_THREAD}
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True, env=environment)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_worker_answers_every_request_and_outlives_a_failure():
    answers = talk("steps", "by hand", {"setup": TINY}, {"run": 3}, {"setup": {"dim": "many"}}, {"setup": TINY})
    assert answers[0]["versions"]["torch"] == importlib.metadata.version("torch")
    assert 10 > answers[1]["first"] > answers[1]["call"] > 1e-5
    assert 0.01 < answers[2]["ms"] < 1000
    assert answers[3]["left_out"].startswith("TypeError")
    assert answers[4]["facts"] == {}
    assert len(answers) == 5


def test_a_worker_reports_a_missing_library(tmp_path, monkeypatch):
    (tmp_path / "zuko.py").write_text("raise ImportError('there is no zuko here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "there is no zuko here" in talk("steps", "zuko", {"setup": TINY})[-1]["left_out"]


def test_every_competitor_has_a_function():
    for competitors in workers.COMPETITORS.values():
        for competitor in competitors.values():
            path = BENCHMARKS / f"{competitor.module}.py"
            defined = [node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)]
            (function,) = (node for node in defined if node.name == competitor.function)
            arguments = {argument.arg for argument in [*function.args.args, *function.args.kwonlyargs]}
            assert competitor.options.keys() <= arguments


def test_by_hand_is_a_flow_with_the_right_log_determinant():
    by_hand = importlib.import_module("speed_torch")
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(by_hand.Layer(4, 8, backwards) for backwards in (False, True, False)).double()
    by_hand.draw_weights(layers, 0)
    for layer in layers:
        layer.masks = [mask.double() for mask in layer.masks]
    x = torch.randn(1, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: by_hand.stack(layers, x)[0], x)[0, :, 0]
    torch.testing.assert_close(by_hand.stack(layers, x)[1], jacobian.slogdet().logabsdet[None])
    assert jacobian.triu(1).abs().max() > 1e-3
    assert jacobian.tril(-1).abs().max() > 1e-3


# -- the evidence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_the_evidence_of_the_normal_target(dim):
    y = torch.linspace(-1, 1, dim - 1, dtype=torch.float64)
    covariance = 1.25 * torch.eye(dim - 1, dtype=torch.float64) + 1
    wanted = MultivariateNormal(torch.zeros(dim - 1, dtype=torch.float64), covariance).log_prob(y)
    assert gap.log_evidence("location", dim) == pytest.approx(float(wanted), abs=1e-10)


def test_the_evidence_of_the_target_with_unknown_scale():
    y = torch.linspace(-1, 1, 5, dtype=torch.float64)
    nodes = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    scale = ((2 * nodes).exp() + 0.25).sqrt()
    log_density = Normal(0.0, scale[:, None]).log_prob(y).sum(-1) + Normal(0.0, 1.0).log_prob(nodes)
    wanted = log_density.logsumexp(0) + math.log(18 / 20_000)
    assert gap.log_evidence("scale", 6) == pytest.approx(float(wanted), abs=1e-8)


def test_training_ends_at_the_first_check_that_is_near():
    elbos = iter([-2.0, -1.2, -1.05, -1.0])
    job = gap.until_near(lambda: None, lambda: next(elbos), -1.0, seconds=60.0, spent=2.0)
    job.call()
    assert (job.facts()["near"], job.facts()["steps"]) == (True, 3 * gap.Target.check_every)
    assert job.facts()["gap"] == pytest.approx(0.05)
    assert job.facts()["seconds"] >= 2.0
    late = gap.until_near(lambda: None, lambda: -5.0, -1.0, seconds=0.001)
    late.call()
    assert late.facts()["near"] is False


# -- the program -------------------------------------------------------------------------------------------------------


def test_a_study_is_run_and_written_down(tmp_path):
    competitors = ["fit", "by hand", "NumPyro, scan"]
    command = ["--only", *competitors, "--rounds", "2", "--output", str(tmp_path), "--numpyro", "none"]
    path = program.run("steps", [TINY], program.parse(command))
    rows = report.read_rows(path)
    assert [row["competitor"] for row in rows] == competitors
    assert [len(row["rounds"].split()) for row in rows] == [2, 2, 0]
    for row in rows[:2]:
        times = [float(ms) for ms in row["rounds"].split()]
        assert min(times) <= float(row["ms"]) <= max(times)
    assert "No such file" in rows[2]["left_out"]
    text = report.write("steps", path)
    assert f"- NumPyro, scan (D = 3): {rows[2]['left_out']}" in text
    assert "| by hand |" in text
    assert (tmp_path / "speed_steps.md").read_text("utf-8") == f"{text}\n"
    assert (tmp_path / "speed_steps.png").stat().st_size > 5_000


def test_a_study_of_a_vae_is_run(tmp_path):
    command = ["--only", "by hand", "ours", "Pyro SVI", "--rounds", "1", "--output", str(tmp_path)]
    rows = report.read_rows(program.run("vae", [{"posterior": "iaf", "batch": 2}], program.parse(command)))
    assert [row["left_out"] for row in rows] == ["", "", ""]
    assert all(0.1 < float(row["ms"]) < 10_000 for row in rows)


# -- the report --------------------------------------------------------------------------------------------------------


def row(competitor: str, rounds: str, **values: object) -> dict[str, object]:
    numbers = {"dim": 10, "particles": 32, "hidden": 64, "competitor": competitor, "ms": "", "first": 1.0}
    if rounds:
        numbers["ms"] = report.median(float(ms) for ms in rounds.split())
    about = {"date": "2026-01-01", "hardware": "a machine", "versions": "torch 2, Python 3"}
    return {**numbers, "left_out": "", "rounds": rounds, **about, **values}


@pytest.fixture
def path(tmp_path):
    rows = [
        row("Pyro SVI", "8 40 6"),
        row("fit", "2 20 3"),
        row("fit, compiled", "1 1 1"),
        row("NumPyro, loop", "2 2 0.5"),
        row("FlowJAX, loop", "", left_out="no module"),
    ]
    for one in rows:
        append_row(tmp_path / "speed_steps.csv", one)
    return tmp_path / "speed_steps.csv"


def test_ratios_are_taken_within_a_round(path):
    rows = report.read_rows(path)
    fit, pyro, missing = (report.find(rows, name) for name in ("fit", "Pyro SVI", "FlowJAX, loop"))
    assert report.ratio(fit, pyro) == 0.5  # the median of 1/4, 1/2, 1/2; that of the medians is 3/8
    assert math.isnan(report.ratio(missing, pyro))
    assert report.find(rows, "fit", dim=11) is None


def test_the_table_compares_and_names_what_is_missing(path):
    text = report.write("steps", path)
    assert "| fit | 3 (2×) |" in text
    assert "| FlowJAX, loop | — |" in text
    assert "- FlowJAX, loop (D = 10): no module" in text
    assert "| fit / Pyro SVI, D=10, P=32 | 0.333 | 0.5 | no |" in text
    assert "| fit, compiled / NumPyro, loop, D=10, P=32 | 1 | 0.5 | yes |" in text
    assert "a machine; torch 2, Python 3." in text


def test_time_to_the_evidence_shows_who_missed_it(tmp_path):
    shared = {"target": "scale", "dim": 10, "first": 3.0, "rounds": "", "ms": "", "left_out": ""}
    about = {"date": "2026-01-01", "hardware": "a machine", "versions": "torch 2"}
    facts = ({"near": True, "seconds": 1.5, "steps": 300, "gap": 0.02}, {"near": False, "seconds": 40.0, "steps": 9000})
    for name, own in zip(("fit", "Pyro AutoIAFNormal"), facts, strict=True):
        append_row(tmp_path / "speed_gap.csv", {**shared, "competitor": name, "gap": 2.5, **own, **about})
    text = report.write("gap", tmp_path / "speed_gap.csv")
    assert "| fit | 1.5 s (300 steps) |" in text
    assert "| Pyro AutoIAFNormal | not in 40 s (gap 2.5) |" in text
