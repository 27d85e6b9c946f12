"""Promises of the log: one line per request, found by its id, complete, and without its text."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from elastiformer.usage import Usage
from service.logs import JsonLines, Lines
from service.orders import Done, Summary, Ticket
from tests.service.conftest import PATIENCE_SECONDS, Clock, Watched, in_house
from tests.service.test_tracing import Memory

ROOT = Path(__file__).resolve().parents[2]
SECRET = "plugh"  # stands in every prompt; must stand in no line
LONG = {"prompt": f"{SECRET} {'a' * 150}", "max_tokens": 12, "ignore_eos": True, "temperature": 0}


@contextmanager
def written(formatter=None, level=logging.INFO):
    """Everything that `elasti.…` loggers write inside the block, as lines."""
    lines = []

    class Keeper(logging.Handler):
        def emit(self, record):
            lines.append(self.format(record))

    keeper, root = Keeper(), logging.getLogger("elasti")
    keeper.setFormatter(formatter or JsonLines())
    root.addHandler(keeper)
    before, _ = root.level, root.setLevel(level)
    try:
        yield lines
    finally:
        root.removeHandler(keeper)
        root.setLevel(before)
        assert SECRET not in "".join(lines)


def test_a_line_holds_what_the_answer_holds():
    replies = []

    async def visit(house):
        reply = await house.post("/v1/completions", **LONG, capacity=0.7)
        replies.append(reply)

    with written() as lines:
        in_house(visit)
    (line,) = map(json.loads, lines)
    (reply,) = replies
    usage, elasti = reply.json()["usage"], reply.json()["elasti"]
    assert line["request_id"] == reply.headers["x-request-id"]
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert (line["level"], line["logger"], line["model"]) == ("info", "elasti.access", "tiny")
    assert line["time"].endswith("+00:00")
    assert line["capacity_requested"] == line["capacity_applied"] == 0.7
    assert line["capacity_spent"] == pytest.approx(elasti["capacity_spent"], abs=5e-5)
    assert line["prompt_tokens"] == usage["prompt_tokens"]
    assert line["completion_tokens"] == usage["completion_tokens"] == 12
    assert line["queue_ms"] == elasti["queue_ms"] and line["engine_ms"] == elasti["total_ms"]
    assert line["first_token_ms"] == elasti["time_to_first_token_ms"]
    assert line["duration_ms"] >= line["engine_ms"]
    assert line["message"] == f"POST /v1/completions 200 {line['duration_ms']:.1f} ms"
    assert "energy_joules" not in line and "error" not in line


def test_a_reader_s_line_says_the_same():
    async def visit(house):
        await house.post("/v1/completions", **LONG, headers={"X-Request-Id": "mine-1"})
        await house.client.get("/v1/models/none")

    with written(Lines()) as lines:
        in_house(visit)
    first, second = lines
    assert " INFO elasti.access: POST /v1/completions 200 " in first
    assert " ms request_id=mine-1 " in first
    assert " model=tiny capacity_requested=1.0 " in first and " completion_tokens=12 " in first
    assert "GET /v1/models/none 404" in second and "model=" not in second


@pytest.mark.parametrize("given", ["", "a b", "a\nb", "ü", "x" * 129, '"', "<script>"])
def test_a_caller_s_id_is_kept_only_if_it_is_plain(given):
    async def visit(house):
        headers = {"x-request-id": given.encode()}
        told = (await house.client.get("/v1/models", headers=headers)).headers["x-request-id"]
        assert told != given and len(told) == 32

    in_house(visit)


def test_every_answer_carries_an_id_whatever_it_says():
    class Crashing(Watched):
        def blocks_for(self, *_, **__):
            raise RuntimeError("a mistake of ours")

    async def visit(house):
        replies = [
            await house.client.get("/health", headers={"x-request-id": "p"}),
            await house.client.get("/nowhere", headers={"x-request-id": "q"}),
            await house.post("/v1/completions", **LONG, headers={"x-request-id": "r"}, capacity=2),
            await house.post("/v1/completions", x="y" * 3000, headers={"x-request-id": "s"}),
            await house.post("/v1/completions", **LONG, headers={"x-request-id": "t"}),
        ]
        assert [reply.status_code for reply in replies] == [200, 404, 400, 413, 500]
        assert [reply.headers["x-request-id"] for reply in replies] == list("pqrst")

    with written() as lines:
        in_house(visit, models={"tiny": Crashing()}, max_body_bytes=2000)
    told = [json.loads(line) for line in lines]
    assert [(line["request_id"], line.get("status")) for line in told] == [
        ("q", 404),
        ("r", 400),
        ("s", 413),
        ("t", 500),
        ("t", None),
    ]
    assert "a mistake of ours" in told[-1]["exception"] and told[-1]["level"] == "error"


def test_a_probe_is_told_to_who_debugs():
    async def visit(house):
        for path in ("/health", "/ready", "/metrics", "/v1/models"):
            await house.client.get(path)

    with written() as lines:
        in_house(visit)
    assert [json.loads(line)["path"] for line in lines] == ["/v1/models"]
    with written(level=logging.DEBUG) as lines:
        in_house(visit)
    assert len(lines) == 4


def test_who_leaves_and_who_is_late_are_told_with_what_they_spent():
    clock = Clock()

    async def is_late(house):
        house.keeps_time_by(clock)
        await house.post("/v1/completions", **LONG | {"max_tokens": 300})

    async def leaves(house):
        leaving = asyncio.create_task(house.post("/v1/completions", **LONG | {"max_tokens": 300}))
        await house.until_running(leaving)
        leaving.cancel()
        await house.until_idle()

    with written() as lines:
        slow = Watched(step_seconds=0.3, clock=clock)
        in_house(is_late, models={"tiny": slow}, request_timeout_seconds=1)
        in_house(leaves, models={"tiny": Watched(step_seconds=0.02)})
    late, left = map(json.loads, lines)
    assert (late["status"], late["error"]) == (503, "timeout")
    assert (left["status"], left["error"]) == (499, "cancelled")
    assert 0 < late["completion_tokens"] < 300 and late["capacity_spent"] > 0


def test_who_looks_on_and_fails_costs_nobody_an_ending():
    async def visit():
        summary = Summary(Usage(), 0, 0, 0, 0.0, None, 0.0)
        ticket = Ticket(None, lambda: None, asyncio.get_running_loop())
        told = []
        ticket.when_ended(lambda ending: 1 / 0)
        ticket.when_ended(told.append)
        ticket.deliver(Done(summary))
        assert told == [Done(summary)] == [event async for event in ticket.events()]
        ticket.when_ended(told.append)  # late, and told all the same
        assert len(told) == 2

    with written() as lines:
        asyncio.run(visit())
    (line,) = map(json.loads, lines)
    assert "ZeroDivisionError" in line["exception"]


def test_a_path_cannot_begin_a_line_of_its_own():
    async def visit(house):
        await house.client.get("/v1/models/a%0AINFO%20all%20is%20well")

    with written(Lines()) as lines:
        in_house(visit)
    assert "\n" not in lines[0] and "%0AINFO" in lines[0]


def test_a_line_names_its_trace():
    memory, replies = Memory(), []

    async def visit(house):
        replies.append(await house.post("/v1/completions", **LONG))

    with written() as lines:
        in_house(visit, tracing=memory.tracing)
    line = json.loads(lines[0])
    traceparent = replies[0].headers["traceparent"]
    assert traceparent[:-3] == f"00-{line['trace_id']}-{line['span_id']}"


MAIN = """
import sys
from service.__main__ import main
main(sys.argv[1:])
sys.exit(", ".join(name for name in sys.modules if name.startswith("opentelemetry.sdk")) or None)
"""


def test_a_server_that_logs_json_writes_nothing_else_and_loads_no_tracing(tiny_folder):
    environment = os.environ | {"ELASTI_LOG_FORMAT": "json", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MAIN, "--port", "0", "--threads", "1",
               "--model", f"mine={tiny_folder}"]  # fmt: skip
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            for text in process.stderr:
                lines.append(json.loads(text))
                if lines[-1]["message"].startswith("ready: "):
                    break
            address = lines[-1]["message"].split()[1]
            body = {"model": "mine", "prompt": SECRET, "max_tokens": 4, "temperature": 0}
            reply = httpx.post(f"{address}/v1/completions", json=body, timeout=PATIENCE_SECONDS)
            process.send_signal(signal.SIGTERM)
            lines += map(json.loads, process.stderr)
            assert process.wait(timeout=PATIENCE_SECONDS) == 0
        finally:
            process.kill()
    (access,) = (line for line in lines if line["logger"] == "elasti.access")
    assert access["request_id"] == reply.headers["x-request-id"]
    assert access["path"] == "/v1/completions"
    assert access["completion_tokens"] == reply.json()["usage"]["completion_tokens"]
    assert any(line["logger"].startswith("uvicorn") for line in lines)
    assert not any("uvicorn.access" in line["logger"] for line in lines)
    assert SECRET not in json.dumps(lines)
