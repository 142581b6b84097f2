"""Log densities of traces, one number for each draw, in double precision on the CPU."""

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from pyro.infer.traceenum_elbo import _compute_model_factors
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_factor
from torch import Tensor

from pyro_flowguides.programs.batched_run import Layout, NotVectorizedError
from pyro_flowguides.programs.running import DRAWS_PLATE, unvalidated
from pyro_flowguides.programs.sites import is_deterministic, sample_sites
from pyro_flowguides.programs.types import Site

__all__ = ["double_total", "joint_log_prob", "marginal_log_prob", "score_site", "scored_sites"]


def joint_log_prob(trace: Trace, layout: Layout) -> Tensor:
    """Return the log density of all sites of a trace for each draw, shape (S,).

    A value outside the support of its site has log density minus infinity, whatever formula its distribution uses.
    """
    total = torch.zeros(layout.num_samples, dtype=torch.float64)
    for _, site in scored_sites(trace):
        total = total + double_total(site["log_prob"], layout)
    return total


def double_total(log_prob: Tensor, layout: Layout) -> Tensor:
    """Sum a log density over everything but the draws, in double precision on the CPU, shape (S,)."""
    log_prob = log_prob.cpu().double() if log_prob.device.type == "mps" else log_prob.double()
    return layout.total(log_prob).cpu()


def marginal_log_prob(trace: Trace, layout: Layout) -> Tensor:
    """Sum the enumerated sites out of the joint density by tensor variable elimination, shape (S,).

    Raises:
        NotVectorizedError: if a factor of the marginal density does not depend on the draw.
    """
    trace = prune_subsample_sites(trace)
    for _ in scored_sites(trace):
        pass
    trace.pack_tensors()
    is_single = layout.num_samples == 1  # packing drops a plate of size one
    symbol = "" if is_single else trace.plate_to_symbol[DRAWS_PLATE]
    total = torch.zeros(layout.num_samples, dtype=torch.float64)
    for term in _marginal_terms(trace):
        if symbol not in term._pyro_dims:  # type: ignore[attr-defined]
            raise NotVectorizedError("a factor of the marginal density does not depend on the draw")
        total = total + torch.einsum(f"{term._pyro_dims}->{symbol}", [term.cpu().double()])  # type: ignore[attr-defined]
    return total


def _marginal_terms(trace: Trace) -> list[Tensor]:
    costs, factors, _, sum_dims, scale = _compute_model_factors(trace, Trace())
    terms = [term for group in costs.values() for term in group]
    for group in contract_tensor_tree(OrderedDict(factors), sum_dims).values():
        terms += [packed.scale_and_mask(term, scale=scale) for term in group]
    return terms


def score_site(trace: Trace, name: str) -> None:
    """Fill in the log density of one site of a trace, under the validation that is on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on values that are not finite
        trace.compute_log_prob(lambda other, _: other == name)


def scored_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """Yield the sites of a trace that carry density, with their log densities filled in."""
    with ExitStack() as stack:
        for _, site in sample_sites(trace):
            stack.enter_context(unvalidated(site["fn"]))
        trace.compute_log_prob()
    for name, site in sample_sites(trace):
        if is_deterministic(site):
            continue
        if not site_is_factor(site):  # type: ignore[arg-type]
            _respect_support(site)
        yield name, site


def _respect_support(site: Site) -> None:
    outside = _outside_support(site)
    if outside is None or site["mask"] is False:
        return
    if isinstance(site["mask"], Tensor):
        outside = outside & site["mask"]
    for key in ("log_prob", "unscaled_log_prob"):
        site[key] = site[key].masked_fill(outside, -torch.inf)


def _outside_support(site: Site) -> Tensor | None:
    """Return where a value lies outside its support, in the shape of its batch; ``None`` if the support is unknown."""
    fn, value = site["fn"], site["value"]
    try:
        outside: Tensor = ~fn.support.check(value)
    except (NotImplementedError, AttributeError, ValueError):
        return None
    if value.is_floating_point():  # NaN stays NaN
        undefined = value.isnan()
        outside = outside & ~(undefined.flatten(-fn.event_dim).any(-1) if fn.event_dim else undefined)
    return outside
