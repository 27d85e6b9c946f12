"""Every metric this service exports, each with its unit and its question.

Names follow Prometheus: a base unit as the suffix, `_total` on counters. A ratio is never
averaged here: both its parts are counted, and whoever reads them divides. Labels are bounded:
models, units, phases and reasons are few, and a capacity becomes one of a dozen tiers.
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from elastiformer.capacity import Phase, Unit
from elastiformer.usage import Usage
from service.build import releases, version

# A time of creation per series doubles the page and answers nothing.
disable_created_metrics()  # type: ignore[no-untyped-call]

FINISHED = ("stop", "length", "abort", "error")
REJECTED = ("queue_full", "draining", "dead")
INTERNAL = "internal"  # an error that nobody foresaw, wherever a request met it
# Refused before a model was found: their model_name is empty, as whatever stood there is unbounded.
REJECTED_AT_THE_DOOR = ("invalid", "unauthorized", "unknown_model", "too_large", INTERNAL)
NO_MODEL = ""
OVERRIDES = ("key", "server", "load", "model")
AUTO, MIXED = "auto", "mixed"  # tiers of requests that name no single number
TOKEN_UNITS = (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS, Unit.IMAGE_TOKENS)

_WAIT_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
_SHARES = tuple(step / 20 for step in range(1, 21))
_DECISIONS = (0, 10, 100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000)
_PRODUCTS = (0, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14)


@dataclass(frozen=True, slots=True)
class Finished:
    """One request that ended, as the metrics see it."""

    tier: str
    usage: Usage
    prompt_tokens: int
    generated_tokens: int
    asked: float | None  # None where the request asked for no single number
    total_seconds: float
    first_token_seconds: float | None
    energy_joules: float | None = None  # None where no counter can be read


@dataclass(frozen=True, slots=True)
class Series:
    """What one engine writes at every step, looked up once."""

    alive: Gauge
    running: Gauge
    waiting: Gauge
    cache_usage: Gauge
    prefix_queries: Counter
    prefix_hits: Counter


def tiers(lowest: float) -> tuple[str, ...]:
    """Every tier that a request to a model can fall into: steps of 0.1 from its lowest one on."""
    steps = range(int(lowest * 10 + 1e-9), 11)
    return (*(f"{step / 10:.1f}" for step in steps), AUTO, MIXED)


class Metrics:
    """The registry of one app."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        model, tier = ["model_name"], ["model_name", "tier"]
        self.build_info = self._gauge(
            "elasti_build_info",
            "Always 1: which build answers, and the releases beneath it.",
            ["version", "build", *releases()],
        )
        self.alive = self._gauge(
            "elasti_engine_alive",
            "1 while the engine works, 0 once it has died: is the model served at all?",
            model,
        )
        self.running = self._gauge(
            "elasti_num_requests_running", "Sequences in the running batch: how busy is it?", model
        )
        self.waiting = self._gauge(
            "elasti_num_requests_waiting",
            "Sequences accepted and not yet in a batch: is the queue growing?",
            model,
        )
        self.cache_usage = self._gauge(
            "elasti_kv_cache_usage_perc",
            "Share of the key-value cache that running sequences reserve; 1 is full.",
            model,
        )
        self.prefix_queries = self._counter(
            "elasti_prefix_cache_queries_total",
            "Prompt tokens that were looked for among stored prefixes.",
            model,
        )
        self.prefix_hits = self._counter(
            "elasti_prefix_cache_hits_total",
            "Prompt tokens found there. Over elasti_prefix_cache_queries_total: the share found.",
            model,
        )
        self.load_ceiling = self._gauge(
            "elasti_load_capacity_ceiling",
            "Most capacity that the server grants now: its own ceiling, or under load that of the "
            "requests that it may limit.",
            model,
        )
        self.adapter_info = self._gauge(
            "elasti_adapter_info",
            "Always 1: which adapter and base model stand behind a name.",
            [*model, "adapter", "base"],
        )
        self.prompt_tokens = self._counter(
            "elasti_prompt_tokens_total", "Prompt tokens of finished requests.", model
        )
        self.generation_tokens = self._counter(
            "elasti_generation_tokens_total", "Tokens generated for finished requests.", model
        )
        self.success = self._counter(
            "elasti_request_success_total",
            "Sequences that ended, by why: stop, length, abort (the caller left) or error.",
            [*model, "finished_reason"],
        )
        self.rejections = self._counter(
            "elasti_admission_rejections_total",
            "Requests refused before any work, by why; internal: an error that nobody foresaw.",
            [*model, "reason"],
        )
        self.routed = self._counter(
            "elasti_router_tokens_total",
            "Decisions taken: one per token, layer and thing that could be left out.",
            [*model, "unit", "phase"],
        )
        self.skipped = self._counter(
            "elasti_router_tokens_skipped_total",
            "Decisions to leave out. Over elasti_router_tokens_total: the share left out.",
            [*model, "unit", "phase"],
        )
        self.flops = self._counter(
            "elasti_flops_total",
            "FLOPs that ran. Over elasti_dense_flops_total: the share of compute still paid.",
            tier,
        )
        self.dense_flops = self._counter(
            "elasti_dense_flops_total",
            "FLOPs that the pretrained model would have run for the same tokens.",
            tier,
        )
        self.parameters = self._counter(
            "elasti_parameters_used_total",
            "Parameters touched, once per token: how much of the weights was worked with?",
            tier,
        )
        self.dense_parameters = self._counter(
            "elasti_dense_parameters_total",
            "Parameters that the pretrained model would have touched for the same tokens.",
            tier,
        )
        self.energy = self._counter(
            "elasti_energy_joules_total",
            "Energy of the GPU, by requests' shares of the FLOPs; none where it does not count.",
            tier,
        )
        self.overrides = self._counter(
            "elasti_capacity_override_total",
            "Requests that got another capacity than they asked for, by whose limit.",
            [*model, "reason"],
        )
        self.first_token = self._histogram(
            "elasti_time_to_first_token_seconds",
            "From accepting a request to its first token: how long does a caller look at nothing?",
            tier,
            _WAIT_SECONDS,
        )
        self.between_tokens = self._histogram(
            "elasti_inter_token_latency_seconds",
            "Between two tokens of one sequence: how fast does an answer flow?",
            tier,
            _TOKEN_SECONDS,
        )
        self.latency = self._histogram(
            "elasti_e2e_request_latency_seconds",
            "From accepting a request to its last token.",
            tier,
            _REQUEST_SECONDS,
        )
        self.queue_time = self._histogram(
            "elasti_request_queue_time_seconds",
            "From accepting a sequence to its first step: is there too little room?",
            tier,
            _WAIT_SECONDS,
        )
        self.capacity = self._histogram(
            "elasti_request_capacity", "Capacity asked for, as a fraction.", model, _SHARES
        )
        self.capacity_spent = self._histogram(
            "elasti_request_capacity_spent",
            "Capacity really spent, as a fraction, one per request.",
            model,
            _SHARES,
        )
        self.tokens_skipped = self._histogram(
            "elasti_tokens_skipped_per_request",
            "Tokens left out in a request, once per layer.",
            [*model, "unit"],
            _DECISIONS,
        )
        self.parameters_skipped = self._histogram(
            "elasti_parameters_skipped_per_request",
            "Parameters not touched in a request, once per token.",
            model,
            _PRODUCTS,
        )
        for reason in REJECTED_AT_THE_DOOR:
            self.rejections.labels(NO_MODEL, reason)

    def name_build(self, build: str | None) -> None:
        """Say what answers; `build` is what the operator calls it."""
        self.build_info.labels(version(), build or "none", *releases().values()).set(1)

    def open(self, name: str, adapter: str, base: str, units: tuple[Unit, ...]) -> None:
        """Show a model's series from the start: one that appears late loses its first step."""
        self.adapter_info.labels(name, adapter, base).set(1)
        for gauge in (self.running, self.waiting, self.cache_usage):
            gauge.labels(name).set(0)
        for counter in (
            self.prompt_tokens,
            self.generation_tokens,
            self.prefix_queries,
            self.prefix_hits,
        ):
            counter.labels(name)
        for reason in FINISHED:
            self.success.labels(name, reason)
        for reason in REJECTED:
            self.rejections.labels(name, reason)
        for reason in OVERRIDES:
            self.overrides.labels(name, reason)
        for histogram in (self.capacity, self.capacity_spent, self.parameters_skipped):
            histogram.labels(name)
        for unit in TOKEN_UNITS:
            self.tokens_skipped.labels(name, unit.value)
        for unit in units:
            for phase in Phase:
                self.routed.labels(name, unit.value, phase.value)
                self.skipped.labels(name, unit.value, phase.value)

    def open_tiers(self, name: str, lowest: float, energy: bool) -> None:
        """Show a model's series by tier from the start, from its lowest capacity on.

        Args:
            energy: whether the device's counter can be read; else there is no sample of it.
        """
        each = (
            self.flops,
            self.dense_flops,
            self.parameters,
            self.dense_parameters,
            self.first_token,
            self.between_tokens,
            self.latency,
            self.queue_time,
            *((self.energy,) if energy else ()),
        )
        for tier in tiers(lowest):
            for metric in each:
                metric.labels(name, tier)

    def series(self, name: str) -> Series:
        return Series(
            alive=self.alive.labels(name),
            running=self.running.labels(name),
            waiting=self.waiting.labels(name),
            cache_usage=self.cache_usage.labels(name),
            prefix_queries=self.prefix_queries.labels(name),
            prefix_hits=self.prefix_hits.labels(name),
        )

    def finish(self, name: str, done: Finished) -> None:
        """Add one request that ended, whatever its ending: its compute was spent."""
        usage = done.usage
        self.prompt_tokens.labels(name).inc(done.prompt_tokens)
        self.generation_tokens.labels(name).inc(done.generated_tokens)
        self.flops.labels(name, done.tier).inc(usage.flops)
        self.dense_flops.labels(name, done.tier).inc(usage.dense_flops)
        self.parameters.labels(name, done.tier).inc(usage.parameters_used)
        self.dense_parameters.labels(name, done.tier).inc(usage.dense_parameters)
        for (unit, phase), count in usage.routed.items():
            self.routed.labels(name, unit.value, phase.value).inc(count)
        for (unit, phase), count in usage.skipped.items():
            self.skipped.labels(name, unit.value, phase.value).inc(count)
        if done.asked is not None:
            self.capacity.labels(name).observe(done.asked)
        if usage.dense_block_flops:
            self.capacity_spent.labels(name).observe(usage.capacity_spent)
        for unit in TOKEN_UNITS:
            self.tokens_skipped.labels(name, unit.value).observe(usage.unit_skipped(unit))
        if done.energy_joules is not None:
            self.energy.labels(name, done.tier).inc(done.energy_joules)
        left_out = usage.dense_parameters - usage.parameters_used
        self.parameters_skipped.labels(name).observe(left_out)
        self.latency.labels(name, done.tier).observe(done.total_seconds)
        if done.first_token_seconds is not None:
            self.first_token.labels(name, done.tier).observe(done.first_token_seconds)

    def page(self) -> bytes:
        """The text exposition format, version 0.0.4."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, question: str, labels: list[str]) -> Gauge:
        return Gauge(name, question, labels, registry=self.registry)

    def _counter(self, name: str, question: str, labels: list[str]) -> Counter:
        return Counter(name, question, labels, registry=self.registry)

    def _histogram(
        self, name: str, question: str, labels: list[str], buckets: tuple[float, ...]
    ) -> Histogram:
        return Histogram(name, question, labels, buckets=buckets, registry=self.registry)
