"""benchmarks/vlae.py runs its studies, keeps comparisons with other settings, and its tables agree with its rows."""

import csv
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
program = importlib.import_module("vlae")
MODELS = ["VAE", "IAF-VAE", "AF-prior VAE", "PixelCNN alone", "VLAE"]


@pytest.fixture
def run(tmp_path):
    """Run some studies on random images; return the folder of the results."""
    images = np.random.default_rng(0).integers(0, 256, (30, 1, 8, 8), dtype=np.uint8)
    faces = np.random.default_rng(1).integers(0, 256, (30, 560), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", train=images[:20], test=images[20:])
    np.savez(tmp_path / "faces.npz", train=faces[:20], test=faces[20:])
    files = ["--data", str(tmp_path / "images.npz"), "--faces", str(tmp_path / "faces.npz")]
    small = ["--face-steps", "2", "--window-steps", "2", "--prior-hidden", "8", "--latent-dim", "3", "--samples", "4"]
    small += ["--filters", "4", "--window-filters", "4", "--output", str(tmp_path / "results")]

    def run(*arguments):
        program.main([*files, *small, *arguments])
        return tmp_path / "results"

    return run


def read(path):
    return list(csv.DictReader(path.read_text("utf-8").splitlines()))


def test_comparisons_with_other_settings_stay(run):
    folder = run("--studies", "compare", "--steps", "1", "--seeds", "0", "1")
    first = read(folder / "vlae_compare.csv")
    assert [row["model"] for row in first] == MODELS
    for row in first:
        seeds = [float(nll) for nll in row["nll_by_seed"].split()]
        assert float(row["nll"]) == pytest.approx(sum(seeds) / 2, abs=0.02)
        if row["gain"]:
            assert float(row["gain"]) == pytest.approx(float(first[0]["nll"]) - float(row["nll"]), abs=0.02)
    run("--studies", "compare", "--steps", "2")
    run("--studies", "compare", "--steps", "2")
    rows = read(folder / "vlae_compare.csv")
    assert [row["steps"] for row in rows] == ["2"] * 5 + ["1"] * 5
    assert rows[5:] == first
    text = (folder / "vlae_compare.md").read_text("utf-8")
    assert text.count("| model |") == 2
    assert f"| VLAE | {first[4]['nll']} ± {first[4]['nll_error']} |" in text


def test_gray_images_are_compared_in_bits_per_dimension(run):
    folder = run("--studies", "frey")
    rows = read(folder / "vlae_frey.csv")
    assert [row["model"] for row in rows] == MODELS
    for row in rows:
        assert float(row["bits_per_dim"]) == pytest.approx(float(row["nll"]) / (560 * np.log(2)), abs=1e-3)
    assert "| bits/dim |" in (folder / "vlae_frey.md").read_text("utf-8")


def test_windows(run):
    folder = run("--studies", "window", "--reaches", "1", "2", "--free-reaches", "2")
    rows = read(folder / "vlae_window_pixelcnn.csv")
    assert [(row["reach"], row["free_bits"]) for row in rows] == [("1", "0.00"), ("2", "0.00"), ("2", "0.64")]
    assert (folder / "vlae_window_pixelcnn.png").stat().st_size > 1000


def test_the_decoder_alone_has_an_exact_likelihood():
    """Its bound is its likelihood, which sums to one over all binary images."""
    torch.manual_seed(0)
    model = program.DecoderAlone(*program.make_decoder("pixelcnn", (1, 2, 2), "bernoulli", 0, 0, {"filters": 4}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).view(-1, 1, 2, 2)
    log_likelihood = model.log_likelihood(images, 3, 10)
    torch.testing.assert_close(log_likelihood.exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(model.terms(images, 2).elbo, log_likelihood.expand(2, -1))
    assert log_likelihood.std() > 0.01
