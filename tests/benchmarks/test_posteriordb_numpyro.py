"""The NumPyro models of benchmarks/posteriordb_numpyro.py are the Pyro models; the program fits them, if it can."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
program = importlib.import_module("posteriordb")
fits = importlib.import_module("posteriordb_fits")
models = importlib.import_module("posteriordb_models")

needs_numpyro = pytest.mark.skipif(
    importlib.util.find_spec("numpyro") is None or "FLOWGUIDES_DATA" not in os.environ,
    reason="numpyro is not installed, or FLOWGUIDES_DATA is not set",
)
PROGRAMS = sorted(program.__name__ for program in (entry.model for entry in models.PROGRAMS.values()))


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


def root() -> Path:
    return Path(os.environ["FLOWGUIDES_DATA"]) / "posteriordb" / "posterior_database"


def posterior(function: str):
    posteriors = (models.load(root(), name) for name in models.names(root()))
    return next(posterior for posterior in posteriors if posterior.model.__name__ == function)


def pyro_log_joint(one, sites: dict[str, Tensor]) -> Tensor:
    trace = poutine.trace(poutine.condition(one.model, sites)).get_trace(**one.data)
    return poutine.util.prune_subsample_sites(trace).log_prob_sum()


def random_points(one, number: int) -> list[dict[str, Tensor]]:
    """Reference draws, moved at random by their standard deviations in unconstrained space."""
    draws = {site: value.flatten(0, 1) for site, value in one.from_reference(one.reference).items()}
    trace = poutine.trace(poutine.condition(one.model, {site: x[0] for site, x in draws.items()}))
    nodes = trace.get_trace(**one.data).nodes
    points = [{} for _ in range(number)]
    for site, value in draws.items():
        transform = biject_to(nodes[site]["fn"].support)
        u = transform.inv(value)
        moved = u[torch.randint(len(u), (number,))] + u.std(0) * torch.randn(number, *u.shape[1:])
        for point, x in zip(points, transform(moved), strict=True):
            point[site] = x
    return points


@needs_numpyro
@pytest.mark.parametrize("function", PROGRAMS)
def test_log_joint_densities_are_equal(function):
    numpyro_models = importlib.import_module("posteriordb_numpyro")
    one = posterior(function)
    for sites in random_points(one, 5):
        values = {site: x.numpy() for site, x in sites.items()}
        log_p, _ = numpyro_models.log_density(numpyro_models.counterpart(one), (), {}, values)
        torch.testing.assert_close(float(log_p), float(pyro_log_joint(one, sites)), rtol=1e-11, atol=1e-9)


@needs_numpyro
@pytest.mark.parametrize("guide", fits.NUMPYRO_PEERS)
def test_draws_of_a_fit_carry_the_densities_of_model_and_guide(guide):
    numpyro_models = importlib.import_module("posteriordb_numpyro")
    one = posterior("eight_schools_noncentered")
    weigh = numpyro_models.fit(one, *fits.NUMPYRO_PEERS[guide], seed=0, steps=300, num_particles=8, lr=1e-2)
    weighted = weigh(500)
    assert weighted.draws["theta_trans"].shape == (500, 8)
    for s in range(5):
        sites = {site: value[s] for site, value in weighted.draws.items()}
        torch.testing.assert_close(weighted.log_p[s], pyro_log_joint(one, sites))
    # log p - log q is nearly constant only if log q is the density of these draws, and the guide was trained.
    assert weighted.log_w.isfinite().all()
    assert weighted.log_w.std() < 1.5 < weighted.log_q.std()


@needs_numpyro
def test_a_job_is_run():
    name = "eight_schools-eight_schools_noncentered"
    row = program.run_job(fits.Job(root(), name, "NumPyro AutoIAFNormal x1", 0, 20, 1.0, num_samples=500))
    assert row.verdict != "failed", row.note
    assert (row.steps, row.limit) == (20, "20 steps")
    assert row.elbo < row.log_evidence
    assert "NumPyro" in row.versions


@pytest.mark.parametrize("asked", [["--numpyro"], ["--guides", "NumPyro AutoBNAFNormal"]])
def test_without_numpyro_the_remedy_is_named(asked, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numpyro" else find(name))
    with pytest.raises(SystemExit):
        program.main(["--posteriordb", "anywhere", *asked])
    assert "pip install 'pyro-flowguides[benchmarks]'" in capsys.readouterr().err
