"""Export of a fitted guide to ArviZ."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, cast

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_flowguides.diagnostics import arviz_compat
from pyro_flowguides.diagnostics.arviz_compat import ArvizData
from pyro_flowguides.diagnostics.resampling import resample as resample_draws
from pyro_flowguides.diagnostics.weights import WeightedDraws, weigh
from pyro_flowguides.programs.batched_run import RunMode, first_line
from pyro_flowguides.programs.layout import Layout, NotVectorizedError
from pyro_flowguides.programs.model_runs import Collect, run_model
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.running import SampleObserved, evaluation
from pyro_flowguides.programs.sites import SiteInfo
from pyro_flowguides.programs.trace_density import scored_sites
from pyro_flowguides.programs.types import Guide, Model, Site, Values

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["DatasetBuilder", "collect_groups", "describe_origin", "export_program", "to_inference_data"]

#: Number of draws from the guide per resampled draw.
_OVERSAMPLING = 4
_SAMPLE_DIMS = ("chain", "draw")


def to_inference_data(
    model: Model,
    guide: Guide,
    *args: object,
    num_samples: int = 1000,
    resample: bool = False,
    coords: Mapping[str, Sequence[object]] | None = None,
    **kwargs: object,
) -> ArvizData:
    """Draw from a guide, and export the draws to ArviZ.

    The groups are ``posterior`` (latent and deterministic sites), ``sample_stats`` (``log_p``, ``log_q`` and
    ``log_weights``), ``posterior_predictive`` (new data given the latent sites), ``log_likelihood`` (of each datum, as
    ``az.loo`` needs it), ``observed_data``, ``prior`` and ``prior_predictive``. Dimensions of a plate carry its name. A
    group that is not available is left out, and the attributes of ``posterior`` give the reason: an improper prior has
    no draws, and a datum has no log likelihood of its own if discrete sites are summed out.

    Args:
        model: a Pyro model.
        guide: any Pyro guide for it.
        *args: arguments of model and guide.
        num_samples: number of draws.
        resample: whether to take four times as many draws and resample them with Pareto-smoothed importance weights.
        coords: labels of plates or other dimensions: name -> labels; integers by default.
        **kwargs: keyword arguments of model and guide.

    Returns:
        An ``arviz.InferenceData`` (ArviZ 0.2x) or an ``xarray.DataTree`` (1.x); both have ``to_netcdf``.

    Raises:
        ImportError: if ArviZ is not installed.
        ValueError: if ``coords`` names a dimension that does not exist or has another size, and for the reasons that
            :func:`log_weights` gives.

    References:
        R. Kumar, C. Carroll, A. Hartikainen, O. Martin (2019). ArviZ: a unified library for exploratory analysis of
        Bayesian models in Python. JOSS 4(33).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("person", len(x)):
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("z", dist.Normal(0.3, 0.5))
        >>> data = to_inference_data(model, guide, torch.tensor([0.1, 0.2, 0.9]), num_samples=100)
        >>> data["posterior_predictive"]["x"].dims
        ('chain', 'draw', 'person')
    """
    program = Program.inspect(model, guide, args, kwargs)
    return export_program(program, num_samples=num_samples, resample=resample, coords=coords)


def export_program(
    program: Program,
    *,
    num_samples: int = 1000,
    resample: bool = False,
    coords: Mapping[str, Sequence[object]] | None = None,
) -> ArvizData:
    """Draw from the guide of an inspected program, and export the draws to ArviZ; see :func:`to_inference_data`."""
    weighted = weigh(program, num_samples * _OVERSAMPLING if resample else num_samples)
    if resample:
        weighted = resample_draws(weighted, num_samples)
    groups, notes = collect_groups(program, weighted)
    attrs = {**describe_origin(program, num_samples, resampled=resample), **notes}
    builder = DatasetBuilder(program, coords or {})
    datasets = {group: builder.dataset(group, values, attrs) for group, values in groups.items() if values}
    builder.check_labels()
    return arviz_compat.build_tree(datasets, attrs)


# --- the groups ------------------------------------------------------------------------------------------------------


def collect_groups(program: Program, weighted: WeightedDraws) -> tuple[dict[str, Values], dict[str, str]]:
    """Collect the tensors of each group, with a leading dimension of draws except for the data.

    Returns:
        group -> site -> tensor, and group -> reason for those that are left out.
    """
    notes: dict[str, str] = {}
    groups = {
        "posterior": dict(weighted.draws),
        "sample_stats": {"log_p": weighted.log_p, "log_q": weighted.log_q, "log_weights": weighted.log_w},
        "observed_data": {name: site.value for name, site in program.observed.items()},
    }
    runs = _ModelRuns(program, weighted)
    if program.enumerated:
        notes["log_likelihood"] = f"left out: sites {', '.join(program.enumerated)} are summed out"
    else:
        collected = runs.log_likelihood_and_deterministics()
        groups["posterior"] |= {name: collected[name] for name in program.deterministics}
        groups["log_likelihood"] = {name: collected[name] for name in program.observed}
    for group, draw in (("posterior_predictive", runs.posterior_predictive), ("prior_predictive", runs.prior)):
        if not program.observed:
            continue
        try:
            groups[group] = draw()
        except (NotImplementedError, RuntimeError, ValueError) as error:
            notes[group] = f"left out: {first_line(error)}"
    _split_prior(program, groups)
    return groups, notes


def _split_prior(program: Program, groups: dict[str, Values]) -> None:
    drawn = groups.get("prior_predictive", {})
    if drawn:
        groups["prior"] = {name: value for name, value in drawn.items() if name not in program.observed}
        groups["prior_predictive"] = {name: drawn[name] for name in program.observed}


class _ModelRuns:
    """Runs of the model on the draws, in the mode in which the draws were weighed."""

    def __init__(self, program: Program, weighted: WeightedDraws) -> None:
        self.program, self.weighted = program, weighted

    def log_likelihood_and_deterministics(self) -> Values:
        """Return the log likelihood of each datum and the deterministic sites."""

        def collect(trace: Trace, layout: Layout) -> Values:
            scored = dict(scored_sites(trace))
            out = {
                name: layout.split(scored[name]["unscaled_log_prob"], site.batch_shape)
                for name, site in self.program.observed.items()
            }
            return out | _split_sites(trace, layout, self.program.deterministics)

        return self._run(self.weighted.draws, collect)

    def posterior_predictive(self) -> Values:
        """Draw new data given the latent sites."""

        def collect(trace: Trace, layout: Layout) -> Values:
            return _split_sites(trace, layout, self.program.observed)

        return self._run(self.weighted.draws, collect, sample_observed=True)

    def prior(self) -> Values:
        """Draw latent sites and data from the prior."""
        _refuse_improper(self.program)

        def collect(trace: Trace, layout: Layout) -> Values:
            return _split_sites(trace, layout, self.program.latents | self.program.observed)

        return self._run({}, collect, sample_observed=True)

    def _run(self, values: Values, collect: Collect, *, sample_observed: bool = False) -> Values:
        def run(mode: RunMode) -> Values:
            with evaluation():
                return run_model(
                    self.program,
                    values,
                    self.weighted.num_samples,
                    collect,
                    self.program.default_chunk_size,
                    mode=mode,
                    handlers=[SampleObserved()] if sample_observed else [],
                )

        try:
            return run(self.weighted.model_mode)
        except (NotVectorizedError, RuntimeError):  # some distributions score many draws at once but cannot sample so
            if self.weighted.model_mode is RunMode.SINGLE:
                raise
            return run(RunMode.SINGLE)


def _split_sites(trace: Trace, layout: Layout, sites: Mapping[str, SiteInfo]) -> Values:
    out = {}
    for name, site in sites.items():
        value = cast("Mapping[str, Site]", trace.nodes)[name]["value"]
        if layout.size is None and value.shape != site.shape:
            raise ValueError(f"a draw of site '{name}' has shape {tuple(value.shape)}, not {tuple(site.shape)}")
        out[name] = layout.split(value, site.shape)
    return out


def _refuse_improper(program: Program) -> None:
    for name, site in program.latents.items():
        if site.is_improper:
            raise NotImplementedError(f"the prior of site '{name}' is improper")


# --- datasets -------------------------------------------------------------------------------------------------------


class DatasetBuilder:
    """Builder of xarray datasets that names the dimensions of all groups consistently.

    Args:
        program: the program whose sites the datasets hold.
        labels: dimension -> labels; integers by default.
    """

    def __init__(self, program: Program, labels: Mapping[str, Sequence[object]]) -> None:
        self.sites = program.latents | program.observed | program.deterministics
        self.labels = labels
        self._sizes: dict[str, int] = {}

    def dataset(self, group: str, values: Values, attrs: Mapping[str, str]) -> xr.Dataset:
        """Return the tensors of a group as a dataset."""
        import xarray as xr

        sample_dims = () if group == "observed_data" else _SAMPLE_DIMS
        variables = {}
        for name, value in values.items():
            array = _to_numpy(value)
            dims = (*sample_dims, *self._dims(name, is_density=group == "log_likelihood"))
            variables[name] = (dims, array[np.newaxis] if sample_dims else array)
            self._sizes |= dict(zip(dims, variables[name][1].shape, strict=True))
        sizes = {dim: size for dims, array in variables.values() for dim, size in zip(dims, array.shape, strict=True)}
        coords = {dim: self._labels(dim, size) for dim, size in sizes.items()}
        return xr.Dataset(variables, coords=coords, attrs=dict(attrs))

    def check_labels(self) -> None:
        """Refuse labels for a dimension that no dataset has."""
        for name in self.labels:
            if name not in self._sizes:
                raise ValueError(f"coords: no dimension '{name}'; the dimensions are {', '.join(sorted(self._sizes))}")

    def _labels(self, dim: str, size: int) -> NDArray[np.generic]:
        labels = self.labels.get(dim)
        if labels is None:
            return np.arange(size)
        if len(labels) != size:
            raise ValueError(f"coords: {len(labels)} labels for dimension '{dim}' of size {size}")
        return np.asarray(labels)

    def _dims(self, name: str, *, is_density: bool) -> list[str]:
        if name not in self.sites:
            return []
        site = self.sites[name]
        shape = site.batch_shape if is_density else site.shape
        plates = {len(site.batch_shape) + plate.dim: plate for plate in site.plates}
        dims = []
        for axis, size in enumerate(shape):
            plate = plates.get(axis)
            dims.append(self._plate_dim(plate.name, size) if plate and plate.size == size else f"{name}_dim_{axis}")
        return dims

    def _plate_dim(self, plate: str, size: int) -> str:
        """Return a plate's name, changed if a site, a sample dimension or a plate of another size has the same."""
        name = f"{plate}_plate" if plate in self.sites or plate in _SAMPLE_DIMS else plate
        return name if self._sizes.get(name, size) == size else f"{name}_{size}"


def _to_numpy(value: Tensor) -> NDArray[np.generic]:
    value = value.detach().cpu()
    if value.dtype in (torch.bfloat16, torch.float16):
        value = value.float()
    return np.array(value.numpy(), order="C")


def describe_origin(program: Program, num_samples: int, *, resampled: bool) -> dict[str, str]:
    """Return attributes that record how the draws were made."""
    return {
        "created_at": datetime.now(timezone.utc).isoformat(),
        "inference_library": "pyro_flowguides",
        "inference_library_version": _version(),
        "pyro_version": pyro.__version__,
        "torch_version": str(torch.__version__),
        "guide": _qualified_name(program.guide),
        "model": _qualified_name(program.model),
        "num_samples": str(num_samples),
        "draws": "importance-resampled" if resampled else "from the guide",
    }


def _version() -> str:
    try:
        return importlib.metadata.version("pyro_flowguides")
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get("pyro_flowguides"), "__version__", "unknown"))


def _qualified_name(program: Model | Guide) -> str:
    return str(getattr(program, "__qualname__", type(program).__qualname__))
