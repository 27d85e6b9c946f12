"""Promises to those who stay: whoever leaves gives up his rows and his room within one step."""

import asyncio
import json
from urllib.parse import urlsplit

import pytest

from tests.service.conftest import PATIENCE_SECONDS, House, Watched, build, soon

LONG = {"model": "tiny", "prompt": "a", "max_tokens": 400, "ignore_eos": True, "temperature": 0}


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


def on_street(street, visit, **settings):
    """A real server over a model that can be held, and a visit to it."""
    model = Watched()
    house = House(build({"tiny": model}, **settings), None)
    address = street(house.app)

    async def talk():
        call = Callers(address)
        async with asyncio.timeout(PATIENCE_SECONDS):
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
        with model.held(after=3) as hold:
            _, writer = await call(**body)
            await soon(hold.waits.is_set)
            if rudely:
                writer.transport.abort()
            else:
                writer.close()
            await soon(lambda: house.engine._leaving)  # the server has heard of it
            steps = len(model.steps)
        await soon(lambda: house.hall.idle)
        assert len(model.steps) == steps  # the one that ran was the last
        assert model.cache.free_blocks == model.cache.total_blocks
        await soon(lambda: house.value("elasti_num_requests_running") == 0)
        assert house.value("elasti_kv_cache_usage_perc") == 0

    house = on_street(street, visit)
    assert house.value("elasti_request_success_total", finished_reason="abort") == body.get("n", 1)


def test_a_socket_closed_in_the_middle_of_a_prompt_ends_it(street):
    async def visit(house, model, call):
        with model.held(after=1) as hold:
            _, writer = await call(prompt="a" * 400, max_tokens=5)
            await soon(hold.waits.is_set)
            writer.close()
            await soon(lambda: house.engine._leaving)
        await soon(lambda: house.hall.idle)
        assert model.steps == [[32]] * 2

    house = on_street(street, visit, max_step_tokens=32)
    assert house.value("elasti_request_success_total", finished_reason="abort") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_the_queue_is_forgotten_and_the_next_one_moves_up(street, stream):
    async def visit(house, model, call):
        requests = house.engine._ledger.requests
        with model.held(after=1) as hold:
            _, first = await call()
            await soon(hold.waits.is_set)
            _, second = await call(stream=stream)
            await soon(lambda: len(requests) == 2)
            reader, _ = await call(stream=True, max_tokens=3)
            await soon(lambda: len(requests) == 3)
            second.close()
            await soon(lambda: house.engine._leaving)
            hold.let_pass(1)
            await soon(hold.waits.is_set)
            assert len(requests) == 2 and model.steps[-1] == [1]  # the first was not disturbed
            first.close()
            await soon(lambda: house.engine._leaving)
        answer = await reader.readuntil(b"[DONE]")  # neither was the third
        assert b'"finish_reason": "length"' in answer

    house = on_street(street, visit, max_running=1)
    assert house.value("elasti_request_success_total", finished_reason="abort") == 2
    assert house.value("elasti_request_success_total", finished_reason="length") == 1


def test_who_stays_does_not_notice_who_leaves(street):
    async def visit(house, model, call):
        with model.held(after=1) as hold:
            reader, _ = await call(max_tokens=12)
            await soon(hold.waits.is_set)
            _, writer = await call(stream=True)
            await soon(lambda: len(house.engine._ledger.requests) == 2)
            hold.let_pass(1)
            await soon(lambda: len(house.engine._ledger.rows) == 2)
            writer.close()
            await soon(lambda: house.engine._leaving)
        head, _, text = (await reader.readuntil(b"}}")).partition(b"\r\n\r\n")
        assert b" 200 " in head
        text += await reader.readexactly(
            int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]) - len(text)
        )
        assert json.loads(text)["usage"]["completion_tokens"] == 12

    on_street(street, visit)
