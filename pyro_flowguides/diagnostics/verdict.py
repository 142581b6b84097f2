"""The verdict on a fitted guide."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_flowguides.diagnostics.decision import Evidence, Verdict, decide
from pyro_flowguides.diagnostics.defensive import WiderLook, look_wider, survey
from pyro_flowguides.diagnostics.fit_agreement import Agreement
from pyro_flowguides.diagnostics.moments import shift
from pyro_flowguides.diagnostics.psis import MIN_DRAWS, effective_sample_size, khat_threshold, log_mean_weight
from pyro_flowguides.diagnostics.summary import SmoothedMoments, Summary
from pyro_flowguides.diagnostics.weights import WeightedDraws, point_sites
from pyro_flowguides.programs.program import inspect_program


@dataclass(frozen=True)
class Diagnosis:
    """What can be said of a fitted guide from S of its draws.

    Attributes:
        verdict: ``"good"``: the guide's draws can be used as they are; ``"usable with importance resampling"``: use
            :func:`importance_resample`; ``"do not trust"``: neither will do.
        reason: why, in a sentence.
        advice: what to try next.
        elbo: mean log weight, in nats; −inf if a draw has zero density under the model.
        elbo_se: its standard error.
        log_evidence: importance-sampling estimate of log p(x).
        log_evidence_se: its standard error.
        khat: tail index of the weights; NaN if no weight is positive.
        khat_threshold: the k-hat up to which estimates from S weighted draws are reliable.
        ess: effective sample size of the weights.
        num_samples: number of draws S.
        mean_shift: largest change of a posterior mean when the draws are weighted, in standard deviations.
        log_sd_shift: largest change of the logarithm of a standard deviation when the draws are weighted.
        shift_site: the site of the larger of the two changes.
        log_weight_min: smallest finite log weight.
        log_weight_max: largest finite log weight.
        num_nonfinite: number of draws whose log weight is −inf or NaN.
        wider: what draws from a widened guide add; ``None`` if the guide cannot be widened.
        agreement: comparison with independent fits, if there was one.
    """

    verdict: Verdict
    reason: str
    advice: str
    elbo: float
    elbo_se: float
    log_evidence: float
    log_evidence_se: float
    khat: float
    khat_threshold: float
    ess: float
    num_samples: int
    mean_shift: float
    log_sd_shift: float
    shift_site: str
    log_weight_min: float
    log_weight_max: float
    num_nonfinite: int
    wider: WiderLook | None = None
    agreement: Agreement | None = None

    @property
    def ess_fraction(self) -> float:
        """Effective sample size as a fraction of the number of draws."""
        return self.ess / self.num_samples

    @property
    def gap(self) -> float:
        """log evidence − ELBO, an estimate of KL(q || p) in nats."""
        return self.log_evidence - self.elbo

    def __str__(self) -> str:
        lines = [
            f"Verdict: {self.verdict}",
            f"  {self.reason}",
            f"  {self.advice}",
            f"  ELBO         {self.elbo:.3f} ± {self.elbo_se:.3f}; log evidence {self.log_evidence:.3f} ± "
            f"{self.log_evidence_se:.3f}; gap {self.gap:.3f} nats",
            f"  k-hat        {self.khat:.2f} (reliable up to {self.khat_threshold:.2f})",
            f"  ESS          {self.ess:.0f} of {self.num_samples} draws ({100 * self.ess_fraction:.1f} %)",
            f"  weighting    moves means by up to {self.mean_shift:.2f} sd, log sd by up to {self.log_sd_shift:.2f} "
            f"(worst at '{self.shift_site}')",
            f"  log weights  {self.log_weight_min:.2f} to {self.log_weight_max:.2f}; {self.num_nonfinite} not finite",
        ]
        if self.wider is not None:
            lines.append(
                f"  wider look   {self.wider.factor:.1f} times: k-hat {self.wider.khat:.2f}, ESS {self.wider.ess:.0f}, "
                f"missed mass {100 * self.wider.missed_mass:.0f} %, moments off by {self.wider.shift:.2f} sd"
            )
        lines.append(f"  agreement    {'not checked' if self.agreement is None else self.agreement}")
        return "\n".join(lines)


def diagnose(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 4000,
    agreement: Agreement | None = None,
    **kwargs: Any,
) -> Diagnosis:
    r"""Judge a fitted guide by the importance weights of its draws.

    With :math:`\log w_s = \log p(x, z_s) - \log q(z_s)` and :math:`z_s \sim q`, the report holds

    .. math::
        \text{ELBO} = \frac1S \sum_s \log w_s, \qquad
        \log \hat p(x) = \log \frac1S \sum_s w_s, \qquad
        \text{ESS} = \frac{(\sum_s w_s)^2}{\sum_s w_s^2},

    the tail index k-hat, and by how much means and standard deviations change when the draws are weighted. No number
    decides alone. k-hat says whether the others can be believed, not whether they are good, and it says little of
    weights that are nearly equal. All of them rest on the guide's own draws, so a second set of draws from a widened
    guide (:func:`defensive_log_weights`) looks for posterior mass next to them. A mode that is far off stays hidden
    even then: where that matters, pass the :func:`agreement` of independent fits.

    Args:
        model: a Pyro model.
        guide: any Pyro guide for it.
        *args: arguments of model and guide.
        num_samples: number of draws S, at least 25.
        agreement: comparison of the resampled draws of independent fits.
        **kwargs: keyword arguments of model and guide.

    Raises:
        ValueError: if there are fewer than 25 draws, and as :func:`log_weights`.

    Cost: 2 S runs of guide and model, as many at a time as hold some tens of MB. No draws are kept but those of large
    weight, at most 8 √S.

    References:
        Y. Yao, A. Vehtari, D. Simpson, A. Gelman (2018). Yes, but did it work? Evaluating variational inference.
        arXiv:1802.02538. A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry (2024). Pareto smoothed importance
        sampling. arXiv:1507.02646.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> _ = pyro.set_rng_seed(0)
        >>> def model(scale):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))
        >>> def guide(scale):
        ...     pyro.sample("z", dist.Normal(1.0, scale))
        >>> diagnose(model, guide, 0.5**0.5).verdict  # the posterior itself
        'good'
        >>> diagnose(model, guide, 0.1).verdict  # much too narrow
        'do not trust'
    """
    if num_samples < MIN_DRAWS:
        raise ValueError(f"a diagnosis needs at least {MIN_DRAWS} draws, not {num_samples}")
    program = inspect_program(model, guide, args, kwargs)
    own, mixture = survey(program, num_samples)
    return _judge(own, mixture, program.widening, agreement, point_sites(program, own.constant))


def judge(
    weighted: WeightedDraws,
    defensive: WeightedDraws | None = None,
    factor: float = math.nan,
    agreement: Agreement | None = None,
) -> Diagnosis:
    """As :func:`diagnose`, for draws that are there already.

    Args:
        weighted: draws of the guide with their weights.
        defensive: those of :func:`defensive_log_weights`, if there are any.
        factor: by how much the guide was widened for them.
        agreement: comparison of the resampled draws of independent fits.

    Raises:
        ValueError: if there are fewer than 25 draws.
    """
    if weighted.num_samples < MIN_DRAWS:
        raise ValueError(f"a diagnosis needs at least {MIN_DRAWS} draws, not {weighted.num_samples}")
    own = Summary(weighted.num_samples)
    own.add(weighted.draws, weighted.log_w)
    mixture = None
    if defensive is not None:
        mixture = SmoothedMoments(defensive.num_samples)
        mixture.add(defensive.draws, defensive.log_w)
    return _judge(own, mixture, factor, agreement, weighted.point_sites)


def _judge(
    own: Summary,
    mixture: SmoothedMoments | None,
    factor: float,
    agreement: Agreement | None,
    point_sites: tuple[str, ...],
) -> Diagnosis:
    evidence = _evidence(own, mixture, factor, agreement, point_sites)
    verdict, reason, advice = decide(evidence)
    elbo, elbo_se = _elbo(own.log_w)
    log_evidence, log_evidence_se = log_mean_weight(own.log_w)
    finite = own.log_w[own.log_w.isfinite()]
    return Diagnosis(
        verdict=verdict,
        reason=reason,
        advice=advice,
        elbo=elbo,
        elbo_se=elbo_se,
        log_evidence=log_evidence,
        log_evidence_se=log_evidence_se,
        khat=evidence.khat,
        khat_threshold=evidence.khat_threshold,
        ess=evidence.ess,
        num_samples=evidence.num_samples,
        mean_shift=evidence.mean_shift,
        log_sd_shift=evidence.log_sd_shift,
        shift_site=evidence.shift_site,
        log_weight_min=float(finite.min()) if len(finite) else math.nan,
        log_weight_max=float(finite.max()) if len(finite) else math.nan,
        num_nonfinite=evidence.num_zero + evidence.num_invalid,
        wider=evidence.wider,
        agreement=agreement,
    )


def _evidence(
    own: Summary,
    mixture: SmoothedMoments | None,
    factor: float,
    agreement: Agreement | None,
    point_sites: tuple[str, ...],
) -> Evidence:
    log_w = own.log_w
    ess = effective_sample_size(log_w)
    khat, change, wider = math.nan, (math.nan, math.nan, next(iter(own.plain))), None
    if ess > 0:
        smoothed, corrected = own.weighted.smooth()
        khat, change = smoothed.khat, shift(own.plain, corrected)
        wider = None if mixture is None else look_wider(own, corrected, mixture, factor)
    return Evidence(
        khat=khat,
        khat_threshold=khat_threshold(len(log_w)),
        ess=ess,
        num_samples=len(log_w),
        mean_shift=change[0],
        log_sd_shift=change[1],
        shift_site=change[2],
        num_zero=int(log_w.isneginf().sum()),
        num_invalid=int(log_w.isnan().sum()),
        point_sites=point_sites,
        wider=wider,
        agreement=agreement,
    )


def _elbo(log_w: Tensor) -> tuple[float, float]:
    """Mean log weight and its standard error; −inf without an error if a weight is zero."""
    valid = log_w[~log_w.isnan()]
    if len(valid) < 2:
        return math.nan, math.nan
    if valid.isneginf().any():
        return -math.inf, math.nan
    return float(valid.mean()), float(valid.std() / math.sqrt(len(valid)))
