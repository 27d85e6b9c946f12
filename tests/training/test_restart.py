"""A worker that is lost: torchrun starts all anew, and the run ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
STEPS = 40
OPTIONS = (
    "--stream --window 24 --batch-tokens 96 --experts 8 --probe-windows 0 --held-out 0 "
    f"--steps {STEPS} --checkpoint-every 3 --lora-rank 0 --resume"
).split()


@pytest.fixture
def launch(tiny_folder, tmp_path):
    data = tmp_path / "text.jsonl"
    texts = [
        f"{number}. The routers of a model learn what it can do without." for number in range(40)
    ]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def start(out):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", "--max-restarts", "1", "-m", "training", "distill"]
        command += ["--base", str(tiny_folder), "--data", str(data), "--out", str(tmp_path / out)]
        return subprocess.Popen(
            [*command, *OPTIONS],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def worker(launcher, rank):
    """The process of one rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = path.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            environment = path.joinpath("environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has just ended
        if int(parent) == launcher.pid and f"LOCAL_RANK={rank}".encode() in environment:
            return int(path.name)
    raise AssertionError(f"no rank {rank} under {launcher.pid}")


def test_a_run_that_loses_a_worker_ends_as_an_undisturbed_one(launch, tmp_path):
    with launch("whole") as whole, launch("killed") as killed:
        log = tmp_path / "killed.run" / "progress.jsonl"
        while not (log.exists() and log.read_text().count("\n") >= 4):
            assert killed.poll() is None, killed.stderr.read()
            time.sleep(0.005)
        os.kill(worker(killed, rank=1), signal.SIGKILL)
        (told, errors), (_, whole_errors) = killed.communicate(), whole.communicate()

    assert whole.returncode == 0, whole_errors
    assert killed.returncode == 0, errors
    assert "Signal 9 (SIGKILL)" in errors or "exitcode: -9" in errors, errors
    assert json.loads(told.splitlines()[-1])["finished"]
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    one, other = (load_file(tmp_path / out / "routers.safetensors") for out in ("whole", "killed"))
    assert one.keys() == other.keys() and one
    assert all(torch.equal(one[name], other[name]) for name in one)
