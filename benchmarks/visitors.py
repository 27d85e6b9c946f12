"""Callers as a server meets them: patient, impatient, wrong. Each notes how its request ended.

What a visitor does is drawn from its own generator, so a seed repeats a whole crowd.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.server import NAME

PATH = "/v1/completions"
WRONG: tuple[dict[str, Any], ...] = (
    {"capacity": 1.5},
    {"max_tokens": -1},
    {"prompt": []},
    {"temperature": 9},
)


@dataclass(frozen=True, slots=True)
class Ending:
    """How one request ended, as its caller saw it."""

    number: int
    kind: str  # answered, streamed, refused, cancelled, hung up
    jobs: int  # sequences that the server took on for it
    certain: bool = True  # False: the caller left before it could know whether they were
    wrong: str | None = None  # why this is not exactly one ending


class Visitor:
    """One caller with one request."""

    def __init__(
        self, number: int, draw: random.Random, ids: Sequence[int], longest: int, lowest: float
    ) -> None:
        self._number, self._draw = number, draw
        self._choices = draw.choice((1, 1, 1, 1, 2, 3))
        # Mostly short ones, and some of the longest.
        length = min(longest, 1 + int(draw.expovariate(4 / longest)))
        start = draw.randrange(len(ids) - length)
        self._body: dict[str, Any] = {
            "model": NAME,
            "prompt": list(ids[start : start + length]),
            "max_tokens": draw.randint(1, 48),
            "n": self._choices,
            "capacity": self._capacity(lowest),
            "temperature": draw.choice((0, 0.7, 1.0)),
            "ignore_eos": draw.random() < 0.5,
        }
        if draw.random() < 0.3:
            self._body["logprobs"] = draw.randint(0, 3)
        if draw.random() < 0.2:
            self._body |= {"top_p": 0.9, "frequency_penalty": 0.5}

    async def visit(self, client: httpx.AsyncClient) -> Ending:
        """Ask, behave as one does, and tell how it ended."""
        behaviour = self._draw.choices(
            (self._stream, self._wait, self._cancel, self._hang_up, self._ask_wrongly),
            weights=(40, 25, 20, 10, 5),
        )[0]
        return await behaviour(client)

    def _capacity(self, lowest: float) -> object:
        if lowest == 1.0:
            return 1.0
        low, high = round(lowest + 0.1, 2), 1.0
        share = round(self._draw.uniform(low, high), 2)
        return self._draw.choice((1.0, share, share, "auto", {"prompt": share, "output": 1.0}))

    async def _wait(self, client: httpx.AsyncClient) -> Ending:
        answer = await client.post(PATH, json=self._body)
        if answer.status_code != 200:
            return self._refused(answer.status_code, answer.json())
        reasons = [choice["finish_reason"] for choice in answer.json()["choices"]]
        complete = len(reasons) == self._choices and all(reasons)
        return self._ended("answered", None if complete else f"finish reasons {reasons}")

    async def _stream(self, client: httpx.AsyncClient) -> Ending:
        return await self._read(client, leave_after=None)

    async def _cancel(self, client: httpx.AsyncClient) -> Ending:
        return await self._read(client, leave_after=self._draw.randint(1, 12))

    async def _read(self, client: httpx.AsyncClient, leave_after: int | None) -> Ending:
        reasons: Counter[int] = Counter()
        done = events = 0
        async with client.stream("POST", PATH, json=self._body | {"stream": True}) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return self._refused(answer.status_code, answer.json())
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    done += 1
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return self._ended("failed", f"an error in the stream: {event['error']}")
                reasons.update(
                    choice["index"] for choice in event["choices"] if choice["finish_reason"]
                )
                events += 1
                if events == leave_after:
                    return self._ended("cancelled")
        complete = done == 1 and reasons == Counter(range(self._choices))
        told = f"{done} [DONE], finish reasons {dict(reasons)} of {self._choices} choices"
        return self._ended("streamed", None if complete else told)

    async def _hang_up(self, client: httpx.AsyncClient) -> Ending:
        """Leaves before an answer, if it is not there at once."""
        try:
            async with asyncio.timeout(self._draw.uniform(0.0, 1.0)):
                return await self._wait(client)
        except TimeoutError:
            return Ending(self._number, "hung up", self._choices, certain=False)

    async def _ask_wrongly(self, client: httpx.AsyncClient) -> Ending:
        wrong = self._draw.choice(WRONG)
        answer = await client.post(PATH, json=self._body | wrong)
        if answer.status_code == 400:
            return self._refused(400, answer.json())
        return self._ended("refused", f"{wrong} was answered with {answer.status_code}")

    def _refused(self, status: int, body: dict[str, Any]) -> Ending:
        whole = isinstance(body.get("error"), dict) and bool(body["error"].get("message"))
        told = None if whole and status in (400, 429) else f"{status} {body}"
        return Ending(self._number, "refused", 0, wrong=told)

    def _ended(self, kind: str, wrong: str | None = None) -> Ending:
        return Ending(self._number, kind, self._choices, wrong=wrong)
