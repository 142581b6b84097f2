"""Draws of a guide, or of a widened copy of it, with their importance weights: all other diagnostics build on them."""

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

from pyro_flowguides.nn.arguments import check_count
from pyro_flowguides.programs.batched_run import Layout, RunMode
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.program_runs import sample_guide, score_model
from pyro_flowguides.programs.running import evaluation, exclusive, trace_guide
from pyro_flowguides.programs.trace_density import double_total
from pyro_flowguides.programs.types import Guide, Model, Site, Values

__all__ = [
    "WeightedDraws",
    "Widening",
    "log_weight",
    "log_weights",
    "point_sites",
    "valid_chunk_size",
    "weigh",
    "weigh_widened",
]

_TARGET_ESS_FRACTION = 0.1
_MAX_FACTOR = 4.0
#: Name under which the log density of the widened guide minus that of the guide itself is collected.
_LOG_RATIO = " log ratio"  # no site has this name
_LOC_SCALE = (dist.Normal, dist.LogNormal, dist.Laplace, dist.Cauchy, dist.StudentT, dist.Logistic)

WidenT = TypeVar("WidenT", bound="_Widen")


@dataclass(frozen=True, eq=False)
class WeightedDraws:
    """Draws z of a guide q, with importance weights for the posterior p(z | x) ∝ p(x, z).

    The densities are in double precision on the CPU; the draws keep their device and type.

    Attributes:
        draws: constrained value of each latent site, without auxiliary sites: ``(S, *batch, *event)``.
        log_p: log p(x, z), shape (S,); −inf where the density is zero.
        log_q: log q(z), shape (S,).
        log_w: log p(x, z) − log q(z), shape (S,); −inf where p is zero, NaN where either density is undefined.
        point_sites: continuous sites where all draws are equal, so that the guide has no density.
        guide_note: the reason why the guide ran draw by draw; empty if it ran on many draws at once.
        model_mode: how the model ran.
        model_note: the reason why the model did not run under a plate of draws; empty if it did.
    """

    draws: Values
    log_p: Tensor
    log_q: Tensor
    log_w: Tensor
    point_sites: tuple[str, ...] = ()
    guide_note: str = ""
    model_mode: RunMode = RunMode.PLATE
    model_note: str = ""

    @property
    def num_samples(self) -> int:
        """Number of draws S."""
        return self.log_w.shape[0]

    @property
    def num_zero(self) -> int:
        """Number of draws with zero density under the model."""
        return int(self.log_w.isneginf().sum())

    @property
    def num_invalid(self) -> int:
        """Number of draws at which a density is NaN or infinite."""
        return int(self.log_w.isnan().sum())

    @property
    def vectorized(self) -> bool:
        """Whether both model and guide ran on many draws at once."""
        return not self.guide_note and self.model_mode is not RunMode.SINGLE


def log_weights(
    model: Model, guide: Guide, *args: object, num_samples: int = 1000, chunk_size: int | None = None, **kwargs: object
) -> WeightedDraws:
    r"""Draw from a guide and weigh the draws.

    .. math:: \log w_s = \log p(x, z_s) - \log q(z_s), \qquad z_s \sim q

    Model and guide run on many draws at once, under an outermost plate of draws. A few draws of each chunk, including
    the extreme ones, also run one by one. If the results differ (due to a sum over all dimensions or an index from the
    left), the model is mapped over the draws by ``torch.func.vmap``. If that fails (due to a branch on a value), or if
    the guide's results differ, runs are draw by draw, which is slow but correct.

    Discrete sites of the model that are marked for parallel enumeration and missing in the guide are summed out.
    Auxiliary sites of the guide enter log q with their density. That is correct if the other sites are a one-to-one
    function of them, as in Pyro's autoguides.

    Args:
        model, guide: a Pyro model and any Pyro guide for it.
        *args, **kwargs: arguments of both.
        num_samples: number of draws S.
        chunk_size: number of draws that run together; chosen by the size of the sites by default.

    Raises:
        ValueError: if S or the chunk size is not positive; if Pyro's validation refuses model or guide at every draw;
            if a plate is subsampled, since a weight needs the density of all the data; if model and guide differ in
            their latent sites.

    Cost: S runs of guide and model, in chunks of some tens of MB.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> _ = pyro.set_rng_seed(0)
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))
        >>> def guide():  # the exact posterior
        ...     pyro.sample("z", dist.Normal(1.0, 0.5**0.5))
        >>> weighted = log_weights(model, guide, num_samples=100)
        >>> evidence = dist.Normal(0.0, 2.0**0.5).log_prob(torch.tensor(2.0))
        >>> weighted.draws["z"].shape, torch.allclose(weighted.log_w.float(), evidence)
        (torch.Size([100]), True)
    """
    return weigh(Program.inspect(model, guide, args, kwargs), num_samples, chunk_size)


