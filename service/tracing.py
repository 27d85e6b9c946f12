"""Traces by OpenTelemetry: where a request's time went, and what it paid.

Off unless the extra `tracing` is installed and the standard variables name an exporter; then the
only cost is that they were looked at. FastAPI makes the span of the HTTP request and reads
`traceparent`. Below it stands the GenAI span of the inference, and below that queue, prefill and
decode, all made in one go when the request has ended, from the times and counts that the engine
keeps anyway. No text of a prompt or an answer is in any of them.

    OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318 python -m service

Names: https://github.com/open-telemetry/semantic-conventions-genai; what they lack begins with
`elasti.`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from elastiformer.capacity import Phase, Unit
from elastiformer.usage import Usage
from service.build import PACKAGE, version
from service.desk import Placed, PlacedLabels
from service.errors import refusal_of
from service.items import PlacedItems
from service.orders import Done, Failed, Summary, Ticket, fetched_for, waited_before

if TYPE_CHECKING:  # for their names only: nothing of it is loaded where tracing is off
    from fastapi.telemetry import TelemetryConfig
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

PROVIDER = "elastiformer"
PROBES = ("/health", "/ready", "/metrics")  # asked every few seconds, and nothing to see
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_HTTP = "http/protobuf"
AnyPlaced = Placed | PlacedLabels | PlacedItems
Attributes = dict[str, str | int | float | list[str]]

OFF: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where in which trace something happens, in W3C's notation."""

    trace_id: str
    span_id: str
    traceparent: str


class Tracing:
    """Spans through one provider of OpenTelemetry's SDK."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import context, trace

        self._context = context
        self._trace = trace
        self._provider = provider
        self._tracer = provider.get_tracer(PACKAGE, version())

    @property
    def of_app(self) -> TelemetryConfig:
        """FastAPI's part: the span of the HTTP request, without its messages and stacks."""
        return {
            **OFF,
            "tracing": True,
            "tracer_provider": self._provider,
            "exclude": _is_probe,
        }

    def here(self) -> Place | None:
        """The current span; None outside of any."""
        at = self._trace.get_current_span().get_span_context()
        if not at.is_valid:
            return None
        trace_id, span_id = f"{at.trace_id:032x}", f"{at.span_id:016x}"
        return Place(trace_id, span_id, f"00-{trace_id}-{span_id}-{at.trace_flags:02x}")

    def follow(self, placed: AnyPlaced, ticket: Ticket) -> None:
        """Make an order's spans, below the current one, as soon as it has ended."""
        parent = self._context.get_current()
        began = time.time_ns() - round((waited_before.get() + fetched_for.get()) * 1e9)

        def tell(ending: Done | Failed) -> None:
            clock = _Clock(began, ending.summary)
            span = self._tracer.start_span(
                f"{placed.operation} {placed.served.name}",
                context=parent,
                attributes=_asked(placed),
                start_time=clock.began,
            )
            if span.is_recording():
                span.set_attributes(_got(ending.summary, placed))
                self._phases(span, clock, ending.summary, placed)
            if isinstance(ending, Failed):
                span.set_attribute("error.type", refusal_of(ending.error).code)
                span.set_status(self._trace.StatusCode.ERROR)
            span.end(clock.ended)

        ticket.when_ended(tell)

    def _phases(
        self,
        inference: Span,
        clock: _Clock,
        summary: Summary,
        placed: AnyPlaced,
    ) -> None:
        inside = self._trace.set_span_in_context(inference)

        def phase(name: str, begins: int, ends: int, attributes: Attributes) -> None:
            span = self._tracer.start_span(
                name, context=inside, attributes=attributes, start_time=begins
            )
            span.end(ends)

        applied = placed.order.resolved.applied
        if summary.fetch_seconds:
            phase("fetch", clock.began, clock.fetched, {})
        phase("queue", clock.fetched, clock.admitted, {})
        if not summary.usage.dense_flops and summary.first_token_seconds is None:
            return  # it never ran
        before, after = _parts(summary)
        phase(
            "prefill",
            clock.admitted,
            clock.first_token,
            {
                "gen_ai.usage.input_tokens": summary.prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": summary.cached_tokens,
                "elasti.capacity.applied": _json(_share(applied.as_json(), "prompt")),
                **before,
                **_left_out(summary.usage, Phase.PROMPT),
            },
        )
        if summary.first_token_seconds is None:
            return  # it only scored
        phase(
            "decode",
            clock.first_token,
            clock.ended,
            {
                "gen_ai.usage.output_tokens": summary.generated_tokens,
                "elasti.capacity.applied": _json(_share(applied.as_json(), "output")),
                **after,
                **_left_out(summary.usage, Phase.OUTPUT),
            },
        )

    def close(self) -> None:
        """Send what is not yet sent."""
        self._provider.shutdown()


@dataclass(frozen=True, slots=True)
class _Clock:
    """A request's times as OpenTelemetry has them: nanoseconds of the wall clock."""

    began: int
    summary: Summary

    @property
    def fetched(self) -> int:
        return self._after(self.summary.fetch_seconds)

    @property
    def admitted(self) -> int:
        return self._after(self.summary.fetch_seconds + self.summary.queue_seconds)

    @property
    def first_token(self) -> int:
        first = self.summary.first_token_seconds
        return self.ended if first is None else self._after(first)

    @property
    def ended(self) -> int:
        return self._after(self.summary.total_seconds)

    def _after(self, seconds: float) -> int:
        return self.began + round(seconds * 1e9)


