"""Draws in parts, none of them kept: the same numbers as from all of them, and little memory."""

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
from pyro_flowguides.diagnostics import defensive_log_weights, diagnose, judge, log_weights, pareto_smooth
from pyro_flowguides.diagnostics.moments import RunningMoments, moments
from pyro_flowguides.diagnostics.summary import SmoothedMoments
from pyro_flowguides.programs import chunking as _chunks
from pyro_flowguides.programs.program import inspect_program
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


def drawn() -> dict[str, Tensor]:
    return {"a": 1e3 + 10 * torch.randn(SIZE), "b": torch.randn(SIZE, 3, 5).exp()}


def log_weights_of(kind: str) -> Tensor:
    log_w = 700 + 3 * torch.randn(SIZE)
    if kind == "equal":
        return torch.zeros(SIZE)
    if kind == "spoilt":
        log_w[::3], log_w[::7] = -torch.inf, torch.nan
    if kind == "rare":  # too few for a tail
        log_w[20:] = -torch.inf
    return log_w


def direct(value: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, by their definition."""
    flat = value.reshape(len(value), -1)
    mean = (weights[:, None] * flat).sum(0)
    return mean, (weights[:, None] * (flat - mean) ** 2).sum(0).sqrt()


@pytest.mark.parametrize("part", [1, 7, 150, SIZE])
@pytest.mark.parametrize("kind", ["heavy", "equal", "spoilt", "rare"])
def test_smoothed_moments_do_not_depend_on_the_parts(kind: str, part: int) -> None:
    draws, log_w = drawn(), log_weights_of(kind)
    found = SmoothedMoments(SIZE)
    for chunk in _chunks.chunks(SIZE, part):
        found.add({name: value[chunk] for name, value in draws.items()}, log_w[chunk])
    smoothed, under = found.smooth()
    expected = pareto_smooth(log_w)
    torch.testing.assert_close(found.log_w, log_w, rtol=0, atol=0, equal_nan=True)
    assert smoothed.khat == expected.khat
    for name, value in draws.items():
        torch.testing.assert_close(under[name], direct(value, expected.log_weights.exp()), rtol=1e-10, atol=0)


@pytest.mark.parametrize("part", [1, 7, SIZE])
def test_running_moments_are_those_of_all_draws(part: int) -> None:
    draws, log_w = drawn(), log_weights_of("heavy")
    log_w[:50] = -torch.inf
    found = RunningMoments()
    for chunk in _chunks.chunks(SIZE, part):
        found.add({name: value[chunk] for name, value in draws.items()}, log_w[chunk])
    for name, value in draws.items():
        torch.testing.assert_close(found.moments[name], direct(value, log_w.softmax(0)), rtol=1e-10, atol=0)


@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_moments_of_a_few_coordinates_at_a_time(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(_chunks, "_CHUNK_NUMBERS", 6 * SIZE * at_once)
    draws, weights = drawn() | {"none": torch.zeros(SIZE, 0)}, torch.rand(SIZE).softmax(0)
    for name, found in moments(draws, weights).items():
        torch.testing.assert_close(found, direct(draws[name], weights), rtol=1e-11, atol=0)


def correlated() -> Callable[..., Any]:
    guide = fg.AutoPlanar(programs.schools_model, init_scale=0.5)
    guide()
    return guide


@pytest.mark.parametrize("make", [correlated, lambda: programs.schools_guide])
@pytest.mark.parametrize("at_once", [1, 13, 10_000])
def test_a_diagnosis_is_that_of_the_draws_held(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Callable[..., Any]], at_once: int
) -> None:
    model, guide = programs.schools_model, make()
    monkeypatch.setattr(_chunks, "_CHUNK_NUMBERS", at_once * numbers_per_draw(model, guide))
    looks: list[Callable[..., Any]] = [log_weights, defensive_log_weights, diagnose]
    found = []
    for look in looks:
        pyro.set_rng_seed(3)
        found.append(look(model, guide, num_samples=100))
    own, both, report = found
    expected = judge(own, both, inspect_program(model, guide, (), {}).widening)
    assert report.wider is not None
    assert dataclasses.asdict(report.wider) == pytest.approx(dataclasses.asdict(expected.wider), rel=1e-10)
    plain = {name: value for name, value in vars(expected).items() if isinstance(value, float)}
    assert {name: getattr(report, name) for name in plain} == pytest.approx(plain, rel=1e-10)
    assert (report.verdict, report.shift_site) == (expected.verdict, expected.shift_site)


def numbers_per_draw(model: Callable[..., Any], guide: Callable[..., Any]) -> int:
    program = inspect_program(model, guide, (), {})
    groups = (program.latents, program.observed, program.deterministics, program.guide_sites)
    return sum(site.value.numel() for group in groups for site in group.values())


def test_a_point_estimate_is_told_from_draws_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunks, "_CHUNK_NUMBERS", 1)

    def guide() -> None:
        pyro.sample("mu", dist.Delta(torch.tensor(4.0)))
        pyro.sample("tau", dist.LogNormal(1.0, 0.5))
        with pyro.plate("school", 8):
            pyro.sample("theta", dist.Normal(4.0, 3.0))

    report = diagnose(programs.schools_model, guide, num_samples=30)
    assert report.verdict == "do not trust"
    assert "'mu'" in report.reason
    assert "'theta'" not in report.reason


# -- memory ------------------------------------------------------------------------------------------------------------


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that operations have made and that are still there.

    Attributes:
        most: the most that there ever were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: Counter[int] = Counter()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                place, size = storage.data_ptr(), storage.nbytes()
                self.now += 0 if self.tensors[place] else size
                self.tensors[place] += 1
                weakref.finalize(value, self.let_go, place, size)
        self.most = max(self.most, self.now)
        return result

    def let_go(self, place: int, size: int) -> None:
        self.tensors[place] -= 1
        self.now -= 0 if self.tensors[place] else size


@pytest.mark.parametrize("make", [fg.AutoPlanar, pyro.infer.autoguide.AutoNormal])
def test_a_diagnosis_never_holds_all_its_draws(monkeypatch: pytest.MonkeyPatch, make: Callable[..., Any]) -> None:
    """In many dimensions it holds some at a time and those of large weight: less than all of the guide's draws once."""
    dim, size = 500, 4000

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))

    guide = make(model)
    guide()
    monkeypatch.setattr(_chunks, "_CHUNK_NUMBERS", 50 * numbers_per_draw(model, guide))
    with Held() as held:
        diagnose(model, guide, num_samples=size)
    assert held.most < dim * size * 8
    with Held() as held:  # which is what it takes to return them
        log_weights(model, guide, num_samples=size)
    assert dim * size * 8 < held.most < 1.5 * dim * size * 8
