"""Defensive check of a guide: draws from a mixture of the guide and a widened copy of it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_flowguides.diagnostics.moments import GuideSummary, Moments, SmoothedMoments, moment_shift
from pyro_flowguides.diagnostics.psis import effective_sample_size, log_mean_weight
from pyro_flowguides.diagnostics.weights import WeightedDraws, Widening, log_weight, valid_chunk_size, weigh_widened
from pyro_flowguides.programs.batched_run import chunks
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.types import Guide, Model

__all__ = ["DefensiveCheck", "defensive_check", "defensive_log_weights", "summarize_own_and_widened"]

#: If runs are draw by draw, the widened guide gets 1 / this many of the draws.
_SLOW_REDUCTION = 4
# A check is reliable up to this k-hat, or up to the larger one if the ESS is at least this fraction of the draws.
_RELIABLE_KHAT = 0.7
_RELIABLE_ESS = 200.0
_FLAT_KHAT = 1.0
_FLAT_ESS_FRACTION = 0.4
#: A draw is dominant only if it carries more than this share of the total weight.
_DOMINANT_SHARE = 0.01


def defensive_log_weights(
    model: Model, guide: Guide, *args: object, num_samples: int = 1000, chunk_size: int | None = None, **kwargs: object
) -> WeightedDraws | None:
    r"""Draw from a mixture of a guide and a widened copy of it, and weigh the draws.

    The widened guide :math:`q_c` multiplies the scale of every Gaussian (or other location-scale) distribution in the
    guide, including the base of its flows, by a factor c > 1. S draws of each are weighted by

    .. math:: \log w_s = \log p(x, z_s) - \log \tfrac12 \big(q(z_s) + q_c(z_s)\big).

    These weights are at most twice the weight :math:`p / q` of the same draw, vary less where the guide's tails are too
    light, and reveal posterior mass next to the guide. c decreases with the number of dimensions, so that a fraction
    of the widened draws stays within the posterior.

    Args:
        model, guide: a Pyro model and any Pyro guide for it.
        *args, **kwargs: arguments of both.
        num_samples: number of draws S from each.
        chunk_size: number of draws that run together; chosen by the size of the sites by default.

    Returns:
        2S weighted draws, or fewer if runs are draw by draw; their ``log_q`` is the density of the mixture. ``None`` if
        no distribution in the guide can be widened.

    Raises:
        ValueError: for the reasons that :func:`log_weights` gives.

    Cost: 2 S runs of guide and model.

    References:
        T. Hesterberg (1995). Weighted average importance sampling and defensive mixture distributions. Technometrics
        37(2). A. Owen, Y. Zhou (2000). Safe and effective importance sampling. JASA 95(449).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_flowguides.diagnostics import log_weights
        >>> _ = pyro.set_rng_seed(0)
        >>> def model():
        ...     modes = dist.Normal(torch.tensor([-4.0, 4.0]), 1.0)
        ...     pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), modes))
        >>> def guide():  # misses the mode at -4
        ...     pyro.sample("z", dist.Normal(4.0, 1.0))
        >>> [round(weigh(model, guide, num_samples=20_000).log_w.exp().mean().item(), 1)
        ...  for weigh in (log_weights, defensive_log_weights)]
        [0.5, 1.0]
    """
    program = Program.inspect(model, guide, args, kwargs)
    size = valid_chunk_size(program, num_samples, chunk_size)
    weighing = _weigh_in_parts(program, Widening.of(program), num_samples, num_samples, size)
    parts = [mixed for _, mixed, _ in weighing if mixed is not None]
    if not parts:
        return None
    return replace(
        parts[0],
        draws={name: torch.cat([part.draws[name] for part in parts]) for name in parts[0].draws},
        log_p=torch.cat([part.log_p for part in parts]),
        log_q=torch.cat([part.log_q for part in parts]),
        log_w=torch.cat([part.log_w for part in parts]),
    )


def summarize_own_and_widened(
    program: Program, widening: Widening, num_samples: int, chunk_size: int | None
) -> tuple[GuideSummary, SmoothedMoments | None]:
    """Summarize the draws of :func:`log_weights` and :func:`defensive_log_weights` without keeping them.

    Returns:
        A summary of the guide's draws, and the moments of the mixture; ``None`` if no distribution can be widened.
    """
    own, mixture = GuideSummary(num_samples), None
    part_size = valid_chunk_size(program, num_samples, chunk_size)
    for part, mixed, num_mixed in _weigh_in_parts(program, widening, num_samples, part_size, None):
        if part is not None:
            own.add(part.draws, part.log_w)
        if mixed is not None:
            mixture = mixture or SmoothedMoments(num_mixed)
            mixture.add(mixed.draws, mixed.log_w)
    return own, mixture


def _weigh_in_parts(
    program: Program, widening: Widening, num_samples: int, part_size: int, chunk_size: int | None
) -> Iterator[tuple[WeightedDraws | None, WeightedDraws | None, int]]:
    """Draw from a guide, then from the widened guide, and weigh the draws of each part.

    Yields:
        The draws weighted for the guide, ``None`` if they come from the widened guide; the draws weighted for the
        mixture, ``None`` if no distribution can be widened; and the number of all draws of the mixture.
    """
    num_wide = 0
    for part in chunks(num_samples, part_size):
        own, log_ratio = weigh_widened(program, widening, part.stop - part.start, chunk_size)
        if widening.sites and num_wide == 0:
            num_wide = num_samples if own.vectorized else -(-num_samples // _SLOW_REDUCTION)
        share = num_samples / (num_samples + num_wide)
        yield own, _weigh_for_mixture(own, log_ratio, share) if widening.sites else None, num_samples + num_wide
    for part in chunks(num_wide, part_size):
        wide, log_ratio = weigh_widened(program, widening, part.stop - part.start, chunk_size, from_widened=True)
        yield None, _weigh_for_mixture(wide, log_ratio, share), num_samples + num_wide


def _weigh_for_mixture(part: WeightedDraws, log_ratio: Tensor, share: float) -> WeightedDraws:
    """Weigh draws by the density of the mixture, given its share from the guide and the widened guide's log ratio."""
    own, wide = torch.full_like(part.log_q, math.log(share)), log_ratio + math.log1p(-share)
    log_mix = part.log_q + torch.logaddexp(own, wide)
    return replace(part, log_q=log_mix, log_w=log_weight(part.log_p, log_mix))


