"""What the benchmarks are made of: turns, spreads, goals, reports of the load generator."""

from __future__ import annotations

import ast
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import count
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import gguf_file
from benchmarks.machine import Limits
from benchmarks.models import shaped, text_ids
from benchmarks.profile import OTHER, family_of
from benchmarks.results import Goal
from benchmarks.roofline import Roofline
from benchmarks.runs import generate
from benchmarks.saving import Measured, _goals
from benchmarks.sender import Sender
from benchmarks.server import ServerError
from benchmarks.serving import percentiles
from benchmarks.timing import Interval, Spread, take_turns
from deploy.stage import free_port
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


def test_requests_go_out_at_their_moments_and_who_is_refused_has_failed():
    sender = Sender(f"http://127.0.0.1:{free_port()}", range(20), count(), prompt=8, tokens=4)
    phase = sender.at([0.0, 0.1, 0.2], (1.0,), seconds=0.5)
    starts = [each.started for each in phase.requests]
    assert [later - starts[0] for later in starts] == pytest.approx([0.0, 0.1, 0.2])
    assert all(each.failed and each.to_first_token is None for each in phase.requests)
    assert phase.finished == []


def test_a_request_that_is_wrong_ends_a_measurement_with_what_was_said():
    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(400)
            self.send_header("Content-Length", "12")
            self.end_headers()
            self.wfile.write(b"no such unit")

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as refusing:
        threading.Thread(target=refusing.serve_forever).start()
        address = f"http://127.0.0.1:{refusing.server_port}"
        sender = Sender(address, range(20), count(), prompt=8, tokens=4)
        try:
            with pytest.raises(ServerError, match="no such unit"):
                sender.at([0.0], ({"nothing": 0.5},), seconds=1)
        finally:
            refusing.shutdown()


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


@pytest.mark.parametrize(
    ("milliseconds", "of_roof", "bounded"),
    [(12.0, 0.9, True), (9.0, 0.9, False), (12.0, 1.41, False), (12.0, None, True)],
)
def test_what_is_faster_than_its_roofline_has_none(milliseconds, of_roof, bounded):
    time, ratio = Spread.of([milliseconds]), Spread.of([0.7])
    work = ("decode, batch 16", 16, 0.65)
    each = Measured(*work, time, ratio, 0.65, 0.7, 0.9, 0.9, 10.0, 0.75, of_roof)
    assert each.is_bounded is bounded
    (goal,) = (goal for goal in _goals([each], shaped=True) if "roofline" in goal.what)
    assert goal.got == (of_roof if bounded else None)


def test_a_limit_is_the_best_of_two_measurements():
    assert Limits(2.0, 30.0).or_better(Limits(3.0, 20.0)) == Limits(3.0, 30.0)
