"""Promises to clients: the `openai` package works unchanged, and so does the command line."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest
import torch
import transformers

from service.metrics import Metrics
from service.routes import PAGE
from service.schemas import Answered, Prediction, Wrong
from service.served import serve
from service.settings import ModelSpec, Settings
from tests.service.conftest import PATIENCE_SECONDS, build, elastic_model, in_house

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def client(street):
    with openai.OpenAI(base_url=f"{street(build())}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_openai_client_chats_streams_and_completes(client):
    messages = [{"role": "user", "content": "hi"}]
    for capacity in (1.0, 0.8, 0.6):
        asked = {
            "model": "tiny",
            "messages": messages,
            "max_completion_tokens": 130,
            "temperature": 0,
            "extra_body": {"capacity": capacity, "ignore_eos": True},
        }
        whole = client.chat.completions.create(**asked)
        assert whole.usage.completion_tokens == 130
        spent = whole.model_extra["elasti"]["capacity_spent"]
        # At 1.0 all is computed that somebody reads: in the last layer, a prompt's keys and values.
        assert spent == pytest.approx(capacity, abs=0.02) or (capacity == 1 and 0.9 < spent < 1)

        chunks = list(
            client.chat.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}
            )
        )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
        assert chunks[-1].usage.model_extra["compute"] == whole.usage.model_extra["compute"]
        assert chunks[-1].model_extra["elasti"]["capacity_applied"] == capacity

    scored = client.completions.create(
        model="tiny@0.7", prompt=[[5, 6, 7], [8, 9]], max_tokens=1, echo=True, logprobs=1
    )
    assert [len(choice.logprobs.tokens) for choice in scored.choices] == [4, 3]
    assert {model.id for model in client.models.list()} >= {"tiny", "tiny@0.75"}
    assert client.models.retrieve("tiny@0.75").model_extra["root"] == "tiny"
    chat = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=2, logprobs=True, top_logprobs=3
    )
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 3


def test_the_openai_client_understands_every_refusal(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", extra_body={"capacity": "fast"})
    assert caught.value.param == "capacity" and caught.value.code == "invalid_capacity"
    with pytest.raises(openai.NotFoundError, match="nothing"):
        client.completions.create(model="nothing", prompt="a")
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="tiny", prompt="a" * 600, stream=True)


def test_classification_agrees_with_the_likelihood_of_each_label(client):
    labels = ["good", "good enough", "bad"]
    whole = client.post(
        "/classify",
        body={"model": "tiny", "input": ["a fine day", "rain"], "labels": labels},
        cast_to=object,
    )
    assert whole["object"] == "list" and len(whole["data"]) == 2
    for index, row in enumerate(whole["data"]):
        assert row.keys() == {"index", "label", "probs", "num_classes", "labels"}
        assert row["index"] == index and row["num_classes"] == 3 and row["labels"] == labels
        assert sum(row["probs"]) == pytest.approx(1)
        assert row["label"] == labels[row["probs"].index(max(row["probs"]))]
    root = str(client.base_url).removesuffix("v1/")
    body = {"inputs": "a fine day", "labels": labels}
    ask = partial(httpx.post, f"{root}predict", timeout=PATIENCE_SECONDS)
    ranked = ask(json=body).json()
    expected = dict(zip(labels, whole["data"][0]["probs"], strict=True))
    assert {each["label"]: each["score"] for each in ranked} == pytest.approx(expected)
    raw = ask(json=body | {"inputs": ["x"], "raw_scores": True}).json()
    assert all(each["score"] < 0 for each in raw[0])
    long = body | {"inputs": "x" * 900}
    assert ask(json=long).status_code == 400
    assert ask(json=long | {"truncate": True}).status_code == 200


def test_the_version_tells_what_each_model_runs_on():
    async def visit(house):
        told = (await house.client.get("/version")).json()
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert told["version"] == house.app.version == project["version"]
        assert told["build"] == "0123abc"
        assert told["releases"] == {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        model = house.engine.model
        assert told["models"] == {
            "tiny": {
                "device": "cpu",
                "dtype": "float32",
                "attention": model.attention_backend,
                "cache_tokens": 320,
                "cache_bytes": model.cache.rows.nbytes,
                "prefix_cache": False,
                "energy": False,
                "adapter": model.adapter.identity,
                "adapter_files": {},  # it was never on disk
                "costs": None,
            }
        }

    in_house(visit, cache_tokens=320, prefix_cache=False, build="0123abc")


def test_the_version_holds_the_hashes_of_the_adapter_s_files(tmp_path):
    saved = elastic_model()
    saved.adapter.save(tmp_path)
    told = serve(ModelSpec("tiny", "tiny-llama"), saved, Settings(), Metrics()).machinery
    assert {"adapter.json", "calibration.json", "routers.safetensors"} < told.adapter_files.keys()
    sums = subprocess.run(
        ["sha256sum", *told.adapter_files], cwd=tmp_path, text=True, capture_output=True, check=True
    )
    assert told.adapter_files == {
        name: digest for digest, name in (line.split() for line in sums.stdout.splitlines())
    }


def test_the_page_needs_nothing_from_elsewhere():
    text = PAGE.read_text()
    assert "http://" not in text and "https://" not in text and "src=" not in text


def test_answers_and_refusals_are_what_openapi_says():
    async def visit(house):
        paths = (await house.client.get("/openapi.json")).json()["paths"]
        for operation in (each for path in paths.values() for each in path.values()):
            assert {"200", "4XX", "5XX"} == operation["responses"].keys()

        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        labels = {"labels": ["a", "b"]}
        for route, body in (
            ("completions", {"prompt": "hi", "max_tokens": 2, "capacity": 0.7}),
            ("chat/completions", chat | {"capacity": {"prompt": 0.6}}),
            ("classify", {"input": "hi", "capacity": "auto"} | labels),
        ):
            answer = (await house.post(f"/v1/{route}", **body)).json()
            held = Answered.model_validate(answer, strict=True)
            assert held.usage.compute.model_dump(exclude_unset=True) == answer["usage"]["compute"]
            assert held.elasti.model_dump() == answer["elasti"]
        for label in (await house.post("/predict", inputs="hi", **labels)).json():
            Prediction.model_validate(label, strict=True)
        refusal = (await house.post("/v1/completions", prompt="hi", capacity=2)).json()
        assert Wrong.model_validate(refusal, strict=True).model_dump() == refusal

    in_house(visit)


def test_the_page_reads_only_what_answers_hold():
    text = PAGE.read_text()

    async def visit(house):
        assert (await house.client.get("/")).text == text
        answer = await house.complete(max_tokens=2, capacity=0.8)
        for held, name in ((answer["usage"]["compute"], "compute"), (answer["elasti"], "elasti")):
            read = set(re.findall(rf"\b{name}\.(\w+)", text))
            assert read and read <= held.keys()

    in_house(visit)


# `python -m service`, which waits for something while a file is there.
HELD = """
import runpy, sys, time
from pathlib import Path
from elastiformer import ElasticModel

