"""Promises to those who stay: whoever leaves gives up his rows and his room within one step."""

import asyncio
import json
from urllib.parse import urlsplit

import pytest

from tests.service.conftest import House, Watched, build

LONG = {"model": "tiny", "prompt": "a", "max_tokens": 400, "ignore_eos": True, "temperature": 0}
pytestmark = pytest.mark.alone

STEP_SECONDS = 0.05


class Callers:
    """Requests over sockets of our own, whose answers may stay unread."""

    def __init__(self, address):
        self._place = urlsplit(address)
        self._writers = []

    async def __call__(self, **body):
        reader, writer = await asyncio.open_connection(self._place.hostname, self._place.port)
        self._writers.append(writer)
        content = json.dumps(LONG | body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {self._place.netloc}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        writer.write(head.encode() + content)
        await writer.drain()
        return reader, writer

    async def hang_up(self):
        for writer in self._writers:
            writer.close()
            await writer.wait_closed()


async def soon(condition, seconds=20.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


def on_street(street, visit, **settings):
    """A real server over a slow model, and a visit to it."""
    model = Watched(step_seconds=STEP_SECONDS)
    house = House(build({"tiny": model}, **settings), None)
    address = street(house.app)

    async def talk():
        call = Callers(address)
        async with asyncio.timeout(60):
            try:
                await visit(house, model, call)
            finally:
                await call.hang_up()

    asyncio.run(talk())
    return house


@pytest.mark.parametrize("rudely", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("body", [{"stream": True}, {"stream": False}, {"n": 3}])
def test_a_closed_socket_frees_rows_and_cache_within_one_step(street, body, rudely):
    async def visit(house, model, call):
        _, writer = await call(**body)
        await soon(lambda: len(model.steps) > 3)
        if rudely:
            writer.transport.abort()
        else:
            writer.close()
        steps = len(model.steps)
        await soon(lambda: house.hall.idle)
        # The step that runs, and perhaps one that begins before the server hears of it.
        assert len(model.steps) - steps <= 2
        assert model.cache.free_blocks == model.cache.total_blocks
        await soon(lambda: house.value("elasti_num_requests_running") == 0)
        assert house.value("elasti_kv_cache_usage_perc") == 0

    house = on_street(street, visit)
    assert house.value("elasti_request_success_total", finished_reason="abort") == body.get("n", 1)


def test_a_socket_closed_in_the_middle_of_a_prompt_ends_it(street):
    async def visit(house, model, call):
        _, writer = await call(prompt="a" * 400, max_tokens=5)
        await soon(lambda: model.steps)
        writer.close()
        steps = len(model.steps)
        await soon(lambda: house.hall.idle)
        assert len(model.steps) - steps <= 2
        assert all(step == [32] for step in model.steps)

    house = on_street(street, visit, max_step_tokens=32)
    assert house.value("elasti_request_success_total", finished_reason="abort") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_the_queue_is_forgotten_and_the_next_one_moves_up(street, stream):
    async def visit(house, model, call):
        _, first = await call()
        await soon(lambda: house.engine._ledger.rows)
        _, second = await call(stream=stream)
        await soon(lambda: len(house.engine._ledger.requests) == 2)
        reader, _ = await call(stream=True, max_tokens=3)
        await soon(lambda: len(house.engine._ledger.requests) == 3)
        second.close()
        await soon(lambda: len(house.engine._ledger.requests) == 2, 4 * STEP_SECONDS + 5)
        assert house.engine._ledger.rows  # the first one was not disturbed
        first.close()
        answer = await reader.readuntil(b"[DONE]")  # neither was the third
        assert b'"finish_reason": "length"' in answer

    house = on_street(street, visit, max_running=1)
    assert house.value("elasti_request_success_total", finished_reason="abort") == 2
    assert house.value("elasti_request_success_total", finished_reason="length") == 1


def test_who_stays_does_not_notice_who_leaves(street):
    async def visit(house, model, call):
        reader, _ = await call(max_tokens=12)
        _, writer = await call(stream=True)
        await soon(lambda: len(house.engine._ledger.rows) == 2)
        writer.close()
        head, _, text = (await reader.readuntil(b"}}")).partition(b"\r\n\r\n")
        assert b" 200 " in head
        text += await reader.readexactly(
            int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]) - len(text)
        )
        assert json.loads(text)["usage"]["completion_tokens"] == 12

    on_street(street, visit)
