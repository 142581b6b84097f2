"""The few things asked of ArviZ, for its 0.2x releases and for 1.x.

ArviZ 1.x is three packages, ``arviz_base``, ``arviz_stats`` and ``arviz_plots``, which ``arviz`` re-exports. It keeps
results in an ``xarray.DataTree`` where 0.2x has its own ``InferenceData``, and its ``psislw`` takes log *likelihoods*,
so that the sign of what is passed differs. Nothing outside this file knows which of the two is installed.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

_MISSING = "this needs ArviZ: pip install arviz"


def load() -> ModuleType:
    """Import ArviZ.

    The notice about its refactoring, which ArviZ 0.2x gives on one import a day, is kept quiet.

    Raises:
        ImportError: if ArviZ is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("arviz")
        except ModuleNotFoundError as error:
            raise ImportError(_MISSING) from error


def is_legacy(arviz: ModuleType) -> bool:
    """Whether an ArviZ module is of the 0.x series, which has ``InferenceData``."""
    return int(str(arviz.__version__).split(".")[0]) < 1


def psislw(log_weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Pareto-smooth log weights.

    Args:
        log_weights: log importance ratios of independent draws, shape (S,).

    Returns:
        Smoothed log weights, normalized to sum to one, shape (S,), and the tail index k-hat.
    """
    arviz = load()
    with np.errstate(all="ignore"):  # candidates for the tail index overflow where they do not fit
        if is_legacy(arviz):
            smoothed, khat = arviz.psislw(log_weights)
        else:
            array_stats = importlib.import_module("arviz_stats.base").array_stats
            smoothed, khat = array_stats.psislw(-log_weights)
    return np.asarray(smoothed, dtype=float), float(khat)


def build_tree(groups: Mapping[str, xr.Dataset], attrs: Mapping[str, str]) -> Any:
    """Join datasets into an ``arviz.InferenceData`` (0.2x) or an ``xarray.DataTree`` (1.x).

    Args:
        groups: dataset of each group.
        attrs: attributes of the whole.
    """
    arviz = load()
    if is_legacy(arviz):
        return arviz.InferenceData(attrs=dict(attrs), **groups)
    data_tree = importlib.import_module("xarray").DataTree
    tree = data_tree.from_dict({f"/{name}": dataset for name, dataset in groups.items()})
    tree.attrs.update(attrs)
    return tree


def pair_figure(data: Any, var_names: Sequence[str] | None, **options: Any) -> Figure:
    """Draw every pair of variables of the posterior against each other."""
    arviz = load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if is_legacy(arviz):
            names = None if var_names is None else list(var_names)
            options = {"marginals": True, "scatter_kwargs": {"alpha": 0.3}, **options}
            return _figure(arviz.plot_pair(data, var_names=names, show=False, backend="matplotlib", **options))
        return _figure(arviz.plot_pair(data, var_names=var_names, backend="matplotlib", **options))


def ppc_figure(data: Any, var_names: Sequence[str] | None, num_samples: int, **options: Any) -> Figure:
    """Draw data sets from the posterior predictive distribution over the observed data."""
    arviz = load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if is_legacy(arviz):
            names = None if var_names is None else list(var_names)
            options = {"num_pp_samples": num_samples, "show": False, "backend": "matplotlib", **options}
            return _figure(arviz.plot_ppc(data, var_names=names, **options))
        return _figure(
            arviz.plot_ppc_dist(data, var_names=var_names, num_samples=num_samples, backend="matplotlib", **options)
        )


def _figure(plot: Any) -> Figure:
    """The figure behind ArviZ's axes (0.2x) or plot collection (1.x), taken out of pyplot's list of open figures."""
    figure = plot.viz["figure"].item() if hasattr(plot, "viz") else np.ravel(plot)[0].figure
    importlib.import_module("matplotlib.pyplot").close(figure)
    return figure
