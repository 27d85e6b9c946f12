"""Those who call a fleet in a drill: streams one after the other, each with its ending noted."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field

import httpx

from deploy.ray.fleet import REPLICA

BUSY = (429, 503)


@dataclass(frozen=True, slots=True)
class Call:
    """One request as its caller saw it; `replica` is None where no answer began."""

    began: float
    ended: float
    replica: str | None
    status: int | None  # None: no answer at all
    whole: bool  # the stream came to its end
    told: str = ""  # what the caller was told where it did not

    def spans(self, moment: float) -> bool:
        return self.began <= moment <= self.ended

    @property
    def turned_away(self) -> bool:
        return self.status in BUSY


@dataclass
class Callers:
    """So many of them, who call until they are sent home."""

    address: str
    model: str
    tokens: int = 48
    calls: list[Call] = field(default_factory=list)
    _wanted: int = 0
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def number(self, wanted: int) -> None:
        """Call more of them in, or let some finish what they wait for and go."""
        self._wanted = wanted
        leaving, self._tasks = self._tasks[wanted:], self._tasks[:wanted]
        await asyncio.gather(*leaving)
        while len(self._tasks) < wanted:
            self._tasks.append(asyncio.create_task(self._call_again(len(self._tasks))))

    async def _call_again(self, me: int) -> None:
        async with httpx.AsyncClient(base_url=self.address, timeout=120, trust_env=False) as client:
            for number in itertools.count():
                if me >= self._wanted:
                    return
                self.calls.append(await self._stream(client, (0.5, 0.7, 1.0)[number % 3]))
                if not self.calls[-1].whole:
                    await asyncio.sleep(0.5)

    async def _stream(self, client: httpx.AsyncClient, capacity: float) -> Call:
        body = {
            "model": self.model,
            "prompt": "Once upon",
            "max_tokens": self.tokens,
            "capacity": capacity,
            "ignore_eos": True,
            "stream": True,
        }
        began, replica, status = time.monotonic(), None, None
        last = told = ""
        try:
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                replica, status = answer.headers.get(REPLICA), answer.status_code
                async for line in answer.aiter_lines():
                    last = line or last
                if status != 200 or last != "data: [DONE]":
                    told = f"{status}: {last}"
        except httpx.HTTPError as error:
            told = f"{type(error).__name__}: {error}"
        whole = status == 200 and last == "data: [DONE]"
        return Call(began, time.monotonic(), replica, status, whole, told)
