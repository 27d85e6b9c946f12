"""Every order gets exactly one ending, whatever happens in whatever order.

Hypothesis draws the orders of a day, who leaves when, and the steps in which the model fails, the
clock jumps, or the engine dies. The engine, its thread and the model are the real ones.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import pytest
import torch
from hypothesis import event, example, given
from hypothesis import strategies as st

from elastiformer import ElasticModel
from service.desk import Caller
from service.errors import Cancelled, Draining, EngineDead, QueueFull, StepFailed, TimedOut
from service.orders import Done, Failed, Generated, Scored, Ticket
from service.schemas import CompletionRequest
from tests.examples import examples
from tests.service.conftest import PATIENCE_SECONDS, Clock, House, build, elastic_model, opened

TIMEOUT_SECONDS = 600.0
MOST_RUNNING, MOST_WAITING = 3, 9  # the largest order may wait whole

Fault = Literal["raises", "out of memory", "one row broken", "all rows broken", "late", "dies"]


# What is drawn.


@dataclass(frozen=True)
class Placed:
    """An order, as its caller writes it."""

    prompt_tokens: int = 1
    new_tokens: int = 1
    choices: int = 1
    prompts: int = 1
    capacity: float = 1.0
    scored: bool = False


@dataclass(frozen=True)
class Leaves:
    """A caller who goes away: the one of that order, counted from the first."""

    order: int


@dataclass(frozen=True)
class Waits:
    """Nothing, while the engine makes so many steps; or until it has nothing to do."""

    steps: int


@dataclass(frozen=True)
class Day:
    moves: tuple[Placed | Leaves | Waits, ...]
    faults: tuple[tuple[int, Fault], ...] = ()  # by the number of the step
    unopened: tuple[int, ...] = ()  # sequences that cannot be made, by number
    stops: bool = False  # with whatever still runs

    def has(self, *faults: Fault) -> bool:
        return any(fault in faults for _, fault in self.faults)


orders = st.builds(
    Placed,
    prompt_tokens=st.integers(1, 40),
    new_tokens=st.integers(1, 12),
    choices=st.integers(1, 3),
    prompts=st.integers(1, 3),
    capacity=st.sampled_from((1.0, 0.8, 0.6)),
    scored=st.booleans(),
)
moves = st.one_of(
    orders, st.builds(Waits, st.integers(0, 4)), orders, st.builds(Leaves, st.integers(0, 3))
)
faults = st.tuples(
    st.integers(1, 12),
    st.sampled_from(
        ("raises", "out of memory", "one row broken", "all rows broken", "late", "dies")
    ),
)
days = st.builds(
    Day,
    moves=st.lists(moves, min_size=1, max_size=14).map(tuple),
    faults=st.lists(faults, max_size=2).map(tuple),
    unopened=st.lists(st.integers(1, 12), max_size=1).map(tuple),
    stops=st.booleans(),
)


# A real model on a bad day.


class Moody(ElasticModel):
    """A real model some of whose steps fail, each in the way that the day has for it."""

    def __init__(self, day: Day, clock: Clock) -> None:
        known = _known()
        super().__init__(known.base, known.adapter, tokenizer=known.tokenizer)
        self.day, self.clock = day, clock
        self.steps = self.tries = self.unopened = 0
        self.engine: Any = None
        self.failed: set[Ticket] = set()  # whose rows were in a step that failed

    def sequence(self, *args: Any, **choices: Any) -> Any:
        self.tries += 1
        if self.tries in self.day.unopened:
            self.unopened += 1
            raise RuntimeError("no sequence today")
        return super().sequence(*args, **choices)

    def step(self, chunks):
        self.steps += 1
        fault = dict(self.day.faults).get(self.steps)
        if fault in ("raises", "out of memory"):
            self.blame(chunks)
            raise RuntimeError("boom") if fault == "raises" else MemoryError
        if fault == "dies":
            raise SystemExit(1)
        logits = super().step(chunks)
        if fault in ("one row broken", "all rows broken"):
            broken = range(len(chunks)) if fault == "all rows broken" else [len(chunks) // 2]
            self.blame([chunks[place] for place in broken if len(logits[place])])
            for place in broken:
                logits[place] = torch.full_like(logits[place], torch.nan)
        if fault == "late":
            self.clock.seconds += 2 * TIMEOUT_SECONDS
        return logits

    def blame(self, chunks) -> None:
        among = {chunk.sequence for chunk in chunks}
        rows = self.engine._ledger.rows.values()
        self.failed |= {row.request.ticket for row in rows if row.sequence in among}


@lru_cache
def _known() -> ElasticModel:
    return elastic_model()


# One day.


@dataclass(frozen=True)
class Ended:
    """A ticket that was taken, and all that its caller heard."""

    ticket: Ticket
    events: list[Any]
    error: Exception | None


async def listen(ticket: Ticket) -> Ended:
    events: list[Any] = []
    try:
        async for event_ in ticket.events():
            events.append(event_)
    except Exception as error:
        return Ended(ticket, events, error)
    return Ended(ticket, events, None)


def submit(house: House, placed: Placed, number: int) -> Ticket:
    ids = [(7 * number + place) % 250 for place in range(placed.prompt_tokens)]
    asked = CompletionRequest(
        model="tiny",
        prompt=[ids] * placed.prompts,
        max_tokens=placed.new_tokens,
        n=placed.choices,
        capacity=placed.capacity,
        echo=placed.scored,
        logprobs=1 if placed.scored else None,
        seed=number,
    )
    return house.engine.submit(house.hall.desk.completion(asked, Caller()).order)


async def live(house: House, model: Moody, day: Day) -> None:
    tickets: list[Ticket] = []
    left: set[Ticket] = set()
    for number, move in enumerate(day.moves):
        if isinstance(move, Placed):
            try:
                tickets.append(submit(house, move, number))
            except QueueFull:
                event("a full queue")
            except EngineDead:
                assert day.has("dies")
        elif isinstance(move, Leaves) and move.order < len(tickets):
            tickets[move.order].cancel()
            left.add(tickets[move.order])
        elif isinstance(move, Waits):
            until = model.steps + move.steps
            while model.steps < until and house.engine.alive and not house.engine.idle:
                await asyncio.sleep(0.001)
    if day.stops:
        await asyncio.to_thread(house.engine.stop)
    ended = await asyncio.gather(*(listen(ticket) for ticket in tickets))
    died = day.has("dies") and not house.engine.alive and not day.stops
    if not day.stops and not died:
        assert house.engine.alive
        await serves_on(house, model)
    await asyncio.to_thread(house.engine.stop)  # so that nothing more can be said
    await asyncio.sleep(0)

    for each in ended:
        check(each, day, each.ticket in left)
    harmed = {each.ticket for each in ended if isinstance(each.error, StepFailed)}
    assert len(harmed - model.failed) <= model.unopened, "failed in a step that it was not in"
    jobs = sum(len(ticket.order.jobs) for ticket in tickets)
    more = 0 if day.stops or died else 1
    assert house.value("elasti_request_success_total") == jobs + more
    nothing_is_left(house, model)


async def serves_on(house: House, model: Moody) -> None:
    """An engine that came through all this still gives an answer."""
    model.day = Day(())
    ended = await listen(submit(house, Placed(new_tokens=3), 0))
    assert ended.error is None


def check(ended: Ended, day: Day, has_left: bool) -> None:
    """One ending, the last of its events, and with a reason."""
    order, events, error = ended.ticket.order, ended.events, ended.error
    assert ended.ticket._events.empty(), "more after the ending"
    assert not any(isinstance(each, Done | Failed) for each in events[:-1])
    last = [each.number for each in events if isinstance(each, Generated) and each.ended]
    assert len(set(last)) == len(last), "a job ended twice"
    scored = [each.number for each in events if isinstance(each, Scored)]
    assert len(set(scored)) == len(scored), "a job scored twice"
    event(type(error).__name__ if error else "Done")
    if error is None:
        assert isinstance(events[-1], Done)
        assert sorted(last) == [job.number for job in order.jobs]
        return
    reasons = {
        Cancelled: has_left,
        TimedOut: day.has("late"),
        StepFailed: True,  # the caller looks at whose steps those were
        Draining: day.stops,
        EngineDead: day.has("dies"),
    }
    assert reasons.get(type(error)), f"failed without a reason: {error!r}"


def nothing_is_left(house: House, model: Moody) -> None:
    engine = house.engine
    assert not engine._ledger.rows and not engine._ledger.requests and engine._scheduler.idle
    for name in ("running", "waiting"):
        assert house.value(f"elasti_num_requests_{name}") == 0
    assert house.value("elasti_kv_cache_usage_perc") == 0
    assert model.cache.free_blocks == model.cache.total_blocks


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@examples(40)
@given(day=days)
@example(
    Day(
        (Placed(9, 12, 3), Placed(3, 12, 2), Placed(2, 12), Waits(2), Leaves(0), Leaves(2)),
        faults=((4, "one row broken"), (7, "late")),
    )
)
@example(  # a step fails while others wait
    Day((Placed(4, 12, 3), Placed(4, 12, 3), Waits(9)), faults=((4, "raises"),))
)
@example(  # one choice breaks in a step that its sister and a stranger are in
    Day((Placed(4, 12, 2), Placed(4, 12), Waits(9)), faults=((5, "one row broken"),))
)
def test_every_order_gets_exactly_one_ending(day):
    clock = Clock()
    model = Moody(day, clock)
    app = build(
        {"tiny": model},
        max_running=MOST_RUNNING,
        max_waiting=MOST_WAITING,
        max_step_tokens=16,
        cache_tokens=128,
        request_timeout_seconds=TIMEOUT_SECONDS,
    )
    house = House(app, None)
    model.engine = house.engine
    model.engine._clock = model.engine._ledger._clock = clock

    async def talk() -> None:
        async with opened(app) as house, asyncio.timeout(PATIENCE_SECONDS):
            await live(house, model, day)

    asyncio.run(talk())
