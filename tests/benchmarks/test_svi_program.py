"""svi.py of benchmarks/ trains guides by plain SVI, and says how many runs crash or fall behind."""

import importlib
import sys
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
svi = importlib.import_module("svi")
row_files = importlib.import_module("row_files")


@pytest.fixture(autouse=True)
def _single_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", svi.MODELS)
@torch.no_grad()
def test_models_broadcast_over_particles(name):
    """The bound of a narrow guide is the same with vectorized particles and with single ones."""
    model = svi.MODELS[name]
    guide = AutoNormal(model, init_scale=1e-4)
    guide()
    bounds = []
    for vectorized in (True, False):
        pyro.set_rng_seed(0)
        bounds.append(Trace_ELBO(20, vectorize_particles=vectorized, max_plate_nesting=1).loss(model, guide))
    assert bounds[0] == pytest.approx(bounds[1], rel=0.01)


def test_runs_are_measured_and_compared_with_the_gaussian(tmp_path):
    path = tmp_path / "svi.csv"
    for guide in (svi.GAUSSIAN, "iaf"):
        row_files.append_row(path, svi.measure((svi.Run("banana", guide, 16, "Adam 0.01", 0), 3)))
    gaussian, flow = row_files.read_rows(path)
    assert gaussian["crashed_at"] == flow["crashed_at"] == ""
    difference = float(flow["bound"]) - float(gaussian["bound"])
    assert f"| iaf | 1 | 0 | 0 | 0 | {difference:.1f} | {difference:.2f} |" in svi.write_table(path)


def test_crashes_are_counted(tmp_path):
    path = tmp_path / "svi.csv"
    run = svi.Run("banana", svi.GAUSSIAN, 1, "Adam 0.01", 0)
    rows = [svi.measure((run, 1)), svi.measure((run, 1)) | {"guide": "iaf", "bound": "nan", "crashed_at": 7}]
    for row in rows:
        row_files.append_row(path, row)
    assert "| iaf | 1 | 1 | 1 | 0 | nan | nan |" in svi.write_table(path)
