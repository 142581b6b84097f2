"""The plot of the ELBO."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import pyro_flowguides as fg

RNG = np.random.default_rng(0)


def _history(steps: int = 1000) -> np.ndarray:
    """A fit that starts 100,000 nats too low and settles at -50 with a noise of 0.5."""
    return -50.0 - 1e5 * np.exp(-np.arange(steps) / 10) + 0.5 * RNG.standard_normal(steps)


def _lines(figure: Any) -> dict[str, Any]:
    return {line.get_label().split(" (")[0]: line for line in figure.axes[0].get_lines()}


def test_the_plateau_fills_the_plot() -> None:
    figure = fg.plot_elbo(_history())
    bottom, top = figure.axes[0].get_ylim()
    assert -55 < bottom < -51
    assert -49 < top < -46
    assert "outside" in figure.axes[0].texts[0].get_text()


def test_nothing_is_cut_off_without_a_low_start() -> None:
    values = -50.0 + 0.5 * RNG.standard_normal(200).clip(-2, 2)
    figure = fg.plot_elbo(values)
    bottom, top = figure.axes[0].get_ylim()
    assert bottom < values.min() < values.max() < top
    assert not figure.axes[0].texts


def test_every_step_is_plotted_and_an_outlier_does_not_move_the_median() -> None:
    values = np.full(500, -3.0)
    values[400] = -1e6
    lines = _lines(fg.plot_elbo(values))
    assert lines["each step"].get_ydata().tolist() == values.tolist()
    assert set(lines["median of 21 steps"].get_ydata()) == {-3.0}
    assert lines["median of 21 steps"].get_xdata()[[0, -1]].tolist() == [0, 499]


def test_steps_without_a_finite_value_are_marked() -> None:
    values = _history(300)
    values[[5, 7, 200]] = [np.nan, np.inf, -np.inf]
    lines = _lines(fg.plot_elbo(values.tolist()))
    assert lines["no finite value"].get_xdata().tolist() == [5, 7, 200]
    assert lines["no finite value"].get_label() == "no finite value (3)"
    assert len(lines["each step"].get_xdata()) == 297
    assert "no finite value" not in _lines(fg.plot_elbo(_history(300)))


@pytest.mark.parametrize("history", [[-3.0], [-3.0, -3.0], (0.0, 0.0, float("nan"))], ids=str)
def test_short_and_constant_histories(history: Any) -> None:
    figure = fg.plot_elbo(history)
    figure.savefig("/dev/null", format="png")
    bottom, top = figure.axes[0].get_ylim()
    assert bottom < history[0] < top


def test_accepts_fit_results_and_tensors_and_does_not_touch_pyplot() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before, values = pyplot.get_fignums(), _history(50)
    for history in (SimpleNamespace(elbo_history=values.tolist()), torch.tensor(values, requires_grad=True)):
        assert np.allclose(_lines(fg.plot_elbo(history))["each step"].get_ydata(), values)
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize("history", [[], [float("nan")] * 3, [[1.0, 2.0]]], ids=str)
def test_invalid_histories(history: Any) -> None:
    with pytest.raises(ValueError, match="sequence of numbers"):
        fg.plot_elbo(history)