def from_environment(
    say: Callable[[str], None], environment: Mapping[str, str] = os.environ
) -> Tracing | None:
    """What the standard OTEL_ variables ask for; None where they ask for nothing.

    What they ask for and cannot be had is told, and the server goes on without it: they are
    often set for a whole cluster.
    """
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    to_collector = any(environment.get(name) for name in _ENDPOINTS) or exporter == "otlp"
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or exporter == "none":
        return None
    if not to_collector and exporter != "console":
        return None
    if exporter not in ("", "otlp", "console"):
        say(f"no traces: OTEL_TRACES_EXPORTER is otlp, console or none here; got {exporter!r}")
        return None
    protocol = next((environment[name] for name in _PROTOCOLS if environment.get(name)), _HTTP)
    if exporter != "console" and protocol != _HTTP:
        say(f"no traces: OTEL_EXPORTER_OTLP_PROTOCOL is {_HTTP} here; got {protocol!r}")
        return None
    try:
        provider = _provider(console=exporter == "console")
    except ImportError as error:
        say(f"no traces: {error.name} is missing: pip install '{PACKAGE}[tracing]'")
        return None
    return Tracing(provider)


def _provider(console: bool) -> TracerProvider:
    """Sampler, batches, headers and time limits come from OTEL_ variables by themselves."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import (
        BatchSpanProcessor,
        ConsoleSpanExporter,
        SimpleSpanProcessor,
    )

    own = Resource.create({"service.name": PACKAGE, "service.version": version()})
    provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()))
    if console:
        provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))
    else:
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _is_probe(scope: MutableMapping[str, Any]) -> bool:
    return scope["type"] != "http" or scope["path"] in PROBES


def _asked(placed: AnyPlaced) -> Attributes:
    """What a sampler may look at: it is known before anything ran."""
    order, resolved = placed.order, placed.order.resolved
    sampling = order.sampling
    attributes: Attributes = {
        "gen_ai.operation.name": placed.operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": placed.name,
        "elasti.capacity.requested": _json(resolved.requested),
        "elasti.capacity.applied": _json(resolved.applied.as_json()),
        "elasti.capacity.tier": resolved.tier,
    }
    if resolved.limited_by is not None:
        attributes["elasti.capacity.limited_by"] = resolved.limited_by
    if placed.operation in ("classify", "embeddings"):
        return attributes
    attributes |= {
        "gen_ai.request.max_tokens": max(job.most_new for job in order.jobs),
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
    }
    if order.choices != 1:
        attributes["gen_ai.request.choice.count"] = order.choices
    if sampling.top_k:
        attributes["gen_ai.request.top_k"] = sampling.top_k
    if sampling.seed is not None:
        attributes["gen_ai.request.seed"] = sampling.seed
    return attributes


def _got(summary: Summary, placed: AnyPlaced) -> Attributes:
    usage = summary.usage
    attributes: Attributes = {
        "gen_ai.response.model": placed.served.name,
        "gen_ai.response.finish_reasons": list(summary.finish_reasons),
        "gen_ai.usage.input_tokens": summary.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": summary.cached_tokens,
        "gen_ai.usage.output_tokens": summary.generated_tokens,
        "elasti.capacity.spent": usage.capacity_spent,
        "elasti.flops": usage.flops,
        "elasti.dense_flops": usage.dense_flops,
    }
    if summary.first_token_seconds is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = summary.first_token_seconds
    if summary.energy_joules is not None:
        attributes["elasti.energy_joules"] = summary.energy_joules
    return attributes


def _parts(summary: Summary) -> tuple[Attributes, Attributes]:
    """What was spent up to the first drawn token of each sequence, and after it."""
    usage = summary.usage
    block, dense = usage.block_flops, usage.dense_block_flops
    if summary.first_token_seconds is None:
        return _spent(block, dense), {}
    first, dense_first = summary.prefill_block_flops, summary.prefill_dense_block_flops
    return _spent(first, dense_first), _spent(block - first, dense - dense_first)


def _spent(block_flops: int, dense_block_flops: int) -> Attributes:
    attributes: Attributes = {
        "elasti.block_flops": block_flops,
        "elasti.dense_block_flops": dense_block_flops,
    }
    if dense_block_flops:
        attributes["elasti.capacity.spent"] = block_flops / dense_block_flops
    return attributes


def _left_out(usage: Usage, phase: Phase) -> Attributes:
    """Decisions of the tokens of one phase, by unit. The last prompt token is an output token."""
    attributes: Attributes = {}
    for unit in Unit:
        routed = usage.routed.get((unit, phase), 0)
        if routed:
            attributes[f"elasti.{unit.value}.routed"] = routed
            attributes[f"elasti.{unit.value}.skipped"] = usage.skipped.get((unit, phase), 0)
    return attributes


def _share(capacity: object, phase: str) -> object:
    """One phase of a capacity in its JSON form."""
    return capacity[phase] if isinstance(capacity, dict) and phase in capacity else capacity


def _json(value: object) -> str:
    """As text, whatever it is: an attribute that changes its type is refused by many stores."""
    return value if isinstance(value, str) else json.dumps(value)
