"""Promises of the metrics: the sums are those of the answers, the labels few, the page valid."""

import asyncio
import json
import re
import shutil
import subprocess

from prometheus_client.parser import text_string_to_metric_families

from elastiformer import ElasticModel, Phase, Unit
from service.build import releases, version
from service.knob import Asked, Knob
from service.metrics import Metrics, tiers
from tests.service.conftest import elastic_model, in_house
from tests.tiny import tiny, tiny_tokenizer

# As design.md names them.
CONTRACT = """
    elasti_num_requests_running elasti_num_requests_waiting elasti_kv_cache_usage_perc
    elasti_prompt_tokens_total elasti_generation_tokens_total elasti_request_success_total
    elasti_admission_rejections_total elasti_time_to_first_token_seconds_bucket
    elasti_inter_token_latency_seconds_bucket elasti_e2e_request_latency_seconds_bucket
    elasti_request_queue_time_seconds_bucket elasti_router_tokens_total
    elasti_router_tokens_skipped_total elasti_flops_total elasti_dense_flops_total
    elasti_parameters_used_total elasti_dense_parameters_total elasti_request_capacity_bucket
    elasti_request_capacity_spent_bucket elasti_tokens_skipped_per_request_bucket
    elasti_parameters_skipped_per_request_bucket elasti_capacity_override_total
    elasti_load_capacity_ceiling elasti_adapter_info elasti_build_info elasti_engine_alive
    elasti_prefix_cache_queries_total elasti_prefix_cache_hits_total
"""
LABELS = {"model_name", "unit", "phase", "tier", "reason", "finished_reason", "le"}


async def mixed_answers(house):
    """Requests of every kind; returns their usages."""
    texts = {"prompt": ["Once upon a time", "abc"], "max_tokens": 20, "n": 2}
    bodies = [
        ("/v1/completions", texts | {"capacity": 0.6}),
        ("/v1/completions", texts | {"capacity": 1.0, "echo": True, "logprobs": 1}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0, "echo": True, "capacity": "auto"}),
        ("/v1/completions", texts | {"capacity": {"heads": 0.5, "mlp_tokens": 0.5}}),
        ("/v1/completions", texts | {"capacity": 0.8, "stream": True}),
        ("/v1/classify", {"input": ["a", "b"], "labels": ["x", "yy"], "capacity": 0.7}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "capacity": 0.5},
        ),
    ]
    replies = await asyncio.gather(*(house.post(path, **body) for path, body in bodies))
    usages = []
    for reply in replies:
        assert reply.status_code == 200, reply.text
        if "event-stream" in reply.headers["content-type"]:
            last = reply.text.split("\n\n")[-3].removeprefix("data: ")
            usages.append(json.loads(last)["usage"])
        else:
            usages.append(reply.json()["usage"])
    return usages


def test_the_sums_are_the_sums_of_the_answers():
    async def visit(house):
        usages = await mixed_answers(house)
        computes = [usage["compute"] for usage in usages]
        for name, metric in (
            ("flops", "elasti_flops_total"),
            ("dense_flops", "elasti_dense_flops_total"),
            ("parameters_used", "elasti_parameters_used_total"),
            ("dense_parameters", "elasti_dense_parameters_total"),
        ):
            assert house.value(metric) == sum(compute[name] for compute in computes) > 0
        for name, metric in (
            ("prompt_tokens", "elasti_prompt_tokens_total"),
            ("completion_tokens", "elasti_generation_tokens_total"),
        ):
            assert house.value(metric) == sum(usage[name] for usage in usages) > 0
        for unit in (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS):
            for name, metric in (
                ("tokens_routed", "elasti_router_tokens_total"),
                ("tokens_skipped", "elasti_router_tokens_skipped_total"),
            ):
                expected = sum(compute[name][unit.value] for compute in computes)
                assert house.value(metric, unit=unit.value) == expected > 0
        for unit in (Unit.HEADS, Unit.EXPERTS, Unit.CHANNELS):
            expected = sum(compute[f"{unit.value}_skipped"] for compute in computes)
            assert house.value("elasti_router_tokens_skipped_total", unit=unit.value) == expected
        by_phase = [house.value("elasti_router_tokens_total", phase=phase.value) for phase in Phase]
        assert min(by_phase) > 0

        requests = len(usages)
        for name in (
            "elasti_e2e_request_latency_seconds_count",
            "elasti_request_capacity_spent_count",
            "elasti_parameters_skipped_per_request_count",
        ):
            assert house.value(name) == requests
        assert house.value("elasti_request_capacity_count") == requests - 2  # auto, and an object
        sequences = 4 + 4 + 1 + 4 + 4 + 4 + 1
        assert house.value("elasti_request_success_total") == sequences
        assert house.value("elasti_request_queue_time_seconds_count") == sequences
        assert house.value("elasti_num_requests_running") == 0
        assert house.value("elasti_num_requests_waiting") == 0

    in_house(visit)


