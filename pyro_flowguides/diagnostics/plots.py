"""Pictures of a fitted guide."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_flowguides.diagnostics import arviz_compat as _arviz
from pyro_flowguides.diagnostics.psis import (
    MIN_DRAWS,
    effective_sample_size,
    khat_threshold,
    log_mean_weight,
    pareto_smooth,
)
from pyro_flowguides.diagnostics.weights import WeightedDraws

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMALLEST = 100
_STEPS = 12
_KNOTS = 400


def plot_elbo(history: Sequence[float] | Tensor | Any) -> Figure:
    """The ELBO at every step of a fit, with its running median.

    The scale is that of the second half of the fit: a low start is cut off, and how many steps lie outside is written
    into the picture. Steps without a finite value are marked at the bottom.

    Args:
        history: what :func:`~pyro_flowguides.fit` returns (anything with ``elbo_history``), or numbers, one per step.

    Returns:
        A figure with one axes. It is not shown, and does not belong to pyplot.

    Raises:
        ValueError: if the history is not one-dimensional or holds no finite value.

    Example:
        >>> figure = plot_elbo([-400.0, -30.0, -5.0, float("nan"), -3.2, -3.1, -3.2])
        >>> [round(float(limit)) for limit in figure.axes[0].get_ylim()]
        [-3, -3]
    """
    values = torch.as_tensor(getattr(history, "elbo_history", history)).detach().cpu().double().numpy()
    finite = np.isfinite(values)
    if values.ndim != 1 or not finite.any():
        raise ValueError(f"an ELBO history is a sequence of numbers, some of them finite; got shape {values.shape}")
    figure: Figure = importlib.import_module("matplotlib.figure").Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    _draw_history(axes, np.flatnonzero(finite), values[finite])
    _mark_steps(axes, np.flatnonzero(~finite))
    axes.set(xlabel="step", ylabel="ELBO (nats)", xlim=(0, max(1, len(values) - 1)))
    axes.legend(loc="lower right")
    return figure


def plot_khat(weights: WeightedDraws | Tensor | Any) -> Figure:
    """The importance weights of a guide, and the tail index k-hat as more and more of them are looked at.

    On the left the distribution of the weights relative to their mean, which is a spike at one for an exact guide. On
    the right k-hat of the first n draws beside its threshold for n draws; a k-hat that still climbs is not to be
    trusted at its last value.

    Args:
        weights: result of :func:`log_weights`, log weights (S,), or data from :func:`to_inference_data`.

    Returns:
        A figure with two axes. It is not shown, and does not belong to pyplot.

    Raises:
        ValueError: if there are fewer than 25 draws, no positive weight, or the data hold resampled draws.

    Example:
        >>> import torch
        >>> figure = plot_khat(torch.randn(500))
        >>> len(figure.axes)
        2
    """
    log_w = _log_weights_of(weights)
    figure: Figure = importlib.import_module("matplotlib.figure").Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_weights(left, log_w)
    _draw_khats(right, log_w)
    return figure


def plot_pairs(data: Any, var_names: Sequence[str] | None = None, **options: Any) -> Figure:
    """Every pair of variables of the posterior.

    Args:
        data: result of :func:`to_inference_data`.
        var_names: names of sites; all if not given.
        **options: passed to ``arviz.plot_pair``.

    Returns:
        The figure. It is not shown, and does not belong to pyplot.

    Raises:
        ImportError: if ArviZ is not installed.
        KeyError: if there is no such variable.
    """
    return _arviz.pair_figure(data, var_names, **options)


def plot_ppc(data: Any, var_names: Sequence[str] | None = None, *, num_samples: int = 50, **options: Any) -> Figure:
    """The data beside data drawn from the posterior predictive distribution.

    Args:
        data: result of :func:`to_inference_data`.
        var_names: names of observed sites; all if not given.
        num_samples: number of data sets to draw, at most.
        **options: passed to ``arviz.plot_ppc`` (ArviZ 0.2x) or ``arviz.plot_ppc_dist`` (1.x).

    Returns:
        The figure. It is not shown, and does not belong to pyplot.

    Raises:
        ImportError: if ArviZ is not installed.
        ValueError: if the data hold no posterior predictive draws.
    """
    if "posterior_predictive" not in _groups_of(data):
        raise ValueError("the data hold no posterior predictive draws")
    available = int(data["posterior_predictive"].sizes["draw"])
    return _arviz.ppc_figure(data, var_names, min(num_samples, available), **options)


def _groups_of(data: Any) -> set[str]:
    return set(data.children) if hasattr(data, "children") else set(data.groups())


def _log_weights_of(weights: WeightedDraws | Tensor | Any) -> Tensor:
    if isinstance(weights, WeightedDraws):
        return weights.log_w
    if isinstance(weights, Tensor):
        return weights.detach().cpu().double()
    if weights.attrs.get("draws") == "importance-resampled":
        raise ValueError("the data hold resampled draws, whose weights have been used up")
    return torch.from_numpy(np.asarray(weights["sample_stats"]["log_weights"], dtype=float).ravel())


def _draw_history(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    half = max(1, len(values) // 50)
    knots = np.unique(np.linspace(0, len(values) - 1, _KNOTS).astype(int))
    medians = [np.median(values[max(0, knot - half) : knot + half + 1]) for knot in knots]
    axes.plot(steps, values, color="C0", alpha=0.35, linewidth=0.8, label="each step")
    axes.plot(steps[knots], medians, color="C0", linewidth=1.8, label=f"median of {2 * half + 1} steps")
    axes.set_title(f"ELBO {medians[-1]:.2f}")
    bottom, top = _settled_limits(values)
    axes.set_ylim(bottom, top)
    outside = int(((values < bottom) | (values > top)).sum())
    if outside:
        text = f"{outside} of {len(values)} outside"
        axes.text(0.01, 0.98, text, transform=axes.transAxes, va="top", fontsize="small", color="0.4")


def _settled_limits(values: np.ndarray) -> tuple[float, float]:
    """Limits that hold nearly all values of the second half, with some room for what came before."""
    low, high = np.quantile(values[len(values) // 2 :], [0.01, 0.99])
    room = max(high - low, 1e-3 * abs(high), 1e-6)
    return float(max(low - room, values.min() - 0.1 * room)), float(min(high + room, values.max() + 0.1 * room))


def _mark_steps(axes: Axes, steps: np.ndarray) -> None:
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
    start = max(MIN_DRAWS, min(_SMALLEST, len(log_w)))
    sizes = sorted({int(size) for size in np.geomspace(start, max(start, len(log_w)), _STEPS)})
    khats = [pareto_smooth(log_w[:size]).khat for size in sizes]
    axes.plot(sizes, khats, marker="o", color="C0", label="k-hat")
    axes.plot(sizes, [khat_threshold(size) for size in sizes], color="C3", linestyle="--", label="threshold")
    axes.set_xscale("log")
    axes.set(xlabel="number of draws", ylabel="k-hat")
    axes.set_title(f"k-hat {khats[-1]:.2f}")
    axes.legend()
