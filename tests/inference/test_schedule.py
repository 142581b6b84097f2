"""When a fit explores, refines and ends."""

import math
import random

import pytest

from pyro_flowguides.inference.schedule import Schedule


def run(schedule, elbo):
    """All steps: (step size, particles) before each."""
    seen = []
    while not schedule.done:
        seen.append((schedule.rate, schedule.current_particles))
        schedule.advance(elbo(schedule.step))
        assert schedule.step <= schedule.steps
    return seen


def noisy(mean, sd=0.1):
    generator = random.Random(0)
    return lambda step: mean(step) + generator.gauss(0, sd)


def test_a_flat_bound_ends_the_exploration_early_and_says_so():
    schedule = Schedule(4000, 0.01, 32, 0.01)
    seen = run(schedule, noisy(lambda step: -5.0))
    assert schedule.refining_since <= 600
    assert len(seen) == schedule.step == schedule.refining_since + 2000
    assert "gained less than 0.01 nats" in schedule.reason


def test_a_rising_bound_is_followed_to_the_end():
    schedule = Schedule(1000, 0.01, 32, 0.01)
    seen = run(schedule, noisy(lambda step: 0.01 * step))
    assert len(seen) == 1000
    assert schedule.reason == "all 1000 steps used"
    assert schedule.refining_since == 500


def test_a_bound_that_rises_and_then_stands_still_ends_where_it_does():
    schedule = Schedule(8000, 0.01, 32, 0.01)
    run(schedule, noisy(lambda step: -10 * math.exp(-step / 200)))
    assert 600 < schedule.refining_since < 3000


def test_a_rise_that_single_steps_hide_is_seen():
    """Half a nat in a hundred steps against a noise of one nat per step."""
    schedule = Schedule(4000, 0.01, 32, 0.01)
    run(schedule, noisy(lambda step: 0.005 * step, sd=1.0))
    assert schedule.reason == "all 4000 steps used"


def test_one_dip_is_no_standstill():
    schedule = Schedule(4000, 0.01, 32, 0.01)
    run(schedule, noisy(lambda step: 0.01 * step - (2.0 if 600 <= step < 650 else 0.0)))
    assert schedule.reason == "all 4000 steps used"


def test_a_guide_that_becomes_nearly_exact_is_refined_shortly():
    """The gap counts as a mean over a window, not by one lucky step."""
    schedule = Schedule(4000, 0.01, 32, 0.01)
    gap = noisy(lambda step: 0.01 if step == 20 else 5.0 if step < 700 else 0.05, sd=0.01)
    while not schedule.done:
        schedule.advance(0.01 * schedule.step, gap(schedule.step))
    assert 700 + schedule.WINDOW <= schedule.refining_since <= 700 + 2 * schedule.WINDOW
    assert schedule.step == 2 * schedule.refining_since
    assert "came within 0.3 nats" in schedule.reason


@pytest.mark.parametrize("gap", [0.0, 0.2, 0.4, 1e9, math.nan])
def test_a_start_that_is_nearly_exact_is_refined_at_once_with_care(gap):
    schedule = Schedule(4000, 0.01, 32, 0.01)
    schedule.begin(gap)
    seen = run(schedule, noisy(lambda step: 0.01 * step))
    if gap < 0.3:
        assert len(seen) == schedule.LEAST_REFINING
        assert max(rate for rate, _ in seen) <= 0.003
        assert "the start was within" in schedule.reason
    else:
        assert len(seen) == 4000
        assert max(rate for rate, _ in seen) == pytest.approx(0.01)


def test_step_size_warms_up_stays_and_falls_along_a_cosine():
    rates = [rate for rate, _ in run(Schedule(1000, 0.01, 32, 0.01), noisy(lambda step: float(step)))]
    assert rates[0] == pytest.approx(0.01 / 50)
    assert rates[49:500] == pytest.approx([0.01] * 451)
    assert rates[750] == pytest.approx(0.01 * (0.01 + 0.99 * 0.5))
    assert rates[500:] == sorted(rates[500:], reverse=True)
    assert 0.01 * 0.01 <= rates[-1] < 0.01 * 0.0102


@pytest.mark.parametrize(("steps", "stairs"), [(2000, [32, 45, 64]), (1000, [32, 64]), (600, [64])])
def test_particles_double_while_refining_in_stairs_of_many_steps(steps, stairs):
    batches = [batch for _, batch in run(Schedule(steps, 0.01, 32, 0.01), noisy(lambda step: float(step)))]
    exploring, refining = batches[: steps // 2], batches[steps // 2 :]
    assert set(exploring) == {32}
    assert refining == sorted(refining)
    assert list(dict.fromkeys(refining)) == stairs  # each is recorded once
    assert min(map(refining.count, stairs)) >= Schedule.LEAST_STAIR


def test_steps_without_a_bound_are_neither_gain_nor_standstill():
    schedule = Schedule(1000, 0.01, 32, 0.01)
    run(schedule, lambda step: math.nan)
    assert schedule.reason == "all 1000 steps used"
    assert not schedule.elbos
    assert schedule.standstills == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10])
def test_no_more_steps_than_asked_for(steps):
    schedule = Schedule(steps, 0.01, 32, 0.01)
    assert len(run(schedule, lambda step: 0.0)) == steps
    assert schedule.reason


@pytest.mark.parametrize("stop", [1, 99, 250, 420, 900])
def test_state_round_trip(stop):
    elbos = [noisy(lambda step: -5 * math.exp(-step / 50))(step) + 0.001 * (step % 7) for step in range(2000)]
    schedule = Schedule(2000, 0.01, 32, 0.01)
    for step in range(stop):
        if not schedule.done:
            schedule.advance(elbos[step])
    other = Schedule(**schedule.state())
    assert other == schedule
    assert run(other, lambda step: elbos[step]) == run(schedule, lambda step: elbos[step])
    assert other == schedule


@pytest.mark.parametrize("elbo", [lambda step: float(step), lambda step: 0.0], ids=["rising", "standing still"])
@pytest.mark.parametrize("gap", [5.0, 0.01], ids=["far", "near"])
@pytest.mark.parametrize("most", [7, 1000])
def test_steps_taken_together_are_those_taken_one_by_one(elbo, gap, most):
    one, other = Schedule(1037, 0.01, 32, 0.01), Schedule(1037, 0.01, 32, 0.01)
    singly = []
    while not one.done:
        singly.append((one.rate, one.current_particles, one.refining_since, one.averaging))
        one.advance(elbo(one.step), gap)
    together, calls = [], 0
    while not other.done:
        common = other.current_particles, other.refining_since, other.averaging
        rates = other.rates(most)
        assert 1 <= len(rates) <= most
        together += [(rate, *common) for rate in rates]
        for _ in rates:
            other.advance(elbo(other.step), gap)
        calls += 1
    assert together == singly
    assert calls < len(singly)
