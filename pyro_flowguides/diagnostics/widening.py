"""Widen the noise of a guide, and compare its density with that of the guide itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_flowguides.programs.layout import Layout
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.running import evaluation, trace_guide
from pyro_flowguides.programs.trace_density import double_total
from pyro_flowguides.programs.types import Values

__all__ = ["LOG_RATIO", "Widen", "Widening", "widening_factor"]

_TARGET_ESS_FRACTION = 0.1
_MAX_FACTOR = 4.0
#: Name under which the log density of the widened guide, less that of the guide itself, is collected.
LOG_RATIO = " log ratio"  # a name that no site has

_LOC_SCALE = (dist.Normal, dist.LogNormal, dist.Laplace, dist.Cauchy, dist.StudentT, dist.Logistic)


def widening_factor(dim: int) -> float:
    r"""The factor c by which to widen a guide over D dimensions.

    For a posterior that the guide fits exactly, draws from a Gaussian widened by c keep an effective sample size of

    .. math:: \big(\sqrt{2c^2 - 1} \,/\, c^2\big)^D

    as a fraction of their number. c makes this 0.1, and is at most 4.
    """
    ratio = _TARGET_ESS_FRACTION ** (2 / dim)
    return min(math.sqrt((1 + math.sqrt(1 - ratio)) / ratio), _MAX_FACTOR)


@dataclass(frozen=True)
class Widening:
    """How a guide can be widened.

    Attributes:
        sites: the sites whose distribution has a scale that can be multiplied; empty if there is none.
        factor: the factor that multiplies the scales.
    """

    sites: tuple[str, ...]
    factor: float

    @classmethod
    def of(cls, program: Program) -> Widening:
        """Run the guide once and find out."""
        widen = Widen(2.0, active=True)
        try:
            with evaluation(), torch.random.fork_rng(devices=[]):
                trace_guide(program.guide, program.args, program.kwargs, Layout(None, 0), handlers=[widen])
        except Exception:  # a guide may do anything with a value it did not expect, and flows need not have an inverse
            return cls((), 1.0)
        sites = tuple(widen.log_ratios)
        dim = sum(program.guide_sites[name].value.numel() for name in sites)
        return cls(sites, widening_factor(dim) if dim else 1.0)

    def handler(self, *, active: bool) -> Widen:
        """Return the handler that compares with the widened distributions, or draws from them if it is active."""
        return Widen(self.factor, active=active, only=self.sites)


class Widen(Messenger):
    """Compares the distributions of a guide's sites with wider ones, and draws from the wider ones if told to.

    Attributes:
        factor: the factor that multiplies scales.
        active: whether to draw from the wider distributions.
        only: the sites to touch; all if not given.
        log_ratios: log q_c − log q of each site in the last run, in the shape of its batch.
    """

    def __init__(self, factor: float, *, active: bool, only: Collection[str] | None = None) -> None:
        super().__init__()
        self.factor, self.active, self.only = factor, active, only
        self.log_ratios: dict[str, Tensor] = {}
        self._pairs: dict[str, tuple[Any, Any]] = {}

    def __enter__(self) -> Any:
        self.log_ratios, self._pairs = {}, {}
        return super().__enter__()

    def collect(self, layout: Layout) -> Values:
        """Return the log ratio of the last run, summed over all sites, under the name :data:`LOG_RATIO`, (S,)."""
        total = torch.zeros(layout.num_samples, dtype=torch.float64)
        for log_ratio in self.log_ratios.values():
            total = total + double_total(log_ratio, layout)
        return {LOG_RATIO: total}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["is_observed"] or site_is_subsample(msg) or (self.only is not None and name not in self.only):
            return
        wide = _widened(msg["fn"], self.factor)
        if wide is not None:
            self._pairs[name] = (msg["fn"], wide)
            msg["fn"] = wide if self.active else msg["fn"]

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self._pairs:
            ratio = _log_ratio(*self._pairs[msg["name"]], msg["value"])
            self.log_ratios[msg["name"]] = scale_and_mask(ratio, msg["scale"], msg["mask"])


def _widened(fn: Any, factor: float) -> Any:
    """A distribution with its scale multiplied, or ``None`` if that is not defined."""
    if isinstance(fn, dist.Independent):
        return _rewrapped(fn.base_dist, factor, lambda base: base.to_event(fn.reinterpreted_batch_ndims))
    if isinstance(fn, dist.MaskedDistribution):
        return _rewrapped(fn.base_dist, factor, lambda base: base.mask(fn._mask))
    if isinstance(fn, dist.MixtureSameFamily):
        mixing = fn.mixture_distribution
        return _rewrapped(fn.component_distribution, factor, lambda base: dist.MixtureSameFamily(mixing, base))
    if isinstance(fn, dist.MultivariateNormal):
        return dist.MultivariateNormal(fn.loc, scale_tril=factor * fn.scale_tril)
    if isinstance(fn, dist.LowRankMultivariateNormal):
        return dist.LowRankMultivariateNormal(fn.loc, factor * fn.cov_factor, factor**2 * fn.cov_diag)
    if isinstance(fn, _LOC_SCALE):
        others = {"df": fn.df} if isinstance(fn, dist.StudentT) else {}
        return type(fn)(loc=fn.loc, scale=factor * fn.scale, **others)
    if isinstance(fn, dist.TransformedDistribution):
        return _rewrapped(fn.base_dist, factor, lambda base: dist.TransformedDistribution(base, fn.transforms))
    return None


def _rewrapped(base: Any, factor: float, wrap: Callable[[Any], Any]) -> Any:
    wide = _widened(base, factor)
    return None if wide is None else wrap(wide)


def _log_ratio(fn: Any, wide: Any, value: Tensor) -> Tensor:
    """log q_c − log q. Transforms are common to both, so that no Jacobian is needed, only the base value."""
    if isinstance(fn, dist.Independent):
        return sum_rightmost(_log_ratio(fn.base_dist, wide.base_dist, value), fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.TransformedDistribution):
        base_value = value
        for transform in reversed(fn.transforms):
            base_value = transform.inv(base_value)
        base_ratio = _log_ratio(fn.base_dist, wide.base_dist, base_value)
        return sum_rightmost(base_ratio, base_ratio.dim() - len(fn.batch_shape))
    ratio: Tensor = wide.log_prob(value) - fn.log_prob(value)
    return ratio
