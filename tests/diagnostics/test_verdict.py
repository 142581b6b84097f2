"""The verdict: right for fits with known errors, and never "good" for a wrong fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from torch import Tensor
from torch.distributions import constraints

import pyro_flowguides as fg
from pyro_flowguides.diagnostics import (
    Diagnosis,
    WeightedDraws,
    agreement,
    defensive_log_weights,
    diagnose,
    diagnose_draws,
    importance_resample,
    log_weights,
)
from tests.diagnostics import programs
from tests.diagnostics.programs import DATA

GOOD, USABLE, BAD = "good", "usable with importance resampling", "do not trust"


@pytest.fixture(autouse=True)
def _fresh() -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def test_exact_guide_is_good() -> None:
    report = diagnose(programs.gaussian_model, programs.gaussian_guide(), DATA, num_samples=2000)
    evidence = programs.gaussian_evidence(DATA)
    assert report.verdict == GOOD
    assert report.elbo == pytest.approx(evidence, abs=1e-4)
    assert report.log_evidence == pytest.approx(evidence, abs=1e-4)
    assert report.elbo_se == pytest.approx(0, abs=1e-5)
    assert report.log_evidence_se == pytest.approx(0, abs=1e-4)
    assert report.gap == pytest.approx(0, abs=1e-4)
    assert report.ess == pytest.approx(2000)
    assert report.ess_fraction == pytest.approx(1)
    assert report.khat == 0
    assert report.khat_threshold == pytest.approx(1 - 1 / math.log10(2000))
    assert report.num_nonfinite == 0
    assert report.log_weight_min == pytest.approx(evidence, abs=1e-4)
    assert report.log_weight_max == pytest.approx(evidence, abs=1e-4)


def test_elbo_and_evidence_of_a_shifted_wide_guide() -> None:
    guide = programs.gaussian_guide(shift=0.5, scale=1.2)
    report = diagnose(programs.gaussian_model, guide, DATA)
    kl = 0.5 * (1.2**2 + 0.5**2 - 1) - math.log(1.2)
    evidence = programs.gaussian_evidence(DATA)
    assert abs(report.elbo - (evidence - kl)) < 4 * report.elbo_se
    assert abs(report.log_evidence - evidence) < 4 * report.log_evidence_se
    assert report.mean_shift == pytest.approx(0.5, abs=0.05)
    assert report.log_sd_shift == pytest.approx(math.log(1.2), abs=0.05)
    assert report.shift_site == "z"


@pytest.mark.parametrize(
    ("shift", "scale", "verdict"),
    [
        (0.0, 0.95, GOOD),
        (0.1, 1.0, GOOD),
        (0.05, 1.1, GOOD),
        (0.5, 1.0, USABLE),
        (0.0, 1.5, USABLE),
        (0.0, 0.7, USABLE),
        (0.0, 0.15, BAD),
        (3.0, 0.5, BAD),
    ],
)
def test_gaussian_guides(shift: float, scale: float, verdict: str) -> None:
    assert diagnose(programs.gaussian_model, programs.gaussian_guide(shift, scale), DATA).verdict == verdict


def _diagnose_against(log_prob: Callable[[Tensor], Tensor], guide_fn: Any) -> Diagnosis:
    (dim,) = guide_fn.event_shape

    def model() -> None:
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (dim,)))
        pyro.factor("target", log_prob(z))

    def guide() -> None:
        pyro.sample("z", guide_fn)

    return diagnose(model, guide)


@pytest.mark.parametrize("dim", [1, 5, 20])
def test_exact_normal_guide_is_good(dim: int) -> None:
    normal = dist.Normal(torch.zeros(dim), 1.0).to_event(1)
    assert _diagnose_against(normal.log_prob, normal).verdict == GOOD


@pytest.mark.parametrize("dim", [1, 5, 20])
@pytest.mark.parametrize("target", ["normal", "student"])
@pytest.mark.parametrize("error", [0.35, 0.7])
def test_mean_errors_above_0_3_sd_are_not_good(dim: int, target: str, error: float) -> None:
    marginal = dist.Normal(0.0, 1.0) if target == "normal" else dist.StudentT(5.0)
    sd = 1.0 if target == "normal" else (5 / 3) ** 0.5
    loc = torch.zeros(dim)
    loc[0] = error * sd
    report = _diagnose_against(marginal.expand([dim]).to_event(1).log_prob, dist.Normal(loc, sd).to_event(1))
    assert report.verdict != GOOD


@pytest.mark.parametrize("rho", [0.9, 0.99])
def test_mean_field_guide_of_a_correlated_posterior_is_not_trusted(rho: float) -> None:
    covariance = torch.tensor([[1.0, rho], [rho, 1.0]])
    target = dist.MultivariateNormal(torch.zeros(2), covariance)
    guide_fn = dist.Normal(torch.zeros(2), (1 - rho**2) ** 0.5).to_event(1)
    assert _diagnose_against(target.log_prob, guide_fn).verdict == BAD


@pytest.mark.parametrize("distance", [4.0, 6.0, 8.0])
@pytest.mark.parametrize("dim", [1, 3])
def test_a_missed_mode_nearby_is_detected(distance: float, dim: int) -> None:
    loc = torch.zeros(2, dim)
    loc[1, 0] = distance
    target = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(loc, 1.0).to_event(1))
    report = _diagnose_against(target.log_prob, dist.Normal(torch.zeros(dim), 1.0).to_event(1))
    assert report.verdict == BAD


def test_equal_weights_do_not_hide_a_missed_mode() -> None:
    """At this distance k-hat is 0 and the ESS is that of equal weights: only the widened guide finds the mode."""
    target = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([0.0, 11.0]), 1.0))
    report = _diagnose_against(lambda z: target.log_prob(z[..., 0]), dist.Normal(torch.zeros(1), 1.0).to_event(1))
    assert report.khat == 0
    assert report.ess_fraction > 0.999
    assert report.defensive is not None
    assert report.defensive.missed_mass > 0.2 or report.defensive.has_dominant_draw
    assert report.verdict == BAD


def test_a_heavy_tail_without_weight_does_not_end_trust() -> None:
    """The weights of a Gaussian guide for Student's t have no finite variance, but the guide's moments are right."""
    target = dist.StudentT(30.0).expand([1]).to_event(1)
    report = _diagnose_against(target.log_prob, dist.Normal(torch.zeros(1), (30 / 28) ** 0.5).to_event(1))
    assert report.khat > report.khat_threshold
    assert report.ess_fraction > 0.95
    assert report.verdict == USABLE


def _distant_modes() -> tuple[Callable[[], None], Callable[[float], Callable[[], None]]]:
    def model() -> None:
        modes = dist.Normal(torch.tensor([-30.0, 30.0]), 1.0)
        pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), modes))

    def guide(loc: float) -> Callable[[], None]:
        return lambda: pyro.sample("z", dist.Normal(loc, 1.0))

    return model, guide


def test_independent_fits_reveal_a_distant_mode() -> None:
    model, guide = _distant_modes()
    single = diagnose(model, guide(30.0), num_samples=1000)
    assert single.verdict == GOOD  # a single fit cannot show the other mode, and the advice says so
    assert "compare independent fits" in single.advice
    fits = [importance_resample(model, guide(loc), num_proposals=1000) for loc in (30.0, -30.0)]
    compared = agreement(*fits)
    report = diagnose(model, guide(30.0), num_samples=1000, agreement=compared)
    assert compared.mean_difference > 10
    assert report.verdict == BAD
    assert report.agreement is compared
    assert "'z'" in report.reason


def test_fits_that_agree_keep_the_verdict() -> None:
    model, guide = programs.gaussian_model, programs.gaussian_guide(0.1)
    fits = [importance_resample(model, guide, DATA) for _ in range(3)]
    report = diagnose(model, guide, DATA, agreement=agreement(*fits))
    assert report.verdict == GOOD
    assert "3 independent fits agree" in report.reason


def test_slightly_different_fits_are_not_good() -> None:
    draws = torch.randn(4000)
    compared = agreement({"z": draws}, {"z": draws + 0.25})
    report = diagnose(programs.gaussian_model, programs.gaussian_guide(), DATA, agreement=compared)
    assert report.verdict == USABLE


def test_a_point_estimate_is_not_trusted() -> None:
    report = diagnose(programs.schools_model, autoguide.AutoDelta(programs.schools_model), num_samples=100)
    assert report.verdict == BAD
    assert "point estimate" in report.reason


@pytest.mark.parametrize(
    "make", [autoguide.AutoNormal, autoguide.AutoMultivariateNormal, autoguide.AutoIAFNormal, fg.AutoIAF, fg.AutoPlanar]
)
def test_untrained_guides_are_not_good(make: type) -> None:
    report = diagnose(programs.schools_model, make(programs.schools_model), num_samples=500)
    assert report.verdict == BAD
    assert report.defensive is not None


def test_no_draw_with_positive_weight() -> None:
    def model() -> None:
        pyro.sample("z", dist.Uniform(5.0, 6.0))

    report = diagnose(model, lambda: pyro.sample("z", dist.Uniform(0.0, 1.0)), num_samples=100)
    assert report.verdict == BAD
    assert report.elbo == -math.inf
    assert report.num_nonfinite == 100
    assert math.isnan(report.khat)
    assert "No draw" in report.reason
    assert str(report).startswith("Verdict: do not trust")


def test_draws_with_undefined_density_are_not_trusted() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", 0.0 * (z + 1.5).log())

    report = diagnose(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), num_samples=1000)
    assert report.verdict == BAD
    assert "NaN" in report.reason
    assert report.num_nonfinite == report.num_invalid > 10
    assert math.isfinite(report.elbo)


def test_report_shows_every_number_and_is_immutable() -> None:
    report = diagnose(programs.gaussian_model, programs.gaussian_guide(0.1), DATA, num_samples=500)
    text = str(report)
    assert text.splitlines()[0] == "Verdict: good"
    for word in ("ELBO", "log evidence", "k-hat", "ESS", "log weights", "defensive", "agreement    not checked"):
        assert word in text
    assert max(len(line) for line in text.splitlines()) < 130
    with pytest.raises(AttributeError):
        report.elbo = 0.0  # type: ignore[misc]


def test_diagnose_draws() -> None:
    weighted = log_weights(programs.gaussian_model, programs.gaussian_guide(), DATA)
    report = diagnose_draws(weighted)
    assert report.defensive is None
    assert report.verdict == GOOD
    few = WeightedDraws({"z": torch.zeros(5)}, torch.zeros(5), torch.zeros(5), torch.zeros(5))
    with pytest.raises(ValueError, match="at least 25"):
        diagnose_draws(few)
    with pytest.raises(ValueError, match="at least 25"):
        diagnose(programs.gaussian_model, programs.gaussian_guide(), DATA, num_samples=10)


def test_defensive_weights_are_unbiased_and_bounded() -> None:
    for guide in (programs.gaussian_guide(scale=0.5), programs.gaussian_guide(shift=2.0)):
        own = log_weights(programs.gaussian_model, guide, DATA, num_samples=4000)
        both = defensive_log_weights(programs.gaussian_model, guide, DATA, num_samples=4000)
        assert both is not None
        assert both.num_samples == 8000
        estimate = both.log_w.logsumexp(0) - math.log(8000)
        assert float(estimate) == pytest.approx(programs.gaussian_evidence(DATA), abs=0.1)
        assert both.log_w.max() < own.log_w.max() + math.log(2) + 0.5


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (autoguide.AutoNormal, {"init_scale": 1.0}),
        (autoguide.AutoMultivariateNormal, {"init_scale": 1.0}),
        (autoguide.AutoLowRankMultivariateNormal, {"init_scale": 1.0}),
        (autoguide.AutoIAFNormal, {}),
        (fg.AutoIAF, {"init_scale": 1.0}),
    ],
)
def test_defensive_density_is_normalized(make: Callable[..., Any], options: dict[str, float]) -> None:
    """The mean of p / q over draws of the mixture q is 1 for any density p that q covers."""

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = make(model, **options)
    guide()
    both = defensive_log_weights(model, guide, num_samples=2000)
    assert both is not None
    assert float(both.log_w.exp().mean()) == pytest.approx(1, abs=0.05)


def test_guides_without_a_scale_get_no_defensive_check() -> None:
    def model() -> None:
        pyro.sample("z", dist.Gamma(2.0, 1.0))

    report = diagnose(model, lambda: pyro.sample("z", dist.Gamma(2.0, 1.0)), num_samples=500)
    assert report.defensive is None
    assert report.verdict == GOOD


def test_models_written_for_one_draw_are_diagnosed() -> None:
    def model(data: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        pyro.factor("x", dist.Normal(z.unsqueeze(-1), 1.0).log_prob(data).sum())

    report = diagnose(model, programs.gaussian_guide(), DATA, num_samples=200)
    assert report.elbo == pytest.approx(programs.gaussian_evidence(DATA), abs=1e-4)
