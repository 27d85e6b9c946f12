"""What every request passes before a route: the bound on its body.

Plain ASGI, because a wrapper around responses would hide a disconnect from a stream.
"""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import BodyTooLarge, error_object, refusal_of
from service.metrics import NO_MODEL, Metrics


class BodyBound:
    """Reads a body up to a bound and hands it on whole; beyond it, 413."""

    def __init__(self, app: ASGIApp, most_bytes: int, metrics: Metrics) -> None:
        self._app = app
        self._most_bytes = most_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        body = await self._read(scope, receive)
        if body is None:
            self._metrics.rejections.labels(NO_MODEL, "too_large").inc()
            error = BodyTooLarge(f"the body is larger than {self._most_bytes} bytes")
            status = refusal_of(error).status
            # The rest of the body is not read: the connection cannot be used again.
            headers = {"connection": "close"}
            await JSONResponse(error_object(error), status, headers)(scope, receive, send)
            return
        handed_on = False

        async def replay() -> Message:
            nonlocal handed_on
            if handed_on:
                return await receive()
            handed_on = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None as soon as it is too large."""
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self._most_bytes:
                return None
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > self._most_bytes:
                return None
        return b"".join(parts)
