"""The dashboards against a real Prometheus that scraped a real server under load.

One server, one Prometheus and one load for the whole file; all of it on loopback.
"""

import asyncio
import io
import itertools
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import uvicorn
from PIL import Image

from deploy.dashboards.__main__ import BOARDS, JSON
from deploy.dashboards.health import ENDED, ERROR
from deploy.dashboards.panels import WIDTH, Board, Kind, Panel, Row, placed
from deploy.dashboards.pictures import Span, draw
from deploy.dashboards.prometheus import Prometheus, PrometheusError
from deploy.dashboards.queries import VARIABLES, Window, grown, over
from service.energy import Meter
from service.settings import Key
from tests.deploy.test_dashboards import panels
from tests.service.conftest import PATIENCE_SECONDS, UNITS, Watched, build

pytestmark = [
    pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is not installed"),
    pytest.mark.alone,
]

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = sorted((ROOT / JSON).glob("*.json"))
JOB, LOAD_SECONDS, LEAST_ROUNDS = "elastiformer", 9.0, 8
FREE, LIMITED = "free-key", "limited-key"
KEYS = (Key("free", key=FREE), Key("limited", ceiling=0.6, key=LIMITED))
BROKEN = [7, 7, 7]  # a prompt that the model fails on
UNFORESEEN = [8, 8, 8, 8, 8]  # one that fails before the engine has it
SHARED = "Once upon a time there was a model that nobody had to pay in full. " * 2


class Brittle(Watched):
    """A real model, at a pace of its own, that fails on one prompt, and on another before that."""

    def step(self, chunks):
        if any(list(chunk.ids[: len(BROKEN)]) == BROKEN for chunk in chunks):
            raise RuntimeError("this step fails on purpose")
        return super().step(chunks)

    def blocks_for(self, capacity, prompt_tokens, most_tokens, scored=False):
        if (prompt_tokens, most_tokens) == (len(UNFORESEEN), len(UNFORESEEN) + 1):
            raise RuntimeError("this prompt fails on purpose")
        return super().blocks_for(capacity, prompt_tokens, most_tokens, scored)


@dataclass(frozen=True)
class Scraped:
    prometheus: Prometheus
    span: Span
    window: Window


