"""Describe the sites of one run of a program: values, plates, and what kind of site each is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import pyro.distributions as dist
import torch
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

from pyro_flowguides.programs.types import Site

__all__ = [
    "PlateInfo",
    "SiteInfo",
    "innermost",
    "is_data",
    "is_deterministic",
    "is_reparametrized",
    "latent_sites",
    "plate_depth",
    "sample_sites",
    "subsampled_plates",
]


@dataclass(frozen=True)
class PlateInfo:
    """A plate around a site; ``dim`` counts from the right of the batch shape and is negative."""

    name: str
    size: int
    dim: int


@dataclass(frozen=True)
class SiteInfo:
    """A site as one run shows it, without a dimension of draws."""

    value: Tensor
    batch_shape: torch.Size
    plates: tuple[PlateInfo, ...]
    is_discrete: bool
    is_point_mass: bool
    is_improper: bool

    @classmethod
    def of(cls, site: Site) -> SiteInfo:
        """Describe a site of a trace."""
        fn, value = site["fn"], site["value"]
        return cls(
            value=value,
            batch_shape=torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim]),
            plates=tuple(PlateInfo(f.name, f.size, f.dim) for f in site["cond_indep_stack"] if f.vectorized),
            is_discrete=_is_discrete(fn),
            is_point_mass=isinstance(innermost(fn), dist.Delta),
            is_improper=isinstance(innermost(fn), dist.ImproperUniform),
        )

    @property
    def shape(self) -> torch.Size:
        """Shape of the value: batch and event."""
        return self.value.shape


def _is_discrete(fn: Distribution) -> bool:
    try:
        support = fn.support
        return support is not None and bool(support.is_discrete)
    except (NotImplementedError, AttributeError, ValueError):
        return False


def is_deterministic(site: Site) -> bool:
    """Tell whether a site comes from ``pyro.deterministic``."""
    return bool(site["infer"].get("_deterministic", False))


def is_reparametrized(site: Site) -> bool:
    """Tell whether a site is what ``poutine.reparam`` leaves of a latent one: a point mass at an observed value."""
    return bool(site["is_observed"]) and not is_deterministic(site) and isinstance(innermost(site["fn"]), dist.Delta)


def is_data(site: Site) -> bool:
    """Tell whether a site is an observation: neither a factor nor a function of latent sites."""
    if not site["is_observed"] or is_deterministic(site) or is_reparametrized(site):
        return False
    return not site_is_factor(site)  # type: ignore[arg-type]


def innermost(fn: Distribution) -> Distribution:
    """Return a distribution without the masks, expansions and reinterpreted dimensions around it."""
    while isinstance(fn, (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)):
        fn = fn.base_dist
    return fn


def sample_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """Yield the sample sites of a trace, without those that choose the subsample of a plate."""
    for name, site in cast("Mapping[str, Site]", trace.nodes).items():
        if site["type"] == "sample" and not site_is_subsample(site):  # type: ignore[arg-type]
            yield name, site


def latent_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """Yield the sample sites of a trace that are not observed."""
    return ((name, site) for name, site in sample_sites(trace) if not site["is_observed"])


def subsampled_plates(trace: Trace) -> dict[str, tuple[int, int]]:
    """Return the plates of a trace that are subsampled: name -> (size of the subsample, full size)."""
    plates = {}
    for name, site in cast("Mapping[str, Site]", trace.nodes).items():
        if site["type"] == "sample" and site_is_subsample(site) and len(site["value"]) < site["fn"].size:  # type: ignore[arg-type]
            plates[name] = (len(site["value"]), site["fn"].size)
    return plates


def plate_depth(trace: Trace) -> int:
    """Return the depth of the deepest batch dimension in use, whether or not a plate declares it."""
    depths = [0]
    for _, site in sample_sites(trace):
        depths += [-frame.dim for frame in site["cond_indep_stack"] if frame.vectorized]
        if not is_deterministic(site):
            depths.append(len(site["fn"].batch_shape))
        if not is_deterministic(site) and not site_is_factor(site):  # type: ignore[arg-type]
            depths.append(site["value"].dim() - site["fn"].event_dim)
    return max(depths)
