"""Calls to ArviZ that work with its 0.2x releases and with 1.x.

ArviZ 1.x consists of three packages, ``arviz_base``, ``arviz_stats`` and ``arviz_plots``, which ``arviz`` re-exports.
It stores results in an ``xarray.DataTree`` instead of its own ``InferenceData``, and its ``psislw`` takes log
*likelihoods*, so the sign of the argument differs. No other module depends on the installed version.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyro_flowguides.nn.arguments import describe

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

__all__ = [
    "ArvizData",
    "build_tree",
    "group_names",
    "is_legacy",
    "load",
    "pair_figure",
    "posterior_predictive_figure",
    "psislw",
]

#: ``arviz.InferenceData`` (0.2x) or ``xarray.DataTree`` (1.x): the type depends on the installed ArviZ.
ArvizData: TypeAlias = Any


def load() -> ModuleType:
    """Import ArviZ, without the notice about its refactoring that ArviZ 0.2x prints once a day.

    Raises:
        ImportError: if ArviZ is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("arviz")
        except ModuleNotFoundError as error:
            raise ImportError("this function needs ArviZ: pip install arviz") from error


def is_legacy(arviz: ModuleType) -> bool:
    """Tell whether an ArviZ module belongs to the 0.x series, which has ``InferenceData``."""
    return int(str(arviz.__version__).split(".")[0]) < 1


def psislw(log_weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Pareto-smooth log weights.

    Args:
        log_weights: log importance ratios of independent draws, shape (S,).

    Returns:
        Smoothed log weights, normalized so that the weights sum to one, shape (S,), and the tail index k-hat.
    """
    arviz = load()
    with np.errstate(all="ignore"):  # poor candidates for the tail index overflow
        if is_legacy(arviz):
            smoothed, khat = arviz.psislw(log_weights)
        else:
            array_stats = importlib.import_module("arviz_stats.base").array_stats
            smoothed, khat = array_stats.psislw(-log_weights)
    return np.asarray(smoothed, dtype=float), float(khat)


def build_tree(groups: Mapping[str, xr.Dataset], attrs: Mapping[str, str]) -> ArvizData:
    """Join the datasets of all groups into an ``arviz.InferenceData`` (0.2x) or an ``xarray.DataTree`` (1.x)."""
    arviz = load()
    if is_legacy(arviz):
        return arviz.InferenceData(attrs=dict(attrs), **groups)
    data_tree = importlib.import_module("xarray").DataTree
    tree = data_tree.from_dict({f"/{name}": dataset for name, dataset in groups.items()})
    tree.attrs.update(attrs)
    return tree


def group_names(data: ArvizData) -> set[str]:
    """Return the names of the groups.

    Raises:
        TypeError: for anything but data of ArviZ.
    """
    if not (hasattr(data, "children") or callable(getattr(data, "groups", None))):
        raise TypeError(f"the data must be what to_inference_data returns, got {describe(data)}")
    return set(data.children) if hasattr(data, "children") else set(data.groups())


def pair_figure(data: ArvizData, var_names: Sequence[str] | None, **options: object) -> Figure:
    """Plot all pairs of posterior variables."""
    defaults = {"marginals": True, "scatter_kwargs": {"alpha": 0.3}, "show": False} if is_legacy(load()) else {}
    return _figure("plot_pair", data, var_names, {**defaults, **options})


def posterior_predictive_figure(
    data: ArvizData, var_names: Sequence[str] | None, num_samples: int, **options: object
) -> Figure:
    """Plot datasets from the posterior predictive distribution together with the observed data."""
    if is_legacy(load()):
        return _figure("plot_ppc", data, var_names, {"num_pp_samples": num_samples, "show": False, **options})
    return _figure("plot_ppc_dist", data, var_names, {"num_samples": num_samples, **options})


def _figure(function: str, data: ArvizData, var_names: Sequence[str] | None, options: Mapping[str, object]) -> Figure:
    """Call a plotting function of ArviZ, and return its figure after removing it from pyplot's open figures."""
    names = None if var_names is None else list(var_names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plot = getattr(load(), function)(data, var_names=names, backend="matplotlib", **options)
    figure = plot.viz["figure"].item() if hasattr(plot, "viz") else np.ravel(plot)[0].figure
    importlib.import_module("matplotlib.pyplot").close(figure)
    return figure
