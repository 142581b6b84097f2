"""What one run of a model and one of its guide show: sites, plates, and how deep the plates are nested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from pyro_flowguides.programs.chunking import per_chunk
from pyro_flowguides.programs.traces import (
    Arguments,
    Layout,
    Site,
    evaluation,
    innermost,
    is_data,
    is_deterministic,
    sample_sites,
    trace_guide,
    trace_program,
)
from pyro_flowguides.programs.widening import Widen, widening_factor

_MAX_CHUNK = 10_000


@dataclass(frozen=True)
class Plate:
    """A plate in which a site stands; ``dim`` counts from the right of the batch shape and is negative."""

    name: str
    size: int
    dim: int


@dataclass(frozen=True)
class SiteInfo:
    """What one run says of a site, without any dimension of draws."""

    value: Tensor
    batch_shape: torch.Size
    plates: tuple[Plate, ...]
    is_discrete: bool
    is_point_mass: bool
    is_improper: bool

    @property
    def shape(self) -> torch.Size:
        """Shape of the site's value: batch and event."""
        return self.value.shape


@dataclass(frozen=True)
class Program:
    """A model, its guide and their arguments, with what one run of each has shown.

    Attributes:
        model: the model.
        guide: the guide.
        arguments: positional and keyword arguments of both.
        latents: the sites that model and guide share.
        observed: the model's sites with data.
        deterministics: the model's sites made by ``pyro.deterministic``.
        enumerated: names of the model's discrete sites that are summed out.
        guide_sites: all latent sites of the guide, auxiliary ones included.
        widenable: the sites of the guide whose distribution has a scale that can be multiplied.
        nesting: number of batch dimensions to the left of which a plate of draws may stand.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    arguments: Arguments
    latents: dict[str, SiteInfo]
    observed: dict[str, SiteInfo]
    deterministics: dict[str, SiteInfo]
    enumerated: tuple[str, ...]
    guide_sites: dict[str, SiteInfo]
    widenable: tuple[str, ...]
    nesting: int

    @property
    def widening(self) -> float:
        """The factor by which the guide is widened; 1 if it cannot be."""
        dim = sum(self.guide_sites[name].value.numel() for name in self.widenable)
        return widening_factor(dim) if dim else 1.0

    @property
    def default_chunk_size(self) -> int:
        """Number of draws that are run together, so that what their sites hold stays within some tens of MB."""
        groups = (self.latents, self.observed, self.deterministics, self.guide_sites)
        elements = sum(max(site.value.numel(), 1) for group in groups for site in group.values())
        return min(_MAX_CHUNK, per_chunk(elements))


def inspect_program(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Program:
    """Run guide and model once and note their structure.

    The runs take place outside any plate of draws, so that an autoguide that has never been called sets itself up on
    the bare model.

    Raises:
        ValueError: if a plate is subsampled, or guide and model do not have the same latent sites.
    """
    arguments, alone = (args, kwargs), Layout(None, 0)
    with torch.no_grad():
        guide_trace = trace_guide(guide, arguments, alone)
    guide_sites = {name: site for name, site in sample_sites(guide_trace) if not site["is_observed"]}
    with evaluation():
        model_trace = trace_program(
            model, arguments, alone, {name: site["value"] for name, site in guide_sites.items()}
        )
    model_sites = dict(sample_sites(model_trace))
    for role, trace in (("model", model_trace), ("guide", guide_trace)):
        _refuse_subsampling(role, trace)
    _refuse_missing(model_sites, guide_sites)
    _refuse_surplus(model_sites, guide_sites)
    latents = {name: site for name, site in model_sites.items() if not site["is_observed"]}
    return Program(
        model=model,
        guide=guide,
        arguments=arguments,
        latents={name: _info(site) for name, site in latents.items() if name in guide_sites},
        observed={name: _info(site) for name, site in model_sites.items() if is_data(site)},
        deterministics={name: _info(site) for name, site in model_sites.items() if is_deterministic(site)},
        enumerated=tuple(name for name in latents if name not in guide_sites),
        guide_sites={name: _info(site) for name, site in guide_sites.items()},
        widenable=_widenable(guide, arguments),
        nesting=max(_nesting(model_trace), _nesting(guide_trace)),
    )


def _widenable(guide: Callable[..., Any], arguments: Arguments) -> tuple[str, ...]:
    widen = Widen(2.0, active=True)
    try:
        with evaluation():
            trace_guide(guide, arguments, Layout(None, 0), handlers=[widen])
    except Exception:  # a guide may do anything with a value it did not expect, and flows need not have an inverse
        return ()
    return tuple(widen.log_ratios)


def _info(site: Site) -> SiteInfo:
    fn, value = site["fn"], site["value"]
    return SiteInfo(
        value=value,
        batch_shape=torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim]),
        plates=tuple(Plate(f.name, f.size, f.dim) for f in site["cond_indep_stack"] if f.vectorized),
        is_discrete=_is_discrete(fn),
        is_point_mass=isinstance(innermost(fn), dist.Delta),
        is_improper=isinstance(innermost(fn), dist.ImproperUniform),
    )


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except (NotImplementedError, AttributeError, ValueError):
        return False


def _nesting(trace: Trace) -> int:
    """The deepest batch dimension in use, whether or not a plate declares it."""
    depths = [0]
    for _, site in sample_sites(trace):
        depths += [-frame.dim for frame in site["cond_indep_stack"] if frame.vectorized]
        if not is_deterministic(site):
            depths.append(len(site["fn"].batch_shape))
        if not is_deterministic(site) and not site_is_factor(site):  # type: ignore[arg-type]
            depths.append(site["value"].dim() - site["fn"].event_dim)
    return max(depths)


def _refuse_subsampling(role: str, trace: Trace) -> None:
    for name, node in trace.nodes.items():
        site: Any = node
        if site["type"] != "sample" or not site_is_subsample(site) or len(site["value"]) >= site["fn"].size:
            continue
        raise ValueError(
            f"plate '{name}' of the {role} is subsampled ({len(site['value'])} of {site['fn'].size}). An importance "
            "weight needs the density of all the data, not of a scaled minibatch: call this with arguments that give "
            "the plate its full size."
        )


def _refuse_missing(model_sites: dict[str, Site], guide_sites: dict[str, Site]) -> None:
    for name, site in model_sites.items():
        if site["is_observed"] or name in guide_sites:
            continue
        can_enumerate = getattr(site["fn"], "has_enumerate_support", False)
        if can_enumerate and site["infer"].get("enumerate") == "parallel":
            continue
        hint = "; to sum it out, mark it with infer={'enumerate': 'parallel'}" if can_enumerate else ""
        raise ValueError(f"the guide has no site '{name}', which is latent in the model{hint}")


def _refuse_surplus(model_sites: dict[str, Site], guide_sites: dict[str, Site]) -> None:
    for name, site in guide_sites.items():
        if site["infer"].get("is_auxiliary") or (name in model_sites and not model_sites[name]["is_observed"]):
            continue
        raise ValueError(
            f"site '{name}' of the guide is not latent in the model; if it is auxiliary, "
            "mark it with infer={'is_auxiliary': True}"
        )
