"""vae_joint.py and vae_posteriors.py of benchmarks/ run, resume, and compare with the Gaussian of the same seed."""

import csv
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
joint = importlib.import_module("vae_joint")
posteriors = importlib.import_module("vae_posteriors")


@pytest.fixture
def command(tmp_path):
    """Random images, and the arguments that both programs share."""
    images = np.random.default_rng(0).integers(0, 256, (160, 1, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "mnist.npz", train=images[:140], test=images[140:])
    return ["--data", str(tmp_path / "mnist.npz"), "--epochs", "1", "--output", str(tmp_path / "rows.csv")]


def read(command):
    return list(csv.DictReader(Path(command[-1]).read_text("utf-8").splitlines()))


def test_a_joint_run_resumes(command):
    small = ["--latent-dim", "3", "--hidden", "8", "--samples", "2", "--seeds", "0", *command]
    joint.main(["--variants", "planar posterior", *small])
    joint.main(["--variants", "diagonal Gaussian", "planar posterior", *small])
    flow, plain = read(command)
    assert (flow["variant"], plain["variant"]) == ("planar posterior", "diagonal Gaussian")
    gain = float(flow["elbo"]) - float(plain["elbo"])
    text = Path(command[-1]).with_suffix(".md").read_text("utf-8")
    assert f"| planar posterior | 1 | {float(flow['elbo']):.2f} | {gain:.2f} |" in text


def test_a_posterior_is_chosen_on_validation_images(command):
    posteriors.main(["--families", "planar x4", "--decoder-epochs", "1", "--seeds", "0", *command])
    rows = read(command)
    assert [row["family"] for row in rows] == ["diagonal Gaussian", "planar x4"]
    for row in rows:
        valid = {rate: float(row[f"valid_{rate:g}"]) for rate in posteriors.LEARNING_RATES}
        assert float(row["learning_rate"]) == min(valid, key=valid.__getitem__)
    gain = float(rows[0]["test"]) - float(rows[1]["test"])
    text = Path(command[-1]).with_suffix(".md").read_text("utf-8")
    assert f"| planar x4 | {float(rows[1]['test']):.2f} | {gain:.2f} | {gain:.2f} |" in text
    before = Path(command[-1]).read_bytes()
    posteriors.main(["--families", "planar x4", "--seeds", "0", *command])
    assert Path(command[-1]).read_bytes() == before


def test_gains_are_over_the_same_seed():
    rows = [
        {"variant": joint.DIAGONAL, "seed": "0", "elbo": "-10"},
        {"variant": joint.DIAGONAL, "seed": "1", "elbo": "-20"},
        {"variant": "MAF prior", "seed": "1", "elbo": "-17"},
        {"variant": "MAF prior", "seed": "2", "elbo": "-1"},
    ]
    assert joint.gains(rows, "MAF prior", "elbo") == [3.0]


def test_pyro_posteriors_have_the_density_of_their_draws():
    posterior = posteriors.FAMILIES["Pyro conditional IAF x4"].build(5)
    loc, scale, context = (posteriors.torch.rand(4, size) + 0.5 for size in (10, 10, 5))
    z, log_q = posterior.rsample_and_log_prob(loc, scale, context, (3,))
    assert z.shape == (3, 4, 10)
    posteriors.torch.testing.assert_close(posterior(loc, scale, context).log_prob(z), log_q)