@dataclass(frozen=True)
class DefensiveCheck:
    """Comparison of the draws of :func:`defensive_log_weights` with the guide's own draws.

    Attributes:
        widening_factor: factor by which the scales of the guide were multiplied.
        khat: tail index of the mixture's weights.
        ess: their effective sample size.
        num_samples: number of draws from the mixture.
        largest_share: the largest weight, as a fraction of their sum.
        log_evidence: estimate of log p(x).
        log_evidence_se: its standard error.
        missed_mass: fraction of the posterior mass that the guide's own draws miss: 1 − p_own / p_mixture for the two
            estimates of p(x); 0 unless their logarithms differ by more than three standard errors.
        shift: largest difference from the means of the guide's draws, in standard deviations, or from the logarithms
            of their standard deviations.
        weighted_shift: the same after weighting the guide's draws.
        has_dominant_draw: whether a single draw weighs far more than any of the guide's own: a sign of a missed mode.
    """

    widening_factor: float
    khat: float
    ess: float
    num_samples: int
    largest_share: float
    log_evidence: float
    log_evidence_se: float
    missed_mass: float
    shift: float
    weighted_shift: float
    has_dominant_draw: bool

    @property
    def is_reliable(self) -> bool:
        """Whether these draws estimate moments reliably."""
        limit = _RELIABLE_KHAT if self.ess < _FLAT_ESS_FRACTION * self.num_samples else _FLAT_KHAT
        return self.khat <= limit and self.ess >= _RELIABLE_ESS and not self.has_dominant_draw

    @property
    def monte_carlo_error(self) -> float:
        """Two standard errors of the shifts."""
        return 2.0 / math.sqrt(self.ess)

    def __str__(self) -> str:
        return (
            f"guide widened {self.widening_factor:.1f} times: k-hat {self.khat:.2f}, ESS {self.ess:.0f}, missed mass "
            f"{100 * self.missed_mass:.0f} %, moments differ by {self.shift:.2f} sd"
        )


def defensive_check(
    own: GuideSummary, corrected: Moments, mixture: SmoothedMoments, widening_factor: float
) -> DefensiveCheck | None:
    """Compare the guide's own draws with those of the mixture.

    Args:
        own: summary of the guide's draws, some of whose weights are positive.
        corrected: moments of these draws after weighting.
        mixture: moments of the mixture's draws.
        widening_factor: factor by which the guide was widened.

    Returns:
        The comparison; ``None`` if no weight of the mixture is positive.
    """
    log_w, own_log_w = mixture.log_w, own.weighted.log_w
    ess = effective_sample_size(log_w)
    if ess == 0:
        return None
    smoothed, reference = mixture.smooth()
    log_evidence, standard_error = log_mean_weight(log_w)
    own_log_evidence, own_standard_error = log_mean_weight(own_log_w)
    excess = log_evidence - own_log_evidence
    is_excess_clear = excess > 3 * math.hypot(standard_error, own_standard_error)
    share, own_share = _largest_share(log_w), _largest_share(own_log_w)
    return DefensiveCheck(
        widening_factor=widening_factor,
        khat=smoothed.khat,
        ess=ess,
        num_samples=len(log_w),
        largest_share=share,
        log_evidence=log_evidence,
        log_evidence_se=standard_error,
        missed_mass=1 - math.exp(-excess) if is_excess_clear else 0.0,
        shift=max(moment_shift(own.unweighted.moments, reference)[:2]),
        weighted_shift=max(moment_shift(corrected, reference)[:2]),
        has_dominant_draw=share > max(_DOMINANT_SHARE, 3 * own_share, 20 / len(log_w)),
    )


def _largest_share(log_w: Tensor) -> float:
    """Return the largest weight as a fraction of the sum of all weights."""
    valid = log_w[~log_w.isnan()]
    return float((valid.max() - valid.logsumexp(0)).exp())
