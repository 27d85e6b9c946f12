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

import httpx
import pytest

from benchmarks.models import routed_tokens
from elastiformer import Capacity, Chunk, ElasticModel
from service import led
from service.settings import Settings
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
def over_two(folder: Path, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """torchrun with two processes of the server, and their address; what they say is in `log`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "service", "--port", "0", "--threads", "1"]
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


def alone(folder: Path, capacity: float) -> tuple[str, float]:
    """The greedy text of one process, without HTTP, and the share that it spends."""
    model = ElasticModel.load(
        str(folder / "base"), folder / "adapter", dtype="float32", device="cpu"
    )
    sequence = model.sequence(Capacity(capacity, capacity), len(PROMPT), len(PROMPT) + TOKENS)
    made: list[int] = []
    ids = PROMPT
    while len(made) < TOKENS:
        (logits,) = model.step([Chunk(sequence, ids)])
        made.append(int(logits[-1].argmax()))
        ids = [made[-1]]
    text: str = model.tokenizer.decode(made, skip_special_tokens=True)
    return text, sequence.usage.capacity_spent


def test_two_processes_serve_as_one_would_and_drain_together(folder, tmp_path):
    log = tmp_path / "log"
    with over_two(folder, log) as (_, address), httpx.Client(base_url=address) as client:

        def ask(capacity: float) -> dict:
            body = {
                "model": "tiny",
                "prompt": PROMPT,
                "max_tokens": TOKENS,
                "capacity": capacity,
                "temperature": 0,
                "ignore_eos": True,
            }
            answer = client.post("/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            return answer.json()

        capacities = [1.0, 0.6, 0.9, 0.8]  # others: a stored beginning costs nothing
        with ThreadPoolExecutor(len(capacities)) as callers:
            answers = list(callers.map(ask, capacities))
        for capacity, answer in zip(capacities, answers, strict=True):
            text, spent = alone(folder, capacity)
            assert answer["choices"][0]["text"] == text
            # Not to the last FLOP: the engine cuts prompts otherwise.
            assert answer["elasti"]["capacity_spent"] == pytest.approx(spent, abs=0.02)
        again = ask(1.0)  # from the stored prefixes, of which each process has its part
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 64
        assert again["choices"] == answers[0]["choices"]

        long = {
            "model": "tiny",
            "prompt": PROMPT,
            "max_tokens": 400,
            "ignore_eos": True,
            "stream": True,
        }
        with client.stream("POST", "/v1/completions", json=long) as answer:
            next(answer.iter_lines())  # and leaves: its room is free again, in both
        assert ask(0.6)["choices"] == answers[1]["choices"]
        assert client.post(
            "/v1/completions", json={"model": "tiny", "prompt": [1], "capacity": 0.01}
        ).is_error
        assert ask(1.0)["choices"] == answers[0]["choices"]

    # Torchrun itself ends in a traceback on a signal; its processes have none.
    said = log.read_text()
    assert "stopping: running requests have" in said and "[rank" not in said, said


def test_without_the_other_process_nothing_pretends_to_serve(folder, tmp_path):
    with over_two(folder, tmp_path / "log") as (process, address):
        others = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(others[-1]), signal.SIGKILL)
        assert process.wait(timeout=300)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{address}/health")


def test_over_several_processes_one_model_is_served(monkeypatch):
    settings = Settings(models="a=./x;b=./y")
    led.check(settings)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"over 2 processes one model is served; got a, b"):
        led.check(settings)