@contextmanager
def on_a_port(app):
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        thread.join(0.01)
    try:
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def scraping(target, folder):
    """A Prometheus that scrapes a target each second."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    targets = [{"job_name": JOB, "static_configs": [{"targets": [target]}]}]
    targets.append({"job_name": "itself", "static_configs": [{"targets": [address]}]})
    every = {"scrape_interval": "1s", "scrape_timeout": "1s"}
    config = folder / "prometheus.json"  # JSON is YAML
    config.write_text(json.dumps({"global": every, "scrape_configs": targets}), "utf-8")
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address={address}", "--log.level=warn"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait(PATIENCE_SECONDS)


def until(true, what):
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < PATIENCE_SECONDS, what
        time.sleep(0.1)


async def load(address):
    """Every kind of request, again and again: all tiers, errors, refusals, overrides."""
    text = {"model": "tiny", "prompt": SHARED, "max_tokens": 12}
    labels = {"model": "tiny", "input": ["good", "bad"], "labels": ["yes", "no"]}
    asked = [
        *(("/v1/completions", FREE, text | {"capacity": share}) for share in (1.0, 0.8, 0.6)),
        ("/v1/completions", FREE, text | {"capacity": "auto"}),
        ("/v1/completions", FREE, text | {"capacity": {"heads": 0.5, "experts": 5 / 7}}),
        ("/v1/completions", LIMITED, text | {"capacity": 0.9}),
        ("/v1/classify", FREE, labels | {"capacity": 0.8}),
        ("/v1/completions", FREE, text | {"capacity": 1.5}),
        ("/v1/completions", "wrong-key", text),
    ]
    # After the others: the step that fails takes all with it that run in it.
    failing = [
        ("/v1/completions", FREE, text | {"prompt": BROKEN}),
        ("/v1/completions", FREE, text | {"prompt": UNFORESEEN, "max_tokens": 1}),
    ]
    ends = time.monotonic() + LOAD_SECONDS
    rounds, statuses = 0, set()
    async with httpx.AsyncClient(base_url=f"http://{address}", timeout=PATIENCE_SECONDS) as client:
        while rounds < LEAST_ROUNDS or time.monotonic() < ends:
            rounds += 1
            for together in (asked, failing):
                replies = await asyncio.gather(
                    *(
                        client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})
                        for path, key, body in together
                    )
                )
                statuses |= {reply.status_code for reply in replies}
            await asyncio.sleep(0.2)
    assert statuses == {200, 400, 401, 500}


@pytest.fixture(scope="module")
def scraped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prometheus")
    drawn = itertools.count(1000)  # a counter that goes up by a joule whenever it is read
    app = build(
        models={"tiny": Brittle(step_seconds=0.002)},
        keys=KEYS,
        meter=Meter(lambda: float(next(drawn))),
        max_running=6,
        load_patience_seconds=600.0,  # a moment's standstill is no load
    )
    with (
        on_a_port(app) as target,
        scraping(target, folder) as address,
        httpx.Client() as client,
    ):
        prometheus = Prometheus(client, address)
        until(lambda: scraped_at(prometheus) > 0, (folder / "log").read_text())
        start = time.time()
        asyncio.run(load(target))
        served = time.time()
        until(lambda: scraped_at(prometheus) > served, "one more scrape")
        end = time.time()
        # Every rate looks at the whole load: with few requests a shorter window may be empty.
        span = Span(start, end, 1.0, round(end - start))
        yield Scraped(prometheus, span, span.window(prometheus))


def scraped_at(prometheus):
    """When the server was last read, by Prometheus' clock; 0 if it was not."""
    try:
        found = prometheus.now(f'timestamp(up{{job="{JOB}"}} == 1)', time.time())
    except PrometheusError:
        return 0.0
    return max((course.values[-1] for course in found), default=0.0)


def ask(scraped, expr, instant=True):
    query, span = scraped.window.filled(expr), scraped.span
    if instant:
        return scraped.prometheus.now(query, span.end)
    return scraped.prometheus.over(query, span.start, span.end, span.step_seconds)


def number(scraped, expr):
    (course,) = ask(scraped, expr)
    return course.values[-1]


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_every_query_of_every_panel_is_answered(path, scraped):
    board = json.loads(path.read_text("utf-8"))
    asked = 0
    for panel in panels(board):
        for target in panel["targets"]:
            found = ask(scraped, target["expr"], instant=target["instant"])
            told = [course for course in found if course.says_something]
            assert told, (panel["title"], target["expr"])
            for label in re.findall(r"{{(\w+)}}", target.get("legendFormat", "")):
                assert all(label in course.labels for course in found), panel["title"]
            if panel["type"] == "heatmap":
                assert max(value for course in told for value in course.values) > 0
            asked += 1
    assert asked > 10


def test_the_variables_offer_what_is_there_and_nothing_else(scraped):
    chosen = scraped.window.chosen
    assert set(chosen) == {variable.name for variable in VARIABLES}
    assert (chosen["job"], chosen["model"]) == ((JOB,), ("tiny",))
    assert len(chosen["instance"]) == 1


def answer_of(scraped, board, title):
    (panel,) = (
        panel
        for each in BOARDS
        if each.name == board
        for row in each.rows
        for panel in row.panels
        if panel.title == title
    )
    return {
        tuple(course.labels.values()): course.values[-1]
        for query in panel.queries
        for course in ask(scraped, query.expr)
    }


