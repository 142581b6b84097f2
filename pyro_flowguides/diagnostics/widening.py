"""Widen the distributions of a guide, and compare the density with that of the guide itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeVar

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

from pyro_flowguides.programs.batched_run import Layout
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.running import evaluation, trace_guide
from pyro_flowguides.programs.trace_density import double_total
from pyro_flowguides.programs.types import Site, Values

__all__ = ["LOG_RATIO", "Widen", "Widening", "widening_factor"]

_TARGET_ESS_FRACTION = 0.1
_MAX_FACTOR = 4.0
#: Name under which the log density of the widened guide minus that of the guide itself is collected.
LOG_RATIO = " log ratio"  # no site has this name

WidenT = TypeVar("WidenT", bound="Widen")

_LOC_SCALE = (dist.Normal, dist.LogNormal, dist.Laplace, dist.Cauchy, dist.StudentT, dist.Logistic)


def widening_factor(dim: int) -> float:
    r"""Return the factor c by which to widen a guide in D dimensions.

    If a Gaussian guide equals the posterior, the effective sample size of draws from the guide widened by c is the
    fraction

    .. math:: \big(\sqrt{2c^2 - 1} \,/\, c^2\big)^D

    of their number. c makes this fraction 0.1, and is at most 4.
    """
    ratio = _TARGET_ESS_FRACTION ** (2 / dim)
    return min(math.sqrt((1 + math.sqrt(1 - ratio)) / ratio), _MAX_FACTOR)


@dataclass(frozen=True)
class Widening:
    """Sites of a guide whose distributions can be widened, and the factor.

    Attributes:
        sites: sites whose distributions have a scale; empty if the guide cannot be widened.
        factor: factor that multiplies the scales.
    """

    sites: tuple[str, ...]
    factor: float

    @classmethod
    def of(cls, program: Program) -> Widening:
        """Find the sites in one run of the guide, which uses up no random numbers."""
        widen = Widen(2.0, active=True)
        try:
            with evaluation(), torch.random.fork_rng(devices=[]):
                trace_guide(program.guide, program.args, program.kwargs, Layout(None, 0), handlers=[widen])
        except Exception:  # a guide may fail in any way at unusual values, and its flows may have no inverse
            return cls((), 1.0)
        sites = tuple(widen.log_ratios)
        dim = sum(program.guide_sites[name].value.numel() for name in sites)
        return cls(sites, widening_factor(dim) if dim else 1.0)

    def handler(self, *, active: bool) -> Widen:
        """Return a handler that compares with the widened distributions and, if active, draws from them."""
        return Widen(self.factor, active=active, only=self.sites)


class Widen(Messenger):
    """Handler that compares the distributions of a guide's sites with widened ones and, if active, draws from those.

    Attributes:
        factor: factor that multiplies the scales.
        active: whether to draw from the widened distributions.
        only: sites to widen; all by default.
        log_ratios: log q_c − log q of each site in the last run, in its batch shape.
    """

    def __init__(self, factor: float, *, active: bool, only: Collection[str] | None = None) -> None:
        super().__init__()
        self.factor, self.active, self.only = factor, active, only
        self.log_ratios: dict[str, Tensor] = {}
        self._pairs: dict[str, tuple[Distribution, Distribution]] = {}

    def __enter__(self: WidenT) -> WidenT:
        self.log_ratios, self._pairs = {}, {}
        return super().__enter__()

    def collect(self, layout: Layout) -> Values:
        """Return the log ratio of the last run, summed over all sites, under the name :data:`LOG_RATIO`, (S,)."""
        total = torch.zeros(layout.num_samples, dtype=torch.float64)
        for log_ratio in self.log_ratios.values():
            total = total + double_total(log_ratio, layout)
        return {LOG_RATIO: total}

    def _pyro_sample(self, msg: Site) -> None:
        name = msg["name"]
        if msg["is_observed"] or (self.only is not None and name not in self.only):
            return
        if site_is_subsample(msg):  # type: ignore[arg-type]
            return
        wide = _widened(msg["fn"], self.factor)
        if wide is not None:
            self._pairs[name] = (msg["fn"], wide)
            msg["fn"] = wide if self.active else msg["fn"]

    def _pyro_post_sample(self, msg: Site) -> None:
        if msg["name"] in self._pairs:
            ratio = _log_ratio(*self._pairs[msg["name"]], msg["value"])
            self.log_ratios[msg["name"]] = scale_and_mask(ratio, msg["scale"], msg["mask"])


def _widened(fn: Distribution, factor: float) -> Distribution | None:
    """Return a distribution with its scale multiplied, or ``None`` if it has no scale."""
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


def _rewrapped(base: Distribution, factor: float, wrap: Callable[..., Distribution]) -> Distribution | None:
    """Widen the distribution within another, and wrap it again."""
    wide = _widened(base, factor)
    return None if wide is None else wrap(wide)


def _log_ratio(fn: Distribution, wide: Distribution, value: Tensor) -> Tensor:
    """Return log q_c − log q. Both have the same transforms, so that their Jacobians cancel."""
    if isinstance(fn, dist.Independent) and isinstance(wide, dist.Independent):
        return sum_rightmost(_log_ratio(fn.base_dist, wide.base_dist, value), fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.TransformedDistribution) and isinstance(wide, dist.TransformedDistribution):
        base_value = value
        for transform in reversed(fn.transforms):
            base_value = transform.inv(base_value)
        base_ratio = _log_ratio(fn.base_dist, wide.base_dist, base_value)
        return sum_rightmost(base_ratio, base_ratio.dim() - len(fn.batch_shape))
    ratio: Tensor = wide.log_prob(value) - fn.log_prob(value)
    return ratio
