"""What README shows runs as it stands there: its requests, on the embedded models."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO

import pytest

from deploy.dashboards.load import LEFT, send
from service.app import create_app
from service.metrics import Metrics
from service.served import load
from service.settings import EMBEDDED_DEFAULTS, Settings
from tests.documents import ROOT, blocks, lines

README = (ROOT / "README.md").read_text("utf-8")
GUIDE = (ROOT / "docs" / "operating.md").read_text("utf-8")
NAMED = re.compile(rf'\\?"?model\\?"?(?:: |=)\\?"({"|".join(EMBEDDED_DEFAULTS)})\\?"')
MOST_SECONDS = 60  # for all requests


def model_of(example: str) -> str | None:
    """The embedded model that it asks, if it does."""
    found = NAMED.search(example)
    return found[1] if found else None


def ran(line: str) -> dict:
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=MOST_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def printed(example: str) -> str:
    into = StringIO()
    with redirect_stdout(into):
        exec(compile(example, "README.md", "exec"), {})
    return into.getvalue()


@pytest.mark.alone
@pytest.mark.timeout(600)  # kernels may have to be compiled first
@pytest.mark.skipif(shutil.which("curl") is None, reason="README's requests are sent by curl")
def test_every_request_that_readme_shows_of_an_embedded_model_runs_as_it_stands(
    street, monkeypatch
):
    settings = Settings(
        dtype="float32", cache_tokens=2048, prefix_cache=False, default_max_tokens=16
    )
    metrics = Metrics()
    address = street(create_app(settings, load(settings, metrics), metrics)).removeprefix("http://")
    monkeypatch.chdir(ROOT)
    shown = [line for line in lines(README + GUIDE, "bash") if line.startswith("curl ")]
    requests = [line for line in shown if model_of(line)]
    examples = [each for each in blocks(README, "python") if model_of(each)]
    assert {model_of(each) for each in (*requests, *examples)} == set(EMBEDDED_DEFAULTS)
    assert len(requests) >= 5 and len(examples) == 2

    begun, said = time.monotonic(), []
    for line in requests:
        answer = ran(line.replace("127.0.0.1:8000", address))
        if "choices" in answer and "image_url" not in line:
            assert answer["choices"][0]["message"]["content"]
        elif "choices" in answer:
            assert r"\"temperature\": 0" in line  # or the answer would be drawn
            assert answer["usage"]["compute"]["tokens_skipped"]["image_tokens"] > 0
            said.append(answer["choices"][0]["message"]["content"])
        elif isinstance(answer, list):
            said.append(answer[0]["label"])
        else:
            said += [entry["label"] for entry in answer["data"]]
        if asked := re.search(r'\\?"capacity\\?": (0\.\d+)', line):
            assert answer["elasti"]["capacity_spent"] < float(asked[1]) + 0.03
    text, pictured = (printed(each.replace("127.0.0.1:8000", address)) for each in examples)
    assert sorted(said) == [
        *("Ankle boot", "negative", "positive", "positive", "pullover", "pullover")
    ]
    assert re.fullmatch(r"(?s).+ 0\.\d+\n", text)
    assert pictured.startswith("pullover {")
    assert time.monotonic() - begun < MOST_SECONDS

    # The load that dashboards are drawn under, for a moment, on the same server.
    monkeypatch.setattr(sys, "stderr", StringIO())
    given = asyncio.run(send(f"http://{address}", minutes=0.05, rate=4, keys=(None, None)))
    assert given["200"] > 0 and set(given) <= {"200", "400", LEFT}, given
