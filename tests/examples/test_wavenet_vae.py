"""The WaveNet example runs, and its data are what it says."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "examples" / "wavenet_vae.py"


@pytest.fixture
def program(monkeypatch):
    specification = importlib.util.spec_from_file_location("wavenet_vae", PATH)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "wavenet_vae", module)
    specification.loader.exec_module(module)
    return module


def test_training_and_test_pieces_share_no_value(program):
    train, test = program.recording()
    assert train.shape[1:] == test.shape[1:] == (1, 96)
    assert torch.equal(train[1, 0, :88], train[0, 0, 8:])
    assert torch.equal(train, train.round())
    assert {train.min().item(), train.max().item()} <= set(range(256))
    tail, head = train[-1, 0], test[0, 0]
    assert not any(torch.equal(tail[-shift:], head[:shift]) for shift in range(8, 97))


def test_the_latent_vector_reaches_the_wavenet_only_where_it_should(program):
    _, test = program.recording()
    z = torch.randn(3, program.LATENT_DIM)
    for features, used in {0: False, program.LATENT_DIM: True}.items():
        vae = program.build(features)
        assert vae.network.receptive_field == 16
        found = torch.stack([vae.conditional_log_prob(each, test[:1]) for each in z])
        assert (found.std() > 0) == used


def test_the_command_compares_both_and_draws(program, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["wavenet_vae.py", "--steps", "2", "--output", str(tmp_path / "series.png")])
    train, test = program.recording()
    monkeypatch.setattr(program, "recording", lambda: (train, test[:3]))
    program.main()
    results = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "test −log p(x)" in line]
    assert results == ["WaveNet alone", "WaveNet VAE"]
    assert (tmp_path / "series.png").stat().st_size > 1000