def test_the_numbers_are_those_of_the_load(scraped):
    (saved,) = answer_of(scraped, "savings", "FLOPs saved").values()
    assert 0.05 < saved < 0.4
    by_tier = answer_of(scraped, "savings", "FLOPs saved, by capacity tier")
    assert by_tier[("0.6",)] > by_tier[("0.8",)] > by_tier[("1.0",)] >= 0
    dense, spent, unspent = (
        answer_of(scraped, "savings", f"{title}, in money")[()]
        for title in ("Dense would have cost", "Spent", "Not spent")
    )
    assert dense == pytest.approx(answer_of(scraped, "savings", "Dense would have cost")[()] / 1e18)
    assert unspent == pytest.approx(dense - spent) and unspent / dense == pytest.approx(saved)
    units = {unit for (unit,) in answer_of(scraped, "savings", "Left out per request, by unit")}
    assert units == {unit.value for unit in UNITS}
    (below,) = answer_of(scraped, "savings", "Requests below 1.0").values()
    # Of eight that run, those at 1.0 and 'auto' and the broken one (1.0 by default) are not.
    assert below == pytest.approx(5 / 8, abs=0.08)
    in_engine = number(scraped, over(grown(ENDED, only=ERROR), grown(ENDED)))
    assert answer_of(scraped, "health", "Ended in an error")[()] > in_engine > 0
    assert answer_of(scraped, "health", "Refused")[()] == pytest.approx(2 / 11, abs=0.05)
    mistakes = answer_of(scraped, "health", "Failed on an error that nobody foresaw")
    assert mistakes[("internal",)] > 0
    doors = answer_of(scraped, "health", "Refused at the door, by why")
    assert doors[("invalid",)] > 0 and doors[("unauthorized",)] > 0 and ("internal",) not in doors
    overrides = answer_of(scraped, "health", "Overrides per second, by whose limit")
    assert overrides[("key",)] > 0 == overrides[("server",)]
    assert answer_of(scraped, "health", "Prefix hits, by model")[("tiny",)] > 0.3
    assert answer_of(scraped, "health", "Servers that answer") == {(): 1}


def test_a_choice_of_another_model_leaves_only_what_has_no_model(scraped):
    other = Window(
        scraped.window.range_seconds,
        scraped.window.rate_seconds,
        {**scraped.window.chosen, "model": ("another",)},
    )
    elsewhere = Scraped(scraped.prometheus, scraped.span, other)
    assert answer_of(elsewhere, "savings", "FLOPs saved") == {}
    assert answer_of(elsewhere, "health", "Refused at the door, by why")[("invalid",)] > 0


def test_a_picture_shows_every_kind_of_panel(scraped):
    panels = {panel.kind: panel for board in BOARDS for row in board.rows for panel in row.panels}
    assert set(panels) == set(Kind)
    board = Board("all", "All kinds", "?", (Row("One of each", tuple(panels.values())),))
    full = draw(board, scraped.prometheus, scraped.span)
    before = replace(scraped.span, start=scraped.span.start - 7200, end=scraped.span.end - 7200)
    empty = draw(board, scraped.prometheus, before)
    assert full != empty and len(full) < 100_000
    with Image.open(io.BytesIO(full)) as drawn, Image.open(io.BytesIO(empty)) as bare:
        assert drawn.size == bare.size and drawn.width > 1000
        lines = max(place.y + place.height for _, place in placed(board))
        for thing, place in placed(board):
            more = ink(drawn, place, lines) - ink(bare, place, lines)
            assert (more > 50) == isinstance(thing, Panel), (thing.title, more)


def test_a_picture_lacks_the_row_of_what_is_not_counted(scraped):
    (board,) = (board for board in BOARDS if board.name == "savings")
    before = replace(scraped.span, start=scraped.span.start - 7200, end=scraped.span.end - 7200)
    heights = []
    for span in (scraped.span, before):
        with Image.open(io.BytesIO(draw(board, scraped.prometheus, span))) as drawn:
            heights.append(drawn.height)
    assert heights[0] > heights[1]


def ink(picture, place, lines):
    """The dark dots in a place of the grid; two lines for the heading come before it."""
    wide, high = picture.width / WIDTH, picture.height / (lines + 2)
    left, top = place.x * wide, (place.y + 2) * high
    box = (left, top, left + place.width * wide, top + place.height * high)
    return sum(picture.convert("L").crop(tuple(map(round, box))).histogram()[:180])
