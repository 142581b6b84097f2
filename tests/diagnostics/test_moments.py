"""Draws that arrive in parts: the same numbers as from all draws at once, in little memory."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyro_flowguides as fg
from pyro_flowguides.diagnostics import defensive_log_weights, diagnose, diagnose_draws, log_weights, pareto_smooth
from pyro_flowguides.diagnostics.moments import RunningMoments, SmoothedMoments, moments
from pyro_flowguides.diagnostics.weights import Widening
from pyro_flowguides.programs.batched_run import chunks, per_chunk
from pyro_flowguides.programs.program import Program
from tests.diagnostics import programs

SIZE = 400


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def two_sites() -> dict[str, Tensor]:
    return {"a": 1e3 + 10 * torch.randn(SIZE), "b": torch.randn(SIZE, 3, 5).exp()}


def make_log_weights(kind: str) -> Tensor:
    log_w = 700 + 3 * torch.randn(SIZE)
    if kind == "equal":
        return torch.zeros(SIZE)
    if kind == "nonfinite":
        log_w[::3], log_w[::7] = -torch.inf, torch.nan
    if kind == "too few for a tail":
        log_w[20:] = -torch.inf
    return log_w


def direct_moments(value: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, computed by definition."""
    flat = value.reshape(len(value), -1)
    mean = (weights[:, None] * flat).sum(0)
    return mean, (weights[:, None] * (flat - mean) ** 2).sum(0).sqrt()


@pytest.mark.parametrize("part", [1, 7, 150, SIZE])
@pytest.mark.parametrize("kind", ["heavy", "equal", "nonfinite", "too few for a tail"])
def test_smoothed_moments_do_not_depend_on_the_parts(kind: str, part: int) -> None:
    draws, log_w = two_sites(), make_log_weights(kind)
    summary = SmoothedMoments(SIZE)
    for chunk in chunks(SIZE, part):
        summary.add({name: value[chunk] for name, value in draws.items()}, log_w[chunk])
    smoothed, smoothed_moments = summary.smooth()
    expected = pareto_smooth(log_w)
    torch.testing.assert_close(summary.log_w, log_w, rtol=0, atol=0, equal_nan=True)
    assert smoothed.khat == expected.khat
    for name, value in draws.items():
        by_definition = direct_moments(value, expected.log_weights.exp())
        torch.testing.assert_close(tuple(smoothed_moments[name]), by_definition, rtol=1e-10, atol=0)


@pytest.mark.parametrize("part", [1, 7, SIZE])
def test_running_moments_are_those_of_all_draws(part: int) -> None:
    draws, log_w = two_sites(), make_log_weights("heavy")
    log_w[:50] = -torch.inf
    running = RunningMoments()
    for chunk in chunks(SIZE, part):
        running.add({name: value[chunk] for name, value in draws.items()}, log_w[chunk])
    for name, value in draws.items():
        by_definition = direct_moments(value, log_w.softmax(0))
        torch.testing.assert_close(tuple(running.moments[name]), by_definition, rtol=1e-10, atol=0)


@pytest.mark.parametrize("num_samples", [1_000_000, 200_000, 400], ids=lambda size: f"{per_chunk(6 * size)} at a time")
def test_moments_do_not_depend_on_the_coordinates_at_a_time(num_samples: int) -> None:
    draws = {"a": 1e3 + torch.randn(num_samples), "b": torch.randn(num_samples, 5), "none": torch.ones(num_samples, 0)}
    weights = torch.rand(num_samples).softmax(0)
    for name, site_moments in moments(draws, weights).items():
        torch.testing.assert_close(tuple(site_moments), direct_moments(draws[name], weights), rtol=1e-11, atol=1e-12)


def planar_guide() -> Callable[[], object]:
    guide = fg.AutoPlanar(programs.schools_model, init_scale=0.5)
    guide()
    return guide


@pytest.mark.parametrize("make", [planar_guide, lambda: programs.schools_guide], ids=["planar", "schools"])
@pytest.mark.parametrize("chunk_size", [1, 13, None])
def test_a_diagnosis_is_that_of_all_draws(make: Callable[[], Callable[[], object]], chunk_size: int | None) -> None:
    model, guide = programs.schools_model, make()
    results = []
    for function in (log_weights, defensive_log_weights, diagnose):
        pyro.set_rng_seed(3)
        results.append(function(model, guide, num_samples=100, chunk_size=chunk_size))
    own, mixture, report = results
    expected = diagnose_draws(own, mixture, Widening.of(Program.inspect(model, guide)).factor)
    assert report.defensive is not None
    assert dataclasses.asdict(report.defensive) == pytest.approx(dataclasses.asdict(expected.defensive), rel=1e-10)
    numbers = {name: value for name, value in vars(expected).items() if isinstance(value, float)}
    assert {name: getattr(report, name) for name in numbers} == pytest.approx(numbers, rel=1e-10)
    assert (report.verdict, report.shift_site) == (expected.verdict, expected.shift_site)


def test_a_point_estimate_is_recognized_from_draws_in_parts() -> None:
    def guide() -> None:
        pyro.sample("mu", dist.Delta(torch.tensor(4.0)))
        pyro.sample("tau", dist.LogNormal(1.0, 0.5))
        with pyro.plate("school", 8):
            pyro.sample("theta", dist.Normal(4.0, 3.0))

    report = diagnose(programs.schools_model, guide, num_samples=30, chunk_size=1)
    assert report.verdict == "do not trust"
    assert report.point_sites == ("mu",)
    assert "'mu'" in report.reason


# -- memory ------------------------------------------------------------------------------------------------------------


class TensorMemory(TorchDispatchMode):
    """Count the bytes of all tensors that operations have made and that still exist.

    Attributes:
        peak: the largest count so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: Counter[int] = Counter()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                address, size = storage.data_ptr(), storage.nbytes()
                self.now += 0 if self.tensors[address] else size
                self.tensors[address] += 1
                weakref.finalize(value, self.release, address, size)
        self.peak = max(self.peak, self.now)
        return result

    def release(self, address: int, size: int) -> None:
        self.tensors[address] -= 1
        self.now -= 0 if self.tensors[address] else size


@pytest.mark.parametrize("make", [fg.AutoPlanar, pyro.infer.autoguide.AutoNormal])
def test_a_diagnosis_never_holds_all_its_draws(make: Callable[..., Callable[[], object]]) -> None:
    """In many dimensions it holds one chunk and the draws of large weight: less than all of the guide's draws."""
    dim, num_samples = 500, 4000

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))

    guide = make(model)
    guide()
    bytes_of_draws = dim * num_samples * 8
    with TensorMemory() as memory:
        diagnose(model, guide, num_samples=num_samples, chunk_size=50)
    assert memory.peak < bytes_of_draws
    with TensorMemory() as memory:  # log_weights returns all draws
        log_weights(model, guide, num_samples=num_samples, chunk_size=50)
    assert bytes_of_draws < memory.peak < 1.5 * bytes_of_draws