gate = Path(sys.argv.pop(1))

{}

runpy.run_module("service", run_name="__main__", alter_sys=True)
"""
# All steps but the first ones, of which some text has come.
STEPS_WAIT = """
step, steps = ElasticModel.step, []

def waits(self, chunks):
    steps.append(gate.exists())
    while sum(steps) > 40 and gate.exists():
        time.sleep(0.01)
    return step(self, chunks)

ElasticModel.step = waits
"""
# A model that is loaded and measured again and again.
LOADING_WAITS = """
measure_costs = ElasticModel.measure_costs

def waits(self, *options):
    while gate.exists():
        measure_costs(self, *options)
    return measure_costs(self, *options)

ElasticModel.measure_costs = waits
"""


def test_the_command_serves_tells_a_line_to_try_and_drains(tiny_folder, tmp_path):
    environment = {**os.environ, "ELASTI_LOG_LEVEL": "warning", "OMP_NUM_THREADS": "1"}
    gate = tmp_path / "gate"
    command = [sys.executable, "-c", HELD.format(STEPS_WAIT), str(gate), "--port", "0",
               "--threads", "1", "--model", f"mine={tiny_folder}",
               "--drain-seconds", str(PATIENCE_SECONDS)]  # fmt: skip
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            lines: list[str] = []
            reading = threading.Thread(target=lambda: lines.extend(process.stderr))
            told = iter(process.stderr.readline, "")
            for line in told:
                lines.append(line)
                if "curl" in line:
                    break
            reading.start()
            start = "".join(lines)
            assert "loading mine" in lines[0]
            assert "attention by" in start and "cache of 32768 tokens" in start
            assert "rows up to which a product goes row by row" in start
            address = next(line for line in lines if "ready: " in line).split()[1]
            assert f"curl -N {address}/v1/chat/completions" in start

            patient = {"timeout": PATIENCE_SECONDS}
            told = httpx.get(f"{address}/version", **patient).json()["models"]["mine"]
            assert told["costs"] in start and told["attention"] in start
            body = {"model": "mine", "prompt": "a", "max_tokens": 250, "stream": True}
            body |= {"ignore_eos": True, "temperature": 0}
            gate.touch()
            with httpx.stream("POST", f"{address}/v1/completions", json=body, **patient) as reply:
                events = reply.iter_lines()
                next(events)
                process.send_signal(signal.SIGTERM)
                while httpx.get(f"{address}/ready", **patient).status_code == 200:
                    pass
                refused = httpx.post(f"{address}/v1/completions", json=body, **patient)
                assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
                gate.unlink()
                rest = [line for line in events if line]
            assert rest[-1] == "data: [DONE]"
            assert json.loads(rest[-2][6:])["usage"]["completion_tokens"] == 250
            assert process.wait(timeout=PATIENCE_SECONDS) == 0
        finally:
            process.kill()
            reading.join()
    assert "Traceback" not in "".join(lines)


@pytest.mark.alone
@pytest.mark.parametrize(("stop", "form"), [(signal.SIGTERM, "json"), (signal.SIGINT, "text")])
def test_a_signal_while_models_load_ends_the_server_at_once_in_good_order(
    tiny_folder, tmp_path, form, stop
):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    gate = tmp_path / "gate"
    gate.touch()
    command = [sys.executable, "-c", HELD.format(LOADING_WAITS), str(gate), "--port", "0",
               "--threads", "1", "--model", f"mine={tiny_folder}",
               "--log-format", form]  # fmt: skip
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert "loading mine" in process.stderr.readline()
        process.send_signal(stop)
        began = time.monotonic()
        try:
            rest = process.stderr.read().splitlines()  # what loads has no end
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
    assert time.monotonic() - began < 10
    (line,) = (line for line in rest if "while models were loading" in line)
    assert line == rest[-1] and stop.name in line
    assert not any("ready: " in line or "Traceback" in line for line in rest)
