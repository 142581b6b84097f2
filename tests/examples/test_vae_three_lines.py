"""The three-line VAE example: it runs and trains every parameter."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

PATH = Path(__file__).parents[2] / "examples" / "vae_three_lines.py"


@pytest.fixture
def program(monkeypatch):
    specification = importlib.util.spec_from_file_location("vae_three_lines", PATH)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "vae_three_lines", module)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["PlainVAE", "FlowVAE"])
def test_training_changes_every_parameter_and_raises_the_elbo(program, kind):
    training, test = program.digits()
    assert training.shape == (1500, 64)
    assert test.shape == (297, 64)
    vae = getattr(program, kind)()
    before = {name: parameter.detach().clone() for name, parameter in vae.named_parameters()}
    elbo_at_start, _ = program.evaluate(vae, test, num_particles=20)
    program.train(vae, training, epochs=3)
    assert not [name for name, parameter in vae.named_parameters() if torch.equal(parameter, before[name])]
    elbo, log_p = program.evaluate(vae, test, num_particles=20)
    assert elbo_at_start < elbo < log_p < 0
    assert elbo_at_start < -64 * math.log(2) + 1  # an untrained model is no better than coin flips


def test_exactly_three_lines_are_changed():
    assert [line.split("# ")[-1] for line in PATH.read_text().splitlines() if "# changed line" in line] == [
        f"changed line {number}" for number in (1, 2, 3)
    ]


def test_the_command_prints_both_posteriors(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vae_three_lines.py", "--epochs", "1"])
    program.main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["posterior", "diagonal", "IAF"]
