"""The app: what is mounted, what starts and stops with it, and which error is which status."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from elastiformer.errors import ElastiError
from service.bench import helpers
from service.build import version
from service.desk import Desk
from service.errors import (
    UNEXPECTED,
    BadRequest,
    ServiceError,
    Unauthorized,
    UnknownModel,
    error_object,
    refusal_of,
)
from service.fetching import Fetcher
from service.knob import Knob
from service.logs import REQUEST_ID, RequestLog, visit_of
from service.metrics import INTERNAL, NO_MODEL, Metrics
from service.middleware import BodyBound
from service.routes import SPENT_HEADER, Hall, hashed, router
from service.served import Catalogue
from service.settings import Key, Settings
from service.tracing import OFF, Tracing

log = logging.getLogger("elasti.http")
SHOWN_CHARACTERS = 60  # of a refused value


def create_app(
    settings: Settings,
    catalogue: Catalogue,
    metrics: Metrics,
    keys: Iterable[Key] = (),
    tracing: Tracing | None = None,
) -> FastAPI:
    """An app over loaded models; its engines start and stop with it."""
    knob = Knob(
        settings.default_capacity,
        settings.effort,
        settings.capacity_ceiling,
        settings.load_limits,
        settings.load_floor,
    )
    desk = Desk(catalogue, knob, settings.default_max_tokens)
    for served in catalogue:
        metrics.load_ceiling.labels(served.name).set_function(partial(desk.ceiling, served))
    metrics.name_build(settings.build)
    hall = Hall(
        catalogue=catalogue,
        desk=desk,
        metrics=metrics,
        keys={hashed(key.key): key for key in keys},
        tracing=tracing,
        fetcher=Fetcher(hosts, settings.max_body_bytes)
        if (hosts := settings.image_hosts)
        else None,
        build=settings.build,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(helpers())
        for served in catalogue:
            served.engine.start()
        yield
        hall.drain()
        for served in catalogue:
            served.engine.stop()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    # The pages of /docs with their scripts inside: nothing is loaded from elsewhere.
    app = FastAPIOffline(
        redoc_url=None,
        title="Elastiformer Serve",
        version=version(),
        description="A compute capacity per request. OpenAI-compatible.",
        lifespan=lifespan,
        telemetry=OFF if tracing is None else tracing.of_app,
    )
    app.state.hall = hall
    app.include_router(router)
    app.add_middleware(BodyBound, most_bytes=settings.max_body_bytes, metrics=metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[SPENT_HEADER, REQUEST_ID],
        )
    app.add_middleware(RequestLog, tracing=tracing)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    for kind in (ServiceError, ElastiError, Exception):
        app.add_exception_handler(kind, _refused)
    return app


async def _refused(request: Request, error: Exception) -> JSONResponse:
    refusal = refusal_of(error)
    headers: dict[str, str] = {}
    if refusal is UNEXPECTED:
        visit = visit_of(request.scope)
        log.exception("%s %s failed", visit.method, visit.path, exc_info=error)
        headers |= visit.headers  # this answer passes no middleware
    _count(request, error)
    if refusal.retry_after_seconds is not None:
        headers["retry-after"] = str(refusal.retry_after_seconds)
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_object(error), refusal.status, headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """A body that the schema refuses, as OpenAI's error object."""
    assert isinstance(error, RequestValidationError)
    return await _refused(request, bad_request(error.errors()))


async def _http(request: Request, error: Exception) -> JSONResponse:
    """What the framework refuses by itself: no such route, no such method, no JSON at all."""
    assert isinstance(error, HTTPException)
    said = str(error.detail)
    if error.status_code == 400:  # FastAPI raises it for one thing only, and names no reason
        said = "the body cannot be read: not UTF-8, nested too deep, or a number too long"
        return await _refused(request, BadRequest(said, None))
    if error.status_code in (404, 405):
        said = f"{request.method} {request.url.path}: {said.lower()}; /docs lists the routes"
    body = {
        "error": {
            "message": said,
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        }
    }
    return JSONResponse(body, error.status_code, error.headers)


def bad_request(errors: Iterable[Mapping[str, object]]) -> BadRequest:
    """All that is wrong, one clause per field and value; `param` is the first field."""
    clauses: dict[tuple[str, str], list[str]] = {}
    for each in errors:
        loc = each["loc"]
        assert isinstance(loc, tuple), "a place in the body"
        if each["type"] == "json_invalid":
            context = each.get("ctx")
            why = context.get("error") if isinstance(context, Mapping) else None
            return BadRequest(f"the body is not JSON: {why}, at character {loc[-1]}", None)
        if len(loc) == 1:
            return BadRequest("the body is not a JSON object sent as application/json", None)
        # The names of a union's branches stand in the place too; only the field is shown.
        name, got = str(loc[1]), f"; got {_shown(each['input'])}"
        said = str(each["msg"]).removeprefix("Value error, ").removeprefix("Input ")
        if each["type"] == "missing":
            said = f"{'.'.join(map(str, loc[1:]))} is missing" if len(loc) > 2 else "it is missing"
            got = ""
        clauses.setdefault((name, got), []).append(said)
    message = "; ".join(
        f"{name}: {' or '.join(dict.fromkeys(texts))}{got}"
        for (name, got), texts in clauses.items()
    )
    return BadRequest(message, next(iter(clauses))[0])


def _shown(value: object) -> str:
    """A refused value, short enough for a message."""
    if isinstance(value, Mapping):
        return "an object"
    text = repr(value[:SHOWN_CHARACTERS] if isinstance(value, str | list) else value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _count(request: Request, error: Exception) -> None:
    """Refusals before an engine was asked, and our mistakes; the engine's own it counts itself."""
    metrics = request.app.state.hall.metrics
    assert isinstance(metrics, Metrics)
    reasons: dict[type[Exception], str] = {
        Unauthorized: "unauthorized",
        UnknownModel: "unknown_model",
    }
    reason, refusal = reasons.get(type(error)), refusal_of(error)
    if reason is None and refusal.status == 400:
        reason = "invalid"
    elif refusal is UNEXPECTED:
        reason = INTERNAL
    if reason is not None:
        metrics.rejections.labels(NO_MODEL, reason).inc()
