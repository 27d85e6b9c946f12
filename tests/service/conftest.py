"""A whole server over a tiny real model: routed by untrained routers, calibrated by hand."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from fastapi import FastAPI

from elastiformer import Calibration, ElasticModel, Measured, Phase, Step, Unit
from elastiformer.accounting import KVPolicy
from service.app import create_app
from service.energy import Meter
from service.metrics import Metrics
from service.served import Catalogue, serve
from service.settings import Key, ModelSpec, Settings
from service.tracing import Tracing
from tests.tiny import LAYERS, tiny, tiny_tokenizer

# Only what hangs takes so long: a machine may compile for a minute, and stand still for seconds.
PATIENCE_SECONDS = 240.0
LOWEST = 0.5
UNITS = (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS, Unit.HEADS, Unit.EXPERTS, Unit.CHANNELS)
PATH = (
    *(Step(layer, "heads", 0.75) for layer in range(LAYERS)),
    *(Step(layer, "mlp_out", 0.7) for layer in range(LAYERS)),
    *(Step(layer, "attention_tokens", 0.5) for layer in range(LAYERS)),
    *(Step(layer, "experts", 5 / 7) for layer in range(LAYERS)),
    *(Step(layer, "mlp_tokens", 0.25) for layer in range(LAYERS)),
)


def elastic_model(family: str = "llama", kv: KVPolicy = "complete", **changes: Any) -> ElasticModel:
    """A tiny model with every unit and a calibration from 0.5 on."""
    base = tiny(family, **changes)
    model = ElasticModel(base, tokenizer=tiny_tokenizer())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapter = model.blank_adapter(
            UNITS, experts=7, expert_split="contiguous", lora_rank=1, kv=kv
        )
        for parameter in adapter.parameters().values():
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapter.calibration = Calibration(
        lowest=LOWEST,
        context=96,
        paths=dict.fromkeys(Phase, PATH),
        thresholds={},
        measured=(Measured(1.0, 1.0, kl=0.0), Measured(0.5, 0.5, kl=0.7)),
    )
    model.attach(adapter)
    return model


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Hold:
    """A model that is held takes no step but those that are let pass."""

    def __init__(self, after: int) -> None:
        self.waits = threading.Event()  # a step has begun, and may not go on
        self._may_pass: float = after
        self._changed = threading.Condition()

    def let_pass(self, steps: float) -> None:
        with self._changed:
            self._may_pass += steps
            self.waits.clear()
            self._changed.notify_all()

    def end(self) -> None:
        self.let_pass(math.inf)

    def stop(self) -> None:
        """What a step does first."""
        with self._changed:
            if not self._may_pass:
                self.waits.set()
                may_pass = self._changed.wait_for(lambda: self._may_pass, PATIENCE_SECONDS)
                assert may_pass, "nobody let this step pass"
            self._may_pass -= 1


class Watched(ElasticModel):
    """A real model that remembers what its steps were made of, and takes its time over them.

    With a clock that time passes on the clock alone.
    """

    def __init__(
        self,
        step_seconds: float = 0.0,
        token_seconds: float = 0.0,
        kv: KVPolicy = "complete",
        clock: Clock | None = None,
    ) -> None:
        known = elastic_model(kv=kv)
        super().__init__(known.base, known.adapter, tokenizer=known.tokenizer)
        self.steps: list[list[int]] = []  # the number of tokens of each sequence
        self._step_seconds, self._token_seconds, self._clock = step_seconds, token_seconds, clock
        self._hold: Hold | None = None

    def step(self, chunks: Any) -> Any:
        self.steps.append([len(chunk.ids) for chunk in chunks])
        if (hold := self._hold) is not None:
            hold.stop()
        seconds = self._step_seconds + self._token_seconds * sum(self.steps[-1])
        if self._clock is None:
            time.sleep(seconds)
        else:
            self._clock.seconds += seconds
        return super().step(chunks)

    @contextmanager
    def held(self, after: int = 0) -> Iterator[Hold]:
        """While this lasts, so many steps are taken and the next one waits."""
        self._hold = hold = Hold(after)
        try:
            yield hold
        finally:
            self._hold = None
            hold.end()


class House:
    """An app over tiny models, and a client that talks to it without a socket."""

    def __init__(self, app: FastAPI, client: httpx.AsyncClient) -> None:
        self.app = app
        self.client = client
        self.hall = app.state.hall

    @property
    def engine(self) -> Any:
        return self.hall.catalogue.default.engine

    async def post(self, path: str, **body: Any) -> httpx.Response:
        headers = body.pop("headers", None)
        return await self.client.post(path, json={"model": "tiny"} | body, headers=headers)

    async def complete(self, prompt: Any = "Once upon a time", **body: Any) -> dict[str, Any]:
        answer = await self.post("/v1/completions", prompt=prompt, **body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def value(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        return sum(
            sample.value
            for family in self.hall.metrics.registry.restricted_registry([name]).collect()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def keeps_time_by(self, clock: Clock) -> None:
        """From now on, of the engine: everything that it measures is told by this clock."""
        engine = self.engine
        clock.seconds = time.monotonic()  # it never goes back
        engine._clock = engine._ledger._clock = engine.load._clock = clock

    async def until_running(self, request: asyncio.Task[Any]) -> None:
        while not self.value("elasti_num_requests_running"):
            assert not request.done(), "it ended before it was seen to run"
            await asyncio.sleep(0.005)

    async def until_idle(self) -> None:
        # The gauges follow when the turn that ended the last request ends.
        await soon(lambda: self.hall.idle and not self.value("elasti_num_requests_running"))


async def soon(condition: Callable[[], Any]) -> None:
    """Wait until something is true of another thread."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():
            await asyncio.sleep(0.001)


def build(
    models: dict[str, ElasticModel] | None = None,
    keys: tuple[Key, ...] = (),
    tracing: Tracing | None = None,
    meter: Meter | None = None,
    **settings: Any,
) -> FastAPI:
    """An app as `python -m service` makes it, over models that are already in memory."""
    chosen, metrics = Settings(**settings), Metrics()
    catalogue = Catalogue(
        serve(ModelSpec(name, "tiny-llama"), model, chosen, metrics, meter=meter)
        for name, model in (models or {"tiny": elastic_model()}).items()
    )
    return create_app(chosen, catalogue, metrics, keys, tracing)


@asynccontextmanager
async def opened(app: FastAPI) -> AsyncIterator[House]:
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://house") as client:
            yield House(app, client)


def in_house(visit: Callable[[House], Awaitable[None]], **options: Any) -> None:
    """Run one test's talk with a house of its own."""

    async def talk() -> None:
        async with opened(build(**options)) as house, asyncio.timeout(PATIENCE_SECONDS):
            await visit(house)

    asyncio.run(talk())


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    """The first steps of a process may compile for a minute; no test's patience counts that."""

    models = {"tiny": elastic_model(), "plain": ElasticModel(tiny(), tokenizer=tiny_tokenizer())}
    asked = [{"model": name, "n": 3} for name in models] + [{"capacity": 0.6, "n": 2}]

    async def talk() -> None:
        async with opened(build(models)) as house:
            await asyncio.gather(*(house.complete(**each) for each in asked))

    asyncio.run(talk())


@pytest.fixture
def street() -> Iterator[Callable[[FastAPI], str]]:
    """A real server on a loopback port, for what a socket alone can show."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(app: FastAPI) -> str:
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join()
