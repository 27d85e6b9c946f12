"""What the benchmarks are made of: turns, spreads, goals, reports of the load generator."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import gguf_file
from benchmarks.guidellm import phase_of
from benchmarks.machine import Limits
from benchmarks.models import shaped, text_ids
from benchmarks.profile import OTHER, family_of
from benchmarks.results import Goal
from benchmarks.roofline import Roofline
from benchmarks.runs import generate
from benchmarks.serving import percentiles
from benchmarks.timing import Interval, Spread, take_turns
from elastiformer import DENSE, Capacity, ElasticModel

ROOT = Path(__file__).resolve().parent.parent.parent


def test_ways_take_turns_and_each_begins_in_its_turn():
    order: list[str] = []
    ways = {name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}
    taken = take_turns(ways, seconds=0, least=2, label="turns")
    assert "".join(order) == "abbaab"
    assert taken == {"a": [4.0, 5.0], "b": [3.0, 6.0]}  # the first round only warms up


def test_turns_end_after_as_many_rounds_as_there_may_be():
    taken = take_turns({"a": lambda: 1.0}, seconds=60, least=1, label="turns", most=3)
    assert len(taken["a"]) == 3


def test_a_spread_holds_what_was_seen():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(3, 1.0, 1.5, 2.0, 2.5)
    assert Spread.of([2.0]).scaled(10) == Spread(1, 20.0, 20.0, 20.0, 20.0)
    interval = Interval.of([1.0, 1.01, 1.02, 1.01])
    assert 1.0 <= interval.low <= interval.median <= interval.high <= 1.02


@pytest.mark.parametrize(
    ("goal", "reached"),
    [
        (Goal("more", 0.9, 0.95), True),
        (Goal("more", 0.9, 0.85), False),
        (Goal("less", 0.05, 0.04, at_most=True), True),
        (Goal("less", 0.05, 0.06, at_most=True), False),
        (Goal("unknown", 1.0, None), None),
    ],
)
def test_a_goal_says_whether_it_was_reached(goal, reached):
    assert goal.reached is reached


def test_percentiles_are_values_that_were_seen():
    assert percentiles(range(1, 101)) == (50, 95, 99)
    assert percentiles([7.0]) == (7.0, 7.0, 7.0)
    assert percentiles([]) is None


def test_the_roofline_of_a_leaner_plan_is_lower_and_never_above_the_dense_one():
    model = shaped("smollm2", 2, "float32", "cpu")
    roofline = Roofline(model, Limits(1e10, 1e11), text_ids(model, 32))
    for rows in (1, 16):
        _, dense = model.plans(DENSE, 64)
        _, lean = model.plans(Capacity(0.5, 0.5), 64)
        low, high = (roofline.seconds(plan, rows, 64) for plan in (lean, dense))
        assert low < high
        if rows == 1:
            assert low / high == pytest.approx(0.5, abs=0.05)  # reading weights is all there is


def test_generated_requests_spend_what_their_capacity_says():
    model = shaped("smollm2", 2, "float32", "cpu")
    ids = text_ids(model, 64)
    usages = generate(model, [DENSE, Capacity(0.6, 0.6)], [ids[:20], ids[20:40]], 4)
    assert usages[1].block_flops < usages[0].block_flops
    assert usages[1].capacity_spent == pytest.approx(0.6, abs=0.1)


def test_an_operator_belongs_to_one_family():
    assert family_of("aten::mm") == family_of("aten::linear") == "products"
    assert family_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert family_of("aten::topk") == family_of("aten::index_select") == "picking and gathering"
    assert family_of("aten::silu") == family_of("aten::rms_norm") == "norms and elementwise"
    assert family_of("aten::view") == OTHER


def test_of_runs_side_by_side_only_the_time_that_all_share_counts():
    def entry(started, ended):
        timings = {
            "request_start": started,
            "first_token_iteration": started + 0.1,
            "request_end": ended,
        }
        return {"info": {"timings": timings}, "output_tokens": 11}

    def run_of(began, ended, *finished):
        return {
            "scheduler_metrics": {"measure_start_time": began, "measure_end_time": ended},
            "requests": {"successful": list(finished), "errored": [], "incomplete": []},
        }

    phase = phase_of([run_of(0, 10, entry(1, 2), entry(5, 6.1)), run_of(4, 14, entry(12, 13))])
    assert phase.seconds == 6
    (only,) = phase.requests
    assert only.to_first_token == pytest.approx(0.1)
    assert only.between_tokens == pytest.approx(0.1)


def test_a_gguf_file_holds_the_very_model(tmp_path, tiny_llama):
    model = ElasticModel(tiny_llama)
    assert gguf_file.unfit(model) is None
    gguf_file.write(model, tmp_path / "tiny.gguf")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32
    )
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, tiny_llama(ids).logits)


def test_only_llamas_become_gguf_files(tiny):
    assert gguf_file.unfit(ElasticModel(tiny("gpt2")))


def test_nothing_else_imports_the_benchmarks():
    for package in ("elastiformer", "service", "training"):
        for path in (ROOT / package).glob("**/*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                found = []
                if isinstance(node, ast.Import):
                    found = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    found = [node.module or ""]
                assert not any(name.startswith("benchmarks") for name in found), path
