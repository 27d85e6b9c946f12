"""Everything the server refuses or fails with on purpose, and the HTTP status of each.

ServiceError
├── QueueFull           no room to wait
├── NotServing          this server takes no work now
│   ├── Draining        it is about to stop
│   └── EngineDead      the worker of this model has died
├── TimedOut            a request took longer than the server lets it
├── StepFailed          the model raised in a step this request was part of
├── Cancelled           the caller went away
├── UnknownModel        no model of that name is served
├── Unauthorized        no key, or one that is not known
├── BodyTooLarge        a request body above the bound
└── BadRequest          a field of the wrong form; `param` names it
"""

from __future__ import annotations

from dataclasses import dataclass

from elastiformer.errors import CacheFull, CapacityError, InputError


class ServiceError(Exception):
    """The root: catch this to catch everything the server refuses."""

    param: str | None = None


class QueueFull(ServiceError):
    """More sequences wait than may; try again later."""


class NotServing(ServiceError):
    """This server takes no work now."""


class Draining(NotServing):
    """The server is about to stop and finishes what it has."""


class EngineDead(NotServing):
    """The worker of this model has died."""


class TimedOut(ServiceError):
    """The request took longer than the server lets one take."""


class StepFailed(ServiceError):
    """The model raised in a step that this request was part of."""


class Cancelled(ServiceError):
    """The caller went away."""


class UnknownModel(ServiceError):
    """No model of that name is served."""

    param = "model"


class Unauthorized(ServiceError):
    """No key, or one that is not known."""


class BodyTooLarge(ServiceError):
    """A request body above the bound."""


class BadRequest(ServiceError):
    """A field of the wrong form."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class Refusal:
    """How an error looks from outside; the names are OpenAI's."""

    status: int
    kind: str
    code: str
    retry_after_seconds: int | None = None


REFUSALS: dict[type[Exception], Refusal] = {
    CapacityError: Refusal(400, "invalid_request_error", "invalid_capacity"),
    InputError: Refusal(400, "invalid_request_error", "invalid_input"),
    BadRequest: Refusal(400, "invalid_request_error", "invalid_value"),
    Unauthorized: Refusal(401, "authentication_error", "invalid_api_key"),
    UnknownModel: Refusal(404, "not_found_error", "model_not_found"),
    BodyTooLarge: Refusal(413, "invalid_request_error", "body_too_large"),
    QueueFull: Refusal(429, "rate_limit_error", "queue_full", retry_after_seconds=1),
    Cancelled: Refusal(499, "cancelled", "cancelled"),
    StepFailed: Refusal(500, "server_error", "step_failed"),
    CacheFull: Refusal(503, "service_unavailable", "cache_full", retry_after_seconds=1),
    Draining: Refusal(503, "service_unavailable", "draining", retry_after_seconds=10),
    EngineDead: Refusal(503, "service_unavailable", "engine_dead", retry_after_seconds=10),
    TimedOut: Refusal(503, "service_unavailable", "timeout", retry_after_seconds=10),
}
MOST_CHARACTERS = 1000  # of a message
UNEXPECTED = Refusal(500, "server_error", "internal_error")


def refusal_of(error: Exception) -> Refusal:
    """The entry of an error's own class or of the nearest one above it."""
    return next((REFUSALS[kind] for kind in type(error).__mro__ if kind in REFUSALS), UNEXPECTED)


def error_object(error: Exception) -> dict[str, object]:
    """OpenAI's error object. What was not raised on purpose says nothing of its inside."""
    refusal = refusal_of(error)
    if refusal is UNEXPECTED:
        message = "the server failed on this request; its log says why"
    else:
        message = str(error)
    if len(message) > MOST_CHARACTERS:  # a caller's own value is in it, of any length
        message = f"{message[:MOST_CHARACTERS]}…"
    return {
        "error": {
            "message": message,
            "type": refusal.kind,
            "param": getattr(error, "param", None) or _param(error, message),
            "code": refusal.code,
        }
    }


def _param(error: Exception, message: str) -> str | None:
    """The library begins a message with the field it is about: `capacity.heads: …`."""
    if not isinstance(error, CapacityError | InputError):
        return None
    name, colon, _ = message.partition(":")
    if colon and " " not in name:
        return name.partition(".")[0]
    return "capacity" if isinstance(error, CapacityError) else None
