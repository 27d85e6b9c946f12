"""When a request came to a proxy: the proxy writes it into a header, and a replica reads it there.

What waits, waits at a proxy: without this, queue, first token and end to end would begin where the
waiting has ended. The clocks of two machines are compared, so they must agree as far as a
latency shall be trusted. Ray is not known here. Plain ASGI.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from service.orders import waited_before

ARRIVED = "X-Elasti-Arrived"  # seconds since 1970
LONGEST_SECONDS = 3600.0  # nobody waits longer; two clocks may be that far apart
_SECONDS = re.compile(r"\d{1,12}\.\d{1,9}")


class Arrivals:
    """A proxy's side. Whatever a caller has written there is replaced."""

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.time) -> None:
        self._app = app
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            MutableHeaders(scope=scope)[ARRIVED] = f"{self._clock():.6f}"
        await self._app(scope, receive, send)


class Waited:
    """A replica's side: the server counts from the arrival on."""

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.time) -> None:
        self._app = app
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            waited_before.set(self._seconds(Headers(scope=scope).get(ARRIVED, "")))
        await self._app(scope, receive, send)

    def _seconds(self, arrived: str) -> float:
        """0 where no proxy wrote it, or where it cannot be."""
        if not _SECONDS.fullmatch(arrived):
            return 0.0
        seconds = self._clock() - float(arrived)
        return seconds if 0 < seconds <= LONGEST_SECONDS else 0.0
