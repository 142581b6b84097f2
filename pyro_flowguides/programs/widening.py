"""Guides with wider noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import pyro.distributions as dist
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

_TARGET_ESS_FRACTION = 0.1
_MAX_FACTOR = 4.0
_LOC_SCALE = (dist.Normal, dist.LogNormal, dist.Laplace, dist.Cauchy, dist.StudentT, dist.Logistic)


def widening_factor(dim: int) -> float:
    r"""The factor c by which to widen a guide over D dimensions.

    For a posterior that the guide fits exactly, draws from a Gaussian widened by c keep an effective sample size of

    .. math:: \big(\sqrt{2c^2 - 1} \,/\, c^2\big)^D

    as a fraction of their number. c makes this 0.1, and is at most 4.
    """
    ratio = _TARGET_ESS_FRACTION ** (2 / dim)
    return min(math.sqrt((1 + math.sqrt(1 - ratio)) / ratio), _MAX_FACTOR)


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
