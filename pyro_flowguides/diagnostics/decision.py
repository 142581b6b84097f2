"""The rules that turn the findings on a guide into a verdict: the limits, and the order in which they are checked."""

from dataclasses import dataclass
from typing import Literal

from pyro_flowguides.diagnostics.defensive import DefensiveCheck
from pyro_flowguides.diagnostics.fit_agreement import Agreement

__all__ = ["Findings", "Verdict", "decide"]

Verdict = Literal["good", "usable with importance resampling", "do not trust"]

# A "good" verdict promises posterior means within 0.3 sd. The limits (shifts in sd, fractions of mass) are tighter,
# since the weights do not show every error.
_GOOD_KHAT = 0.5
_GOOD_ESS_FRACTION = 0.3
_FLAT_ESS_FRACTION = 0.95
_GOOD_SHIFT = 0.2
_GOOD_MISSED = 0.05
_GOOD_DISAGREEMENT = 0.2
_USABLE_ESS = 100.0
_USABLE_SHIFT = 0.25
_USABLE_MISSED = 0.08
_USABLE_DISAGREEMENT = 0.3
_INVALID_FRACTION = 0.01
# A confirmed guide may have a k-hat above its threshold, due to tails without weight, if k-hat is below the first limit
# or the guide was widened by at least the second.
_HARMLESS_KHAT = 1.0
_FAR_WIDENING = 2.5


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Numbers that decide the verdict; :class:`~pyro_flowguides.diagnostics.Diagnosis` explains them."""

    khat: float
    khat_threshold: float
    ess: float
    num_samples: int
    mean_shift: float
    log_sd_shift: float
    shift_site: str
    num_zero: int
    num_invalid: int
    point_sites: tuple[str, ...]
    defensive: DefensiveCheck | None
    agreement: Agreement | None

    @property
    def ess_fraction(self) -> float:
        """Effective sample size as a fraction of the number of draws."""
        return self.ess / self.num_samples

    @property
    def is_confirmed(self) -> bool:
        """Whether a reliable defensive check finds the moments and the mass that the guide's draws show."""
        check = self.defensive
        if check is None or not check.is_reliable:
            return False
        return check.missed_mass <= _GOOD_MISSED and check.shift <= _GOOD_SHIFT + check.monte_carlo_error

    @property
    def is_tail_harmless(self) -> bool:
        """Whether a k-hat above its threshold comes from tails without weight."""
        is_far = self.defensive is not None and self.defensive.widening_factor >= _FAR_WIDENING
        return self.is_confirmed and (self.khat < _HARMLESS_KHAT or is_far)


def decide(findings: Findings) -> tuple[Verdict, str, str]:
    """Return the verdict, its reason, and advice."""
    explanation = _without_usable_weights(findings) or _untrustworthy(findings)
    if explanation is not None:
        return "do not trust", *explanation
    reason = _improved_by_weighting(findings)
    if reason is not None:
        advice = "Use importance_resample. A longer fit or a more flexible guide may make it unnecessary."
        return "usable with importance resampling", reason, advice
    agreement = findings.agreement
    if agreement is not None and agreement.worst_difference > _GOOD_DISAGREEMENT:
        reason = f"Independent fits differ slightly: {_differences(agreement)}."
        advice = "Fit longer, or pool the resampled draws of several fits."
        return "usable with importance resampling", reason, advice
    return "good", *_good(findings)


def _without_usable_weights(f: Findings) -> tuple[str, str] | None:
    """Explain why the weights say nothing, if so."""
    if f.point_sites:
        return (
            f"All draws of site '{f.point_sites[0]}' are equal: the guide is a point estimate, which has no density.",
            "Use a guide with a density, such as AutoNormal or AutoIAF, and start it at this estimate.",
        )
    if f.ess == 0:
        return (
            f"No draw has a positive, finite weight: {f.num_zero} have zero density under the model, and "
            f"{f.num_invalid} have an undefined density.",
            "Check that the guide has the model's supports, and look for NaN in the model at the guide's draws.",
        )
    if f.num_invalid > _INVALID_FRACTION * f.num_samples:
        return (
            f"The density is NaN or infinite, or the model fails, at {f.num_invalid} of {f.num_samples} draws.",
            "Look for errors and overflow in the model at extreme draws. Double precision often helps.",
        )
    return None


