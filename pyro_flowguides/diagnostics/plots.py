"""Pictures of a fitted guide."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import _arviz
from .psis import MIN_DRAWS, effective_sample_size, khat_threshold, log_mean_weight, pareto_smooth
from .weights import WeightedDraws

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMALLEST = 100
_STEPS = 12


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
