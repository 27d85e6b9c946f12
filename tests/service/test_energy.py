"""Promises of the energy: what a counter shows is shared out whole, by FLOPs, and to no sleeper.

The counter is handed in here; the code that reads a real one has not run on a GPU.
"""

import sys

import pytest

from service.energy import Bill, Meter, meter_of
from tests.service.conftest import in_house

WORK = {"prompt": "Once upon a time", "max_tokens": 9, "ignore_eos": True, "temperature": 0}


class Counter:
    """Joules that only a test adds."""

    def __init__(self, joules=1000.0):
        self.joules = joules

    def __call__(self):
        return self.joules


def test_a_difference_is_shared_by_flops():
    counter, small, large = Counter(), Bill(), Bill()
    meter = Meter(counter)
    meter.begin()
    counter.joules += 8
    meter.share([(small, 100), (large, 300)])
    assert (small.joules, large.joules) == (2, 6)


def test_a_counter_that_lags_is_shared_over_all_steps_since():
    counter, early, late = Counter(), Bill(), Bill()
    meter = Meter(counter)
    meter.begin()
    meter.share([(early, 100)])
    meter.share([(early, 100), (late, 200)])
    assert early.joules == late.joules == 0  # it has not moved yet
    counter.joules += 10
    meter.share([(late, 600)])
    assert (early.joules, late.joules) == (2, 8)
    counter.joules += 3
    meter.share([(late, 5)])  # nothing is shared twice
    assert (early.joules, late.joules) == (2, 11)


def test_who_has_ended_pays_no_more():
    counter, gone, stays = Counter(), Bill(), Bill()
    meter = Meter(counter)
    meter.begin()
    meter.share([(gone, 100), (stays, 100)])
    meter.close(gone)
    counter.joules += 6
    meter.share([(stays, 1)])
    assert (gone.joules, stays.joules) == (0, 6)


def test_what_is_used_at_rest_is_nobody_s():
    counter, bill = Counter(), Bill()
    meter = Meter(counter)
    meter.begin()  # two engines of one device
    meter.begin()
    with meter.resting():
        counter.joules += 4  # the other one works
    meter.share([(bill, 1)])
    assert bill.joules == 4
    with meter.resting(), meter.resting():
        counter.joules += 50
    counter.joules += 2
    meter.share([(bill, 1)])
    assert bill.joules == 6


def test_answers_and_the_metric_hold_what_the_counter_showed():
    """Two joules per read: each step reads once, and a rest is read but not billed."""

    class Ticking(Counter):
        reads = 0

        def __call__(self):
            self.reads += 1
            self.joules += 2
            return self.joules

    counter = Ticking()

    async def visit(house):
        page = (await house.client.get("/metrics")).text
        assert 'elasti_energy_joules_total{model_name="tiny",tier="0.6"} 0.0' in page
        steps = []
        step = house.engine.model.step
        house.engine.model.step = lambda chunks: steps.append(len(chunks)) or step(chunks)
        answers = [await house.complete(**WORK, capacity=capacity) for capacity in (1.0, 0.6)]
        told = [answer["usage"]["compute"]["energy_joules"] for answer in answers]
        assert sum(told) == 2 * len(steps)
        assert house.value("elasti_energy_joules_total") == sum(told)
        assert house.value("elasti_energy_joules_total", tier="0.6") == told[1]
        assert (await house.client.get("/version")).json()["models"]["tiny"]["energy"] is True

    in_house(visit, meter=Meter(counter))


def test_without_a_counter_there_is_no_field_and_no_sample():
    async def visit(house):
        answer = await house.complete(**WORK)
        assert "energy_joules" not in answer["usage"]["compute"]
        page = (await house.client.get("/metrics")).text
        assert not [line for line in page.splitlines() if line.startswith("elasti_energy")]

    in_house(visit)


def test_a_cpu_has_no_counter():
    assert meter_of("cpu") is None


def test_without_the_package_there_is_no_meter(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert meter_of("cuda:0") is None


def test_without_a_driver_there_is_no_meter():
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert meter_of("cuda:0") is None  # the package is there, and its library is not
    else:
        pytest.skip("this machine has a driver")
