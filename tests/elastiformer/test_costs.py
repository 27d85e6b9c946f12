"""The faster of two ways is found by turns, for each kind of work by itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from elastiformer import costs
from elastiformer.costs import SHARES, Trial, compare


def went(trial: Trial, work: str, seconds: dict[bool, float], times: int) -> list[bool]:
    """Which ways some turns went that take as long as told."""
    ways = []
    for _ in range(times):
        ways.append(trial.goes_first_way(work))
        trial.took(work, ways[-1], seconds[ways[-1]])
    return ways


@pytest.mark.parametrize("first_is_faster", [True, False])
def test_after_some_turns_each_the_faster_way_has_those_that_follow(first_is_faster):
    seconds = {first_is_faster: 1.0, not first_is_faster: 1.1}
    ways = went(Trial(turns=3), "work", seconds, 10)
    assert ways[:6].count(True) == ways[:6].count(False) == 3
    assert ways[6:] == [first_is_faster] * 4


def test_a_slow_turn_or_two_decide_nothing():
    trial = Trial(turns=5)
    went(trial, "work", {True: 90.0, False: 2.0}, 4)  # as when code is compiled
    assert went(trial, "work", {True: 1.0, False: 2.0}, 10)[-4:] == [True] * 4


def test_what_misled_the_first_turns_is_found_out():
    trial = Trial(turns=3, again=8)
    assert went(trial, "work", {True: 9.0, False: 2.0}, 7)[-1] is False  # something else ran here
    ways = went(trial, "work", {True: 1.0, False: 2.0}, 60)
    assert ways[-32:].count(False) == 4  # the other way, too, goes on being tried


def test_kinds_of_work_are_tried_apart():
    trial = Trial(turns=1)
    assert went(trial, "few", {True: 1.0, False: 2.0}, 3)[-1] is True
    assert went(trial, "many", {True: 2.0, False: 1.0}, 3)[-1] is False
    assert trial.goes_first_way("few")


@pytest.fixture
def passes(monkeypatch):
    """Lets time pass, which does not pass by itself."""
    seconds = [0.0]

    def passes(more: float) -> None:
        seconds[0] += more

    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    return passes


def test_ways_that_differ_clearly_are_told_apart_by_rows_and_share(passes):
    def by_row(share: float, rows: int) -> None:
        passes(1e-4 * (rows if share < 0.9 else 4 * rows))

    def at_once(share: float, rows: int) -> None:
        passes(1e-4 * 24)

    few = compare(by_row, at_once, 0.2)
    assert [few.rows(share) for share in SHARES] == [16] * 4 + [4] * 2


def test_shares_that_take_equally_long_are_measured_once(passes):
    seen = set()

    def way(share: float, rows: int) -> None:
        seen.add(share)
        passes(1e-4)

    few = compare(way, way, 0.1, shares_alike=True)
    assert seen == {1.0}
    # A tie is no reason to go row by row.
    assert {few.rows(share) for share in SHARES} == {0}
