"""Promises of the image's steps, run as the Dockerfile has them, where somebody asks for it.

No engine of containers is needed: test_image_built.py has one. `ELASTI_TEST_IMAGE=1 pytest
--timeout 0 tests/deploy/test_image_steps.py` runs the steps of both targets on a bare folder, in
the order of their stages and each with its own variables and build arguments, and serves on the
CPU from what they made. It loads 3 GB from the package index. Not tested so: the base image, what
is done as root in the stage `runtime`, and a GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest

from tests.deploy.dockerfile import BASE_PATH, ROOT, STAGES, Stage, line_of, variables_of
from tests.deploy.test_image import free_port, health

pytestmark = pytest.mark.skipif(
    "ELASTI_TEST_IMAGE" not in os.environ, reason="ELASTI_TEST_IMAGE is not set: takes minutes"
)

GIVEN = {"ELASTI_BUILD": "of-a-test"}
EXTRAS = {"cpu": ["opentelemetry.sdk"], "cuda": ["opentelemetry.sdk", "pynvml"]}
READY_WITHIN_SECONDS = 1800  # it unpacks models and compiles; on a busy machine that takes long
LAID_DOWN = ("opt/elasti", "opt/app", "opt/weights")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_steps_of_an_image_make_a_server_from_a_bare_folder(target, tmp_path):
    for stage in ("build", "app", f"packages-{target}"):
        for step in STAGES[stage].steps:
            run_step(step, STAGES[stage], tmp_path)
    assert unpinned(tmp_path) == []
    laid_down = files_of(tmp_path / "opt")

    with served(target, tmp_path) as server:
        body = {"prompt": "The sky is", "max_tokens": 8, "capacity": 0.8, "model": "smollm2"}
        answer = httpx.post(f"{server.address}/v1/completions", json=body, timeout=120).json()
        assert answer["usage"]["completion_tokens"] == 8
        assert httpx.get(f"{server.address}/version").json()["build"] == "of-a-test"
        assert health(server.port).returncode == 0
        if target == "cpu":  # one pool of threads, not Numba's beside PyTorch's
            assert server.openmp() == {
                tmp_path / "opt/elasti/lib/python3.11/site-packages/torch/lib"
            }

    assert files_of(tmp_path / "opt") == laid_down  # its root may be read-only
    in_image(target, tmp_path, "-I", "-m", "pip", "check")  # but for weights without their programs
    in_image(target, tmp_path, "-c", f"import {', '.join(EXTRAS[target])}")
    assert size_in_gigabytes(tmp_path) == pytest.approx(size_in_the_guide(target), rel=0.05)


def run_step(step: tuple[str, str], stage: Stage, root: Path) -> None:
    """A step with /opt and /src below `root`; what its stage sets is all that is set."""
    word, text = step
    src = root / "src"
    src.mkdir(exist_ok=True)
    if word == "COPY":
        *sources, _ = text.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, src / source, dirs_exist_ok=True)
            else:
                shutil.copy(ROOT / source, src)
    elif word == "RUN":
        variables = {name: value for name, value in stage.arguments().items() if value}
        variables |= below(root, variables_of(stage.name)) | of_this_machine(stage)
        script = re.sub(r"(?<![\w}])/opt/", f"{root}/opt/", text)
        command = ["/bin/sh", "-ec", script]
        subprocess.run(command, cwd=root / "src", env=variables, check=True, timeout=1800)
    else:
        assert word in ("ARG", "ENV", "WORKDIR"), word


def of_this_machine(stage: Stage) -> dict[str, str]:
    """How pip reaches its index from here. For CUDA the index alone: no wheel that lies about."""
    kept = ("PIP_", "TORCH_INDEX_URL", "HOME")
    held = {name: value for name, value in os.environ.items() if name.startswith(kept)}
    if stage.name == "packages-cuda":
        held = {name: value for name, value in held.items() if name not in _ELSEWHERE}
        held["PIP_CONFIG_FILE"] = os.devnull
    return held


_ELSEWHERE = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL")


def below(root: Path, variables: Mapping[str, str]) -> dict[str, str]:
    """Variables of the image, its folders below `root` and its Python the one at work here."""
    moved = {
        name: re.sub(r"(^|:)/(opt|cache)", rf"\1{root}/\2", v) for name, v in variables.items()
    }
    python = Path(sys.executable).parent
    return moved | {"PATH": moved["PATH"].replace(BASE_PATH, f"{python}:{BASE_PATH}")}


def unpinned(root: Path) -> list[str]:
    """Packages that the environment holds and no file pins to that release."""
    pins = [(ROOT / name).read_text("utf-8") for name in ("constraints.txt", "docker/cuda.txt")]
    pinned = {plain(line) for text in pins for line in text.splitlines()}
    command = [root / "opt/elasti/bin/python", "-m", "pip", "list", "--format=freeze"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    held = {plain(line) for line in listed.splitlines()}
    return sorted(each for each in held - pinned if not each.startswith(("pip==", "wheel==")))


def plain(pin: str) -> str:
    """A pin in the form that all spellings share; PyTorch's build for CPUs is its release."""
    return pin.strip().lower().replace("_", "-").removesuffix("+cpu")


def files_of(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file()
    }


def size_in_gigabytes(root: Path) -> float:
    paths = [path for name in LAID_DOWN for path in (root / name).rglob("*")]
    return sum(path.lstat().st_size for path in paths if path.is_file()) / 1e9


def size_in_the_guide(target: str) -> float:
    guide = (ROOT / "deploy" / "README.md").read_text("utf-8")
    (told,) = re.findall(rf"^\| `{target}` \| ([\d.]+) GB \|", guide, flags=re.MULTILINE)
    return float(told)


def in_image(target: str, root: Path, *words: str) -> None:
    variables = below(root, variables_of(target, GIVEN))
    subprocess.run([root / "opt/elasti/bin/python", *words], env=variables, check=True, timeout=300)


class served:
    """The image's entry point under the image's variables, until the block is left."""

    def __init__(self, target: str, root: Path) -> None:
        assert STAGES["runtime"] in line_of(target)
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        (root / "cache").mkdir(exist_ok=True)
        here = {"ELASTI_HOST": "127.0.0.1", "ELASTI_PORT": str(self.port), "ELASTI_DEVICE": "cpu"}
        self._process = subprocess.Popen(
            ["python", "-m", "service"],
            executable=root / "opt/elasti/bin/python",
            cwd=root / "cache",
            env=below(root, variables_of(target, GIVEN)) | here,
        )

    def openmp(self) -> set[Path]:
        """The folders of the OpenMP libraries that the process has loaded."""
        maps = Path(f"/proc/{self._process.pid}/maps").read_text("utf-8")
        found = re.findall(r" (/\S+/)lib[gi]?omp\S*\.so\S*$", maps, flags=re.MULTILINE)
        return {Path(folder) for folder in found}

    def __enter__(self) -> served:
        try:
            self._wait()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def _wait(self) -> None:
        for _ in range(READY_WITHIN_SECONDS):
            assert self._process.poll() is None, "the server did not start"
            try:
                httpx.get(f"{self.address}/ready").raise_for_status()
                return
            except httpx.HTTPError:
                time.sleep(1)
        raise AssertionError(f"the server is not ready after {READY_WITHIN_SECONDS} seconds")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        assert self._process.wait(timeout=60) == 0
