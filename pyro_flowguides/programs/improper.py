"""Directions that a model does not constrain: masked and improper latent sites, and angles on the line."""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

from pyro_flowguides.programs.running import unvalidated
from pyro_flowguides.programs.sites import innermost, is_deterministic, latent_sites, sample_sites
from pyro_flowguides.programs.trace_density import score_site
from pyro_flowguides.programs.types import Model, Site, Values

__all__ = ["check_angles", "may_be_improper", "with_proper_masked_sites"]

#: Distributions of angles and directions whose support, as the guides see it, is not that of the circle or sphere.
CIRCULAR = (dist.VonMises, dist.VonMises3D, dist.SineBivariateVonMises, dist.SineSkewed, dist.ProjectedNormal)
#: Supports without end, on which a constant density has no integral.
UNBOUNDED = tuple(
    type(support)
    for support in (constraints.real, constraints.positive, constraints.nonnegative, constraints.less_than(0.0))
)
#: Draws of the guide at which the model must have no slope along a direction that it does not constrain.
NUM_DRAWS = 3


def check_angles(owner: str, latents: Iterator[tuple[str, Site]]) -> None:
    """Refuse angles: a density that repeats itself on the line has no integral there.

    Raises:
        ValueError: naming the site and the remedy.
    """
    for name, site in latents:
        fn = innermost(site["fn"])
        if isinstance(fn, CIRCULAR):
            raise ValueError(
                f"{owner}: site {name!r} is an angle or a direction ({type(fn).__name__}), and this guide would draw "
                "it from the whole line, where its density has no end. Draw it from Uniform(-pi, pi) and add the log "
                "density by pyro.factor; or use ProjectedNormal with pyro.infer.reparam.ProjectedNormalReparam; or "
                "write a guide that draws it from a VonMises."
            )


def with_proper_masked_sites(model: Model, run: Callable[[], tuple[Trace, Trace]]) -> Model:
    """Return a model in which every latent direction has a density, if that leaves the posterior of all others as is.

    A mask removes the density of a site. Where nothing else in the model depends on the masked values, as on those of
    ``obs_mask`` at observed data, their posterior would be constant on the whole space. They then keep the density of
    their prior, whose integral is one.

    Args:
        model: a model.
        run: returns traces of the guide and of the model at its draws, with gradients of the latent values.

    Raises:
        ValueError: if only part of the masked values of a site has no effect, or nothing depends on a site with an
            improper prior.
    """
    runs = []
    for _ in range(NUM_DRAWS):
        with contextlib.suppress(Exception):  # a model may fail in any way at some draws
            guide_trace, trace = run()
            runs.append(_slopes(trace))
    free = []
    for name in runs[0] if runs else ():
        site: Site = dict(latent_sites(trace))[name]
        is_flat = torch.stack([slopes[name] == 0 for slopes in runs]).all(0)
        masked = _fitted(_masked_elements(site), is_flat)
        if isinstance(innermost(site["fn"]), dist.ImproperUniform) and _is_unbounded(site["fn"].support):
            _check_improper(name, is_flat)
        elif bool((is_flat & masked).any()):
            if not bool(is_flat[masked].all()):
                raise ValueError(
                    f"site {name!r} is masked, and the rest of the model depends on some of its masked values but not "
                    f"on {int((is_flat & masked).sum())} others, which have no density at all. Mask fewer of them, or "
                    "draw the others at a site of their own."
                )
            if guide_trace.nodes[name]["mask"] is None:  # else the guide leaves the density out as well
                free.append(name)
    return _WithoutMask(free)(model) if free else model


def _check_improper(name: str, is_flat: Tensor) -> None:
    if bool(is_flat.any()):
        raise ValueError(
            f"nothing in the model depends on {int(is_flat.sum())} of {is_flat.numel()} values of site {name!r}, whose "
            "prior is improper: the posterior has no integral. Give the site a proper prior, or data that depend on it."
        )


def may_be_improper(site: Site) -> bool:
    """Tell whether a site of a trace has values without a density: masked ones, or an improper prior."""
    is_improper = isinstance(innermost(site["fn"]), dist.ImproperUniform)
    return is_improper or bool(_masked_elements(site).any())


def _masked_elements(site: Site) -> Tensor:
    """Return which values of a site are masked, in the shape of its batch followed by one for each event dimension."""
    fn, masked = site["fn"], torch.zeros((), dtype=torch.bool)
    if site["mask"] is not None:
        masked = ~torch.as_tensor(site["mask"]).bool()
        masked = masked.reshape(masked.shape + (1,) * fn.event_dim)
    while isinstance(fn, (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)):
        if isinstance(fn, dist.MaskedDistribution):
            own = ~torch.as_tensor(fn._mask).bool()
            masked = masked | own.reshape(own.shape + (1,) * fn.event_dim)
        fn = fn.base_dist
    return masked


def _fitted(masked: Tensor, like: Tensor) -> Tensor:
    """Bring a mask to the shape of a value; an element of a value is masked where the mask hides all its uses."""
    while masked.dim() > like.dim():
        masked = masked.all(0)
    for dim in range(-masked.dim(), 0):
        if like.shape[dim] == 1:
            masked = masked.all(dim, keepdim=True)
    return masked.to(like.device).expand_as(like)


def _slopes(trace: Trace) -> Values:
    """Return the derivatives of the model's log density with respect to sites that may have no density."""
    sites = {name: site for name, site in latent_sites(trace) if may_be_improper(site)}
    values: list[Tensor] = [site["value"] for site in sites.values()]
    total = torch.zeros((), device=values[0].device)
    with torch.enable_grad():
        for name, site in sample_sites(trace):
            if not is_deterministic(site):
                with unvalidated(site["fn"]):
                    score_site(trace, name)
                total = total + torch.as_tensor(site["log_prob_sum"]).to(total)
        unused = [torch.zeros_like(value) for value in values]
        slopes = torch.autograd.grad(total, values, allow_unused=True) if total.requires_grad else unused
    return {name: zero if slope is None else slope for name, zero, slope in zip(sites, unused, slopes, strict=True)}


def _is_unbounded(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return isinstance(support, UNBOUNDED)


class _WithoutMask(Messenger):
    """Score some latent sites by their prior, whatever masks them."""

    def __init__(self, sites: Collection[str]) -> None:
        super().__init__()
        self.sites = frozenset(sites)

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self.sites and not msg["is_observed"]:
            msg["mask"], msg["fn"] = None, _unmasked(msg["fn"])


def _unmasked(fn: Any) -> Any:
    if isinstance(fn, dist.MaskedDistribution):
        return _unmasked(fn.base_dist).expand(fn.batch_shape)
    if isinstance(fn, dist.Independent):
        return _unmasked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.ExpandedDistribution):
        return _unmasked(fn.base_dist).expand(fn.batch_shape)
    return fn
