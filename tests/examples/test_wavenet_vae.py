"""The WaveNet example: it runs, and its data are as described."""

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
    assert 0 <= train.min() < 100 < train.max() <= 255
    tail, head = train[-1, 0], test[0, 0]
    assert not any(torch.equal(tail[-shift:], head[:shift]) for shift in range(8, 97))


def test_the_wavenet_depends_on_the_latent_vector_only_with_features(program):
    _, test = program.recording()
    z = torch.randn(3, program.LATENT_DIM)
    for features, depends_on_z in {0: False, program.LATENT_DIM: True}.items():
        vae = program.build(features)
        assert vae.network.receptive_field == 16
        log_prob = torch.stack([vae.conditional_log_prob(latent, test[:1]) for latent in z])
        assert (log_prob.std() > 0) == depends_on_z


def test_the_command_prints_both_results_and_plots(program, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["wavenet_vae.py", "--steps", "2", "--output", str(tmp_path / "series.png")])
    train, test = program.recording()
    monkeypatch.setattr(program, "recording", lambda: (train, test[:3]))
    program.main()
    results = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "test −log p(x)" in line]
    assert results == ["WaveNet alone", "WaveNet VAE"]
    assert (tmp_path / "series.png").stat().st_size > 1000
