"""The verdict on a fitted guide."""

import math
from dataclasses import dataclass

from torch import Tensor

from pyro_flowguides.diagnostics.decision import Findings, Verdict, decide
from pyro_flowguides.diagnostics.defensive import defensive_check, summarize_own_and_widened
from pyro_flowguides.diagnostics.fit_agreement import Agreement
from pyro_flowguides.diagnostics.moments import GuideSummary, SmoothedMoments, moment_shift
from pyro_flowguides.diagnostics.psis import MIN_DRAWS, effective_sample_size, khat_threshold, log_mean_weight
from pyro_flowguides.diagnostics.weights import WeightedDraws, Widening, point_sites
from pyro_flowguides.nn.arguments import check_count, describe
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.running import exclusive
from pyro_flowguides.programs.types import Guide, Model

__all__ = ["Diagnosis", "diagnose", "diagnose_draws", "diagnose_program"]


@dataclass(frozen=True, kw_only=True)
class Diagnosis(Findings):
    """Verdict on a fitted guide, with the numbers behind it, from S draws of the guide.

    Attributes:
        verdict: ``"good"``: use the guide's draws as they are; ``"usable with importance resampling"``: use
            :func:`importance_resample`; ``"do not trust"``: use neither.
        reason: the reason for the verdict, in one sentence.
        advice: what to do next.
        elbo: mean log weight, in nats; −inf if a draw has zero density under the model.
        elbo_se: its standard error.
        log_evidence: importance-sampling estimate of log p(x).
        log_evidence_se: its standard error.
        khat: tail index of the weights; NaN if no weight is positive.
        khat_threshold: largest k-hat at which estimates from S weighted draws are reliable.
        ess: effective sample size of the weights.
        num_samples: number of draws S.
        mean_shift: largest change of a mean when the draws are weighted, in standard deviations of the posterior.
        log_sd_shift: largest change of the logarithm of a standard deviation when the draws are weighted.
        shift_site: site where the larger of the two changes occurs.
        log_weight_min: smallest finite log weight.
        log_weight_max: largest finite log weight.
        num_zero: number of draws with zero density under the model.
        num_invalid: number of draws at which a density is NaN or infinite.
        point_sites: continuous sites where all draws are equal, so that the guide has no density.
        defensive: comparison with draws of a widened guide; ``None`` if the guide cannot be widened.
        agreement: comparison of independent fits; ``None`` if there was none.
    """

    verdict: Verdict
    reason: str
    advice: str
    elbo: float
    elbo_se: float
    log_evidence: float
    log_evidence_se: float
    log_weight_min: float
    log_weight_max: float

    @property
    def gap(self) -> float:
        """log evidence − ELBO, an estimate of KL(q || p) in nats."""
        return self.log_evidence - self.elbo

    @property
    def num_nonfinite(self) -> int:
        """Number of draws whose log weight is −inf or NaN."""
        return self.num_zero + self.num_invalid

    def __str__(self) -> str:
        lines = [
            f"Verdict: {self.verdict}",
            f"  {self.reason}",
            f"  {self.advice}",
            f"  ELBO         {self.elbo:.3f} ± {self.elbo_se:.3f}; log evidence {self.log_evidence:.3f} ± "
            f"{self.log_evidence_se:.3f}; gap {self.gap:.3f} nats",
            f"  k-hat        {self.khat:.2f} (reliable up to {self.khat_threshold:.2f})",
            f"  ESS          {self.ess:.0f} of {self.num_samples} draws ({100 * self.ess_fraction:.1f} %)",
            f"  weighting    changes means by up to {self.mean_shift:.2f} sd, log sd by up to {self.log_sd_shift:.2f} "
            f"(most at '{self.shift_site}')",
            f"  log weights  {self.log_weight_min:.2f} to {self.log_weight_max:.2f}; {self.num_nonfinite} not finite",
        ]
        if self.defensive is not None:
            lines.append(f"  defensive    {self.defensive}")
        lines.append(f"  agreement    {'not checked' if self.agreement is None else self.agreement}")
        return "\n".join(lines)


def diagnose(
    model: Model,
    guide: Guide,
    *args: object,
    num_samples: int = 4000,
    chunk_size: int | None = None,
    agreement: Agreement | None = None,
    **kwargs: object,
) -> Diagnosis:
    r"""Assess a fitted guide by the importance weights of its draws.

    With :math:`\log w_s = \log p(x, z_s) - \log q(z_s)` and :math:`z_s \sim q`, the report holds

    .. math::
        \text{ELBO} = \frac1S \sum_s \log w_s, \qquad
        \log \hat p(x) = \log \frac1S \sum_s w_s, \qquad
        \text{ESS} = \frac{(\sum_s w_s)^2}{\sum_s w_s^2},

    the tail index k-hat, and the changes of means and standard deviations when the draws are weighted. No single number
    decides. k-hat tells whether the other numbers are reliable, not whether the fit is good, and it tells little if the
    weights are nearly equal. All these numbers come from the guide's own draws, so draws from a widened guide
    (:func:`defensive_log_weights`) search for posterior mass next to them. Even these do not reveal a distant mode. If
    that matters, pass the :func:`agreement` of independent fits.

    Args:
        model, guide: a Pyro model and any Pyro guide for it.
        *args, **kwargs: arguments of both.
        num_samples: number of draws S, at least 25.
        chunk_size: number of draws that run together; chosen by the size of the sites by default.
        agreement: comparison of the resampled draws of independent fits.

    Raises:
        ValueError: if there are fewer than 25 draws, and for the reasons that :func:`log_weights` gives.

    Cost: 2 S runs of guide and model, in chunks of some tens of MB. Only the draws with the largest weights are kept,
    at most 8 √S of them.

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
        >>> diagnose(model, guide, 0.5**0.5).verdict  # the exact posterior
        'good'
        >>> diagnose(model, guide, 0.1).verdict  # much too narrow
        'do not trust'
    """
    program = Program.inspect(model, guide, args, kwargs)
    return diagnose_program(program, num_samples=num_samples, chunk_size=chunk_size, agreement=agreement)


