"""When a fit explores, refines and ends."""

import math
import random
from dataclasses import asdict

import pytest

from pyro_flowguides.inference.schedule import Schedule


def run(schedule, elbo):
    """Run a schedule to its end; return step size and number of particles of every step."""
    steps = []
    while not schedule.is_done:
        steps.append((schedule.lr_at(schedule.step), schedule.current_num_particles))
        schedule.advance(elbo(schedule.step))
        assert schedule.step <= schedule.steps
    return steps


def noisy(mean, sd=0.1):
    generator = random.Random(0)
    return lambda step: mean(step) + generator.gauss(0, sd)


def test_a_flat_bound_ends_the_exploration_early():
    schedule = Schedule(4000, 0.01, 32, 0.01)
    steps = run(schedule, noisy(lambda step: -5.0))
    assert schedule.refining_since <= 600
    assert len(steps) == schedule.step == schedule.refining_since + 2000
    assert "gained less than 0.01 nats" in schedule.reason


def test_a_rising_bound_is_explored_for_half_of_the_steps():
    schedule = Schedule(1000, 0.01, 32, 0.01)
    steps = run(schedule, noisy(lambda step: 0.01 * step))
    assert len(steps) == 1000
    assert schedule.reason == "all 1000 steps used"
    assert schedule.refining_since == 500


def test_a_bound_that_stops_rising_ends_the_exploration_soon_after():
    schedule = Schedule(8000, 0.01, 32, 0.01)
    run(schedule, noisy(lambda step: -10 * math.exp(-step / 200)))
    assert 600 < schedule.refining_since < 3000


def test_a_rise_smaller_than_the_noise_of_a_step_is_detected():
    """Half a nat in a hundred steps against a noise of one nat per step."""
    schedule = Schedule(4000, 0.01, 32, 0.01)
    run(schedule, noisy(lambda step: 0.005 * step, sd=1.0))
    assert schedule.reason == "all 4000 steps used"


def test_one_dip_does_not_end_the_exploration():
    schedule = Schedule(4000, 0.01, 32, 0.01)
    run(schedule, noisy(lambda step: 0.01 * step - (2.0 if 600 <= step < 650 else 0.0)))
    assert schedule.reason == "all 4000 steps used"


def test_a_guide_that_becomes_nearly_exact_gets_a_short_refinement():
    """The gap counts as a mean over a window, so that one lucky step decides nothing."""
    schedule = Schedule(4000, 0.01, 32, 0.01)
    gap = noisy(lambda step: 0.01 if step == 20 else 5.0 if step < 700 else 0.05, sd=0.01)
    while not schedule.is_done:
        schedule.advance(0.01 * schedule.step, gap(schedule.step))
    assert 700 + schedule.WINDOW <= schedule.refining_since <= 700 + 2 * schedule.WINDOW
    assert schedule.step == 2 * schedule.refining_since
    assert "came within 0.3 nats" in schedule.reason


@pytest.mark.parametrize("gap", [0.0, 0.2, 0.4, 1e9, math.nan])
def test_only_a_nearly_exact_start_skips_the_exploration_and_takes_smaller_steps(gap):
    schedule = Schedule(4000, 0.01, 32, 0.01)
    schedule.start(gap)
    steps = run(schedule, noisy(lambda step: 0.01 * step))
    if gap < 0.3:
        assert len(steps) == schedule.MIN_REFINE_STEPS
        assert max(lr for lr, _ in steps) <= 0.003
        assert "the start was within" in schedule.reason
    else:
        assert len(steps) == 4000
        assert max(lr for lr, _ in steps) == pytest.approx(0.01)


def test_the_step_size_warms_up_and_falls_along_a_cosine_while_refining():
    lrs = [lr for lr, _ in run(Schedule(1000, 0.01, 32, 0.01), noisy(lambda step: float(step)))]
    assert lrs[0] == pytest.approx(0.01 / 50)
    assert lrs[49:500] == pytest.approx([0.01] * 451)
    assert lrs[750] == pytest.approx(0.01 * (0.01 + 0.99 * 0.5))
    assert lrs[500:] == sorted(lrs[500:], reverse=True)
    assert 0.01 * 0.01 <= lrs[-1] < 0.01 * 0.0102


@pytest.mark.parametrize(("steps", "stages"), [(2000, [32, 45, 64]), (1000, [32, 64]), (600, [64])])
def test_particles_double_while_refining_in_a_few_long_stages(steps, stages):
    numbers = [number for _, number in run(Schedule(steps, 0.01, 32, 0.01), noisy(lambda step: float(step)))]
    exploring, refining = numbers[: steps // 2], numbers[steps // 2 :]
    assert set(exploring) == {32}
    assert refining == sorted(refining)
    assert list(dict.fromkeys(refining)) == stages  # each is recorded once
    assert min(map(refining.count, stages)) >= Schedule.MIN_STAGE_STEPS


def test_steps_without_a_bound_count_neither_as_a_rise_nor_as_a_stall():
    schedule = Schedule(1000, 0.01, 32, 0.01)
    run(schedule, lambda step: math.nan)
    assert schedule.reason == "all 1000 steps used"
    assert not schedule.elbos
    assert schedule.num_stalls == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10])
def test_short_schedules_take_exactly_their_steps(steps):
    schedule = Schedule(steps, 0.01, 32, 0.01)
    assert len(run(schedule, lambda step: 0.0)) == steps
    assert schedule.reason == f"all {steps} steps used"


@pytest.mark.parametrize("stop", [1, 99, 250, 420, 900])
def test_a_schedule_continues_from_its_state(stop):
    elbos = [noisy(lambda step: -5 * math.exp(-step / 50))(step) + 0.001 * (step % 7) for step in range(2000)]
    schedule = Schedule(2000, 0.01, 32, 0.01)
    for step in range(stop):
        if not schedule.is_done:
            schedule.advance(elbos[step])
    other = Schedule(**asdict(schedule))
    assert other == schedule
    assert run(other, lambda step: elbos[step]) == run(schedule, lambda step: elbos[step])
    assert other == schedule


def seen(schedule, step):
    """Return everything about a step that the schedule decides."""
    particles, stage_end = schedule.current_num_particles, schedule.stage_end
    return schedule.lr_at(step), particles, stage_end, schedule.is_refining, schedule.is_averaging


@pytest.mark.parametrize("elbo", [lambda step: float(step), lambda step: 0.0], ids=["rising", "flat"])
@pytest.mark.parametrize("gap", [5.0, 0.01], ids=["far", "near"])
def test_nothing_but_the_step_size_changes_before_the_next_decision(elbo, gap):
    """Steps up to there can be taken in one call."""
    single, together = Schedule(1037, 0.01, 32, 0.01), Schedule(1037, 0.01, 32, 0.01)
    one_by_one, in_calls, num_calls = [], [], 0
    while not single.is_done:
        one_by_one.append(seen(single, single.step))
        single.advance(elbo(single.step), gap)
    while not together.is_done:
        steps = range(together.step, together.next_decision)
        assert together.step < together.next_decision <= together.stage_end
        in_calls += [seen(together, step) for step in steps]
        for _ in steps:
            together.advance(elbo(together.step), gap)
        num_calls += 1
    assert in_calls == one_by_one
    assert num_calls < len(one_by_one)
