"""An answer as it is written: server-sent events in OpenAI's shape.

What an order delivers at once is written at once. Every stream ends: with `data: [DONE]` after the
chunk that carries the usage, or, when something fails on the way, with an error event. A caller who
leaves takes the work along.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.answers import Json, Shape, counts_json, elasti_json, usage_json
from service.desk import Placed
from service.errors import UNEXPECTED, error_object, refusal_of
from service.metrics import INTERNAL, NO_MODEL
from service.orders import Done, Encoded, Event, Failed, Scored, Ticket
from service.schemas import StreamOptions

log = logging.getLogger("elasti.http")
MUCH = 64  # tokens with their probabilities: more are written out beside the event loop
# Made once: `json.dumps` with settings of one's own makes an encoder for each call.
_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
DONE = "data: [DONE]\n\n"


@asynccontextmanager
async def tied_to(request: Request, ticket: Ticket, keep: bool = False) -> AsyncIterator[None]:
    """Cancel the order when its caller disconnects, and when the block is left.

    With `keep`, leaving the block in good order lets the work go on.
    """

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        ticket.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except BaseException:
        ticket.cancel()
        raise
    else:
        if not keep:
            ticket.cancel()
    finally:
        watching.cancel()


class EventStream(StreamingResponse):
    """Server-sent events; whatever becomes of the response, its order does not outlive it."""

    def __init__(self, ticket: Ticket, body: AsyncIterator[str]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(body, media_type="text/event-stream", headers=headers)
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.cancel()


async def stream(
    request: Request,
    placed: Placed,
    shape: Shape,
    ticket: Ticket,
    first: list[Event],
    batches: AsyncIterator[list[Event]],
    options: StreamOptions | None,
) -> AsyncIterator[str]:
    """The events of one order as text; the `first` of them came before it was a stream."""
    writer = _Writer(placed, shape, options or StreamOptions.model_validate({}))
    async with tied_to(request, ticket):
        try:
            yield await _written(writer, first)
            async for batch in batches:
                if text := await _written(writer, batch):
                    yield text
            yield DONE
        except Exception as error:
            if refusal_of(error) is UNEXPECTED:
                log.exception("a stream failed")
                request.app.state.hall.metrics.rejections.labels(NO_MODEL, INTERNAL).inc()
            yield _event(error_object(error))


class _Writer:
    """Turns events into chunks, one choice interleaved with another as they come."""

    def __init__(self, placed: Placed, shape: Shape, options: StreamOptions) -> None:
        self._placed = placed
        self._shape = shape
        self._usage_apart = bool(options.include_usage)
        self._counting = bool(options.continuous_usage_stats)
        self._opened: set[int] = set()
        self._scored = {job.number for job in placed.order.jobs if job.scored}
        self._ending: Json | None = None  # held back until it is known whether it is the last
        self._generated = 0
        self._prompt_tokens = sum(job.billed_tokens for job in placed.order.jobs)

    def write(self, batch: list[Event]) -> str:
        return "".join(_event(chunk) for event in batch for chunk in self._take(event))

    def _take(self, event: Event) -> list[Json]:
        if isinstance(event, Done):
            return self._end(event)
        assert not isinstance(event, Failed | Encoded), "neither failures nor items are streamed"
        chunks, self._ending = [self._ending] if self._ending else [], None
        if isinstance(event, Scored):
            if event.number in self._scored:
                chunks += self._open(event.number, event)
            return self._dressed(chunks)
        if event.number not in self._opened:
            chunks += self._open(event.number, None)
        self._generated += 1
        chunk = self._shape.chunk(event)
        if event.ended:
            self._ending = self._dressed([chunk])[0]
        elif event.text or self._placed.logprobs is not None:
            chunks.append(chunk)
        return self._dressed(chunks)

    def _open(self, number: int, scored: Scored | None) -> list[Json]:
        self._opened.add(number)
        chunk = self._shape.opening(number, scored.sampled if scored else ())
        return [chunk] if chunk else []

    def _end(self, done: Done) -> list[Json]:
        final = {
            "usage": usage_json(done.summary),
            "elasti": elasti_json(self._placed, done.summary),
        }
        chunks: list[Json] = []
        for job in self._placed.order.jobs:
            if job.most_new == 0:
                chunks += [] if job.number in self._opened else self._open(job.number, None)
                chunks.append(self._shape.closing(job.number))
        chunks = self._dressed(chunks)
        if self._ending:
            chunks.append(self._ending)
        if self._usage_apart or not chunks:
            chunks.append(self._shape.empty())
        chunks[-1] |= final
        return chunks

    def _dressed(self, chunks: list[Json]) -> list[Json]:
        """With the usage so far, or with the `null` that OpenAI sends before the last chunk."""
        for chunk in chunks:
            if "usage" not in chunk and self._counting:
                chunk["usage"] = counts_json(self._prompt_tokens, self._generated)
            elif "usage" not in chunk and self._usage_apart:
                chunk["usage"] = None
        return chunks


async def _written(writer: _Writer, batch: list[Event]) -> str:
    scored = sum(len(event.sampled) for event in batch if isinstance(event, Scored))
    if scored > MUCH:
        return await asyncio.to_thread(writer.write, batch)
    return writer.write(batch)


def _event(chunk: Json) -> str:
    return f"data: {_json(chunk)}\n\n"
