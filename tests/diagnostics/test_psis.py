"""Pareto smoothing and effective sample sizes, with the installed ArviZ."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pyro_flowguides.diagnostics import (
    arviz_compat,
    effective_sample_size,
    khat_threshold,
    log_mean_weight,
    pareto_smooth,
)


def _pareto(k: float, size: int = 4000) -> torch.Tensor:
    """Log weights whose tail index is k."""
    uniform = torch.rand(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.log1p(((1 - uniform) ** -k - 1) / k)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.8, 1.2])
def test_khat_of_pareto_weights(k: float) -> None:
    assert pareto_smooth(_pareto(k)).khat == pytest.approx(k, abs=0.2)


def test_smoothing_keeps_order_and_sums_to_one() -> None:
    log_w = _pareto(0.6)
    smoothed = pareto_smooth(log_w).log_weights
    assert float(smoothed.exp().sum()) == pytest.approx(1)
    assert (smoothed[log_w.argsort()].diff() >= -1e-12).all()
    assert smoothed.max() - smoothed.median() <= log_w.max() - log_w.median() + 1e-9


def test_sign_of_log_weights_is_kept() -> None:
    """ArviZ 1.x smooths log likelihoods, which are minus log weights."""
    log_w = np.random.default_rng(0).normal(size=1000) * 2
    smoothed, khat = arviz_compat.psislw(log_w)
    assert smoothed.argmax() == log_w.argmax()
    assert 0.3 < khat < 1.2


@pytest.mark.parametrize(("version", "expected"), [("0.23.4", True), ("1.0.0", False), ("2.1", False)])
def test_legacy_versions(version: str, expected: bool) -> None:
    class Module:
        __version__ = version

    assert arviz_compat.is_legacy(Module) is expected  # type: ignore[arg-type]


def test_equal_weights_have_no_tail() -> None:
    result = pareto_smooth(torch.full((100,), -7.0) + 1e-6 * torch.randn(100))
    assert result.khat == 0
    torch.testing.assert_close(result.log_weights, torch.full((100,), -math.log(100)).double(), atol=1e-5, rtol=0)


def test_zero_and_undefined_weights() -> None:
    log_w = _pareto(0.4)
    log_w[:100] = -torch.inf
    log_w[100:110] = torch.nan
    result = pareto_smooth(log_w)
    assert result.khat == pytest.approx(0.4, abs=0.25)
    assert result.log_weights[:110].isneginf().all()
    assert float(result.log_weights.exp().sum()) == pytest.approx(1)


def test_too_few_positive_weights_give_an_infinite_khat() -> None:
    log_w = torch.full((1000,), -torch.inf)
    log_w[:20] = torch.randn(20)
    assert pareto_smooth(log_w).khat == math.inf


@pytest.mark.parametrize("log_w", [torch.zeros(10), torch.zeros(30, 2), torch.full((30,), -torch.inf)])
def test_errors(log_w: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"at least 25|no draw"):
        pareto_smooth(log_w)


def test_threshold() -> None:
    assert khat_threshold(100) == pytest.approx(0.5)
    assert khat_threshold(1000) == pytest.approx(2 / 3)
    assert khat_threshold(10**6) == 0.7
    with pytest.raises(ValueError, match="num_samples must be at least 2, got 1"):
        khat_threshold(1)


def test_effective_sample_size() -> None:
    assert effective_sample_size(torch.full((50,), -1e4)) == pytest.approx(50)
    assert effective_sample_size(torch.tensor([0.0, -torch.inf, torch.nan])) == 1
    assert effective_sample_size(torch.tensor([-torch.inf])) == 0
    w = torch.rand(100).double()
    assert effective_sample_size(w.log()) == pytest.approx(float(w.sum() ** 2 / (w**2).sum()))


def test_log_mean_weight_and_its_error() -> None:
    log_w = torch.randn(20000, generator=torch.Generator().manual_seed(0)).double() * 0.5
    estimate, error = log_mean_weight(log_w)
    assert error == pytest.approx(float(log_w.exp().std() / log_w.exp().mean() / 20000**0.5), rel=1e-3)
    assert abs(estimate - 0.125) < 4 * error
    assert all(math.isnan(value) for value in log_mean_weight(torch.tensor([-torch.inf, torch.nan])))