def _untrustworthy(f: Findings) -> tuple[str, str] | None:
    """Explain why even weighted draws do not represent the posterior, if so."""
    if f.agreement is not None and not f.agreement.worst_difference <= _USABLE_DISAGREEMENT:
        return (
            f"Independent fits disagree: {_differences(f.agreement)}.",
            "The posterior may have several modes. Pass temper to fit, or try a more flexible flow.",
        )
    missed = None if f.defensive is None else _missed(f.defensive)
    if missed is not None:
        return missed, "Start the fit from a wider guide, pass temper to fit, or use a more flexible guide."
    if not f.khat <= f.khat_threshold and not f.is_tail_harmless:
        return (
            f"k-hat is {f.khat:.2f}, above its threshold of {f.khat_threshold:.2f}: a few draws carry too much weight.",
            "Fit longer, use a more flexible guide (such as AutoIAF with more depth), or reparametrize the model.",
        )
    if f.ess < min(_USABLE_ESS, f.num_samples / 2):
        return (
            f"The effective sample size of {f.num_samples} weighted draws is only {f.ess:.0f}.",
            "Fit longer, use a more flexible guide, or diagnose with more draws.",
        )
    return None


def _missed(check: DefensiveCheck) -> str | None:
    """Describe the part of the posterior that the guide misses, if the widened guide finds any."""
    is_harmless = check.is_reliable and check.weighted_shift <= _GOOD_SHIFT
    if check.missed_mass > _USABLE_MISSED and not is_harmless:
        return f"The widened guide finds {100 * check.missed_mass:.0f} % of the posterior where the guide has no draws."
    if check.has_dominant_draw:
        return (
            f"One draw of the widened guide carries {100 * check.largest_share:.1f} % of the total weight: the guide "
            "may miss a mode."
        )
    if check.is_reliable and check.weighted_shift > _USABLE_SHIFT + check.monte_carlo_error:
        return f"Draws of the widened guide change the weighted moments by {check.weighted_shift:.2f} sd."
    return None


def _improved_by_weighting(f: Findings) -> str | None:
    """Explain why weighted draws are better than the guide's own, if so."""
    if max(f.mean_shift, f.log_sd_shift) > _GOOD_SHIFT:
        return (
            f"Weighting changes means by up to {f.mean_shift:.2f} sd and log sd by up to {f.log_sd_shift:.2f} "
            f"(most at site '{f.shift_site}')."
        )
    if not f.khat <= f.khat_threshold:
        return f"k-hat is {f.khat:.2f}: the guide's tails are too light, but the widened guide gives the same moments."
    if f.khat > _GOOD_KHAT and f.ess_fraction < _FLAT_ESS_FRACTION and not f.is_confirmed:
        return f"k-hat is {f.khat:.2f}: some tails of the guide are too light."
    if f.defensive is not None and not f.is_confirmed:
        return _unconfirmed(f.defensive)
    if f.ess_fraction < _GOOD_ESS_FRACTION:
        return f"The effective sample size is only {100 * f.ess_fraction:.0f} % of the number of draws."
    if f.num_invalid > 0 or f.num_zero > _INVALID_FRACTION * f.num_samples:
        return f"{f.num_zero} draws have zero density under the model, and {f.num_invalid} have an undefined density."
    return None


def _unconfirmed(check: DefensiveCheck) -> str:
    if not check.is_reliable:
        return (
            f"The widened guide cannot confirm the fit: its weights have a k-hat of {check.khat:.2f} and an effective "
            f"sample size of {check.ess:.0f}."
        )
    return (
        f"The widened guide does not confirm the fit: moments differ by {check.shift:.2f} sd, and the guide misses "
        f"{100 * check.missed_mass:.0f} % of the posterior."
    )


def _differences(agreement: Agreement) -> str:
    return (
        f"means differ by up to {agreement.mean_difference:.2f} sd (at site '{agreement.mean_site}'), log sd by up to "
        f"{agreement.log_sd_difference:.2f} (at site '{agreement.log_sd_site}')"
    )


def _good(f: Findings) -> tuple[str, str]:
    parts = [
        f"The effective sample size is {100 * f.ess_fraction:.0f} % of the number of draws",
        f"k-hat is {f.khat:.2f}",
    ]
    if f.is_confirmed:
        parts.append("the widened guide gives the same moments")
    if f.agreement is not None:
        parts.append(f"{f.agreement.num_fits} independent fits agree")
    advice = "Use the draws as they are."
    if f.agreement is None:
        advice += " A single fit cannot show a distant mode; compare independent fits if that matters."
    return ", ".join(parts[:-1]) + f", and {parts[-1]}.", advice
