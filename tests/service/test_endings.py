"""Promises of the engine: every request gets exactly one ending, and leaving ends the work."""

import asyncio
import json

import httpx
import pytest
import torch

from elastiformer import Capacity, ElasticModel
from service.errors import EngineDead
from tests.service.conftest import House, build, elastic_model, in_house
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


def test_an_error_in_mid_stream_arrives_as_an_event():
    async def visit(house):
        reply = await house.post("/v1/completions", **LONG, stream=True)
        *chunks, last = [line for line in reply.text.split("\n\n") if line]
        assert len(chunks) >= 3
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "step_failed"

    in_house(visit, models={"tiny": Faulty(RuntimeError("boom"), 12)})


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

    in_house(visit, models={"tiny": Faulty(SystemExit(1), 4)}, max_running=3)


def test_a_request_that_takes_too_long_ends_with_an_error():
    async def visit(house):
        reply = await house.post("/v1/completions", **LONG)
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "timeout"
        assert (await house.client.get("/health")).status_code == 200

    in_house(visit, request_timeout_seconds=0.05)


def test_stopping_the_engine_ends_what_runs():
    async def visit(house):
        running = asyncio.create_task(house.post("/v1/completions", **LONG))
        while not house.engine._requests:
            await asyncio.sleep(0)
        await asyncio.to_thread(house.engine.stop)
        assert (await running).status_code == 503

    in_house(visit)


def test_every_order_gets_one_ending_whatever_happens():
    """Requests come, leave and fail at once; each ticket sees exactly one last event."""

    async def visit(house):
        endings: dict[int, int] = {}

        async def one(number: int) -> None:
            body = LONG | {"max_tokens": 5 + number, "n": 1 + number % 3}
            try:
                async with asyncio.timeout(0.02 * (number % 4) or None):
                    await house.post("/v1/completions", **body)
            except TimeoutError:
                pass
            endings[number] = endings.get(number, 0) + 1

        await asyncio.gather(*(one(number) for number in range(40)))
        await house.until_idle()
        assert endings == dict.fromkeys(range(40), 1)
        jobs = sum(1 + number % 3 for number in range(40))
        assert house.value("elasti_request_success_total") <= jobs
        assert house.engine._scheduler.idle and not house.engine._rows
        assert house.engine._scheduler.reserved_tokens == 0

    in_house(visit, models={"tiny": Faulty(RuntimeError("boom"), 25)}, max_running=5)


@pytest.mark.parametrize("stream", [True, False])
def test_work_stops_when_its_caller_leaves(street, stream):
    app = build()
    house = House(app, None)
    address = street(app)

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=address) as client:
            body = LONG | {"model": "tiny", "stream": stream, "capacity": 0.7}
            try:
                async with (
                    asyncio.timeout(0.15),
                    client.stream("POST", "/v1/completions", json=body) as reply,
                ):
                    async for _ in reply.aiter_lines():
                        break
            except TimeoutError:
                pass
        await house.until_idle()

    asyncio.run(leave())
    assert house.value("elasti_request_success_total", finished_reason="abort") == 1
    assert house.value("elasti_generation_tokens_total") < 400
    assert house.value("elasti_num_requests_running") == 0
    assert house.engine._scheduler.reserved_tokens == 0


def test_a_waiting_caller_who_leaves_is_forgotten(street):
    app = build(max_running=1)
    house = House(app, None)
    address = street(app)

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:
            body = LONG | {"model": "tiny"}
            first = asyncio.create_task(client.post("/v1/completions", json=body))
            while not house.engine._requests:
                await asyncio.sleep(0.001)
            try:
                async with asyncio.timeout(0.1):
                    await client.post("/v1/completions", json=body | {"stream": True})
            except TimeoutError:
                pass
            assert (await first).status_code == 200
        await house.until_idle()

    asyncio.run(leave())
    assert house.value("elasti_request_success_total", finished_reason="abort") == 1
    assert house.value("elasti_generation_tokens_total") == 400


def test_nothing_is_taken_by_an_engine_that_was_never_started():
    async def visit() -> None:
        house = House(build(), None)
        from service.desk import Caller
        from service.schemas import CompletionRequest

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
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:
            body = LONG | {"model": "tiny", "stream": True}
            async with client.stream("POST", "/v1/completions", json=body) as slow:
                lines = slow.aiter_lines()
                await anext(lines)
                quick = await client.post("/v1/completions", json=LONG | {"model": "tiny"})
                assert quick.status_code == 200
                rest = [line async for line in lines if line]
            assert rest[-1] == "data: [DONE]"

    asyncio.run(read())
