"""Requests sent over HTTP: streams read to their end, each noted as its sender saw it.

`send` is an open loop: what is due goes out at its moment, whether or not those before it are
answered, so a slow server meets as many requests as a fast one. Who is sent late counts from when
he was due. Moments and capacities come from outside, so that the same ones can be simulated
(`benchmarks/simulation.py`), or sent by another program too (`benchmarks/guidellm.py`).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import httpx

from benchmarks.server import NAME, ServerError

PATH = "/v1/completions"
BUSY = 429  # a full queue


@dataclass(frozen=True, slots=True)
class Due:
    """One request to be sent, so many seconds after the first moment."""

    second: float
    prompt: Sequence[int]
    capacity: object


@dataclass(frozen=True, slots=True)
class Sent:
    """One request, as its sender saw it; times of one clock, in seconds."""

    started: float
    first_token: float | None
    ended: float | None  # None: cut off when the time was over, or failed
    output_tokens: int
    failed: bool
    spent: float | None = None  # capacity, as the server says at the end; None: it did not

    @property
    def to_first_token(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.started

    @property
    def between_tokens(self) -> float | None:
        """The mean over the request."""
        if self.ended is None or self.first_token is None or self.output_tokens < 2:
            return None
        return (self.ended - self.first_token) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Phase:
    """Everything sent at one rate, and for how long it was sent."""

    seconds: float
    requests: tuple[Sent, ...]

    @property
    def finished(self) -> list[Sent]:
        return [each for each in self.requests if each.ended is not None]


class Sender:
    """Requests of one size to one server, no two with the same prompt: a stored one costs nothing.

    `ids` is a text longer than a prompt; prompts begin at the places in it that `starts` counts.
    """

    def __init__(
        self, address: str, ids: Sequence[int], starts: Iterator[int], prompt: int, tokens: int
    ) -> None:
        self._address, self._ids, self._starts = address, ids, starts
        self._prompt, self._tokens = prompt, tokens

    def dues(self, moments: Sequence[float], capacities: Sequence[object]) -> list[Due]:
        """One request for each moment, the capacities in turn."""
        return [
            Due(moment, self._text(), capacities[place % len(capacities)])
            for place, moment in enumerate(moments)
        ]

    def at(self, moments: Sequence[float], capacities: Sequence[object], seconds: float) -> Phase:
        """Send one at each moment, and cut off what is not answered after so many seconds."""
        dues = self.dues(moments, capacities)
        return asyncio.run(send(self._address, dues, self._tokens, seconds))

    def at_once(self, streams: int, capacities: Sequence[object]) -> float:
        """Seconds until so many, sent together, have ended."""
        prompts = [self._text() for _ in range(streams)]
        return asyncio.run(at_once(self._address, prompts, self._tokens, capacities))

    def _text(self) -> Sequence[int]:
        start = next(self._starts) % (len(self._ids) - self._prompt)
        return self._ids[start : start + self._prompt]


async def send(address: str, dues: Sequence[Due], tokens: int, seconds: float) -> Phase:
    """Each at its moment; what is not answered within `seconds` is cut off.

    Raises:
        ServerError: a request was refused for what it asks, and not for want of room.
    """
    async with _client(address, len(dues)) as client:
        began = time.perf_counter()
        reading = [_Reading(client, due, tokens, began + due.second) for due in dues]
        tasks = [asyncio.create_task(each.read()) for each in reading]
        if tasks:
            left = began + seconds - time.perf_counter()
            await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
    return Phase(seconds, tuple(each.sent for each in reading))


async def at_once(
    address: str, prompts: Sequence[Sequence[int]], tokens: int, capacities: Sequence[object]
) -> float:
    """Seconds for one stream per prompt, all at once, the capacities in turn."""
    async with _client(address, len(prompts)) as client:
        began = time.perf_counter()
        reading = [
            _Reading(client, Due(0.0, ids, capacities[place % len(capacities)]), tokens, began)
            for place, ids in enumerate(prompts)
        ]
        await asyncio.gather(*(each.read() for each in reading))
        seconds = time.perf_counter() - began
    made = [each.sent.output_tokens for each in reading]
    assert made == [tokens] * len(prompts), f"{made} tokens came back, not {tokens} each"
    return seconds


def _client(address: str, connections: int) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=max(1, connections))
    return httpx.AsyncClient(base_url=address, timeout=600, limits=limits, trust_env=False)


class _Reading:
    """One request, and what is known of it so far."""

    def __init__(self, client: httpx.AsyncClient, due: Due, tokens: int, moment: float) -> None:
        self._client, self._moment = client, moment
        self._body = {
            "model": NAME,
            "prompt": list(due.prompt),
            "max_tokens": tokens,
            "capacity": due.capacity,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        self._first: float | None = None
        self._ended: float | None = None
        self._made = 0
        self._spent: float | None = None
        self._failed = False

    @property
    def sent(self) -> Sent:
        ends = (self._first, self._ended)
        return Sent(self._moment, *ends, self._made, self._failed, self._spent)

    async def read(self) -> None:
        """Wait for the moment, ask, and read the stream to its end."""
        await asyncio.sleep(self._moment - time.perf_counter())
        with suppress(httpx.HTTPError):
            async with self._client.stream("POST", PATH, json=self._body) as answer:
                if 400 <= answer.status_code < 500 and answer.status_code != BUSY:
                    told = (await answer.aread()).decode()
                    raise ServerError(f"the server refused a request: {told}")
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    self._take(line)
        self._failed = self._ended is None

    def _take(self, line: str) -> None:
        if not line.startswith("data: "):
            return
        now = time.perf_counter()
        if line == "data: [DONE]":
            self._ended = now
        elif '"completion_tokens"' in line:  # the last one, which alone has a usage
            last = json.loads(line.removeprefix("data: "))
            self._made = last["usage"]["completion_tokens"]
            self._spent = last["elasti"]["capacity_spent"]
        elif self._first is None and not line.startswith('data: {"error"'):
            self._first = now
