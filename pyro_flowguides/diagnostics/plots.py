"""Plots of a fitted guide."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from pyro_flowguides.diagnostics import arviz_compat
from pyro_flowguides.diagnostics.arviz_compat import ArvizData
from pyro_flowguides.diagnostics.psis import (
    MIN_DRAWS,
    effective_sample_size,
    khat_threshold,
    log_mean_weight,
    pareto_smooth,
)
from pyro_flowguides.diagnostics.weights import WeightedDraws
from pyro_flowguides.nn.arguments import check_count, describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["new_figure", "plot_elbo", "plot_khat", "plot_pairs", "plot_ppc"]

#: Fewest draws from which :func:`plot_khat` computes a k-hat, if there are as many.
_FEWEST_DRAWS = 100
#: Number of k-hats in :func:`plot_khat`.
_NUM_KHATS = 12
#: Number of points of the running median in :func:`plot_elbo`.
_NUM_MEDIANS = 400


class HasElboHistory(Protocol):
    """Result with the ELBO at every step."""

    @property
    def elbo_history(self) -> Sequence[float]:
        """The ELBO at every step."""


def plot_elbo(history: HasElboHistory | Sequence[float] | np.ndarray | Tensor) -> Figure:
    """Plot the ELBO at every step of a fit, with its running median.

    The second half of the fit sets the scale, so a low start may be cut off; the plot tells how many steps lie outside.
    Steps without a finite value are marked at the bottom.

    Args:
        history: result of :func:`~pyro_flowguides.fit` (or anything with ``elbo_history``), or one number per step.

    Returns:
        A figure with one axes. It is not shown and not registered with pyplot.

    Raises:
        ValueError: if the history is not one-dimensional or has no finite value.

    Example:
        >>> figure = plot_elbo([-400.0, -30.0, -5.0, float("nan"), -3.2, -3.1, -3.2])
        >>> [round(float(limit)) for limit in figure.axes[0].get_ylim()]
        [-3, -3]
    """
    try:
        values = torch.as_tensor(getattr(history, "elbo_history", history)).detach().cpu().double().numpy()
    except (TypeError, ValueError, RuntimeError):  # torch cannot make a tensor of it
        raise TypeError(f"plot_elbo: history must be the result of fit or numbers, got {describe(history)}") from None
    finite = np.isfinite(values)
    if values.ndim != 1 or not finite.any():
        raise ValueError(
            "an ELBO history must be a sequence of numbers with at least one finite value; got "
            f"shape {values.shape} with {finite.sum()} finite values"
        )
    figure = new_figure(width=7)
    axes = figure.subplots()
    _draw_history(axes, np.flatnonzero(finite), values[finite])
    _mark_missing(axes, np.flatnonzero(~finite))
    axes.set(xlabel="step", ylabel="ELBO (nats)", xlim=(0, max(1, len(values) - 1)))
    axes.legend(loc="lower right")
    return figure


def plot_khat(weights: WeightedDraws | Tensor | ArvizData) -> Figure:
    """Plot the importance weights of a guide, and the tail index k-hat for growing numbers of draws.

    The left panel shows the distribution of the weights relative to their mean: a spike at one for an exact guide. The
    right panel shows the k-hat of the first n draws and its threshold for n draws. If k-hat still rises at the end,
    its last value is too low.

    Args:
        weights: result of :func:`log_weights`, log weights (S,), or result of :func:`to_inference_data`.

    Returns:
        A figure with two axes. It is not shown and not registered with pyplot.

    Raises:
        ValueError: if there are fewer than 25 draws, if no weight is positive, or if the draws were resampled.

    Example:
        >>> import torch
        >>> figure = plot_khat(torch.randn(500))
        >>> len(figure.axes)
        2
    """
    log_w = _log_weights_of(weights)
    pareto_smooth(log_w)  # refuses what has no k-hat before anything is drawn
    figure = new_figure(width=9)
    left, right = figure.subplots(1, 2)
    _draw_weights(left, log_w)
    _draw_khats(right, log_w)
    return figure


def plot_pairs(data: ArvizData, var_names: Sequence[str] | None = None, **options: object) -> Figure:
    """Plot all pairs of posterior variables.

    Args:
        data: result of :func:`to_inference_data`.
        var_names: names of sites; all by default.
        **options: passed to ``arviz.plot_pair``.

    Returns:
        The figure. It is not shown and not registered with pyplot.

    Raises:
        ImportError: if ArviZ is not installed.
        KeyError: if a variable does not exist.
    """
    arviz_compat.group_names(data)
    return arviz_compat.pair_figure(data, var_names, **options)


def plot_ppc(
    data: ArvizData, var_names: Sequence[str] | None = None, *, num_samples: int = 50, **options: object
) -> Figure:
    """Plot datasets from the posterior predictive distribution together with the observed data.

    Args:
        data: result of :func:`to_inference_data`.
        var_names: names of observed sites; all by default.
        num_samples: largest number of datasets to plot.
        **options: passed to ``arviz.plot_ppc`` (ArviZ 0.2x) or ``arviz.plot_ppc_dist`` (1.x).

    Returns:
        The figure. It is not shown and not registered with pyplot.

    Raises:
        ImportError: if ArviZ is not installed.
        ValueError: if ``data`` has no posterior predictive draws.
    """
    check_count("plot_ppc", "num_samples", num_samples)
    if "posterior_predictive" not in arviz_compat.group_names(data):
        raise ValueError("the data have no posterior predictive draws")
    available = int(data["posterior_predictive"].sizes["draw"])
    return arviz_compat.posterior_predictive_figure(data, var_names, min(num_samples, available), **options)


def new_figure(width: float, height: float = 3.5) -> Figure:
    """Make a figure that pyplot does not know of."""
    figure: Figure = importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    return figure


def _log_weights_of(weights: WeightedDraws | Tensor | ArvizData) -> Tensor:
    if isinstance(weights, WeightedDraws):
        return weights.log_w
    if isinstance(weights, Tensor):
        return weights.detach().cpu().double()
    arviz_compat.group_names(weights)
    if weights.attrs.get("draws") == "importance-resampled":
        raise ValueError("the draws were resampled by their weights: export them with resample=False to plot k-hat")
    return torch.from_numpy(np.asarray(weights["sample_stats"]["log_weights"], dtype=float).ravel())


def _draw_history(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    half = max(1, len(values) // 50)  # of the window of the median
    knots = np.unique(np.linspace(0, len(values) - 1, _NUM_MEDIANS).astype(int))
    medians = [np.median(values[max(0, knot - half) : knot + half + 1]) for knot in knots]
    axes.plot(steps, values, color="C0", alpha=0.35, linewidth=0.8, label="each step")
    axes.plot(steps[knots], medians, color="C0", linewidth=1.8, label=f"median of {2 * half + 1} steps")
    axes.set_title(f"ELBO {medians[-1]:.2f}")
    bottom, top = _limits_of_second_half(values)
    axes.set_ylim(bottom, top)
    outside = int(((values < bottom) | (values > top)).sum())
    if outside:
        text = f"{outside} of {len(values)} outside"
        axes.text(0.01, 0.98, text, transform=axes.transAxes, va="top", fontsize="small", color="0.4")


def _limits_of_second_half(values: np.ndarray) -> tuple[float, float]:
    """Return limits around nearly all values of the second half, with some room for earlier ones."""
    low, high = np.quantile(values[len(values) // 2 :], [0.01, 0.99])
    margin = max(high - low, 1e-3 * abs(high), 1e-6)
    bottom, top = max(low - margin, values.min() - 0.1 * margin), min(high + margin, values.max() + 0.1 * margin)
    return float(bottom), float(top)


def _mark_missing(axes: Axes, steps: np.ndarray) -> None:
    if len(steps):
        bottom, label = np.full(len(steps), 0.02), f"no finite value ({len(steps)})"
        axes.plot(steps, bottom, "|", color="C3", label=label, transform=axes.get_xaxis_transform())


def _draw_weights(axes: Axes, log_w: Tensor) -> None:
    log_mean, _ = log_mean_weight(log_w)
    finite = (log_w[log_w.isfinite()] - log_mean).numpy()
    axes.hist(finite, bins=50, color="C0")
    axes.axvline(0.0, color="black", linewidth=1)
    axes.set(xlabel="log weight − log mean weight", ylabel="draws")
    axes.set_title(f"ESS {effective_sample_size(log_w):.0f} of {len(log_w)}")


def _draw_khats(axes: Axes, log_w: Tensor) -> None:
    start = max(MIN_DRAWS, min(_FEWEST_DRAWS, len(log_w)))
    sizes = sorted({int(size) for size in np.geomspace(start, max(start, len(log_w)), _NUM_KHATS)})
    khats = [pareto_smooth(log_w[:size]).khat for size in sizes]
    axes.plot(sizes, khats, marker="o", color="C0", label="k-hat")
    axes.plot(sizes, [khat_threshold(size) for size in sizes], color="C3", linestyle="--", label="threshold")
    axes.set_xscale("log")
    axes.set(xlabel="number of draws", ylabel="k-hat")
    axes.set_title(f"k-hat {khats[-1]:.2f}")
    axes.legend()
