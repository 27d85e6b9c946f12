"""What waits at Ray's proxies is seen: in the queue's time, in the gauge, in the count of refusals.

The page is cut from a real one, of Ray 2.60.0 with one proxy in a flood.
"""

import asyncio
import json
import shutil
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
import yaml

from deploy.dashboards.prometheus import Prometheus, PrometheusError
from deploy.dashboards.queries import VARIABLES
from deploy.ray.arrivals import ARRIVED, Arrivals, Waited
from deploy.stage import free_port
from service.orders import waited_before
from tests.deploy.test_ray import RAY
from tests.service.conftest import PATIENCE_SECONDS, build, opened
from tests.service.test_logs import written
from tests.service.test_tracing import Memory

PAGE = (Path(__file__).parent / "ray-page.txt").read_bytes()
WAITED_SECONDS = 30.0
HISTOGRAMS = {
    "elasti_request_queue_time_seconds": "queue_ms",
    "elasti_time_to_first_token_seconds": "time_to_first_token_ms",
    "elasti_e2e_request_latency_seconds": "total_ms",
}


async def hand_on(headers, proxy=None, replica=None):
    """What a replica takes a request to have waited, that came with these headers."""
    seen = []

    async def server(scope, receive, send):
        seen.append(waited_before.get())

    app = Waited(server, lambda: replica)
    if proxy is not None:
        app = Arrivals(app, lambda: proxy)
    await app({"type": "http", "headers": headers}, None, None)
    (seconds,) = seen
    return seconds


@pytest.mark.parametrize(
    ("proxy", "replica", "seconds"),
    [
        (1.7e9, 1.7e9 + 12.5, 12.5),
        (1.7e9, 1.7e9 - 0.1, 0.0),  # the proxy's clock is ahead
        (1.7e9, 1.7e9 + 9e4, 0.0),  # or a day behind
    ],
)
@pytest.mark.parametrize("said", [[], [(b"x-elasti-arrived", b"5.0")]], ids=["none", "a caller's"])
def test_a_replica_knows_how_long_a_request_waited_at_its_proxy(proxy, replica, seconds, said):
    assert asyncio.run(hand_on(said, proxy, replica)) == pytest.approx(seconds, abs=1e-5)


@pytest.mark.parametrize("said", [b"", b"nan", b"-1.0", b"1e3", b"1.7", b"\xff.5"])
def test_what_no_proxy_wrote_is_no_waiting(said):
    assert asyncio.run(hand_on([(ARRIVED.lower().encode(), said)], replica=1.7e9)) == 0


def test_what_a_request_waited_is_in_its_answer_its_metrics_its_line_and_its_trace():
    memory = Memory()
    answers, sums = [], []

    async def ask():
        app = build(tracing=memory.tracing)
        app.add_middleware(Waited)
        async with opened(app) as house:
            await house.complete("a")  # kernels may be compiled at the first request
            for waited in (WAITED_SECONDS, 0.0):
                headers = {ARRIVED: f"{time.time() - waited:.6f}"}
                reply = await house.post("/v1/completions", prompt="a", headers=headers)
                answers.append(reply.json()["elasti"])
                await house.until_idle()
                sums.append({name: house.value(f"{name}_sum") for name in HISTOGRAMS})

    with written() as lines:
        asyncio.run(ask())
    waited, at_once = answers
    for histogram, name in HISTOGRAMS.items():
        assert waited[name] >= 1000 * WAITED_SECONDS > 20_000 > at_once[name]
        told = sums[1][histogram] - sums[0][histogram]
        assert told == pytest.approx(at_once[name] / 1000, abs=0.01)
        assert sums[0][histogram] >= WAITED_SECONDS
    line = json.loads(lines[1])
    assert line["queue_ms"] == waited["queue_ms"]
    assert line["duration_ms"] >= line["engine_ms"] == waited["total_ms"]
    _, queue, later = (span for span in memory.spans if span.name == "queue")
    _, server, _ = (span for span in memory.spans if span.name == "POST /v1/completions")
    assert queue.end_time - queue.start_time >= WAITED_SECONDS * 1e9
    # It began before the replica heard of it, and ended after.
    assert queue.start_time < server.start_time < queue.end_time < later.start_time


@pytest.fixture(scope="module")
def proxies(tmp_path_factory):
    """A Prometheus with the fleet's configuration, over the page alone."""
    folder, port = tmp_path_factory.mktemp("proxies"), free_port()

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(PAGE)

        def log_message(self, *words):
            pass

    read = yaml.safe_load((RAY / "prometheus.yml").read_text("utf-8"))
    (job,) = (each for each in read["scrape_configs"] if each["job_name"].endswith("-proxies"))
    del job["http_sd_configs"]
    server = HTTPServer(("127.0.0.1", 0), Page)
    job["static_configs"] = [{"targets": [f"127.0.0.1:{server.server_port}"]}]
    settings = {"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}
    (folder / "prometheus.yml").write_text(json.dumps(settings), "utf-8")
    threading.Thread(target=server.serve_forever).start()
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", "--log.level=error"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
    process = subprocess.Popen(command)
    try:
        with httpx.Client(trust_env=False) as client:
            prometheus = Prometheus(client, f"http://127.0.0.1:{port}")
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not number(prometheus, 'up{job="elastiformer-proxies"}'):
                assert time.monotonic() < deadline, "the page was not read"
                time.sleep(0.2)
            yield prometheus
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)
        server.shutdown()
        server.server_close()


def number(prometheus, query):
    try:
        found = prometheus.now(query, time.time())
    except PrometheusError:  # it has not started yet
        return None
    return found[0].values[-1] if found else None


needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed"
)


@needs_prometheus
def test_what_ray_counts_at_its_proxies_has_the_names_that_rules_and_dashboards_read(proxies):
    held = 'job="elastiformer",model_name="any model"'
    # Of the servers' queue alone: the page has those of other applications, too.
    assert number(proxies, f"sum(elasti_num_requests_waiting{{{held}}})") == 24
    refused = f'elasti_admission_rejections_total{{{held},reason="queue_full"}}'
    assert number(proxies, f"sum({refused})") == 386
    assert number(proxies, 'count({__name__=~"ray.*|python.*"})') is None
    assert number(proxies, 'count({otel_scope_name!=""})') is None


@needs_prometheus
def test_a_dashboard_offers_what_has_no_model_yet(proxies):
    among = {variable.name: variable for variable in VARIABLES}["model"]
    selector = among.among.replace("$job", "elastiformer")
    now = time.time()
    assert proxies.values(among.label, selector, now - 60, now) == ("any model",)