def test_the_page_is_valid_complete_and_bounded():
    async def visit(house):
        await mixed_answers(house)
        await house.post("/v1/completions", model="x" * 50, prompt="a")
        reply = await house.client.get("/metrics")
        assert reply.headers["content-type"].startswith("text/plain; version=")
        samples = [
            sample
            for family in text_string_to_metric_families(reply.text)
            for sample in family.samples
        ]
        assert set(CONTRACT.split()) <= {sample.name for sample in samples}
        (build,) = [sample for sample in samples if sample.name == "elasti_build_info"]
        assert build.labels["version"] == version() and build.labels["build"] == "of-a-test"
        assert releases().items() <= build.labels.items() and build.value == 1
        for sample in samples:
            if sample is build:
                continue
            assert "model_name" in sample.labels
            assert sample.labels["model_name"] in ("tiny", "")
            allowed = LABELS | ({"adapter", "base"} if "info" in sample.name else set())
            assert set(sample.labels) <= allowed
            if tier := sample.labels.get("tier"):
                assert re.fullmatch(r"[01]\.\d|auto|mixed", tier)
        assert house.value("elasti_adapter_info", base="tiny-llama") == 1
        assert 0.5 <= house.value("elasti_load_capacity_ceiling") <= 1
        assert house.value("elasti_engine_alive", model_name="tiny") == 1
        for line in reply.text.splitlines():
            assert not line.startswith("# HELP") or line.endswith((".", "?")) or "full" in line

        promtool = shutil.which("promtool")
        if promtool:
            checked = subprocess.run(
                [promtool, "check", "metrics"], input=reply.text, text=True, capture_output=True
            )
            assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")

    in_house(visit, build="of-a-test")


BY_TIER = """
    elasti_flops_total elasti_dense_flops_total elasti_parameters_used_total
    elasti_dense_parameters_total elasti_time_to_first_token_seconds_count
    elasti_inter_token_latency_seconds_count elasti_e2e_request_latency_seconds_count
    elasti_request_queue_time_seconds_count
"""


def by_tier(metrics, name):
    """The values of a metric, by model and tier."""
    return {
        (sample.labels["model_name"], sample.labels["tier"]): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == name
    }


def test_every_tier_of_a_model_is_there_before_its_first_request():
    plain = ElasticModel(tiny("gpt2"), tokenizer=tiny_tokenizer())  # no capacity below 1.0

    async def visit(house):
        metrics = house.hall.metrics
        routed = ("0.5", "0.6", "0.7", "0.8", "0.9", "1.0", "auto", "mixed")
        expected = {("tiny", tier) for tier in routed}
        expected |= {("plain", tier) for tier in ("1.0", "auto", "mixed")}
        for name in BY_TIER.split():
            assert by_tier(metrics, name) == dict.fromkeys(expected, 0.0), name
        assert by_tier(metrics, "elasti_energy_joules_total") == {}  # no counter can be read here

        await mixed_answers(house)
        await house.post("/v1/completions", model="plain", prompt="a", max_tokens=2)
        for name in BY_TIER.split():
            values = by_tier(metrics, name)
            assert values.keys() == expected  # none came late
            assert values["tiny", "0.6"] > 0 == values["tiny", "0.9"]

    in_house(visit, models={"tiny": elastic_model(), "plain": plain})


WITHOUT_TIER = """
    elasti_request_capacity_bucket elasti_request_capacity_spent_bucket
    elasti_parameters_skipped_per_request_bucket elasti_tokens_skipped_per_request_bucket
"""


def test_no_series_of_a_model_appears_with_its_first_request():
    """One that appears late loses its first step in rate() and increase()."""

    def series(house):
        return {
            (sample.name, *sorted(sample.labels.items()))
            for family in house.hall.metrics.registry.collect()
            for sample in family.samples
        }

    async def visit(house):
        before = series(house)
        metrics = house.hall.metrics
        for name in WITHOUT_TIER.split():
            assert any(each[0] == name for each in before), name
        assert (
            metrics.registry.get_sample_value(
                "elasti_request_capacity_bucket", {"model_name": "tiny", "le": "0.6"}
            )
            == 0.0
        )
        await mixed_answers(house)
        assert series(house) - before == set()

    in_house(visit)


def test_tiers_begin_where_a_models_capacities_do():
    assert tiers(0.05) == (*(f"{step / 10}" for step in range(11)), "auto", "mixed")
    for share in [step / 100 for step in range(1, 101)]:
        found = Knob().resolve(Asked(body=share), None, 0.01).tier
        assert tiers(share)[0] == found in tiers(0.01)


def test_counts_of_one_app_are_unseen_by_another():
    first, second = Metrics(), Metrics()
    first.prompt_tokens.labels("a").inc(5)
    assert b'elasti_prompt_tokens_total{model_name="a"}' not in second.page()
