"""A fitted guide as ArviZ data."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_flowguides.diagnostics import arviz_compat as _arviz
from pyro_flowguides.diagnostics.resampling import resample as resample_draws
from pyro_flowguides.diagnostics.weights import WeightedDraws, weigh
from pyro_flowguides.programs.batched_run import RunMode
from pyro_flowguides.programs.layout import Layout, NotVectorizedError
from pyro_flowguides.programs.model_runs import Collect, run_model
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.running import SampleObserved, evaluation
from pyro_flowguides.programs.sites import SiteInfo
from pyro_flowguides.programs.trace_density import scored_sites
from pyro_flowguides.programs.types import Values

if TYPE_CHECKING:
    import xarray as xr

_OVERSAMPLING = 4
_SAMPLE_DIMS = ("chain", "draw")


def to_inference_data(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    resample: bool = False,
    coords: Mapping[str, Sequence[Any]] | None = None,
    **kwargs: Any,
) -> Any:
    """Draw from a guide and hand the draws to ArviZ, with all that its functions ask for.

    The groups: ``posterior`` (latent and deterministic sites), ``sample_stats`` (``log_p``, ``log_q`` and
    ``log_weights``), ``posterior_predictive``, ``log_likelihood`` (of each datum, so that ``az.loo`` runs),
    ``observed_data``, ``prior`` and ``prior_predictive``. Dimensions that stand in a plate carry its name. What
    cannot be had is left out, and the attributes of ``posterior`` say why: a prior cannot be drawn from if it is
    improper, and the log likelihood of a datum is not defined where discrete sites are summed out. The predictive
    distributions are those of new data, given the latent sites.

    Args:
        model: a Pyro model.
        guide: any Pyro guide for it.
        *args: arguments of model and guide.
        num_samples: number of draws.
        resample: whether to draw four times as many and resample them with Pareto-smoothed importance weights.
        coords: labels of plates or other dimensions: name -> labels; integers if not given.
        **kwargs: keyword arguments of model and guide.

    Returns:
        An ``arviz.InferenceData`` (ArviZ 0.2x) or an ``xarray.DataTree`` (1.x); both have ``to_netcdf``.

    Raises:
        ImportError: if ArviZ is not installed.
        ValueError: if labels are given for a dimension that does not exist or has another size, and as
            :func:`log_weights`.

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
    coords: Mapping[str, Sequence[Any]] | None = None,
) -> Any:
    """Draw from the guide of an inspected program and hand the draws to ArviZ; see :func:`to_inference_data`."""
    weighted = weigh(program, num_samples * _OVERSAMPLING if resample else num_samples)
    if resample:
        weighted = resample_draws(weighted, num_samples)
    groups, notes = _groups(program, weighted)
    attrs = {**_provenance(program, num_samples, resample), **notes}
    names = _Names(program, coords or {})
    datasets = {group: names.dataset(group, values, attrs) for group, values in groups.items() if values}
    names.check_labels()
    return _arviz.build_tree(datasets, attrs)


# --- what goes into the groups --------------------------------------------------------------------------------------


def _groups(program: Program, weighted: WeightedDraws) -> tuple[dict[str, Values], dict[str, str]]:
    """The tensors of each group, with a leading dimension of draws except for the data; and what was left out."""
    notes: dict[str, str] = {}
    groups = {
        "posterior": dict(weighted.draws),
        "sample_stats": {"log_p": weighted.log_p, "log_q": weighted.log_q, "log_weights": weighted.log_w},
        "observed_data": {name: site.value for name, site in program.observed.items()},
    }
    runs = _Runs(program, weighted)
    if program.enumerated:
        notes["log_likelihood"] = f"left out: sites {', '.join(program.enumerated)} are summed out"
    else:
        collected = runs.given_data()
        groups["posterior"] |= {name: collected[name] for name in program.deterministics}
        groups["log_likelihood"] = {name: collected[name] for name in program.observed}
    for group, draw in (("posterior_predictive", runs.posterior_predictive), ("prior_predictive", runs.prior)):
        if not program.observed:
            continue
        try:
            groups[group] = draw()
        except (NotImplementedError, RuntimeError, ValueError) as error:
            notes[group] = f"left out: {str(error).splitlines()[0]}"
    _split_prior(program, groups)
    return groups, notes


def _split_prior(program: Program, groups: dict[str, Values]) -> None:
    drawn = groups.get("prior_predictive", {})
    if drawn:
        groups["prior"] = {name: value for name, value in drawn.items() if name not in program.observed}
        groups["prior_predictive"] = {name: drawn[name] for name in program.observed}


