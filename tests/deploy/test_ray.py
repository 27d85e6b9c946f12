"""Promises of the fleet on Ray Serve. What needs no Ray is tested everywhere.

The rest runs where the extra `ray` is installed; the whole drill takes some five minutes:
`python -m deploy.ray.drill`, or `ELASTI_TEST_DRILL=1 pytest --timeout 0 tests/deploy/test_ray.py`.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import os
import re
from pathlib import Path

import httpx
import pytest
import yaml
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from deploy.ray import refusals
from deploy.ray.fleet import LISTENER, PROXIES, REPLICA, TARGETS, Fleet
from deploy.ray.targets import FORGOTTEN_SECONDS, Target, Targets, open_page
from service.metrics import Metrics
from tests.deploy.test_rules import PROMETHEUS, needs_promtool, promtool

ROOT = Path(__file__).resolve().parents[2]
RAY = ROOT / "deploy" / "ray"
CONFIG = yaml.safe_load((RAY / "serve.yaml").read_text("utf-8"))
APPLICATIONS = {each["name"]: each for each in CONFIG["applications"]}
GUIDE = (ROOT / "docs" / "operating.md").read_text("utf-8")

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the extra 'ray' is not installed"
)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"replicas": 3, "most_replicas": 2}, "most_replicas: 2"),
        ({"settings": {"port": 80, "host": "a"}}, "host, port belongs to http_options"),
        ({"settings": {"max_runing": 4}}, "max_runing is no setting"),
        ({"replica": 3}, "replica"),
        ({"queued": 0}, "queued"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused_by_name(given, told):
    with pytest.raises(ValidationError, match=told):
        Fleet(**given)


def test_a_wrong_setting_is_refused_before_a_replica_starts():
    with pytest.raises(ValidationError, match="max_running"):
        Fleet(settings={"max_running": 0}).server()


def test_a_replica_gets_a_little_more_than_it_runs_and_the_rest_waits_at_the_proxy():
    settings = Fleet(settings={"max_running": 8}).server()
    assert Fleet().most_ongoing(settings) == 10
    assert Fleet().target_ongoing(settings) == 6
    assert Fleet(ongoing=3, target=1.5).most_ongoing(settings) == 3


def test_replicas_are_listed_while_they_are_heard_of():
    now = 100.0
    targets = Targets(list, clock=lambda: now)
    targets.beat(Target("b", "10.0.0.2:9100", 7))
    now += FORGOTTEN_SECONDS - 1
    targets.beat(Target("a", "10.0.0.1:9100", 8))
    listed = targets(asked(TARGETS))
    assert [each["targets"] for each in listed] == [["10.0.0.1:9100"], ["10.0.0.2:9100"]]
    assert targets.listed()[0]["labels"] == {"replica": "a", "__meta_elasti_process": "8"}
    now += 2
    assert [each["labels"]["replica"] for each in targets.listed()] == ["a"]
    now += FORGOTTEN_SECONDS
    assert targets.listed() == []


@pytest.mark.parametrize("path", [PROXIES, f"{PROXIES}/"])
def test_below_the_list_of_replicas_is_that_of_the_machines_on_which_proxies_are_counted(path):
    targets = Targets(lambda: ["10.0.0.1:8080", "10.0.0.2:8080"])
    targets.beat(Target("b", "10.0.0.2:9100", 7))
    assert targets(asked(path)) == [{"targets": ["10.0.0.1:8080"]}, {"targets": ["10.0.0.2:8080"]}]


def asked(path):
    """As Ray hands it on: what stands before an application's route is its root."""
    headers = [(b"host", b"ray:8000")]
    return Request({"type": "http", "path": path, "root_path": TARGETS, "headers": headers})


def test_each_replica_has_a_page_of_its_own_at_the_first_free_port():
    pages = [Metrics(), Metrics()]
    pages[0].prompt_tokens.labels("m").inc(5)
    first = open_page(pages[0], "127.0.0.1", 0)
    if first > 65000:
        pytest.skip("the free port is too near the last one")
    second = open_page(pages[1], "127.0.0.1", first)
    assert first < second < first + 64
    counted = [
        'elasti_prompt_tokens_total{model_name="m"} 5.0'
        in httpx.get(f"http://127.0.0.1:{port}/metrics").text
        for port in (first, second)
    ]
    assert counted == [True, False]


@pytest.mark.parametrize(
    ("status", "headers", "code", "reason"),
    [
        (503, {"retry-after": "1"}, "queue_full", "queue_full"),
        (503, {}, "internal_error", "internal"),
        (500, {}, "internal_error", "internal"),
        (408, {}, "timeout", "internal"),
        (404, {}, "invalid_value", "invalid"),
    ],
)
def test_what_ray_refuses_itself_is_told_as_the_server_would_and_counted(
    status, headers, code, reason
):
    counted = []
    answer = through_refusals(PlainTextResponse("Traceback …", status, headers), counted)
    assert counted == [reason]
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code and "Traceback" not in answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers.get("retry-after") == headers.get("retry-after")


