"""What Ray's proxies refuse themselves, said as the server says it: OpenAI's error object.

A full queue, a replica that died on a request, a path where nothing is: to those Ray answers in
plain text, with a stack trace at times. What a replica has answered passes as it is. Each refusal,
and each answer that breaks off, is counted on the page of Ray's metrics of its machine. Each proxy
loads this by name; its environment says so before Ray starts:

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deploy.ray.refusals.middlewares

Only `middlewares` knows Ray. Plain ASGI.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.ray.arrivals import Arrivals
from deploy.ray.fleet import REPLICA
from service.errors import BadRequest, QueueFull, TimedOut, error_object

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
PATH = "deploy.ray.refusals.middlewares"
COUNTED = "elasti_admission_rejections"  # Ray puts ray_ before it, and _total behind
_REASONS: dict[type[Exception], str] = {QueueFull: "queue_full", BadRequest: "invalid"}
_OTHERWISE = "internal"
_NOTHING_SAID: Message = {"type": "http.response.start", "status": 500, "headers": []}


def middlewares() -> list[Middleware]:
    """What Ray puts around each proxy; called in its process."""
    from ray.util.metrics import Counter

    counter = Counter(COUNTED, "Requests that a proxy refused itself, by why.", ("reason",))

    def count(reason: str) -> None:
        counter.inc(tags={"reason": reason})

    return [Middleware(Arrivals), Middleware(Refusals, count)]


class Refusals:
    """Gives an answer of Ray's own that is an error the body of one of ours, and counts it."""

    def __init__(self, app: ASGIApp, count: Callable[[str], None]) -> None:
        """Middleware around `app`.

        Args:
            count: called once for each refusal, with its reason.
        """
        self._app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began = ended = left = ray_says = False

        async def heard() -> Message:
            nonlocal left
            message = await receive()
            left = left or message["type"] == "http.disconnect"
            return message

        async def said(message: Message) -> None:
            nonlocal began, ended, ray_says
            began = True
            if message["type"] == "http.response.start":
                headers = Headers(raw=message["headers"])
                ray_says = message["status"] >= 400 and REPLICA not in headers
                if ray_says:
                    await self._refuse(message, send)
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            if not ray_says:
                await send(message)

        try:
            await self._app(scope, heard, said)
        finally:
            # Where a replica died Ray may just return, and an answer that began breaks off, which
            # tells the caller.
            if not left and not began:
                await self._refuse(_NOTHING_SAID, send)
            elif not left and not ended:
                self._count(_OTHERWISE)

    async def _refuse(self, start: Message, send: Send) -> None:
        """The whole answer: its status and its other headers stay Ray's."""
        headers = MutableHeaders(raw=list(start["headers"]))
        error = _error(start["status"], waits="retry-after" in headers)
        self._count(_REASONS.get(type(error), _OTHERWISE))
        body = json.dumps(error_object(error)).encode()
        headers["content-type"] = "application/json"
        headers["content-length"] = str(len(body))
        await send({**start, "headers": headers.raw})
        await send({"type": "http.response.body", "body": body})


def _error(status: int, waits: bool) -> Exception:
    if status == 503 and waits:
        return QueueFull("too many requests wait at this proxy; come again after Retry-After")
    if status == 404:
        return BadRequest("nothing is served at this path", None)
    if status == 408:
        return TimedOut("the request took longer than the proxy lets one take")
    return RuntimeError(f"Ray answered {status}")  # of which nothing is told
