"""The benchmark of autoregressive decoders runs, and its tables and figures are where it says."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "vlae.py"


@pytest.fixture
def program(monkeypatch):
    specification = importlib.util.spec_from_file_location("benchmark_vlae", PATH)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "benchmark_vlae", module)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def run(program, monkeypatch, tmp_path):
    """Run some studies on random images; the tables by the start of their names, without their heads."""
    images = np.random.default_rng(0).integers(0, 256, (30, 1, 8, 8), dtype=np.uint8)
    faces = np.random.default_rng(1).integers(0, 256, (30, 560), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", train=images[:20], test=images[20:])
    np.savez(tmp_path / "faces.npz", train=faces[:20], test=faces[20:])
    files = ["--data", str(tmp_path / "images.npz"), "--faces", str(tmp_path / "faces.npz")]
    small = ["--steps", "2", "--face-steps", "2", "--window-steps", "2", "--prior-hidden", "8", "--latent-dim", "3"]
    small += ["--samples", "4", "--filters", "4", "--window-filters", "4", "--output", str(tmp_path / "results")]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vlae.py", *files, *small, *arguments])
        program.main()
        tables = {path.stem: path.read_text() for path in (tmp_path / "results").glob("*.md")}
        return {name: text.splitlines()[4:] for name, text in tables.items()}, tmp_path / "results"

    return run


def test_the_comparisons(run):
    tables, _ = run("--studies", "compare", "frey")
    for study in ("compare", "frey"):
        (rows,) = [rows for name, rows in tables.items() if name.startswith(f"vlae_{study}_")]
        models = [row.split("|")[1].strip() for row in rows]
        assert models == ["VAE", "IAF-VAE", "AF-prior VAE", "PixelCNN alone", "VLAE"]


def test_the_windows(run):
    tables, folder = run("--studies", "window", "--reaches", "1", "2", "--free-reaches", "2")
    ((name, rows),) = tables.items()
    assert name.startswith("vlae_window_pixelcnn_")
    assert [row.split("|")[1:3] for row in rows] == [[" 1 ", " 0.00 "], [" 2 ", " 0.00 "], [" 2 ", " 0.64 "]]
    assert (folder / f"{name}.png").stat().st_size > 1000
