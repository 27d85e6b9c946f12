"""Uvicorn, with two manners: it says where it is when it is ready, and it drains when it is told
to stop.

While it drains, new work is refused with 503 on a port that still answers; what runs may finish
within the drain time.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from elastiformer.tasks import Task
from service.routes import Hall
from service.settings import Settings

GOODBYE_SECONDS = 5  # for connections to close once their answers are complete


class Server(uvicorn.Server):
    """Runs an app on a socket that is bound already."""

    def __init__(
        self, app: FastAPI, settings: Settings, place: socket.socket, say: Callable[[str], None]
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,  # RequestLog tells more of a request, once
                timeout_graceful_shutdown=GOODBYE_SECONDS,
                server_header=False,
            )
        )
        hall = app.state.hall
        assert isinstance(hall, Hall)
        self._hall = hall
        self._say = say
        self._drain_seconds = settings.drain_seconds
        self._address = address(place)
        self._drain_until: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._say(welcome(self._address, self._hall))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; the next one stops."""
        if self._drain_until is not None or not self.started:
            super().handle_exit(sig, frame)
            return
        self._drain_until = time.monotonic() + self._drain_seconds

    async def on_tick(self, counter: int) -> bool:
        if self._drain_until is not None and not self.should_exit:
            if not self._hall.draining:
                self._hall.drain()
                self._say(f"stopping: running requests have {self._drain_seconds:g} seconds")
            late = time.monotonic() > self._drain_until
            if late:
                for served in self._hall.catalogue:
                    served.engine.stop()  # ends what still runs with an error that says so
            self.should_exit = late or self._hall.idle
        return await super().on_tick(counter)


def address(place: socket.socket) -> str:
    host, port = place.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def welcome(where: str, hall: Hall) -> str:
    """The last lines of a start: where it is, and a line to try."""
    served = hall.catalogue.default
    names = [name for each in hall.catalogue for name in (each.name, *each.aliases)]
    body: dict[str, object] = {"model": served.name}
    if served.aliases:
        body["capacity"] = float(served.aliases[0].rpartition("@")[2])
    if served.encoder is not None:
        features = served.task == Task.FEATURES
        route = "/v1/embeddings" if features else "/v1/classify"
        shown: object = "The sky is blue."
        if served.encoder.encoder.reads_images:
            shown = {"image": "data:image/png;base64,…"}
        body["input"] = shown
        return _told(where, names, f"curl {where}{route}", body)
    if served.engine.inputs.has_chat_template:
        route = "/v1/chat/completions"
        body |= {"messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    else:
        route = "/v1/completions"
        body |= {"prompt": "The sky is blue because"}
    body |= {"max_tokens": 60, "stream": True}
    return _told(where, names, f"curl -N {where}{route}", body)


def _told(where: str, names: list[str], curl: str, body: dict[str, object]) -> str:
    return (
        f"ready: {where}\n"
        f"  models: {', '.join(names)}\n"
        f"  a page to try: {where}/   the API: {where}/docs   metrics: {where}/metrics\n"
        f"try:\n"
        f"  {curl} -H 'Content-Type: application/json' "
        f"-d '{json.dumps(body, ensure_ascii=False)}'"
    )
