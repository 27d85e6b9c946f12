"""Promises of load: `auto` gives way while callers wait, nobody else unless the operator says so,
the answer tells, and what was given up comes back."""

import asyncio

import pytest

from elastiformer import Capacity
from service.knob import Asked, Knob
from service.load import Load, ceiling
from service.settings import Key
from tests.service.conftest import Clock, Watched, in_house


def test_pressure_grows_with_the_longest_wait_and_fades():
    clock = Clock()
    load = Load(2.0, clock)
    assert load.pressure == 0
    load.waited(0.5)  # a quarter of the patience: whoever comes within a step waits for its end
    assert load.pressure == 0
    load.waited(1.25)
    assert load.pressure == pytest.approx(0.5)
    load.waited(0.1)  # the longest counts
    assert load.pressure == pytest.approx(0.5)
    load.waited(60.0)
    assert load.pressure == 1
    load = Load(2.0, clock)
    load.waited(2.0)
    fading = []
    for _ in range(5):
        fading.append(load.pressure)
        clock.seconds += 1.0
    assert fading == sorted(fading, reverse=True) and fading[0] == 1
    assert fading[2] == pytest.approx((0.5 - 0.25) / 0.75)  # half after one patience
    assert load.pressure == 0


def test_a_ceiling_falls_from_one_to_the_floor_in_few_steps():
    steps = [ceiling(pressure / 100, 0.5) for pressure in range(101)]
    assert steps[0] == 1 and steps[-1] == 0.5 and steps == sorted(steps, reverse=True)
    assert len(set(steps)) == 11
    assert ceiling(1.0, 0.63) == 0.63 and ceiling(0.7, 1.0) == 1


@pytest.mark.parametrize(
    ("limits", "auto", "unnamed", "named"),
    [("nobody", 1.0, 1.0, 1.0), ("auto", 0.5, 1.0, 1.0), ("unnamed", 0.5, 0.5, 1.0),
     ("all", 0.5, 0.5, 0.5)],
)  # fmt: skip
def test_the_operator_says_whose_capacity_falls(limits, auto, unnamed, named):
    knob = Knob(effort={"high": Capacity()}, load_limits=limits)

    def applied(pressure=1.0, **forms):
        found = knob.resolve(Asked(**forms), None, 0.3, pressure)
        assert found.limited_by == (None if found.applied == Capacity() else "load")
        return found.applied

    assert applied(body="auto") == Capacity(auto, auto)
    assert applied() == Capacity(unnamed, unnamed)
    # A dense request equals what stands for `auto` inside; it is a number all the same.
    for form in ({"body": 1.0}, {"effort": "high"}, {"alias": "1.0"}):
        assert applied(**form) == Capacity(named, named)
    assert applied(pressure=0.0, body="auto") == Capacity()


def test_nobody_falls_below_his_floor_nor_rises_to_it():
    knob = Knob(load_floor=0.6)

    def under(lowest=0.3, **key):
        return knob.resolve(Asked("auto"), Key("caller", **key), lowest, 1.0)

    assert under().applied == Capacity(0.6, 0.6)
    assert under(floor=0.8).applied == Capacity(0.8, 0.8)
    assert under(floor=0.4).applied == Capacity(0.4, 0.4)
    assert under(floor=0.4, lowest=0.7).applied == Capacity(0.7, 0.7)
    found = under(floor=0.5, ceiling=0.5)
    assert (found.applied, found.limited_by) == (Capacity(0.5, 0.5), "key")
    half = knob.resolve(Asked("auto"), Key("caller", capacity=Capacity(0.5, 0.5)), 0.3, 0.0)
    assert half.applied == Capacity()  # `auto` is the server's default, not the key's


def test_auto_gives_way_while_others_wait_and_recovers():
    clock = Clock()

    async def visit(house):
        house.keeps_time_by(clock)

        async def asked(capacity, tokens):
            answer = await house.complete(capacity=capacity, max_tokens=tokens, ignore_eos=True)
            return answer["elasti"]

        def granted():
            return house.value("elasti_load_capacity_ceiling")

        assert granted() == 1
        before = await asked("auto", 1)
        assert (before["capacity_applied"], before["limited_by"]) == (1.0, None)
        crowd = [asyncio.create_task(asked(1.0, 12)) for _ in range(8)]
        # One after the other: once three have ended, the others have waited several patiences.
        while sum(each.done() for each in crowd) < 3:
            await asyncio.sleep(0.001)
        assert granted() == 0.5
        pressed, dense = await asyncio.gather(asked("auto", 1), asked(1.0, 1))
        assert (pressed["capacity_applied"], pressed["limited_by"]) == (0.5, "load")
        assert pressed["capacity_requested"] == "auto" and pressed["capacity_spent"] < 0.9
        assert (dense["capacity_applied"], dense["limited_by"]) == (1.0, None)
        assert house.value("elasti_capacity_override_total", reason="load") == 1
        assert {each["capacity_applied"] for each in await asyncio.gather(*crowd)} == {1.0}
        clock.seconds += 10
        assert granted() == 1
        assert (await asked("auto", 1))["limited_by"] is None

    in_house(
        visit,
        models={"tiny": Watched(step_seconds=0.02, clock=clock)},
        max_running=1,
        load_patience_seconds=0.2,
    )
