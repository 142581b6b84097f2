"""Importance resampling."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro.infer import autoguide

from pyro_flowguides.diagnostics import WeightedDraws, importance_resample, log_weights, resample
from tests.diagnostics import programs
from tests.diagnostics.programs import DATA


@pytest.fixture(autouse=True)
def _fresh() -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.mark.parametrize("guide", [programs.gaussian_guide(0.8, 1.0), programs.gaussian_guide(0.3, 1.5)])
def test_resampled_moments_are_those_of_the_posterior(guide: object) -> None:
    mean, sd = programs.gaussian_posterior(DATA)
    draws = importance_resample(programs.gaussian_model, guide, DATA, num_proposals=20000, num_samples=4000)["z"]
    assert draws.shape == (4000,)
    assert float(draws.mean()) == pytest.approx(mean, abs=0.1 * sd)
    assert float(draws.std()) == pytest.approx(sd, rel=0.1)


def test_sites_of_a_draw_stay_together() -> None:
    guide = autoguide.AutoNormal(programs.schools_model)
    weighted = log_weights(programs.schools_model, guide, num_samples=200)
    chosen = resample(weighted, 50)
    assert {name: value.shape for name, value in chosen.draws.items()} == {"mu": (50,), "tau": (50,), "theta": (50, 8)}
    for s in range(50):
        (origin,) = torch.where(weighted.draws["mu"] == chosen.draws["mu"][s])
        assert torch.equal(weighted.draws["theta"][origin[0]], chosen.draws["theta"][s])
        assert weighted.log_p[origin[0]] == chosen.log_p[s]


def _with_weights(weights: torch.Tensor) -> WeightedDraws:
    index = torch.arange(len(weights))
    return WeightedDraws({"i": index}, weights.log(), torch.zeros(len(weights)), weights.log())


def test_counts_are_as_expected_and_order_is_random() -> None:
    weights = torch.rand(100).double() + 0.5
    counts = torch.bincount(resample(_with_weights(weights), 1000).draws["i"], minlength=100)
    excess = counts - 1000 * weights / weights.sum()
    assert excess.abs().max() <= 1.5  # smoothing changes the largest weights a little
    order = resample(_with_weights(weights), 1000).draws["i"]
    assert not torch.equal(order, order.sort().values)


def test_without_replacement_draws_differ() -> None:
    weighted = _with_weights(torch.rand(100).double())
    chosen = resample(weighted, 60, replace=False).draws["i"]
    assert len(chosen.unique()) == 60


def test_zero_weights_are_never_chosen() -> None:
    weights = torch.ones(100).double()
    weights[50:] = 0
    weighted = _with_weights(weights)
    assert resample(weighted, 500).draws["i"].max() < 50
    assert resample(weighted, 50, replace=False).draws["i"].max() < 50
    with pytest.raises(ValueError, match="only 50 have positive weight"):
        resample(weighted, 51, replace=False)


def test_errors() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        resample(_with_weights(torch.ones(50)), 0)
    with pytest.raises(ValueError, match="no draw"):
        resample(_with_weights(torch.zeros(50)), 10)
