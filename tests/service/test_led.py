"""A server over two processes answers as one process would, and ends with both."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.models import routed_tokens
from elastiformer import ElasticModel
from service import led
from service.settings import Settings
from tests.service.conftest import PATIENCE_SECONDS
from tests.tiny import tiny, tiny_tokenizer

ROOT = Path(__file__).parents[2]
PROMPT = [7 * place % 90 for place in range(70)]  # more than two pieces of the store of prefixes
TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("led")
    tiny("llama", vocab_size=260).save_pretrained(made / "base")  # which two can divide
    tiny_tokenizer().save_pretrained(made / "base")
    model = ElasticModel.load(str(made / "base"), dtype="float32", device="cpu")
    routed_tokens(model, kv="complete")
    model.adapter.save(made / "adapter")
    return made


@contextmanager
def serving(
    folder: Path, log: Path, processes: int
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server over so many processes, and its address; what it says is in `log`."""
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), "-m"]
    command += ["service", "--port", "0", "--threads", "1"]
    command += ["--model", f"tiny={folder / 'base'},adapter={folder / 'adapter'}"]
    command += ["--dtype", "float32", "--device", "cpu", "--cache-tokens", "2048"]
    with log.open("wb") as lines:
        process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=lines,
        )
    try:
        while not (found := re.search(r"^ready: (\S+)$", log.read_text(), re.MULTILINE)):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield process, found[1]
    finally:
        process.terminate()  # its processes with it
        process.wait()


def calling(address: str) -> httpx.Client:
    return httpx.Client(base_url=address, timeout=PATIENCE_SECONDS)


def ask(client: httpx.Client, capacity: float) -> dict[str, Any]:
    body = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": TOKENS,
        "capacity": capacity,
        "temperature": 0,
        "ignore_eos": True,
    }
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def all_of(client: httpx.Client) -> list[tuple[object, object]]:
    """Texts and usages at several capacities; the last one finds the first one's prefix."""
    answers = [ask(client, capacity) for capacity in (1.0, 0.6, 0.8, 1.0)]
    cached = answers[-1]["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == 64
    return [(answer["choices"], answer["usage"]) for answer in answers]


def test_two_processes_serve_as_one_does_and_drain_together(folder, tmp_path):
    one = tmp_path / "one"
    with serving(folder, one, 1) as (_, address), calling(address) as client:
        expected = all_of(client)
    log = tmp_path / "two"
    with serving(folder, log, 2) as (_, address), calling(address) as client:
        assert all_of(client) == expected
        with ThreadPoolExecutor(4) as callers:
            answers = callers.map(lambda share: ask(client, share), (0.6, 1.0, 0.8, 0.6))
            assert [each["choices"] for each in answers] == [
                expected[place][0] for place in (1, 0, 2, 1)
            ]
        long = {"model": "tiny", "prompt": PROMPT, "max_tokens": 400, "stream": True}
        with client.stream("POST", "/v1/completions", json=long) as answer:
            next(answer.iter_lines())  # and leaves: its room is free again, in both
        assert client.post("/v1/completions", json=long | {"capacity": 0.01}).status_code == 400
        assert ask(client, 0.8)["choices"] == expected[2][0]
    # Torchrun itself ends in a traceback on a signal; its processes have none.
    said = log.read_text()
    assert "stopping: running requests have" in said and "[rank" not in said, said


def test_without_the_other_process_nothing_pretends_to_serve(folder, tmp_path):
    with serving(folder, tmp_path / "log", 2) as (process, address):
        others = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(others[-1]), signal.SIGKILL)
        assert process.wait(timeout=PATIENCE_SECONDS)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{address}/health")


def test_over_several_processes_one_model_is_served(monkeypatch):
    settings = Settings(models="a=./x;b=./y")
    led.check(settings)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"over 2 processes one model is served; got a, b"):
        led.check(settings)
