"""Agreement of independent fits."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_flowguides.diagnostics import agreement


def _normal(loc: float, scale: float, seed: int, size: int = 20000) -> torch.Tensor:
    return loc + scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_known_differences() -> None:
    first = {"a": _normal(0, 1, 0), "b": _normal(0, 1, 1)}
    second = {"a": _normal(0.5, 1, 2), "b": _normal(0, 2, 3)}
    result = agreement(first, second)
    assert result.mean_difference == pytest.approx(0.5, abs=0.05)
    assert result.mean_site == "a"
    assert result.log_sd_difference == pytest.approx(math.log(2), abs=0.05)
    assert result.log_sd_site == "b"
    assert result.worst_difference == result.log_sd_difference
    assert result.worst_site == "b"
    assert str(result).startswith("2 fits: means within 0.")


def test_all_pairs_are_compared_and_numbers_of_draws_may_differ() -> None:
    fits = [{"a": _normal(loc, 1, seed, size)} for seed, (loc, size) in enumerate([(0, 500), (0.3, 600), (-0.3, 700)])]
    result = agreement(*fits)
    assert result.num_fits == 3
    assert result.mean_difference == pytest.approx(0.6, abs=0.15)


def test_constant_coordinates() -> None:
    value = _normal(0, 1, 0).reshape(-1, 2)
    value[:, 1] = 1.0
    assert agreement({"L": value}, {"L": value.clone()}).worst_difference == 0
    assert agreement({"L": value}, {"L": value + torch.tensor([0.0, 1.0])}).mean_difference > 1e6


def test_errors() -> None:
    value = torch.randn(10, 2)
    with pytest.raises(ValueError, match="no sites"):
        agreement({}, {})
    with pytest.raises(ValueError, match="different sites"):
        agreement({"a": value}, {"b": value})
    with pytest.raises(ValueError, match="different shapes"):
        agreement({"a": value}, {"a": value[:, :1]})
    with pytest.raises(ValueError, match="fewer than two"):
        agreement({"a": value}, {"a": value[:1]})
