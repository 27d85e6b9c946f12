"""Promises of the image as an engine of containers builds and runs it, where somebody asks for it.

`ELASTI_TEST_ENGINE=1 pytest --timeout 0 tests/deploy/test_image_built.py`, as root, builds the
target `cpu` with podman and starts it as docker/compose.yaml does: a read-only root, no rights,
one volume. It takes podman, runc and debootstrap (Debian has all three), and no registry of
images: the base is a Debian with its Python 3.11, made here, and not the one that the Dockerfile
names. ELASTI_TEST_PYTHON_IMAGE names another one for the engine to find.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.dockerfile import ROOT
from tests.deploy.test_image import free_port
from tests.deploy.test_image_steps import READY_WITHIN_SECONDS, size_in_the_guide

pytestmark = pytest.mark.skipif(
    "ELASTI_TEST_ENGINE" not in os.environ, reason="ELASTI_TEST_ENGINE is not set: takes minutes"
)

PYTHON_IMAGE, IMAGE, BUILD = "localhost/python:of-a-test", "localhost/elasti:of-a-test", "of-a-test"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGES = "python3,python3-venv,python-is-python3,ca-certificates"
DEBIAN, MIRROR = "bookworm", "http://deb.debian.org/debian"
# As compose.yaml has it. The limits are for hosts that may not raise their own; checks of health
# are run by hand, as the engine would leave them to systemd.
LIKE_COMPOSE = (
    *("--read-only", "--tmpfs", "/tmp:size=256m"),
    *("--cap-drop", "all", "--security-opt", "no-new-privileges"),
    *("--network", "host", "--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"),
    *("--health-interval", "disable"),
)
# One model on one thread, which starts sooner; time enough to drain on a busy machine.
BASE = "smollm2-135m-instruct"
MODEL = f"smollm2={BASE},adapter=/opt/app/elastiformer/adapters/{BASE}"
SETTINGS = {"MODELS": MODEL, "THREADS": "1", "DRAIN_SECONDS": "90"}
NEW_TOKENS = 400


class Engine:
    """podman with images and containers of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command = ["podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs"]
        self.command += ["--root", str(folder / "store"), "--runroot", str(folder / "run")]

    def do(self, *words: str, timeout: float = 120, **options: Any) -> str:
        """What it says on stdout; raises CalledProcessError."""
        command = [*self.command, *words]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout, **options
        )
        return done.stdout.strip()

    def fails(self, *words: str) -> bool:
        return subprocess.run([*self.command, *words], capture_output=True).returncode != 0

    def look(self, kind: str, name: str) -> dict[str, Any]:
        (found,) = json.loads(self.do(kind, "inspect", name))
        return dict(found)


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[Engine]:
    engine = Engine(tmp_path_factory.mktemp("engine"))
    try:
        base = os.environ.get("ELASTI_TEST_PYTHON_IMAGE") or make_base(engine)
        arguments = {"PYTHON_IMAGE": base, "ELASTI_BUILD": BUILD}
        if "TORCH_INDEX_URL" in os.environ:
            arguments["TORCH_INDEX_URL"] = os.environ["TORCH_INDEX_URL"]
        words = [word for each in arguments.items() for word in ("--build-arg", "=".join(each))]
        mounts = [word for each in of_this_machine(engine.folder) for word in ("--volume", each)]
        engine.do(
            *("build", "--isolation", "chroot", "--format", "docker", "--network", "host"),
            *("--file", "docker/Dockerfile", "--target", "cpu", "--tag", IMAGE),
            *words,
            *mounts,
            ".",
            cwd=ROOT,
            timeout=3600,
        )
        yield engine
    finally:
        engine.do("rm", "--all", "--force")
        engine.do("rmi", "--all", "--force")


def make_base(engine: Engine) -> str:
    """A small Debian with Python."""
    root = engine.folder / "root"
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", DEBIAN, root, MIRROR]
    subprocess.run(command, check=True, timeout=1800, stdout=subprocess.DEVNULL)
    for lists in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(root / lists)
    packed = engine.folder / "base.tar"
    subprocess.run(["tar", "-C", root, "-cf", packed, "."], check=True, timeout=600)
    shutil.rmtree(root)
    engine.do("import", "--change", f"ENV PATH={PATH}", str(packed), PYTHON_IMAGE, timeout=600)
    packed.unlink()
    return PYTHON_IMAGE


