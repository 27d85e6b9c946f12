"""Promises of the engine: every request gets exactly one ending, and leaving ends the work."""

import asyncio
import contextlib
import json

import httpx
import pytest
import torch

from elastiformer import Capacity, ElasticModel
from service.desk import Caller
from service.errors import Cancelled, EngineDead, StepFailed
from service.orders import Done, Failed, Generated
from service.schemas import CompletionRequest
from tests.service.conftest import (
    PATIENCE_SECONDS,
    House,
    Watched,
    build,
    elastic_model,
    in_house,
    soon,
)
from tests.tiny import tiny, tiny_tokenizer

LONG = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "temperature": 0}


class Faulty(ElasticModel):
    """A real model that raises, or gives no numbers, when its time has come."""

    def __init__(self, fault, at_step: int) -> None:
        super().__init__(tiny(), tokenizer=tiny_tokenizer())
        self.fault = fault
        self.steps_left = at_step

    def step(self, chunks):
        self.steps_left -= 1
        if self.steps_left == 0:
            if isinstance(self.fault, BaseException):
                raise self.fault
            return [torch.full_like(each, self.fault) for each in super().step(chunks)]
        return super().step(chunks)


@pytest.mark.parametrize("at_step", [1, 4])
@pytest.mark.parametrize("fault", [RuntimeError("boom"), MemoryError(), float("nan")])
def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(fault, at_step):
    async def visit(house):
        body = LONG | {"max_tokens": 20}
        replies = await asyncio.gather(*(house.post("/v1/completions", **body) for _ in range(3)))
        failed = [reply for reply in replies if reply.status_code != 200]
        assert failed
        for reply in failed:
            assert reply.status_code == 500
            assert reply.json()["error"]["code"] == "step_failed"
            assert "boom" not in reply.text and "Traceback" not in reply.text
        await house.until_idle()
        assert house.value("elasti_num_requests_running") == 0
        assert house.value("elasti_kv_cache_usage_perc") == 0
        assert (await house.complete(**body))["usage"]["completion_tokens"] == 20
        assert (await house.client.get("/health")).status_code == 200
        ended = house.value("elasti_request_success_total")
        assert ended == 4 and house.value(
            "elasti_request_success_total", finished_reason="error"
        ) == len(failed)

    in_house(visit, models={"tiny": Faulty(fault, at_step)})


class Broken(Watched):
    """A real model whose first step of three rows gives no numbers for the last two."""

    broke = False

    def step(self, chunks):
        logits = super().step(chunks)
        if len(chunks) == 3 and not self.broke:
            self.broke = True
            logits[1:] = [torch.full_like(each, torch.nan) for each in logits[1:]]
        return logits


def test_a_request_with_two_broken_rows_takes_nobody_along():
    model = Broken()

    async def visit(house):
        with model.held() as hold:
            first = asyncio.create_task(house.post("/v1/completions", **LONG))
            await soon(hold.waits.is_set)
            two = asyncio.create_task(house.post("/v1/completions", **LONG | {"n": 2}))
            await soon(lambda: len(house.engine._ledger.requests) == 3)
        assert (await two).json()["error"]["code"] == "step_failed"
        assert (await first).json()["usage"]["completion_tokens"] == LONG["max_tokens"]

    in_house(visit, models={"tiny": model})


def test_an_error_in_mid_stream_arrives_as_an_event(street):
    class Failing(Watched):
        def step(self, chunks):
            logits = super().step(chunks)
            if len(self.steps) == 12:
                raise RuntimeError("boom")
            return logits

    model = Failing()
    address = street(build({"tiny": model}))
    asked = {"url": f"{address}/v1/completions", "json": LONG | {"model": "tiny", "stream": True}}
    asked["timeout"] = PATIENCE_SECONDS
    # What fails before anything was sent is told by a status.
    with model.held(after=6) as hold, httpx.stream("POST", **asked) as reply:
        lines = reply.iter_lines()
        chunks = [next(lines)]
        hold.end()
        chunks += [line for line in lines if line]
    assert len(chunks) > 3
    assert json.loads(chunks[-1].removeprefix("data: "))["error"]["code"] == "step_failed"


def test_a_dead_engine_fails_everybody_and_health_says_so():
    async def visit(house):
        replies = await asyncio.gather(
            *(house.post("/v1/completions", **LONG) for _ in range(5)),
            house.post("/v1/completions", **LONG, stream=True),
        )
        told = [reply.json() if reply.status_code == 503 else reply.text for reply in replies]
        assert all("engine_dead" in str(each) for each in told)
        assert (await house.client.get("/health")).status_code == 503
        assert (await house.client.get("/ready")).status_code == 503
        late = await house.post("/v1/completions", **LONG)
        assert late.status_code == 503 and late.headers["retry-after"]
        assert not house.engine.alive
        assert house.value("elasti_engine_alive", model_name="tiny") == 0

    in_house(visit, models={"tiny": Faulty(SystemExit(1), 4)}, max_running=3)


def test_a_request_that_takes_too_long_ends_with_an_error():
    async def visit(house):
        reply = await house.post("/v1/completions", **LONG)
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "timeout"
        assert (await house.client.get("/health")).status_code == 200

    in_house(visit, request_timeout_seconds=0.05)