class _Runs:
    """Runs of the model over the draws: on all at once if that was found to be right, and else one by one."""

    def __init__(self, program: Program, weighted: WeightedDraws) -> None:
        self.program, self.weighted = program, weighted

    def given_data(self) -> Values:
        """Log likelihood of each datum, and deterministic sites."""

        def collect(trace: Trace, layout: Layout) -> Values:
            scored = dict(scored_sites(trace))
            out = {
                name: layout.split(scored[name]["unscaled_log_prob"], site.batch_shape)
                for name, site in self.program.observed.items()
            }
            return out | _split_sites(trace, layout, self.program.deterministics)

        return self._run(self.weighted.draws, collect)

    def posterior_predictive(self) -> Values:
        """New data, given the latent sites."""

        def collect(trace: Trace, layout: Layout) -> Values:
            return _split_sites(trace, layout, self.program.observed)

        return self._run(self.weighted.draws, collect, sample_observed=True)

    def prior(self) -> Values:
        """Latent sites and data from the prior."""
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
        except (NotVectorizedError, RuntimeError):  # a distribution may draw what it can score at once only one by one
            if self.weighted.model_mode is RunMode.SINGLE:
                raise
            return run(RunMode.SINGLE)


def _split_sites(trace: Trace, layout: Layout, sites: Mapping[str, SiteInfo]) -> Values:
    out = {}
    for name, site in sites.items():
        value: Any = trace.nodes[name]["value"]
        if layout.size is None and value.shape != site.shape:
            raise ValueError(f"a draw of site '{name}' has shape {tuple(value.shape)}, not {tuple(site.shape)}")
        out[name] = layout.split(value, site.shape)
    return out


def _refuse_improper(program: Program) -> None:
    for name, site in program.latents.items():
        if site.is_improper:
            raise NotImplementedError(f"the prior of site '{name}' is improper")


# --- names and datasets ---------------------------------------------------------------------------------------------


class _Names:
    """Names and labels of dimensions."""

    def __init__(self, program: Program, labels: Mapping[str, Sequence[Any]]) -> None:
        self.sites = program.latents | program.observed | program.deterministics
        self.labels = labels
        self.used: dict[str, int] = {}

    def dataset(self, group: str, values: Values, attrs: Mapping[str, str]) -> xr.Dataset:
        """A group's tensors as a dataset."""
        import xarray as xr

        sample_dims = () if group == "observed_data" else _SAMPLE_DIMS
        variables = {}
        for name, value in values.items():
            array = _to_numpy(value)
            dims = (*sample_dims, *self._dims(name, is_density=group == "log_likelihood"))
            variables[name] = (dims, array[np.newaxis] if sample_dims else array)
            self._use(dims, variables[name][1].shape)
        sizes = {dim: size for dims, array in variables.values() for dim, size in zip(dims, array.shape, strict=True)}
        coords = {dim: self._labels(dim, size) for dim, size in sizes.items()}
        return xr.Dataset(variables, coords=coords, attrs=dict(attrs))

    def check_labels(self) -> None:
        """Raise if labels were given for a dimension that does not exist."""
        for name in self.labels:
            if name not in self.used:
                raise ValueError(f"there is no dimension '{name}'; there are {', '.join(sorted(self.used))}")

    def _use(self, dims: Sequence[str], shape: Sequence[int]) -> None:
        self.used |= dict(zip(dims, shape, strict=True))

    def _labels(self, dim: str, size: int) -> NDArray[Any]:
        labels = self.labels.get(dim)
        if labels is None:
            return np.arange(size)
        if len(labels) != size:
            raise ValueError(f"{len(labels)} labels for dimension '{dim}' of size {size}")
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
            dims.append(self._plate(plate.name, size) if plate and plate.size == size else f"{name}_dim_{axis}")
        return dims

    def _plate(self, plate: str, size: int) -> str:
        """A plate's name, made unlike those of sites, of draws, and of plates of another size."""
        name = f"{plate}_plate" if plate in self.sites or plate in _SAMPLE_DIMS else plate
        return name if self.used.get(name, size) == size else f"{name}_{size}"


def _to_numpy(value: Tensor) -> NDArray[Any]:
    value = value.detach().cpu()
    if value.dtype in (torch.bfloat16, torch.float16):
        value = value.float()
    return np.array(value.numpy(), order="C")


def _provenance(program: Program, num_samples: int, resampled: bool) -> dict[str, str]:
    return {
        "created_at": datetime.now(timezone.utc).isoformat(),
        "inference_library": "pyro_flowguides",
        "inference_library_version": _version(),
        "pyro_version": pyro.__version__,
        "torch_version": str(torch.__version__),
        "guide": _describe(program.guide),
        "model": _describe(program.model),
        "num_samples": str(num_samples),
        "draws": "importance-resampled" if resampled else "from the guide",
    }


def _version() -> str:
    try:
        return importlib.metadata.version("pyro_flowguides")
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get("pyro_flowguides"), "__version__", "unknown"))


def _describe(program: Callable[..., Any]) -> str:
    return str(getattr(program, "__qualname__", type(program).__qualname__))