@exclusive
def diagnose_program(
    program: Program, *, num_samples: int = 4000, chunk_size: int | None = None, agreement: Agreement | None = None
) -> Diagnosis:
    """Assess the guide of an inspected program; see :func:`diagnose`."""
    num_samples = check_count("diagnose", "num_samples", num_samples, MIN_DRAWS)
    _check_agreement(agreement)
    widening = Widening.of(program)
    own, mixture = summarize_own_and_widened(program, widening, num_samples, chunk_size)
    constant = point_sites(program, own.constant)
    return _diagnosis(_findings(own, mixture, widening.factor, agreement, constant), own.weighted.log_w)


def diagnose_draws(
    weighted: WeightedDraws,
    defensive: WeightedDraws | None = None,
    widening_factor: float = math.nan,
    agreement: Agreement | None = None,
) -> Diagnosis:
    """Assess a guide by weighted draws that already exist; see :func:`diagnose`.

    Args:
        weighted: result of :func:`log_weights`.
        defensive: result of :func:`defensive_log_weights`, if any.
        widening_factor: factor by which the guide was widened for ``defensive``.
        agreement: comparison of the resampled draws of independent fits.

    Raises:
        ValueError: if there are fewer than 25 draws.
    """
    for name, draws in (("weighted", weighted), ("defensive", defensive)):
        if not isinstance(draws, WeightedDraws) and not (name == "defensive" and draws is None):
            raise TypeError(f"diagnose_draws: {name} must be WeightedDraws, got {describe(draws)}")
    _check_agreement(agreement)
    check_count("diagnose_draws", "the number of draws", weighted.num_samples, MIN_DRAWS)
    own = GuideSummary(weighted.num_samples)
    own.add(weighted.draws, weighted.log_w)
    mixture = None
    if defensive is not None:
        mixture = SmoothedMoments(defensive.num_samples)
        mixture.add(defensive.draws, defensive.log_w)
    return _diagnosis(_findings(own, mixture, widening_factor, agreement, weighted.point_sites), own.weighted.log_w)


def _check_agreement(comparison: object) -> None:
    if not isinstance(comparison, Agreement | None):
        raise TypeError(f"diagnose: agreement must be what agreement(...) returns, got {describe(comparison)}")


def _diagnosis(findings: Findings, log_w: Tensor) -> Diagnosis:
    verdict, reason, advice = decide(findings)
    elbo, elbo_se = _elbo(log_w)
    log_evidence, log_evidence_se = log_mean_weight(log_w)
    finite = log_w[log_w.isfinite()]
    return Diagnosis(
        **vars(findings),
        verdict=verdict,
        reason=reason,
        advice=advice,
        elbo=elbo,
        elbo_se=elbo_se,
        log_evidence=log_evidence,
        log_evidence_se=log_evidence_se,
        log_weight_min=float(finite.min()) if len(finite) else math.nan,
        log_weight_max=float(finite.max()) if len(finite) else math.nan,
    )


def _findings(
    own: GuideSummary,
    mixture: SmoothedMoments | None,
    widening_factor: float,
    agreement: Agreement | None,
    point_sites: tuple[str, ...],
) -> Findings:
    log_w = own.weighted.log_w
    ess = effective_sample_size(log_w)
    khat, shift, defensive = math.nan, (math.nan, math.nan, next(iter(own.unweighted.moments))), None
    if ess > 0:
        smoothed, corrected = own.weighted.smooth()
        khat, shift = smoothed.khat, moment_shift(own.unweighted.moments, corrected)
        defensive = None if mixture is None else defensive_check(own, corrected, mixture, widening_factor)
    return Findings(
        khat=khat,
        khat_threshold=khat_threshold(len(log_w)),
        ess=ess,
        num_samples=len(log_w),
        mean_shift=shift[0],
        log_sd_shift=shift[1],
        shift_site=shift[2],
        num_zero=int(log_w.isneginf().sum()),
        num_invalid=int(log_w.isnan().sum()),
        point_sites=point_sites,
        defensive=defensive,
        agreement=agreement,
    )


def _elbo(log_w: Tensor) -> tuple[float, float]:
    """Return the mean log weight and its standard error; −inf and NaN if a weight is zero."""
    valid = log_w[~log_w.isnan()]
    if len(valid) < 2:
        return math.nan, math.nan
    if valid.isneginf().any():
        return -math.inf, math.nan
    return float(valid.mean()), float(valid.std() / math.sqrt(len(valid)))
