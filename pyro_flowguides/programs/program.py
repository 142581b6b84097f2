"""A model and its guide with their arguments, inspected once: sites, plates, parameters, and how the model runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar, cast

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_flowguides.nn.arguments import describe
from pyro_flowguides.programs.batched_run import Layout, NotVectorizedError, RunMode, first_line, per_chunk
from pyro_flowguides.programs.improper import check_angles, may_be_improper, with_proper_masked_sites
from pyro_flowguides.programs.log_density import LogDensity
from pyro_flowguides.programs.running import exclusive, trace_guide, trace_program
from pyro_flowguides.programs.sites import (
    SiteInfo,
    innermost,
    is_data,
    is_deterministic,
    is_reparametrized,
    latent_sites,
    plate_depth,
    sample_sites,
    subsampled_plates,
)
from pyro_flowguides.programs.types import Args, Guide, Kwargs, Model, Site
from pyro_flowguides.programs.validation import validated_traces

__all__ = ["Program", "check_programs"]

T = TypeVar("T")

#: Most draws that run together.
MAX_CHUNK = 10_000


@dataclass(eq=False)
class Program:
    """A model, its guide and their arguments, with what one run of each shows.

    Attributes:
        model, guide, args, kwargs: the programs and the arguments of both.
        parameters: the unconstrained parameters of both.
        latents: the sites that model and guide share.
        observed: the model's sites with data.
        deterministics: the model's sites made by ``pyro.deterministic``, and those that ``poutine.reparam`` has made
            functions of others.
        enumerated: the model's discrete sites that are summed out: name -> "parallel" or "sequential".
        guide_sites: all latent sites of the guide, auxiliary ones included.
        is_enumerating: whether a latent site of model or guide is marked for enumeration.
        subsampled: the subsampled plates: name -> (size of the subsample, full size).
        nesting: number of batch dimensions to the left of which a plate of draws may stand.
        mode: the fastest way to run the model on many draws that has not been refused.
        refused: the faster ways, and why each was not taken.
    """

    model: Model
    guide: Guide
    args: Args
    kwargs: Kwargs
    parameters: dict[str, Tensor]
    latents: dict[str, SiteInfo]
    observed: dict[str, SiteInfo]
    deterministics: dict[str, SiteInfo]
    enumerated: dict[str, str]
    guide_sites: dict[str, SiteInfo]
    is_enumerating: bool
    subsampled: dict[str, tuple[int, int]]
    nesting: int
    mode: RunMode = RunMode.PLATE
    refused: dict[RunMode, str] = field(default_factory=dict)

    @classmethod
    @exclusive
    def inspect(cls, model: Model, guide: Guide, args: Args = (), kwargs: Kwargs | None = None) -> Program:
        """Run guide and model once and note their structure.

        The runs take place outside any plate of draws, so that an autoguide that has never been called sets itself up
        on the bare model. They use up no random numbers. Pyro's validation is on, whatever the user's setting.

        Raises:
            ValueError: if guide and model do not have the same latent sites, or if Pyro's validation refuses the shape
                of a site, data outside the support of their distribution, or constant parameters of one.
        """
        check_programs(model, guide)
        kwargs, alone = kwargs or {}, Layout(None, 0)

        @torch.no_grad()
        def draw() -> Trace:
            return trace_guide(guide, args, kwargs, alone)

        def run(guide_trace: Trace) -> Trace:
            drawn = {name: site["value"] for name, site in latent_sites(guide_trace)}
            return trace_program(model, args, kwargs, alone, drawn)

        def run_with_slopes() -> tuple[Trace, Trace]:
            guide_trace = draw()
            drawn = {name: site["value"].detach().clone() for name, site in latent_sites(guide_trace)}
            for value in drawn.values():
                value.requires_grad_(value.is_floating_point())
            with torch.enable_grad():
                return guide_trace, trace_program(model, args, kwargs, alone, drawn)

        with torch.random.fork_rng(devices=[]), poutine.trace(param_only=True) as capture:
            guide_trace, model_trace = validated_traces(draw, run, _check_same_latents)
            if any(may_be_improper(site) for _, site in latent_sites(model_trace)):
                model = with_proper_masked_sites(model, run_with_slopes)
        _check_angles(model_trace, guide_trace)
        model_sites, guide_sites = dict(sample_sites(model_trace)), dict(latent_sites(guide_trace))
        latents = {name: site for name, site in model_sites.items() if not site["is_observed"]}
        captured = cast("dict[str, Site]", capture.trace.nodes)
        return cls(
            model=model,
            guide=guide,
            args=args,
            kwargs=kwargs,
            parameters={name: _unconstrained(site["value"]) for name, site in captured.items()},
            latents={name: SiteInfo.of(site) for name, site in latents.items() if name in guide_sites},
            observed={name: SiteInfo.of(site) for name, site in model_sites.items() if is_data(site)},
            deterministics={
                name: SiteInfo.of(site)
                for name, site in model_sites.items()
                if is_deterministic(site) or is_reparametrized(site)
            },
            enumerated={n: site["infer"]["enumerate"] for n, site in latents.items() if n not in guide_sites},
            guide_sites={name: SiteInfo.of(site) for name, site in guide_sites.items()},
            is_enumerating=any(site["infer"].get("enumerate") for site in [*latents.values(), *guide_sites.values()]),
            subsampled=subsampled_plates(guide_trace) | subsampled_plates(model_trace),
            nesting=max(plate_depth(model_trace), plate_depth(guide_trace)),
        )

    @cached_property
    def log_density(self) -> LogDensity:
        """The model's log density of the unconstrained latent vector of an autoguide."""
        return LogDensity(self)

    def in_fastest_mode(self, run: Callable[[RunMode], T]) -> T:
        """Return what a run gives in the fastest mode in which it raises no error, and remember that mode.

        Raises:
            NotVectorizedError: if the model can take many draws at once in no way, with the reason for each.
        """
        for mode in (RunMode.PLATE, RunMode.MAPPED):
            if mode in self.refused:
                continue
            try:
                result = run(mode)
            except Exception as error:  # a program may fail in any way where it was not written for many draws
                self.refused[mode] = first_line(error)
            else:
                self.mode = mode
                return result
        self.mode = RunMode.SINGLE
        raise NotVectorizedError(f"the model cannot take many draws at once: {self.why_slower}")

    @property
    def why_slower(self) -> str:
        """Why the model does not run in a faster mode, with the reason for each; empty if there is none."""
        return "; ".join(f"{mode.value}, {reason}" for mode, reason in self.refused.items())

    @property
    def mode_note(self) -> str:
        """Why the model does not run under a plate of draws; empty if it does."""
        return f"the model ran {self.mode.value} ({self.why_slower})" if self.refused else ""

    @property
    def default_chunk_size(self) -> int:
        """Number of draws that run together, such that their sites take some tens of MB."""
        groups = (self.latents, self.observed, self.deterministics, self.guide_sites)
        elements = sum(max(site.value.numel(), 1) for group in groups for site in group.values())
        return min(MAX_CHUNK, per_chunk(elements))

    @property
    def tolerance(self) -> float:
        """Relative accuracy to expect of runs that differ in how they add up, for the least precise type in use."""
        sites = [*self.guide_sites.values(), *self.observed.values()]
        types = [site.value.dtype for site in sites if site.value.is_floating_point()]
        return max(torch.finfo(dtype).eps for dtype in types or [torch.get_default_dtype()]) ** 0.5

    def check_full_density(self) -> None:
        """Refuse a program whose density cannot be evaluated at a draw of the guide: an importance weight needs it.

        Raises:
            ValueError: if a plate is subsampled or a site is summed out sequentially, naming it and the remedy.
        """
        for name, (size, full_size) in self.subsampled.items():
            raise ValueError(
                f"plate {name!r} is subsampled ({size} of {full_size}). An importance weight needs the density of all "
                "the data, not of a scaled minibatch: call this with arguments that give the plate its full size."
            )
        for name, how in self.enumerated.items():
            if how != "parallel":
                raise ValueError(f"site {name!r} is enumerated sequentially; {_SUM_OUT}")


