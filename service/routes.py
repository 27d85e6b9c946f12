"""One translation per route: a schema in, an order through the engine, JSON out.

What a route needs hangs on `app.state.hall`. Errors are not caught here: app.py knows which is
which status.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from elastiformer.capacity import DENSE
from service.answers import (
    Answer,
    ChatShape,
    CompletionShape,
    Json,
    Shape,
    classification_json,
    elasti_json,
    gather,
    prediction_json,
    usage_json,
)
from service.build import releases, version
from service.desk import Caller, Desk, Placed, PlacedLabels
from service.errors import Draining, EngineDead, NotServing, QueueFull, Unauthorized, UnknownModel
from service.fetching import Fetcher, R
from service.items import PlacedItems
from service.knob import HEADER
from service.logs import visit_of
from service.metrics import Metrics
from service.orders import Ticket
from service.readings import embeddings_json, read_predictions, reading_json
from service.schemas import (
    Answered,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    Entity,
    Prediction,
    PredictRequest,
    Wrong,
)
from service.served import Catalogue, Served
from service.settings import Key
from service.streams import EventStream, stream, tied_to
from service.tracing import Tracing

SPENT_HEADER = "X-Elasti-Capacity-Spent"
PAGE = Path(__file__).with_name("page.html")
_BEARER = re.compile(r"Bearer\s+(\S+)", re.IGNORECASE)

# What OpenAPI says about answers.
_REFUSED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Wrong, "description": "Refused; 429 comes with Retry-After"},
    "5XX": {"model": Wrong, "description": "Failed; 503 comes with Retry-After"},
}
_ANSWERED: dict[int | str, dict[str, Any]] = {200: {"model": Answered}}
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"model": Answered, "content": {"text/event-stream": {}}}
}
_PREDICTED: dict[int | str, dict[str, Any]] = {
    200: {"model": list[Prediction | Entity] | list[list[Prediction | Entity]]}
}

AnyPlaced = Placed | PlacedLabels | PlacedItems

router = APIRouter(responses=_REFUSED)


@dataclass(slots=True)
class Hall:
    """What the routes share."""

    catalogue: Catalogue
    desk: Desk
    metrics: Metrics
    keys: dict[str, Key] = field(default_factory=dict)  # by the hash of the secret
    tracing: Tracing | None = None
    fetcher: Fetcher | None = None  # where images may be named by their address
    build: str | None = None
    draining: bool = False

    def drain(self) -> None:
        """Take no new work; what runs goes on."""
        self.draining = True
        for served in self.catalogue:
            served.engine.draining = True

    @property
    def idle(self) -> bool:
        return all(served.engine.idle for served in self.catalogue)


def hall_of(request: Request) -> Hall:
    hall = request.app.state.hall
    assert isinstance(hall, Hall)
    return hall


TheHall = Annotated[Hall, Depends(hall_of)]


def hashed(secret: str) -> str:
    """Keys are looked up by their hash: how long it takes says nothing about the key."""
    return hashlib.sha256(secret.encode()).hexdigest()


async def caller_of(request: Request, hall: TheHall) -> Caller:
    """Who asks; raises Unauthorized where keys are required."""
    header = request.headers.get(HEADER)
    if not hall.keys:
        return Caller(None, header)
    bearer = _BEARER.fullmatch(request.headers.get("authorization", "").strip())
    key = hall.keys.get(hashed(bearer[1])) if bearer else None
    if key is None:
        raise Unauthorized("this server needs an API key: Authorization: Bearer KEY")
    return Caller(key, header)


TheCaller = Annotated[Caller, Depends(caller_of)]


@router.post("/v1/completions", responses=_STREAMED)
async def completions(
    request: Request, asked: CompletionRequest, hall: TheHall, caller: TheCaller
) -> Response:
    """Continue a text, or score one (`echo` with `logprobs`)."""
    placed = await asyncio.to_thread(hall.desk.completion, asked, caller)
    return await _generate(request, hall, placed, CompletionShape(placed), asked)


@router.post("/v1/chat/completions", responses=_STREAMED)
async def chat_completions(
    request: Request, asked: ChatRequest, hall: TheHall, caller: TheCaller
) -> Response:
    """Answer a conversation."""
    asked = await _fetched(hall, asked)
    placed = await asyncio.to_thread(hall.desk.chat, asked, caller)
    return await _generate(request, hall, placed, ChatShape(placed), asked)


@router.post("/v1/embeddings", responses=_ANSWERED)
async def embeddings(
    request: Request, asked: EmbeddingRequest, hall: TheHall, caller: TheCaller
) -> Response:
    """Features of texts or images, one vector each."""
    asked = await _fetched(hall, asked)
    placed = await asyncio.to_thread(hall.desk.embed, asked, caller)
    answer = await _answer(request, hall, placed)
    return _json(embeddings_json(placed, answer, asked.encoding_format or "float"), placed, answer)


@router.post("/v1/classify", responses=_ANSWERED)
@router.post("/classify", responses=_ANSWERED)
async def classify(
    request: Request, asked: ClassifyRequest, hall: TheHall, caller: TheCaller
) -> Response:
    """Choose among labels, with the probability of each."""
    asked = await _fetched(hall, asked)
    placed = await asyncio.to_thread(hall.desk.classify, asked, caller)
    answer = await _answer(request, hall, placed)
    if isinstance(placed, PlacedItems):
        return _json(reading_json(placed, answer), placed, answer)
    return _json(classification_json(placed, answer), placed, answer)


@router.post("/predict", responses=_PREDICTED)
async def predict(
    request: Request, asked: PredictRequest, hall: TheHall, caller: TheCaller
) -> Response:
    """Score labels: the same question as `/v1/classify`, the answer as a plain list."""
    asked = await _fetched(hall, asked)
    placed = await asyncio.to_thread(hall.desk.predict, asked, caller)
    answer = await _answer(request, hall, placed)
    raw = bool(asked.raw_scores)
    if isinstance(placed, PlacedItems):
        predictions = read_predictions(placed, answer, raw)
    else:
        predictions = prediction_json(placed, answer, raw)
    body = predictions if isinstance(asked.inputs, list) else predictions[0]
    return JSONResponse(body, headers=_spent(answer))


@router.get("/v1/models")
async def models(hall: TheHall, caller: TheCaller) -> Json:
    """Served models, each with an alias per named capacity."""
    data = [
        _model_json(served, name)
        for served in hall.catalogue
        for name in (served.name, *served.aliases)
    ]
    return {"object": "list", "data": data}


@router.get("/v1/models/{name}")
async def model(name: str, hall: TheHall, caller: TheCaller) -> Json:
    """One served model, by its name or an alias."""
    found = hall.catalogue.find(name)
    if found.alias is not None and name not in found.served.aliases:
        shown = ", ".join(found.served.aliases) or "none"
        raise UnknownModel(f"model: {name!r} is no alias of {found.served.name!r}; these: {shown}")
    return _model_json(found.served, name)


@router.get("/health")
async def health(hall: TheHall) -> Response:
    """Alive: every engine works. 503 when one has died."""
    hall.catalogue.check_alive()
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(hall: TheHall) -> Response:
    """Ready for work: models loaded, engines alive, not draining."""
    if hall.draining:
        raise Draining("this server is about to stop")
    return await health(hall)


@router.get("/version")
async def version_of_server(hall: TheHall) -> Json:
    """The version of this server, and what each model runs on and was loaded from."""
    return {
        "version": version(),
        "build": hall.build,
        "releases": releases(),
        "models": {
            served.name: served.machinery.as_json() | {"adapter": served.identity}
            for served in hall.catalogue
        },
    }


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(hall: TheHall) -> Response:
    """Prometheus."""
    return Response(hall.metrics.page(), media_type=CONTENT_TYPE_LATEST)


@router.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    """A page to try the knob by hand."""
    return HTMLResponse(PAGE.read_text(encoding="utf-8"))


async def _fetched(hall: Hall, asked: R) -> R:
    """The request with the images that it names by address; raises UnknownModel, InputError."""
    if hall.fetcher is None or not hall.catalogue.find(asked.model).served.reads_images:
        return asked
    return await hall.fetcher.within(asked)


async def _generate(
    request: Request,
    hall: Hall,
    placed: Placed,
    shape: Shape,
    asked: CompletionRequest | ChatRequest,
) -> Response:
    if not asked.stream:
        answer = await _answer(request, hall, placed)
        # Thousands of tokens with their probabilities take long to write out.
        return await asyncio.to_thread(_whole, placed, shape, answer)
    ticket = _submit(request, hall, placed)
    batches = ticket.batches()
    async with tied_to(request, ticket, keep=True):
        first = await anext(batches)  # decides between a stream and an error status
    body = stream(request, placed, shape, ticket, first, batches, asked.stream_options)
    return EventStream(ticket, body)


def _whole(placed: Placed, shape: Shape, answer: Answer) -> Response:
    return _json(shape.whole(answer), placed, answer)


async def _answer(request: Request, hall: Hall, placed: AnyPlaced) -> Answer:
    ticket = _submit(request, hall, placed)
    async with tied_to(request, ticket):
        return await gather(ticket.events(), len(placed.order.jobs))


def _submit(request: Request, hall: Hall, placed: AnyPlaced) -> Ticket:
    name, rejections = placed.served.name, hall.metrics.rejections
    try:
        ticket = placed.served.engine.submit(placed.order)
    except (QueueFull, NotServing) as error:
        reason = {QueueFull: "queue_full", EngineDead: "dead"}.get(type(error), "draining")
        rejections.labels(name, reason).inc()
        raise
    if placed.order.resolved.limited_by:
        hall.metrics.overrides.labels(name, placed.order.resolved.limited_by).inc()
    visit_of(request.scope).work(name, ticket)
    if hall.tracing is not None:
        hall.tracing.follow(placed, ticket)
    return ticket


def _json(body: Json, placed: AnyPlaced, answer: Answer) -> Response:
    summary = answer.summary
    body |= {"usage": usage_json(summary), "elasti": elasti_json(placed, summary)}
    return JSONResponse(body, headers=_spent(answer))


def _spent(answer: Answer) -> dict[str, str]:
    return {SPENT_HEADER: f"{answer.summary.usage.capacity_spent:.4f}"}


def _model_json(served: Served, name: str) -> Json:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "elastiformer",
        "root": served.name,
        "parent": None if name == served.name else served.name,
        "max_model_len": served.engine.longest(DENSE),
        "meta": served.meta,
    }