def test_stopping_the_engine_ends_what_runs():
    model = Watched()

    async def visit(house):
        with model.held(after=3) as hold:
            running = asyncio.create_task(house.post("/v1/completions", **LONG))
            await soon(hold.waits.is_set)
            stopping = asyncio.create_task(asyncio.to_thread(house.engine.stop))
            await soon(lambda: house.engine._stopping)
        await stopping
        assert (await running).status_code == 503

    in_house(visit, models={"tiny": model})


def test_every_order_gets_one_ending_whatever_happens():
    """Orders come, are cancelled and fail at once; each ticket's last event is its only ending."""

    async def visit(house):
        tickets = []
        for number in range(40):
            asked = CompletionRequest(
                model="tiny", prompt="ab" * (1 + number), max_tokens=5 + number, n=1 + number % 3
            )
            tickets.append(house.engine.submit(house.hall.desk.completion(asked, Caller()).order))
            if number % 4 == 1:
                tickets[-1].cancel()
            elif number % 4 == 2:
                asyncio.get_running_loop().call_later(0.01 * number, tickets[-1].cancel)
            await asyncio.sleep(0.002 * (number % 3))
        await house.until_idle()
        await asyncio.to_thread(house.engine.stop)  # so that nothing more can be said
        await asyncio.sleep(0)
        kinds = set()
        for ticket in tickets:
            events = [ticket._events.get_nowait() for _ in range(ticket._events.qsize())]
            endings = [event for event in events if isinstance(event, Done | Failed)]
            assert len(endings) == 1 and events[-1] is endings[0]
            ending = endings[0]
            kinds.add(type(ending.error) if isinstance(ending, Failed) else Done)
            ended = sum(isinstance(event, Generated) and bool(event.ended) for event in events)
            assert ended == len(ticket.order.jobs) or isinstance(ending, Failed)
        assert kinds == {Done, Cancelled, StepFailed}
        jobs = sum(len(ticket.order.jobs) for ticket in tickets)
        assert house.value("elasti_request_success_total") == jobs
        assert house.engine._scheduler.idle and not house.engine._ledger.rows
        assert house.engine._scheduler.reserved_blocks == 0

    in_house(visit, models={"tiny": Faulty(RuntimeError("boom"), 25)}, max_running=5)


async def leave(task: asyncio.Task[httpx.Response]) -> None:
    """Hang up, as a caller does who has had enough."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("stream", [True, False])
def test_work_stops_when_its_caller_leaves(street, stream):
    model = Watched()
    house = House(build({"tiny": model}), None)
    address = street(house.app)

    async def visit() -> None:
        async with httpx.AsyncClient(base_url=address, timeout=PATIENCE_SECONDS) as client:
            body = LONG | {"model": "tiny", "stream": stream, "capacity": 0.7}
            with model.held(after=3) as hold:
                asking = asyncio.create_task(client.post("/v1/completions", json=body))
                await soon(hold.waits.is_set)
                await leave(asking)
                await soon(lambda: house.engine._leaving)
        await house.until_idle()

    asyncio.run(visit())
    assert house.value("elasti_request_success_total", finished_reason="abort") == 1
    assert house.value("elasti_generation_tokens_total") == 4
    assert house.value("elasti_num_requests_running") == 0
    assert house.engine._scheduler.reserved_blocks == 0


def test_a_waiting_caller_who_leaves_is_forgotten(street):
    model = Watched()
    house = House(build({"tiny": model}, max_running=1), None)
    address = street(house.app)

    async def visit() -> None:
        async with httpx.AsyncClient(base_url=address, timeout=PATIENCE_SECONDS) as client:
            body = LONG | {"model": "tiny"}
            with model.held(after=3) as hold:
                first = asyncio.create_task(client.post("/v1/completions", json=body))
                await soon(hold.waits.is_set)
                second = client.post("/v1/completions", json=body | {"stream": True})
                waiting = asyncio.create_task(second)
                await soon(lambda: house.engine._scheduler.waiting)
                await leave(waiting)
                await soon(lambda: house.engine._leaving)
                hold.let_pass(1)
                await soon(hold.waits.is_set)
                assert not house.engine._scheduler.waiting
            assert (await first).status_code == 200

    asyncio.run(visit())
    assert house.value("elasti_request_success_total", finished_reason="abort") == 1
    assert house.value("elasti_generation_tokens_total") == 400


def test_nothing_is_taken_by_an_engine_that_was_never_started():
    async def visit() -> None:
        house = House(build(), None)
        asked = CompletionRequest(model="tiny", prompt="a", max_tokens=3)
        placed = house.hall.desk.completion(asked, Caller())
        assert placed.order.resolved.applied == Capacity()
        with pytest.raises(EngineDead):
            house.engine.submit(placed.order)

    asyncio.run(visit())


def test_a_slow_reader_of_a_stream_does_not_hold_up_the_others(street):
    app = build({"tiny": elastic_model()})
    address = street(app)

    async def read() -> None:
        async with httpx.AsyncClient(base_url=address, timeout=PATIENCE_SECONDS) as client:
            body = LONG | {"model": "tiny", "stream": True}
            async with client.stream("POST", "/v1/completions", json=body) as slow:
                lines = slow.aiter_lines()
                await anext(lines)
                quick = await client.post("/v1/completions", json=LONG | {"model": "tiny"})
                assert quick.status_code == 200
                rest = [line async for line in lines if line]
            assert rest[-1] == "data: [DONE]"

    asyncio.run(read())
