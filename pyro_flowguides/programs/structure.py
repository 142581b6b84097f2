"""Check that a model has the fixed structure that a flow guide serves, and say what it cannot serve."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to

from pyro_flowguides.programs.improper import check_angles
from pyro_flowguides.programs.running import isolated
from pyro_flowguides.programs.sites import SiteInfo, latent_sites
from pyro_flowguides.programs.types import Args, Kwargs, Model, Site

__all__ = ["call_signature", "check_plates", "check_same_structure", "check_static", "latent_trace", "observed_sites"]

#: Points around the initial one at which the structure is compared, and their distance in unconstrained space.
PROBES, PROBE_SCALE = 3, 0.5


class _AtPoint(Messenger):
    """Run a model at given unconstrained values, each mapped to the support that its site has there."""

    def __init__(self, unconstrained: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.unconstrained = unconstrained

    def _pyro_sample(self, msg: Site) -> None:
        # The guide's initialization is nearer to the model and has set a value already: replace it.
        if msg["name"] in self.unconstrained and not msg["is_observed"]:
            msg["value"] = biject_to(msg["fn"].support)(self.unconstrained[msg["name"]])


def latent_trace(model: Model, hide: Callable[..., bool], args: Args, kwargs: Kwargs) -> Trace:
    """Return the trace of the latent sites of a model run on its own."""
    with isolated():
        return poutine.trace(poutine.block(model, hide)).get_trace(*args, **kwargs)


def observed_sites(model: Model, args: Args, kwargs: Kwargs) -> frozenset[str]:
    """Return the names of the sites that hold data; a model run to predict them samples them instead."""
    with isolated():
        return frozenset(poutine.trace(model).get_trace(*args, **kwargs).observation_nodes)


def check_plates(owner: str, trace: Trace) -> None:
    """Refuse a latent site inside a subsampled plate: its posterior would be one per slot of the batch, not per datum.

    Raises:
        ValueError: naming the site, the plate and the remedy.
    """
    for name, site in latent_sites(trace):
        for frame in site["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"{owner}: site {name!r} lies in plate {frame.name!r}, which is subsampled to {frame.size} of "
                    f"{frame.full_size}: the guide would learn a posterior per slot, not per datum. Amortize the "
                    f"site over its data with AutoAmortizedFlow, or do not subsample the plate."
                )


def check_static(
    owner: str, model: Model, hide: Callable[..., bool], prototype: Trace, args: Args, kwargs: Kwargs
) -> None:
    """Compare the model's structure and supports at a few other points with those at the initial one.

    Points at which the model cannot be evaluated are passed over.

    Raises:
        ValueError: if sites or shapes change, the support of a site depends on other latent variables, or a site is an
            angle.
    """
    check_angles(owner, latent_sites(prototype))
    generator = torch.Generator().manual_seed(0)
    center = {name: biject_to(site["fn"].support).inv(site["value"]) for name, site in latent_sites(prototype)}
    for _ in range(PROBES):
        point = {name: value + PROBE_SCALE * _noise(value, generator) for name, value in center.items()}
        try:
            trace = latent_trace(_AtPoint(point)(model), hide, args, kwargs)
        except Exception:  # a model may fail in any way where it is not defined
            continue
        check_same_structure(owner, prototype, trace, "at other values of its latent variables")
        _check_supports(owner, prototype, trace, point)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)


def _check_supports(owner: str, prototype: Trace, trace: Trace, point: Mapping[str, Tensor]) -> None:
    initial = dict(latent_sites(prototype))
    for name, site in latent_sites(trace):
        value = biject_to(site["fn"].support)(point[name])
        value_under_initial_support = biject_to(initial[name]["fn"].support)(point[name])
        if not torch.allclose(value, value_under_initial_support, equal_nan=True):
            raise ValueError(
                f"{owner}: the support of site {name!r} depends on other latent variables, so that a guide over one "
                f"unconstrained space would draw values outside it. Reparametrize the site over a fixed support: for "
                f"Uniform(low, high), sample a fraction from Uniform(0, 1) and use low + (high - low) * fraction."
            )


def check_same_structure(owner: str, prototype: Trace, trace: Trace, when: str, observed: Collection[str] = ()) -> None:
    """Refuse a model whose latent sites, their shapes or their plates differ from those the guide was built for.

    Sites that were observed then may be latent now: the model is run to predict them.

    Raises:
        ValueError: naming the sites, the shapes and the remedy.
    """
    before = {name: SiteInfo.of(site) for name, site in latent_sites(prototype)}
    after = {name: SiteInfo.of(site) for name, site in latent_sites(trace)}
    remedy = "A flow guide serves one fixed structure: create one guide per structure."
    missing, new = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys() - set(observed))
    if missing or new:
        raise ValueError(
            f"{owner}: the model has other latent sites {when} (missing: {missing}, new: {new}) than when the guide "
            f"was set up. {remedy}"
        )
    for name, site in before.items():
        if (site.shape, site.plates) != (after[name].shape, after[name].plates):
            raise ValueError(
                f"{owner}: site {name!r} has {_describe(after[name])} {when}, and had {_describe(site)} when the "
                f"guide was set up. {remedy} For a plate over data of changing size use AutoAmortizedFlow."
            )


def _describe(site: SiteInfo) -> str:
    plates = ", ".join(f"{plate.name!r} of size {plate.size}" for plate in site.plates)
    return f"shape {tuple(site.shape)}" + (f" in plate {plates}" if plates else "")


def call_signature(args: Args, kwargs: Kwargs) -> tuple[object, ...]:
    """Return what in a model's arguments can change its structure: shapes, types, and the values of plain switches."""
    return tuple(_leaf(arg) for arg in args), tuple((key, _leaf(value)) for key, value in sorted(kwargs.items()))


def _leaf(value: Any) -> object:
    if isinstance(getattr(value, "shape", None), tuple):
        return type(value), tuple(value.shape)
    if isinstance(value, (bool, int, str, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_leaf(item) for item in value)
    if isinstance(value, dict):
        return dict, tuple((str(key), _leaf(item)) for key, item in value.items())
    return type(value)
