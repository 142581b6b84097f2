"""Export of a fitted guide to ArviZ."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_flowguides.diagnostics import arviz_compat
from pyro_flowguides.diagnostics.arviz_compat import ArvizData
from pyro_flowguides.diagnostics.psis import resample as resample_draws
from pyro_flowguides.diagnostics.weights import WeightedDraws, weigh
from pyro_flowguides.nn.arguments import check_count, check_mapping
from pyro_flowguides.programs.batched_run import Layout, NotVectorizedError, RunMode, first_line
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.program_runs import Collect, run_model
from pyro_flowguides.programs.running import SampleObserved, evaluation, exclusive
from pyro_flowguides.programs.sites import SiteInfo
from pyro_flowguides.programs.trace_density import scored_sites
from pyro_flowguides.programs.types import Guide, Model, Site, Values

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["export_draws", "export_program", "to_inference_data"]

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
        model, guide: a Pyro model and any Pyro guide for it.
        *args, **kwargs: arguments of both.
        num_samples: number of draws.
        resample: whether to take four times as many draws and resample them with Pareto-smoothed importance weights.
        coords: labels of plates or other dimensions: name -> labels; integers by default.

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


@exclusive
def export_program(
    program: Program,
    *,
    num_samples: int = 1000,
    resample: bool = False,
    coords: Mapping[str, Sequence[object]] | None = None,
) -> ArvizData:
    """Draw from the guide of an inspected program, and export the draws to ArviZ; see :func:`to_inference_data`."""
    num_samples = check_count("to_inference_data", "num_samples", num_samples)
    check_mapping("to_inference_data", "coords", coords or {})
    weighted = weigh(program, num_samples * _OVERSAMPLING if resample else num_samples)
    if resample:
        weighted = resample_draws(weighted, num_samples)
    return export_draws(program, weighted, "importance-resampled" if resample else "from the guide", coords=coords)


def export_draws(
    program: Program,
    weighted: WeightedDraws,
    origin: str,
    *,
    coords: Mapping[str, Sequence[object]] | None = None,
    sample_stats: Values | None = None,
    num_chains: int = 1,
) -> ArvizData:
    """Export weighted draws to ArviZ, with the groups that :func:`to_inference_data` describes.

    The draws of several chains stand one chain after the other. ``origin`` tells how the draws were made, and
    ``sample_stats`` replaces densities and weights in the group of this name, each (S,).
    """
    groups, notes = _collect_groups(program, weighted)
    groups["sample_stats"] = sample_stats or groups["sample_stats"]
    attrs = {**_describe(program), "num_samples": str(weighted.num_samples // num_chains), "draws": origin, **notes}
    builder = _DatasetBuilder(program, coords or {}, num_chains)
    datasets = {group: builder.dataset(group, values, attrs) for group, values in groups.items() if values}
    builder.check_labels()
    return arviz_compat.build_tree(datasets, attrs)


# --- the groups ------------------------------------------------------------------------------------------------------


def _collect_groups(program: Program, weighted: WeightedDraws) -> tuple[dict[str, Values], dict[str, str]]:
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
    if program.enumerated:
        notes["log_likelihood"] = f"left out: sites {', '.join(program.enumerated)} are summed out"
    else:
        try:
            scored = _score_data(program, weighted)
        except Exception as error:  # a model may fail in any way at a draw where it is not defined
            notes["log_likelihood"] = f"left out, as are deterministic sites: {first_line(error)}"
        else:
            groups["posterior"] |= {name: scored[name] for name in program.deterministics}
            groups["log_likelihood"] = {name: scored[name] for name in program.observed}
    for group, values in (("posterior_predictive", weighted.draws), ("prior_predictive", {})):
        try:
            groups[group] = _draw_data(program, weighted, values) if program.observed else {}
        except (NotImplementedError, RuntimeError, ValueError) as error:
            notes[group] = f"left out: {first_line(error)}"
    prior = groups.get("prior_predictive", {})
    groups["prior"] = {name: prior.pop(name) for name in program.latents if name in prior}
    return groups, notes


def _score_data(program: Program, weighted: WeightedDraws) -> Values:
    """Return the log likelihood of each datum, and the deterministic sites."""

    def collect(trace: Trace, layout: Layout) -> Values:
        scored = dict(scored_sites(trace))
        log_likelihood = {
            name: layout.split(_log_likelihood(scored[name]), site.batch_shape)
            for name, site in program.observed.items()
        }
        return log_likelihood | _split_sites(trace, layout, program.deterministics)

    return _run(program, weighted, weighted.draws, collect)


def _log_likelihood(site: Site) -> Tensor:
    """Return the log density of each datum, without the scale of a subsample; that of masked data is 0."""
    log_likelihood: Tensor = scale_and_mask(site["unscaled_log_prob"], mask=site["mask"])
    return log_likelihood


def _draw_data(program: Program, weighted: WeightedDraws, values: Values) -> Values:
    """Draw data, and the latent sites without given values from their prior."""
    latents = {name: site for name, site in program.latents.items() if name not in values}
    for name, site in latents.items():
        if site.is_improper:
            raise NotImplementedError(f"the prior of site '{name}' is improper")
    drawn = latents | program.observed
    return _run(program, weighted, values, lambda trace, layout: _split_sites(trace, layout, drawn), [SampleObserved()])


def _run(
    program: Program, weighted: WeightedDraws, values: Values, collect: Collect, handlers: Sequence[Messenger] = ()
) -> Values:
    """Run the model in the mode in which the draws were weighed, or draw by draw where that fails."""
    size = program.default_chunk_size
    run = partial(run_model, program, values, weighted.num_samples, collect, size, handlers=handlers)
    with evaluation():
        try:
            return run(mode=weighted.model_mode)
        except (NotVectorizedError, RuntimeError):  # some distributions score many draws at once but cannot sample so
            if weighted.model_mode is RunMode.SINGLE:
                raise
            return run(mode=RunMode.SINGLE)


def _split_sites(trace: Trace, layout: Layout, sites: Mapping[str, SiteInfo]) -> Values:
    out = {}
    for name, site in sites.items():
        value = cast("Mapping[str, Site]", trace.nodes)[name]["value"]
        if layout.size is None and value.shape != site.shape:
            raise ValueError(f"a draw of site '{name}' has shape {tuple(value.shape)}, not {tuple(site.shape)}")
        out[name] = layout.split(value, site.shape)
    return out


# --- datasets -------------------------------------------------------------------------------------------------------


class _DatasetBuilder:
    """Builder of xarray datasets that names and labels the dimensions of all groups of a program consistently."""

    def __init__(self, program: Program, labels: Mapping[str, Sequence[object]], num_chains: int) -> None:
        self.sites = program.latents | program.observed | program.deterministics
        self.labels, self.num_chains = labels, num_chains
        self._sizes: dict[str, int] = {}

    def dataset(self, group: str, values: Values, attrs: Mapping[str, str]) -> xr.Dataset:
        """Return the tensors of a group as a dataset."""
        import xarray as xr

        sample_dims = () if group == "observed_data" else _SAMPLE_DIMS
        variables = {}
        for name, value in values.items():
            array = _to_numpy(value)
            dims = (*sample_dims, *self._dims(name, is_density=group == "log_likelihood"))
            variables[name] = (dims, array.reshape(self.num_chains, -1, *array.shape[1:]) if sample_dims else array)
            self._sizes |= dict(zip(dims, variables[name][1].shape, strict=True))
        coords = {dim: self._labels(dim) for dims, _ in variables.values() for dim in dims}
        return xr.Dataset(variables, coords=coords, attrs=dict(attrs))

    def check_labels(self) -> None:
        """Refuse labels for a dimension that no dataset has."""
        for name in self.labels:
            if name not in self._sizes:
                raise ValueError(f"coords: no dimension '{name}'; the dimensions are {', '.join(sorted(self._sizes))}")

    def _labels(self, dim: str) -> NDArray[np.generic]:
        size, labels = self._sizes[dim], self.labels.get(dim)
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


def _describe(program: Program) -> dict[str, str]:
    """Return attributes that record the programs, and the time and libraries of the export."""
    return {
        "created_at": datetime.now(timezone.utc).isoformat(),
        "inference_library": "pyro_flowguides",
        "inference_library_version": str(sys.modules["pyro_flowguides"].__version__),
        "pyro_version": pyro.__version__,
        "torch_version": str(torch.__version__),
        "guide": _qualified_name(program.guide),
        "model": _qualified_name(program.model),
    }


def _qualified_name(program: Model | Guide) -> str:
    return str(getattr(program, "__qualname__", type(program).__qualname__))