def check_programs(model: object, guide: object) -> None:
    """Refuse a model or guide that cannot be called, and a class instead of a guide."""
    for name, program in (("model", model), ("guide", guide)):
        if not callable(program):
            raise TypeError(f"the {name} must be a function that calls pyro.sample, got {describe(program)}")
    if isinstance(guide, type):
        raise TypeError(f"the guide must be a guide, not the class {guide.__name__}: pass {guide.__name__}(model)")


def _unconstrained(value: Tensor) -> Tensor:
    """Return the parameter behind its constrained value: itself where leaving a parameter store dropped the link."""
    parameter: Tensor = getattr(value, "unconstrained", lambda: value)()
    return parameter


def _check_angles(model_trace: Trace, guide_trace: Trace) -> None:
    """Refuse angles that the guide draws as a function of numbers on the line."""
    guide_sites = dict(latent_sites(guide_trace))
    is_mapped = {name for name, site in guide_sites.items() if isinstance(innermost(site["fn"]), dist.Delta)}
    check_angles("the guide", ((name, site) for name, site in latent_sites(model_trace) if name in is_mapped))


_SUM_OUT = "to sum it out, mark it with infer={'enumerate': 'parallel'}"


def _check_same_latents(model_trace: Trace, guide_trace: Trace) -> None:
    """Refuse latent sites that only one of model and guide has, unless they are enumerated or auxiliary."""
    model_sites, guide_sites = dict(sample_sites(model_trace)), dict(latent_sites(guide_trace))
    guide_data = [name for name, site in sample_sites(guide_trace) if is_data(site)]
    if guide_data and not any(map(is_data, model_sites.values())):
        raise ValueError(f"the guide holds data (site {guide_data[0]!r}) and the model none: are they swapped?")
    for name, site in model_sites.items():
        if site["is_observed"] or name in guide_sites:
            continue
        can_enumerate = getattr(site["fn"], "has_enumerate_support", False)
        if not (can_enumerate and site["infer"].get("enumerate")):
            hint = f"; {_SUM_OUT}" if can_enumerate else ""
            raise ValueError(f"site {name!r} is latent in the model and not in the guide{hint}")
    for name, site in guide_sites.items():
        is_latent = name in model_sites and not model_sites[name]["is_observed"]
        if not (is_latent or site["infer"].get("is_auxiliary")):
            raise ValueError(
                f"site {name!r} of the guide is not latent in the model; if it is auxiliary, mark it with "
                "infer={'is_auxiliary': True}"
            )