@pytest.mark.parametrize(("status", "headers"), [(200, {}), (400, {REPLICA: "one"})])
def test_what_a_replica_answers_passes_the_proxy_as_it_is(status, headers):
    counted = []
    answer = through_refusals(PlainTextResponse("as it is", status, headers), counted)
    assert counted == []  # by the proxy; a replica counts its own
    assert (answer.status_code, answer.text) == (status, "as it is")


def test_a_proxy_that_fails_before_it_answers_says_so_as_the_server_would():
    async def fail(scope, receive, send):
        raise RuntimeError("the replica is gone")

    counted = []
    answer = through_refusals(fail, counted)
    assert answer.status_code == 500 and counted == ["internal"]
    assert answer.json()["error"]["code"] == "internal_error" and "replica" not in answer.text


def test_a_proxy_that_fails_in_its_answer_does_not_begin_another():
    async def fail(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("the replica is gone")

    counted = []
    with pytest.raises(RuntimeError, match="is gone"):
        through_refusals(fail, counted, raises=True)
    assert counted == ["internal"]


def test_a_proxy_that_returns_without_a_word_says_so_as_the_server_would():
    async def return_at_once(scope, receive, send):
        pass

    counted = []
    answer = through_refusals(return_at_once, counted)
    assert answer.status_code == 500 and counted == ["internal"]
    assert answer.json()["error"]["code"] == "internal_error"


@pytest.mark.parametrize("left", [False, True])
def test_an_answer_that_breaks_off_is_counted_unless_its_caller_left(left):
    async def break_off(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await receive()

    assert counted_of(break_off, left) == ([] if left else ["internal"])


def test_who_leaves_before_an_answer_is_no_failure():
    async def wait(scope, receive, send):
        await receive()

    assert counted_of(wait, left=True) == []


def counted_of(app, left):
    counted, sent = [], []

    async def receive():
        return {"type": "http.disconnect" if left else "http.request"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "headers": []}
    asyncio.run(refusals.Refusals(app, counted.append)(scope, receive, send))
    return counted


def through_refusals(response, counted, raises=False):
    app = refusals.Refusals(response, counted.append)

    async def get():
        transport = httpx.ASGITransport(app, raise_app_exceptions=raises)
        client = httpx.AsyncClient(transport=transport, base_url="http://ray")
        async with client:
            return await client.get("/")

    return asyncio.run(get())


def test_the_guide_names_the_refusals_as_ray_wants_them():
    assert f"{refusals.VARIABLE}={refusals.PATH}" in GUIDE
    module, _, name = refusals.PATH.rpartition(".")
    assert getattr(importlib.import_module(module), name) is refusals.middlewares


def test_the_files_agree_with_the_program():
    fleet = Fleet(**APPLICATIONS["elastiformer"]["args"])
    assert fleet.is_elastic and fleet.server().log_format == "json"
    assert APPLICATIONS[LISTENER]["route_prefix"] == TARGETS
    # What others rest on comes first.
    assert list(APPLICATIONS) == [LISTENER, "elastiformer"]
    read = yaml.safe_load((RAY / "prometheus.yml").read_text("utf-8"))
    at = f"http://ray:{CONFIG['http_options']['port']}"
    jobs = {each["job_name"]: each["http_sd_configs"] for each in read["scrape_configs"]}
    assert {name: [each["url"] for each in found] for name, found in jobs.items()} == {
        "elastiformer": [f"{at}{TARGETS}"],
        "elastiformer-proxies": [f"{at}{PROXIES}"],
    }


def test_every_argument_and_what_it_adds_is_in_the_guide():
    told = GUIDE.partition("## Many machines")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", told, flags=re.MULTILINE)
    assert dict(rows) == {
        name: json.dumps(field.get_default(call_default_factory=True))
        for name, field in Fleet.model_fields.items()
    }
    assert REPLICA in told and TARGETS in told and PROXIES in told


@needs_promtool
def test_prometheus_understands_its_settings():
    done = promtool("check", "config", RAY / "prometheus.yml", cwd=PROMETHEUS)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
def test_ray_understands_the_files_and_builds_the_application():
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve.schema import ServeDeploySchema

    from deploy.ray import app

    read = ServeDeploySchema.model_validate(CONFIG)
    assert [each.name for each in read.applications] == list(APPLICATIONS)
    for each in read.applications:
        module, _, name = each.import_path.partition(":")
        assert module == app.__name__
        built = call_user_app_builder_with_args_if_necessary(getattr(app, name), each.args)
        assert isinstance(built, app.serve.Application)


@needs_ray
@pytest.mark.skipif(
    "ELASTI_TEST_DRILL" not in os.environ, reason="ELASTI_TEST_DRILL is not set: five minutes"
)
def test_a_fleet_loses_only_what_was_in_flight(tmp_path):
    from deploy.ray.drill import main

    report = tmp_path / "drill.json"
    code = main(["--out", str(report)])
    assert code == 0, json.loads(report.read_text("utf-8"))["wrong"]
