"""Promises of the traces: what is in them is what the answer says, and no text is in them."""

import asyncio
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from opentelemetry import propagate, trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode

from service.tracing import Tracing, from_environment
from tests.service.conftest import PATIENCE_SECONDS, Clock, Watched, build, in_house

SECRET = "xyzzy plugh"  # stands in every prompt; must stand in no span
LONG = {"prompt": f"{SECRET} {'a' * 150}", "max_tokens": 12, "ignore_eos": True, "temperature": 0}
NAMES = {
    value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")
}  # as the conventions' own package has them


class Memory:
    """A tracing whose spans stay here."""

    def __init__(self):
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(self.provider)

    @property
    def spans(self):
        return self._exporter.get_finished_spans()

    def named(self, name):
        (span,) = (span for span in self.spans if span.name == name)
        return span


def traced(visit, **options):
    memory = Memory()
    in_house(lambda house: visit(house, memory), tracing=memory.tracing, **options)
    for span in memory.spans:
        assert SECRET not in span.to_json() and "plugh" not in span.to_json()
        for key in span.attributes:
            assert key in NAMES or not key.startswith("gen_ai."), key
    return memory


def test_a_trace_says_what_the_answer_says():
    async def visit(house, memory):
        with memory.provider.get_tracer("caller").start_as_current_span("caller"):
            headers = {}
            propagate.inject(headers)
        reply = await house.post("/v1/completions", **LONG, capacity=0.5, n=2, headers=headers)
        await house.until_idle()
        answer = reply.json()
        usage, elasti = answer["usage"], answer["elasti"]
        caller, server = memory.named("caller"), memory.named("POST /v1/completions")
        inference = memory.named("text_completion tiny")
        queue, prefill, decode = (memory.named(name) for name in ("queue", "prefill", "decode"))

        # One trace, begun by the caller.
        assert {span.context.trace_id for span in memory.spans} == {caller.context.trace_id}
        assert server.parent.span_id == caller.context.span_id and server.parent.is_remote
        assert server.kind is SpanKind.SERVER
        assert inference.parent.span_id == server.context.span_id
        for phase in (queue, prefill, decode):
            assert phase.parent.span_id == inference.context.span_id
        _, trace_id, span_id, flags = reply.headers["traceparent"].split("-")
        assert trace_id == f"{server.context.trace_id:032x}" == headers["traceparent"][3:35]
        assert span_id == f"{server.context.span_id:016x}" and int(flags, 16) & 1

        # Three phases, one after the other, as long as the answer says.
        assert inference.start_time == queue.start_time
        assert queue.end_time == prefill.start_time < prefill.end_time == decode.start_time
        assert decode.end_time == inference.end_time
        assert server.start_time < inference.start_time
        for begins, ends, told in (
            (queue.start_time, queue.end_time, elasti["queue_ms"]),
            (inference.start_time, prefill.end_time, elasti["time_to_first_token_ms"]),
            (inference.start_time, inference.end_time, elasti["total_ms"]),
        ):
            assert (ends - begins) / 1e6 == pytest.approx(told, abs=0.001)

        # The same counts.
        told = inference.attributes
        assert told["gen_ai.operation.name"] == "text_completion"
        assert told["gen_ai.provider.name"] == "elastiformer"
        assert told["gen_ai.request.model"] == told["gen_ai.response.model"] == "tiny"
        assert told["gen_ai.request.choice.count"] == 2
        assert told["gen_ai.request.max_tokens"] == 12
        assert told["gen_ai.response.finish_reasons"] == ("length", "length")
        assert told["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
        assert told["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 24
        assert told["elasti.capacity.requested"] == told["elasti.capacity.applied"] == "0.5"
        assert told["elasti.capacity.spent"] == elasti["capacity_spent"]
        assert told["elasti.flops"] == usage["compute"]["flops"]
        assert told["elasti.dense_flops"] == usage["compute"]["dense_flops"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert told["gen_ai.usage.cache_read.input_tokens"] == cached

        # The parts add up to the whole, and neither is nothing.
        for name in ("block_flops", "dense_block_flops"):
            parts = [phase.attributes[f"elasti.{name}"] for phase in (prefill, decode)]
            assert min(parts) > 0 and sum(parts) == usage["compute"][name]
        for unit in ("attention_tokens", "mlp_tokens"):
            for counted in ("routed", "skipped"):
                parts = [
                    phase.attributes[f"elasti.{unit}.{counted}"] for phase in (prefill, decode)
                ]
                assert sum(parts) == usage["compute"][f"tokens_{counted}"][unit]

    traced(visit)


def test_every_kind_of_request_has_its_span_and_a_probe_has_none():
    chat = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 3, "seed": 5}
    capacity = {"prompt": 0.6, "output": {"mlp_tokens": 0.5}}

    async def visit(house, memory):
        streamed = await house.post("/v1/chat/completions", **chat, capacity=capacity, stream=True)
        assert "[DONE]" in streamed.text
        await house.post("/v1/classify", input=SECRET, labels=["a", "plughs"], capacity="auto")
        scored = LONG | {"max_tokens": 0, "echo": True, "logprobs": 0}
        await house.post("/v1/completions", **scored)
        for probe in ("/health", "/ready", "/metrics"):
            assert "traceparent" not in (await house.client.get(probe)).headers
        await house.client.get("/v1/models")
        await house.until_idle()

    memory = traced(visit)
    servers = [span.name for span in memory.spans if span.kind is SpanKind.SERVER]
    assert servers == [
        "POST /v1/chat/completions",
        "POST /v1/classify",
        "POST /v1/completions",
        "GET /v1/models",
    ]
    told = memory.named("chat tiny").attributes
    assert json.loads(told["elasti.capacity.requested"]) == capacity
    assert told["gen_ai.request.seed"] == 5 and told["elasti.capacity.tier"] == "mixed"
    assert memory.named("classify tiny").attributes["elasti.capacity.requested"] == "auto"
    prefill, decode = (
        [span for span in memory.spans if span.name == name] for name in ("prefill", "decode")
    )
    assert len(prefill) == 3 and len(decode) == 1  # the others draw nothing
    assert prefill[0].attributes["elasti.capacity.applied"] == "0.6"
    assert json.loads(decode[0].attributes["elasti.capacity.applied"]) == {"mlp_tokens": 0.5}
    whole = memory.named("text_completion tiny").attributes
    assert prefill[2].attributes["elasti.capacity.spent"] == whole["elasti.capacity.spent"]


def test_what_fails_is_marked():
    clock = Clock()

    async def visit(house, memory):
        house.keeps_time_by(clock)
        late = await house.post("/v1/completions", **LONG | {"max_tokens": 300})
        assert late.status_code == 503
        refused = await house.post("/v1/completions", **LONG, capacity=2)
        assert refused.status_code == 400
        await house.until_idle()

    model = Watched(step_seconds=0.3, clock=clock)
    memory = traced(visit, models={"tiny": model}, request_timeout_seconds=1)
    assert_marked(memory, "timeout", answers=[503, 400])


def test_who_leaves_is_marked():
    async def visit(house, memory):
        leaving = asyncio.create_task(house.post("/v1/completions", **LONG | {"max_tokens": 300}))
        await house.until_running(leaving)
        leaving.cancel()
        await house.until_idle()

    memory = traced(visit, models={"tiny": Watched(step_seconds=0.02)})
    assert_marked(memory, "cancelled", answers=[None])


def assert_marked(memory, error, answers):
    failed = memory.named("text_completion tiny")
    assert failed.attributes["error.type"] == error
    assert failed.status.status_code is StatusCode.ERROR
    assert failed.attributes["elasti.flops"] > 0
    servers = [span for span in memory.spans if span.kind is SpanKind.SERVER]
    assert [span.attributes.get("http.response.status_code") for span in servers] == answers


def test_a_trace_that_its_caller_does_not_sample_is_not_kept():
    async def visit(house, memory):
        headers = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-00"}
        reply = await house.post("/v1/completions", **LONG, headers=headers)
        assert reply.headers["traceparent"].split("-")[1] == "1" * 32
        assert reply.headers["traceparent"].endswith("-00")

    assert traced(visit).spans == ()


def test_text_of_a_crash_stays_out():
    class Crashing(Watched):
        def step(self, chunks):
            raise RuntimeError(SECRET)

    async def visit(house, memory):
        assert (await house.post("/v1/completions", **LONG)).status_code == 500
        await house.until_idle()

    memory = traced(visit, models={"tiny": Crashing()})
    assert memory.named("text_completion tiny").attributes["error.type"] == "step_failed"
    assert memory.named("POST /v1/completions").attributes["http.response.status_code"] == 500


# The wire.


class Collector(HTTPServer):
    """Receives OTLP over HTTP as a collector does, and keeps what it got."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.spans, self.resources, self.heads = [], [], []
        self.address = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.heads.append((self.path, self.headers["content-type"], self.headers["x-team"]))
        for each in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.resources.append(
                {item.key: item.value.string_value for item in each.resource.attributes}
            )
            self.server.spans += [span for scope in each.scope_spans for span in scope.spans]
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


def test_a_collector_receives_the_trace(street, monkeypatch):
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.address)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=blue")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        said = []
        tracing = from_environment(said.append)
        address = street(build(tracing=tracing))
        sent = trace.SpanContext(7, 9, is_remote=False, trace_flags=trace.TraceFlags(1))
        headers = {}
        propagate.inject(headers, trace.set_span_in_context(trace.NonRecordingSpan(sent)))
        answer = httpx.post(
            f"{address}/v1/completions",
            json={"model": "tiny"} | LONG,
            headers=headers,
            timeout=PATIENCE_SECONDS,
        )
        assert answer.status_code == 200
        begun = time.monotonic()  # a request's spans end after its answer
        while len(collector.spans) < 5 and time.monotonic() < begun + PATIENCE_SECONDS:
            time.sleep(0.02)
        tracing.close()  # sends what waits; the server's own end does the same
    assert said == []
    assert set(collector.heads) == {("/v1/traces", "application/x-protobuf", "blue")}
    assert collector.resources[0]["service.name"] == "elastiformer-serve"
    assert collector.resources[0]["deployment.environment.name"] == "test"
    names = {span.name for span in collector.spans}
    assert names == {
        "POST /v1/completions",
        "text_completion tiny",
        "queue",
        "prefill",
        "decode",
    }
    assert {int.from_bytes(span.trace_id, "big") for span in collector.spans} == {7}
    (server,) = (span for span in collector.spans if span.name == "POST /v1/completions")
    assert int.from_bytes(server.parent_span_id, "big") == 9
    (inference,) = (span for span in collector.spans if span.name == "text_completion tiny")
    told = {item.key: item.value for item in inference.attributes}
    compute = answer.json()["usage"]["compute"]
    assert told["elasti.flops"].int_value == compute["flops"]
    assert told["elasti.capacity.spent"].double_value == answer.json()["elasti"]["capacity_spent"]


# Off.


OTLP = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SERVICE_NAME": "mine"},
        OTLP | {"OTEL_SDK_DISABLED": "true"},
        OTLP | {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
    ],
)
def test_without_a_wish_there_is_no_tracing_and_no_word(environment):
    said = []
    assert from_environment(said.append, environment) is None
    assert said == []


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "'grpc'"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "'zipkin'"),
    ],
)
def test_what_cannot_be_had_is_told_and_the_server_goes_on(more, named):
    said = []
    assert from_environment(said.append, OTLP | more) is None
    (line,) = said
    assert line.startswith("no traces: ") and named in line


def test_a_missing_package_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    said = []
    assert from_environment(said.append, OTLP) is None
    assert said == [
        "no traces: opentelemetry.sdk.trace.export is missing: "
        "pip install 'elastiformer-serve[tracing]'"
    ]


def test_an_answer_without_tracing_has_no_traceparent():
    async def visit(house):
        reply = await house.post("/v1/completions", **LONG)
        assert "traceparent" not in reply.headers and reply.headers["x-request-id"]

    in_house(visit)
