"""How the evidence on a guide is weighed: the limits, and the order in which they are asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyro_flowguides.diagnostics.defensive import WiderLook
from pyro_flowguides.diagnostics.fit_agreement import Agreement

Verdict = Literal["good", "usable with importance resampling", "do not trust"]

# Where the verdict is "good", no posterior mean may be more than 0.3 sd off. The limits on what the weights show
# (shifts in sd, fractions of mass) leave room for what they cannot show.
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
# A k-hat above its threshold may be put down to tails that carry no weight if a wider look reaches this far.
_HARMLESS_KHAT = 1.0
_FAR_REACHING = 2.5


@dataclass(frozen=True)
class Evidence:
    """All that the verdict weighs; see :class:`Diagnosis` for what the numbers mean."""

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
    wider: WiderLook | None
    agreement: Agreement | None

    @property
    def ess_fraction(self) -> float:
        """Effective sample size as a fraction of the number of draws."""
        return self.ess / self.num_samples

    @property
    def is_confirmed(self) -> bool:
        """Whether a reliable wider look finds the moments and the mass that the guide's draws show."""
        wider = self.wider
        if wider is None or not wider.is_reliable:
            return False
        return wider.missed_mass <= _GOOD_MISSED and wider.shift <= _GOOD_SHIFT + wider.noise

    @property
    def is_tail_harmless(self) -> bool:
        """Whether a k-hat above its threshold can be put down to tails that carry no weight."""
        reaches_far = self.wider is not None and self.wider.factor >= _FAR_REACHING
        return self.is_confirmed and (self.khat < _HARMLESS_KHAT or reaches_far)


def decide(evidence: Evidence) -> tuple[Verdict, str, str]:
    """The verdict, its reason and an advice."""
    found = _meaningless(evidence) or _unreliable(evidence)
    if found is not None:
        return "do not trust", *found
    found = _improvable(evidence)
    if found is not None:
        return "usable with importance resampling", *found
    return "good", _praise(evidence), _caution(evidence)


def _meaningless(e: Evidence) -> tuple[str, str] | None:
    """What leaves nothing to weigh."""
    if e.point_sites:
        return (
            f"All draws of site '{e.point_sites[0]}' are the same: a point estimate has no density to weigh.",
            "Use a guide with a spread, such as AutoNormal or AutoIAF, started at this point.",
        )
    if e.ess == 0:
        return (
            f"No draw has a positive and finite weight ({e.num_zero} at zero density, {e.num_invalid} undefined).",
            "Check that the guide's supports match the model's, and look for NaN in the model at the guide's draws.",
        )
    if e.num_invalid > _INVALID_FRACTION * e.num_samples:
        return (
            f"The density is NaN or infinite at {e.num_invalid} of {e.num_samples} draws.",
            "Look for overflow in the model at extreme draws; double precision often helps.",
        )
    return None


def _unreliable(e: Evidence) -> tuple[str, str] | None:
    """What keeps the weighted draws from being the posterior's."""
    if e.agreement is not None and not e.agreement.worst <= _USABLE_DISAGREEMENT:
        return (
            f"Independent fits disagree at site '{e.agreement.worst_site}': their means by "
            f"{e.agreement.mean_difference:.2f} sd, their log sd by {e.agreement.log_sd_difference:.2f}.",
            "There may be several modes: temper the fit, or try a more flexible flow.",
        )
    missed = _missed(e.wider)
    if missed is not None:
        return missed, "Start the fit wider, temper it, or use a more flexible guide."
    if not e.khat <= e.khat_threshold and not e.is_tail_harmless:
        return (
            f"k-hat is {e.khat:.2f}, above {e.khat_threshold:.2f}: draws in the tail carry too much of the weight.",
            "Fit longer, use a more flexible guide (AutoIAF with more depth), or reparametrize the model.",
        )
    if e.ess < min(_USABLE_ESS, e.num_samples / 2):
        return (
            f"{e.num_samples} weighted draws are worth only {e.ess:.0f}.",
            "Fit longer, use a more flexible guide, or diagnose with more draws.",
        )
    return None


def _missed(wider: WiderLook | None) -> str | None:
    """What draws with wider noise have found where the guide never goes."""
    if wider is None:
        return None
    is_harmless = wider.is_reliable and wider.weighted_shift <= _GOOD_SHIFT
    if wider.missed_mass > _USABLE_MISSED and not is_harmless:
        return f"With wider noise, {100 * wider.missed_mass:.0f} % of the posterior lies where the guide does not go."
    if wider.is_surprised:
        return (
            f"One draw with wider noise carries {100 * wider.largest_share:.1f} % of all weight: there may be a mode "
            "that the guide has missed."
        )
    if wider.is_reliable and wider.weighted_shift > _USABLE_SHIFT + wider.noise:
        return f"With wider noise, weighted moments change by {wider.weighted_shift:.2f} sd."
    return None


def _improvable(e: Evidence) -> tuple[str, str] | None:
    """What makes weighted draws better than the guide's own."""
    advice = "Use importance_resample; a longer fit or a more flexible guide may make it unnecessary."
    if max(e.mean_shift, e.log_sd_shift) > _GOOD_SHIFT:
        return (
            f"Weighting moves means by up to {e.mean_shift:.2f} sd and log sd by up to {e.log_sd_shift:.2f} "
            f"(worst at '{e.shift_site}').",
            advice,
        )
    if not e.khat <= e.khat_threshold:
        return f"k-hat is {e.khat:.2f}: tails are too light, though wider noise finds no other moments.", advice
    if e.khat > _GOOD_KHAT and e.ess_fraction < _FLAT_ESS_FRACTION and not e.is_confirmed:
        return f"k-hat is {e.khat:.2f}: the guide's tails are too light in places.", advice
    if e.wider is not None and not e.is_confirmed:
        return _unconfirmed(e.wider), advice
    if e.ess_fraction < _GOOD_ESS_FRACTION:
        return f"Only {100 * e.ess_fraction:.0f} % of the draws count after weighting.", advice
    if e.num_invalid > 0 or e.num_zero > _INVALID_FRACTION * e.num_samples:
        return f"{e.num_zero} draws have zero density under the model, at {e.num_invalid} it is undefined.", advice
    if e.agreement is not None and e.agreement.worst > _GOOD_DISAGREEMENT:
        return (
            f"Independent fits differ by up to {e.agreement.worst:.2f} at site '{e.agreement.worst_site}'.",
            "Fit longer, or pool the resampled draws of several fits.",
        )
    return None


def _unconfirmed(wider: WiderLook) -> str:
    if not wider.is_reliable:
        return (
            f"Draws with wider noise cannot confirm the guide: their k-hat is {wider.khat:.2f}, and they are worth "
            f"{wider.ess:.0f}."
        )
    return (
        f"Draws with wider noise differ from the guide's by {wider.shift:.2f} sd, or hold "
        f"{100 * wider.missed_mass:.0f} % more mass."
    )


def _praise(e: Evidence) -> str:
    parts = [f"{100 * e.ess_fraction:.0f} % of the draws count after weighting", f"k-hat is {e.khat:.2f}"]
    if e.is_confirmed:
        parts.append("draws with wider noise find the same")
    if e.agreement is not None:
        parts.append(f"{e.agreement.num_fits} independent fits agree")
    return ", ".join(parts) + "."


def _caution(e: Evidence) -> str:
    if e.agreement is None:
        return "The draws can be used as they are. One fit cannot show a distant mode; compare fits where that matters."
    return "The draws can be used as they are."