def of_this_machine(folder: Path) -> list[str]:
    """How pip reaches its index from here, mounted while the image is built: none of it is kept."""
    held = {
        name.removeprefix("PIP_").lower().replace("_", "-"): value
        for name, value in os.environ.items()
        if name.startswith("PIP_")
    }
    settings = folder / "pip.conf"
    settings.write_text("\n".join(["[global]", *(f"{k} = {v}" for k, v in held.items())]), "utf-8")
    paths = [word for value in held.values() for word in value.split() if Path(word).is_absolute()]
    there = [path for path in paths if Path(path).exists()]
    return [f"{settings}:/etc/pip.conf:ro", *(f"{path}:{path}:ro" for path in there)]


def test_an_image_says_how_it_wants_to_be_run(engine):
    found = engine.look("image", IMAGE)
    config = found["Config"]
    assert config["User"] == "10001:10001" and config["StopSignal"] == "SIGTERM"
    assert config["Entrypoint"] == ["python", "-m", "service"]
    assert set(config["Volumes"]) == {"/cache"} and set(config["ExposedPorts"]) == {"8000/tcp"}
    assert found["Healthcheck"]["Test"] == ["CMD", "python", "/opt/health.py"]
    if "ELASTI_TEST_PYTHON_IMAGE" not in os.environ:
        base = engine.look("image", PYTHON_IMAGE)["Size"]
        assert (found["Size"] - base) / 1e9 == pytest.approx(size_in_the_guide("cpu"), rel=0.05)


def test_a_container_without_rights_serves_and_drains(engine):
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    settings = SETTINGS | {"HOST": "127.0.0.1", "PORT": str(port)}
    here = [word for name in settings for word in ("--env", f"ELASTI_{name}={settings[name]}")]
    began = time.monotonic()
    engine.do("run", "--detach", "--name", "server", *LIKE_COMPOSE, *here, "-v", "c:/cache", IMAGE)
    wait(engine, address)
    print(f"ready after {time.monotonic() - began:.0f} s")

    engine.do("healthcheck", "run", "server")
    assert engine.do("exec", "server", "id", "-u") == "10001"
    for place in ("/opt/new", "/new", "/opt/app/new"):
        assert engine.fails("exec", "server", "touch", place), place
    for place in ("/cache/new", "/tmp/new"):
        engine.do("exec", "server", "touch", place)
    status = engine.do("exec", "server", "cat", "/proc/1/status")
    told = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {int(told[name], 16) for name in ("CapEff", "CapPrm", "CapBnd")} == {0}
    assert told["NoNewPrivs"] == "1"

    assert httpx.get(f"{address}/version").json()["build"] == BUILD
    chat = {"messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 8, "capacity": 0.5}
    chat["model"] = "smollm2"
    answer = httpx.post(f"{address}/v1/chat/completions", json=chat, timeout=300)
    assert answer.status_code == 200, answer.text
    assert answer.json()["elasti"]["capacity_applied"] == 0.5

    body = {"model": "smollm2", "prompt": "The sky", "max_tokens": NEW_TOKENS, "capacity": 0.6}
    body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=300) as stream:
        lines = (line for line in stream.iter_lines() if line)
        first = next(lines)
        stop = subprocess.Popen([*engine.command, "stop", "--time", "100", "server"])
        *_, last, done = [first, *lines]
    assert done == "data: [DONE]"  # what runs is finished
    usage = json.loads(last.removeprefix("data: "))["usage"]
    assert usage["completion_tokens"] == NEW_TOKENS
    assert stop.wait(timeout=120) == 0
    assert engine.look("container", "server")["State"]["ExitCode"] == 0


def wait(engine: Engine, address: str) -> None:
    for _ in range(READY_WITHIN_SECONDS):
        state = engine.look("container", "server")["State"]
        assert state["Running"], engine.do("logs", "server", stderr=subprocess.STDOUT)
        try:
            httpx.get(f"{address}/ready").raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(1)
    raise AssertionError(f"the server is not ready after {READY_WITHIN_SECONDS} seconds")
