"""What Ray's proxies refuse themselves, said as the server says it: OpenAI's error object.

A full queue, a replica that died on a request, a path where nothing is: to those Ray answers in
plain text, with a stack trace at times. What a replica has answered passes as it is. Each proxy
loads this by name; its environment says so before Ray starts:

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deploy.ray.refusals.middlewares

Ray is not known here. Plain ASGI.
"""

from __future__ import annotations

import json

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.ray.fleet import REPLICA
from service.errors import BadRequest, QueueFull, TimedOut, error_object

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
PATH = "deploy.ray.refusals.middlewares"


def middlewares() -> list[Middleware]:
    """What Ray puts around each proxy."""
    return [Middleware(Refusals)]


class Refusals:
    """Gives an answer of Ray's own that is an error the body of one of ours."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, ray_says = False, False

        async def said(message: Message) -> None:
            nonlocal began, ray_says
            began = True
            if message["type"] == "http.response.start":
                headers = Headers(raw=message["headers"])
                ray_says = message["status"] >= 400 and REPLICA not in headers
                if ray_says:
                    await _refuse(message, send)
            if not ray_says:
                await send(message)

        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            await self._app(scope, receive, said)
        except Exception:
            if not began:  # else the connection breaks off, which tells the caller
                await _refuse({"type": "http.response.start", "status": 500, "headers": []}, send)
            raise


async def _refuse(start: Message, send: Send) -> None:
    """The whole answer: its status and its other headers stay Ray's."""
    headers = MutableHeaders(raw=list(start["headers"]))
    told = error_object(_error(start["status"], waits="retry-after" in headers))
    body = json.dumps(told).encode()
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
