"""What the server says of itself: lines for a reader, or one JSON object per line for a machine.

Each request gets an id: the caller's own `X-Request-Id` or a new one; the answer carries it, and so
does every line that is written on the way. When all of a request has ended, one line tells what it
was, how long it took and what it spent. No line holds a prompt or an answer.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import quote

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elastiformer.weights import tell_through_logging
from service.errors import refusal_of
from service.orders import Done, Failed, Ticket, waited_before
from service.tracing import PROBES, Place, Tracing

Format = Literal["text", "json"]
Fields = dict[str, Any]
REQUEST_ID = "X-Request-Id"
TRACEPARENT = "traceparent"
log = logging.getLogger("elasti.access")
_KEY = "elasti.visit"  # in a request's ASGI scope
_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
CALLER_LEFT = 499  # the status of an answer that nobody waited for


@dataclass(eq=False, slots=True)
class Visit:
    """One HTTP request as the log sees it, filled while it is worked on."""

    id: str
    method: str
    path: str
    client: str
    began: float
    place: Place | None
    status: int | None = None
    model: str | None = None
    ticket: Ticket | None = None

    def work(self, model: str, ticket: Ticket) -> None:
        """The request has become an order of this model's engine."""
        self.model, self.ticket = model, ticket

    @property
    def headers(self) -> dict[str, str]:
        """What every answer carries, so that it can be found again."""
        if self.place is None:
            return {REQUEST_ID: self.id}
        return {REQUEST_ID: self.id, TRACEPARENT: self.place.traceparent}

    @property
    def ids(self) -> Fields:
        if self.place is None:
            return {"request_id": self.id}
        return {
            "request_id": self.id,
            "trace_id": self.place.trace_id,
            "span_id": self.place.span_id,
        }


# Each request runs in a task of its own, whose context holds its visit to the end.
_visit: ContextVar[Visit | None] = ContextVar("visit", default=None)


def visit_of(scope: Scope) -> Visit:
    visit = scope[_KEY]
    assert isinstance(visit, Visit)
    return visit


class RequestLog:
    """Gives each request its id, and writes its line when it has ended. Plain ASGI."""

    def __init__(self, app: ASGIApp, tracing: Tracing | None) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = scope[_KEY] = self._visit(scope)
        _visit.set(visit)

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                MutableHeaders(scope=message).update(visit.headers)
            await send(message)

        try:
            await self._app(scope, receive, stamped)
        except Exception:
            visit.status = visit.status or 500  # the answer is made further out
            raise
        finally:
            _write(visit)

    def _visit(self, scope: Scope) -> Visit:
        given = dict(scope["headers"]).get(REQUEST_ID.lower().encode(), b"").decode("latin-1")
        client = scope.get("client")
        return Visit(
            id=given if _ID.fullmatch(given) else uuid.uuid4().hex,
            method=scope["method"],
            path=quote(scope["path"]),  # a line break in it would begin a line of its own
            client=client[0] if client else "",
            began=time.monotonic() - waited_before.get(),
            place=self._tracing.here() if self._tracing else None,
        )


def _write(visit: Visit) -> None:
    """Write a request's line: now, or once its order has ended too."""
    level = logging.DEBUG if visit.path in PROBES else logging.INFO
    if not log.isEnabledFor(level):
        return
    milliseconds = round((time.monotonic() - visit.began) * 1000, 3)

    def write(ending: Done | Failed | None) -> None:
        fields = _fields(visit, milliseconds, ending)
        told = " ".join(f"{name}={value}" for name, value in fields.items() if name not in _SHOWN)
        message = f"{visit.method} {visit.path} {fields['status']} {milliseconds:.1f} ms"
        log.log(level, "%s", message, extra={"fields": fields, "told": told})

    if visit.ticket is None:
        write(None)
    else:
        visit.ticket.when_ended(write)


_SHOWN = ("method", "path", "status", "duration_ms")  # in the message already


def _fields(visit: Visit, milliseconds: float, ending: Done | Failed | None) -> Fields:
    fields: Fields = {
        **visit.ids,
        "client": visit.client,
        "method": visit.method,
        "path": visit.path,
        "status": visit.status or CALLER_LEFT,
        "duration_ms": milliseconds,
    }
    if ending is None or visit.ticket is None:
        return fields
    summary, resolved = ending.summary, visit.ticket.order.resolved
    fields |= {
        "model": visit.model,
        "capacity_requested": resolved.requested,
        "capacity_applied": resolved.applied.as_json(),
        "capacity_spent": round(summary.usage.capacity_spent, 4),
        "limited_by": resolved.limited_by,
        "prompt_tokens": summary.prompt_tokens,
        "cached_tokens": summary.cached_tokens,
        "completion_tokens": summary.generated_tokens,
        "fetch_ms": _milliseconds(summary.fetch_seconds or None),
        "queue_ms": _milliseconds(summary.queue_seconds),
        "first_token_ms": _milliseconds(summary.first_token_seconds),
        "engine_ms": _milliseconds(summary.total_seconds),
        "energy_joules": summary.energy_joules,
        "error": refusal_of(ending.error).code if isinstance(ending, Failed) else None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


class Lines(logging.Formatter):
    """For a reader."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        if told := getattr(record, "told", None):
            return f"{line} {told}"
        visit = _visit.get()
        return line if visit is None else f"{line} request_id={visit.id}"


class JsonLines(logging.Formatter):
    """For a machine: one object per line, a stack inside of it."""

    def format(self, record: logging.LogRecord) -> str:
        visit = _visit.get()
        line: Fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **(visit.ids if visit is not None else {}),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(form: Format, level: str) -> Callable[[str], None]:
    """Send all that is logged to stderr in this form; returns how to say what is no log line.

    In JSON that is a line like the others, written at any level.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else Lines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Each request of a client library would be told twice.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if form == "text":
        return say
    logging.captureWarnings(True)
    tell_through_logging()
    speaker = logging.getLogger("elasti.server")
    speaker.setLevel(logging.INFO)
    return speaker.info


def say(text: str) -> None:
    """Tell it plainly, on stderr."""
    print(text, file=sys.stderr, flush=True)
