"""A worker that is lost: torchrun starts all anew, and the run ends as if nothing had happened.

On one machine under one launcher, and on two with one each; here both are on loopback.
"""

import json
import os
import socket
import subprocess
import sys
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

# `python -m training`; the first process of a launcher's `LOST` rank that comes to a step of this
# number is killed, and leaves a file.
PROGRAM = """
import os, runpy, signal
from pathlib import Path
from training.progress import Log

step, lost = Log.step, os.environ.get("LOST")

def step_of_life(self, number, values):
    step(self, number, values)
    if number == 7 and lost == os.environ["LOCAL_RANK"]:
        try:
            Path(__file__).with_name(os.environ["LEFT"]).touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

Log.step = step_of_life
runpy.run_module("training", run_name="__main__", alter_sys=True)
"""


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
    program = folder / "program.py"
    program.write_text(PROGRAM)
    started = []

    def start(out, *options, **variables):
        command = [sys.executable, "-m", "torch.distributed.run", *options]
        command += [str(program), "distill", "--base", str(folder / "base")]
        command += ["--data", str(data), "--out", str(folder / out), *OPTIONS]
        launcher = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables,
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
        launcher.communicate(timeout=MOST_SECONDS)


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


def assert_lost_and_finished(out, launchers):
    """The last launcher lost a worker, and the run came to its end."""
    log = out.with_name(f"{out.name}.run") / "progress.jsonl"
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
    launcher, out = launch("killed", *ONE_MACHINE, LOST="1", LEFT="killed-left")
    assert_lost_and_finished(out, [launcher])
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
        launch("apart", *meeting, "--rdzv-conf", f"is_host={host}", **SEVERAL, **lost)
        for host, lost in (("true", {}), ("false", {"LOST": "0", "LEFT": "apart-left"}))
    ]
    launchers, (out, _) = zip(*started, strict=True)
    assert_lost_and_finished(out, launchers)
    assert_same(expected, out)
