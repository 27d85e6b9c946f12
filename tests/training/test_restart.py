"""A worker that is lost: torchrun starts all anew, and the run ends as if nothing had happened.

On one machine under one launcher, and on two with one each; here both are on loopback.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import tiny

ROOT = Path(__file__).parents[2]
STEPS = 40
OPTIONS = (
    "--stream --window 24 --batch-tokens 96 --experts 8 --probe-windows 0 --held-out 0 "
    f"--steps {STEPS} --checkpoint-every 3 --lora-rank 0 --resume"
).split()
ONE_MACHINE = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
# As the operator's guide has it: a restart must not meet the addresses of processes that are gone.
SEVERAL = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
MOST_SECONDS = 300


@pytest.fixture(scope="module")
def launch(tmp_path_factory, tiny_tokenizer):
    """Start the run under torchrun with these options, into a folder of this name."""
    folder = tmp_path_factory.mktemp("restart")
    tiny("llama").save_pretrained(folder / "base")
    tiny_tokenizer.save_pretrained(folder / "base")
    texts = [
        f"{number}. The routers of a model learn what it can do without." for number in range(40)
    ]
    data = folder / "text.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    started = []

    def start(out, *options, **variables):
        command = [sys.executable, "-m", "torch.distributed.run", *options]
        command += ["-m", "training", "distill", "--base", str(folder / "base")]
        command += ["--data", str(data), "--out", str(folder / out), *OPTIONS]
        launcher = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(launcher)
        return launcher, folder / out

    yield start
    for launcher in started:
        if launcher.poll() is None:  # its workers end with it
            launcher.terminate()
        launcher.communicate(timeout=60)


@pytest.fixture(scope="module")
def whole(launch):
    """The routers of a run that nothing happens to, once they are asked for."""
    launcher, out = launch("whole", *ONE_MACHINE)
    known = []

    def routers():
        if not known:
            _, errors = launcher.communicate(timeout=MOST_SECONDS)
            assert launcher.returncode == 0, errors
            known.append(load_file(out / "routers.safetensors"))
        return known[0]

    return routers


def worker(launcher, rank):
    """The process of one rank of a launcher's own."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = path.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            environment = path.joinpath("environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has just ended
        if int(parent) == launcher.pid and f"LOCAL_RANK={rank}".encode() in environment:
            return int(path.name)
    raise AssertionError(f"no rank {rank} under {launcher.pid}")


def kill_in_the_midst(out, launchers, rank):
    """SIGKILL for a worker of the last launcher, once there are checkpoints."""
    log = out.with_name(f"{out.name}.run") / "progress.jsonl"
    begun = time.monotonic()
    while not (log.exists() and log.read_text().count("\n") >= 4):
        assert time.monotonic() - begun < MOST_SECONDS, "no step was taken"
        for launcher in launchers:
            assert launcher.poll() is None, launcher.stderr.read()
        time.sleep(0.005)
    os.kill(worker(launchers[-1], rank), signal.SIGKILL)
    told = [launcher.communicate(timeout=MOST_SECONDS) for launcher in launchers]
    for launcher, (_, errors) in zip(launchers, told, strict=True):
        assert launcher.returncode == 0, errors
    errors = told[-1][1]
    assert "Signal 9 (SIGKILL)" in errors or "exitcode: -9" in errors, errors
    (report,) = [json.loads(said.splitlines()[-1]) for said, _ in told if said]
    assert report["finished"]
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


def assert_same(one, out):
    other = load_file(out / "routers.safetensors")
    assert one.keys() == other.keys() and one
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_loses_a_worker_ends_as_an_undisturbed_one(launch, whole):
    launcher, out = launch("killed", *ONE_MACHINE)
    kill_in_the_midst(out, [launcher], rank=1)
    assert_same(whole(), out)


def test_so_does_one_on_two_machines_that_meet_over_the_network(launch, whole):
    expected = whole()
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    meeting = ("--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3")
    meeting += ("--local-addr", "127.0.0.1")
    meeting += ("--rdzv-backend", "c10d", "--rdzv-endpoint", address, "--rdzv-id", "restart")
    # The first one holds what they meet at; both would take themselves for that host here.
    started = [
        launch("apart", *meeting, "--rdzv-conf", f"is_host={host}", **SEVERAL)
        for host in ("true", "false")
    ]
    launchers, (out, _) = zip(*started, strict=True)
    kill_in_the_midst(out, launchers, rank=0)
    assert_same(expected, out)