def weigh(program: Program, num_samples: int, chunk_size: int | None = None) -> WeightedDraws:
    """Draw from the guide of an inspected program and weigh the draws; see :func:`log_weights`."""
    return weigh_widened(program, Widening((), 1.0), num_samples, chunk_size)[0]


@exclusive
def weigh_widened(
    program: Program, widening: Widening, num_samples: int, chunk_size: int | None = None, *, from_widened: bool = False
) -> tuple[WeightedDraws, Tensor]:
    """Draw from a guide or, if ``from_widened``, from the widened guide, and weigh the draws.

    Returns:
        The weighted draws, whose ``log_q`` is the density of the guide itself in both cases; and the log density of the
        widened guide minus that of the guide itself, (S,).
    """
    size = valid_chunk_size(program, num_samples, chunk_size)
    with evaluation():
        widen = _Widen(widening.factor, active=from_widened, only=widening.sites)
        drawn = sample_guide(program, num_samples, size, handlers=[widen], collect=widen.collect)
        log_p = score_model(program, drawn.values, size)
    log_ratio = drawn.extras[_LOG_RATIO]
    log_q = drawn.log_density - log_ratio if from_widened else drawn.log_density
    constant = {name for name, value in drawn.values.items() if num_samples > 1 and bool((value == value[:1]).all())}
    weighted = WeightedDraws(
        draws=drawn.values,
        log_p=log_p,
        log_q=log_q,
        log_w=log_weight(log_p, log_q),
        point_sites=point_sites(program, constant),
        guide_note=drawn.note,
        model_note=program.mode_note,
        model_mode=program.mode,
    )
    return weighted, log_ratio


def valid_chunk_size(program: Program, num_samples: int, chunk_size: int | None) -> int:
    """Return the number of draws that run together; refuse a program or numbers of draws without weights."""
    program.check_full_density()
    size = program.default_chunk_size if chunk_size is None else chunk_size
    check_count("log_weights", "num_samples", num_samples)
    size = check_count("log_weights", "chunk_size", size)
    if not program.latents:
        raise ValueError("model and guide have no latent site in common: there is nothing to weigh")
    return size


def log_weight(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return log p − log q: −inf where p is zero, NaN where either density is undefined."""
    is_valid = log_q.isfinite() & ~log_p.isnan() & ~log_p.isposinf()
    return torch.where(is_valid, log_p - log_q, torch.nan)


def point_sites(program: Program, constant: Collection[str]) -> tuple[str, ...]:
    """Return the continuous sites among those with constant draws, unless the model itself fixes them to a point."""
    return tuple(
        name
        for name, site in program.latents.items()
        if name in constant and not site.is_discrete and not site.is_point_mass
    )


def _widening_factor(dim: int) -> float:
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
        widen = _Widen(2.0, active=True)
        try:
            with evaluation(), torch.random.fork_rng(devices=[]):
                trace_guide(program.guide, program.args, program.kwargs, Layout(None, 0), handlers=[widen])
        except Exception:  # a guide may fail in any way at unusual values, and its flows may have no inverse
            return cls((), 1.0)
        sites = tuple(widen.log_ratios)
        dim = sum(program.guide_sites[name].value.numel() for name in sites)
        return cls(sites, _widening_factor(dim) if dim else 1.0)


class _Widen(Messenger):
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
        """Return the log ratio of the last run, summed over all sites, under the name ``_LOG_RATIO``, (S,)."""
        total = torch.zeros(layout.num_samples, dtype=torch.float64)
        for log_ratio in self.log_ratios.values():
            total = total + double_total(log_ratio, layout)
        return {_LOG_RATIO: total}

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
    """_Widen the distribution within another, and wrap it again."""
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
