"""Promises of the server on paper: where theory knows the answer, it gives that answer."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.simulation import (
    Arrival,
    Host,
    Promise,
    StepTimes,
    crossing,
    factor_for,
    held_rate,
    poisson,
    simulate,
)
from elastiformer.capacity import DENSE
from service.scheduler import Job, Limits

STEP = 0.1
# Every step of prompts takes as long, and so does every step of decodes: whatever is in it.
EVEN = StepTimes((0, 1, 64), (0, 1, 512), ((0.0, STEP, STEP), (STEP,) * 3, (STEP,) * 3))


def host(places=16, times=EVEN, overhead=1.0):
    limits = Limits(
        max_waiting=1, max_running=places, max_step_tokens=512, cache_blocks=10 * places
    )
    return Host(limits, max_decode_delay_seconds=0.25, times=times, overhead=overhead)


def job(prompt=32, new=1):
    return Job(0, tuple(range(prompt)), DENSE, most_new=new, blocks=10)


def test_times_are_those_of_the_table_and_linear_between():
    times = StepTimes((0, 4, 16), (0, 100), ((0.0, 1.0), (2.0, 3.0), (5.0, 9.0)))
    assert times.of(0, 100) == 1 and times.of(4, 0) == 2 and times.of(16, 100) == 9
    assert times.of(2, 0) == 1 and times.of(10, 0) == 3.5
    assert times.of(10, 50) == pytest.approx((2 + 3 + 5 + 9) / 4)
    assert times.of(28, 0) == 8 and times.of(0, 300) == 3  # beyond: as between the last two


def test_one_request_alone_takes_its_steps():
    (fate,) = simulate(host(), [Arrival(3.0, job(prompt=600, new=5))])
    assert fate.admitted == 3.0
    assert fate.to_first_token == pytest.approx(2 * STEP)  # 512 tokens, then 88
    assert fate.ended == pytest.approx(3.0 + 6 * STEP)
    assert fate.between_tokens == pytest.approx(STEP)
    (slow,) = simulate(host(overhead=1.5), [Arrival(3.0, job(prompt=600, new=5))])
    assert slow.ended == pytest.approx(3.0 + 9 * STEP)


def test_one_place_waits_as_queueing_theory_says():
    """M/D/1: the mean wait is load / (1 - load) / 2 of a service."""
    for load in (0.5, 0.8):
        arrivals = poisson([job()], load / STEP, 500, seed=1)
        waits = [fate.admitted - fate.arrived for fate in simulate(host(places=1), arrivals)]
        assert len(waits) == pytest.approx(500 * load / STEP, rel=0.05)
        assert statistics.mean(waits) == pytest.approx(STEP * load / (1 - load) / 2, rel=0.08)


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.6])
def test_the_factor_is_found_again_in_what_requests_took(factor):
    arrivals = poisson([job(new=4)], 1.2, 60, seed=2)
    fates = simulate(host(overhead=factor), arrivals)
    taken = statistics.fmean(fate.ended - fate.arrived for fate in fates)
    assert factor_for(host(), arrivals, taken) == pytest.approx(factor, abs=0.01)


def test_places_are_shared_and_nobody_is_lost():
    arrivals = [Arrival(0.0, job(new=10)) for _ in range(40)]
    fates = simulate(host(places=8), arrivals)
    # Five times eight: a prompt step in which all fit, then nine steps of decodes.
    assert max(fate.ended for fate in fates) == pytest.approx(5 * 10 * STEP)
    assert [fate.tokens for fate in fates] == [10] * 40
    cut = simulate(host(places=8), arrivals, until=2.05)
    assert sum(fate.ended is not None for fate in cut) == 16


def test_a_step_follows_its_rows():
    growing = StepTimes((0, 64), (0, 512), ((0.0, 0.512), (6.4, 6.912)))
    one, two = (
        max(fate.ended for fate in simulate(host(times=growing), [Arrival(0, job(new=11))] * count))
        for count in (1, 2)
    )
    assert (one, two) == (pytest.approx(0.032 + 1.0), pytest.approx(0.064 + 2.0))


def test_the_rate_held_is_where_the_share_falls():
    assert held_rate(lambda rate: 1 - rate / 10, 0.9, most=8) == pytest.approx(1, abs=0.04)
    assert held_rate(lambda rate: 1.0, 0.9, most=8) == 8
    promise = Promise(2.0, 0.25, 0.9)
    times = [(1.0, 0.2), (3.0, 0.2), (1.0, 0.3), (2.0, None)]
    assert promise.share_kept(times) == 0.5 and promise.share_kept([]) == 1


def test_a_measured_share_is_crossed_between_its_points():
    assert crossing([(1, 1.0), (2, 0.95), (3, 0.75)], 0.9) == pytest.approx(2.25)
    assert crossing([(2, 0.8)], 0.9) == pytest.approx(1)
    assert crossing([(1, 1.0), (2, 0.9)], 0.9) is None
