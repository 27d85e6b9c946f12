"""What a drill plays on: a real server over a tiny model, with ways to fail, and its callers."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.models import routed_tokens
from deploy.faults import DIE
from elastiformer import ElasticModel
from tests.tiny import tiny, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
NAME, LAYERS = "drilled", 12
START_SECONDS = 120.0
FLOOD, MAX_WAITING, MAX_RUNNING = 96, 64, 4
GENTLE_SECONDS = 0.3  # between an answer and the next request
CAPACITIES = (0.5, 0.6, 0.7)


@dataclass(frozen=True, slots=True)
class Question:
    """What a gentle caller asks."""

    prompt: str = "Once upon"
    tokens: int = 24
    capacities: tuple[float, ...] = CAPACITIES


USUAL = Question()
DENSE = Question(capacities=(1.0,))
SHORT = Question(prompt="O", tokens=1)  # of its first token nothing can be left out


@dataclass
class Stage:
    """The server and the callers."""

    folder: Path
    port: int
    question: Question = USUAL
    flood: int = 0
    answers: dict[int, int] = field(default_factory=dict)
    _server: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start_server(self, adapter: bool = True) -> None:
        model = f"{NAME}={self.folder / 'base'}"
        model += f",adapter={self.folder / 'adapter'}" if adapter else ""
        flags = {
            "--port": self.port,
            "--model": model,
            "--threads": 1,
            "--max-waiting": MAX_WAITING,
            "--max-running": MAX_RUNNING,
            "--drain-seconds": 1,
            "--log-level": "critical",
        }
        words = [str(word) for pair in flags.items() for word in pair]
        with (self.folder / "server.log").open("ab") as log:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "deploy.faults", str(self.faults), *words],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdout=log,
                stderr=log,
            )
        await self._until(self._is_ready, START_SECONDS, "the server is not ready")

    @property
    def faults(self) -> Path:
        return self.folder / "faults"

    async def _is_ready(self) -> bool:
        assert self._server is not None and self._server.poll() is None, "the server has ended"
        async with httpx.AsyncClient(trust_env=False, timeout=2) as client:
            with suppress(httpx.HTTPError):
                return (await client.get(f"{self.address}/ready")).status_code == 200
        return False

    async def _until(self, true: Callable[[], Awaitable[bool]], most: float, told: str) -> None:
        deadline = time.monotonic() + most
        while not await true():
            assert time.monotonic() < deadline, f"{told} after {most:g} seconds"
            await asyncio.sleep(0.5)

    async def stop_server(self, how: signal.Signals = signal.SIGTERM) -> None:
        assert self._server is not None
        self._server.send_signal(how)
        await asyncio.to_thread(self._server.wait, 30)

    def close(self) -> None:
        if self._server is not None and self._server.poll() is None:
            self._server.kill()
            self._server.wait()

    # Callers.

    async def call_gently(self) -> None:
        """One request after the other, with a pause between, for as long as the drill lasts."""
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            for number in itertools.count():
                question = self.question
                capacity = question.capacities[number % len(question.capacities)]
                await self._call(client, capacity, question.tokens, question.prompt)
                await asyncio.sleep(GENTLE_SECONDS)

    async def call_in_a_flood(self) -> None:
        """Whoever gets an answer asks again at once, and who is refused, soon."""
        limits = httpx.Limits(max_connections=FLOOD)
        async with httpx.AsyncClient(trust_env=False, timeout=120, limits=limits) as client:

            async def one(number: int) -> None:
                while True:
                    if number >= self.flood:
                        await asyncio.sleep(0.5)
                    elif await self._call(client, CAPACITIES[number % 3], 48) != 200:
                        await asyncio.sleep(1.0)

            await asyncio.gather(*map(one, range(FLOOD)))

    async def _call(
        self,
        client: httpx.AsyncClient,
        capacity: float,
        tokens: int,
        prompt: str = USUAL.prompt,
    ) -> int:
        body = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "capacity": capacity}
        try:
            answer = await client.post(
                f"{self.address}/v1/completions", json=body | {"ignore_eos": True}
            )
            status = answer.status_code
        except httpx.HTTPError:
            status = 0  # no server: that is what some scenes are about
        self.answers[status] = self.answers.get(status, 0) + 1
        return status

    # What goes wrong.

    async def flood_with(self, callers: int) -> None:
        self.flood = callers

    async def fault(self, name: str) -> None:
        (self.faults / name).touch()

    async def mend(self, name: str) -> None:
        (self.faults / name).unlink()

    async def restart(self) -> None:
        await self.stop_server(signal.SIGKILL)
        (self.faults / DIE).unlink(missing_ok=True)
        self.question = USUAL
        await self.start_server()

    async def drop_adapter(self) -> None:
        await self.stop_server()
        self.question = DENSE
        await self.start_server(adapter=False)

    async def ask(self, question: Question) -> None:
        self.question = question


def make_model(folder: Path) -> None:
    """A tiny model, and an adapter that leaves tokens out of all its layers."""
    tiny("llama", num_hidden_layers=LAYERS).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    model = ElasticModel.load(str(folder / "base"), None, dtype="float32", device="cpu")
    routed_tokens(model, kv="complete")
    assert model.adapter is not None
    model.adapter.save(folder / "adapter")


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
