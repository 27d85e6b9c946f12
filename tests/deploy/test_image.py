"""Promises of docker/: linted, whole, without secrets; its steps run, where somebody asks for it.

There is no engine of containers here. `ELASTI_TEST_IMAGE=1 pytest --timeout 0
tests/deploy/test_image.py` runs the steps of the image for CPUs, in the order of its stages and
each with its own variables, on a bare folder, and serves from what they made: ten minutes.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from compose_spec import PyCompose

from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
HEALTH = DOCKER / "health.py"
HADOLINT = Path(sys.executable).with_name("hadolint")
VARIABLE = re.compile(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}")


@dataclass
class Stage:
    """One FROM, and the instructions up to the next."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def texts(self, word: str) -> list[str]:
        return [text for step, text in self.steps if step == word]


def read_stages() -> dict[str, Stage]:
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE)
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stage = stages[name] = Stage(base, name)
        elif word and stage is not None:
            stage.steps.append((word, rest.strip()))
    return stages


STAGES = read_stages()


def line_of(name: str) -> list[Stage]:
    """A stage with those that it begins from, the first one first."""
    stage = STAGES[name]
    return ([*line_of(stage.base)] if stage.base in STAGES else []) + [stage]


# The Dockerfile.


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_runs_as_a_user_with_one_writable_folder_and_a_health_check(target):
    instructions = [step for stage in line_of(target) for step in stage.steps]
    told = dict(instructions)  # the last one counts
    assert instructions[-1] == ("USER", "10001:10001")
    assert told["VOLUME"] == "/cache"
    assert told["ENTRYPOINT"] == '["python", "-m", "service"]'  # no shell: signals arrive
    assert told["STOPSIGNAL"] == "SIGTERM"
    assert '["python", "/opt/health.py"]' in told["HEALTHCHECK"]
    variables = " ".join(text for word, text in instructions if word == "ENV")
    for name in ("HOME", "XDG_CACHE_HOME", "ELASTI_CACHE", "HF_HOME", "NUMBA_CACHE_DIR"):
        assert re.search(rf"\b{name}=/cache\b", variables), name


def test_images_are_pinned_and_nothing_is_fetched_past_the_package_index():
    text = (DOCKER / "Dockerfile").read_text("utf-8")
    assert re.search(r"^ARG PYTHON_IMAGE=python:\d+\.\d+\.\d+-slim-\w+$", text, re.MULTILINE)
    assert {stage.base for stage in STAGES.values()} <= set(STAGES) | {"${PYTHON_IMAGE}"}
    for stage in STAGES.values():
        for run in stage.texts("RUN"):
            assert not re.search(r"\b(curl|wget|apt-get|git)\b", run)
            if "pip install" in run:
                assert "PIP_INDEX_URL" in stage.texts("ARG"), stage.name


def test_the_hash_of_each_package_or_its_pin_is_asked_for():
    installs = [run for stage in STAGES.values() for run in stage.texts("RUN") if "pip i" in run]
    assert len(installs) == 6
    assert all(re.search(r"--require-hashes|--constraint|--no-deps", run) for run in installs)


def test_what_the_dockerfile_copies_is_let_in_and_nothing_else():
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    let_in = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source
        for stage in STAGES.values()
        for text in stage.texts("COPY")
        if not text.startswith("--from")
        for source in text.split()[:-1]
    }
    assert "*" in lines
    assert copied == let_in
    assert all((ROOT / source).exists() for source in copied)


def test_hadolint_finds_nothing():
    command = [HADOLINT, "--config", "docker/hadolint.yaml", "docker/Dockerfile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_yamllint_finds_nothing():
    command = [sys.executable, "-m", "yamllint", "--strict", "docker", "deploy", ".yamllint.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


# The health check.


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_says_what_health_says(status, code):
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        done = health(server.server_port)
        thread.join()
    assert (done.returncode, done.stdout) == (code, f"/health answered {status}\n")


def test_the_health_check_fails_where_nobody_answers():
    done = health(free_port())
    assert done.returncode == 1
    assert "no answer on port" in done.stderr


def health(port: int) -> subprocess.CompletedProcess[str]:
    proxy = {"HTTP_PROXY": "http://127.0.0.1:1", "http_proxy": "http://127.0.0.1:1"}
    return subprocess.run(
        [sys.executable, HEALTH],
        env={**os.environ, **proxy, "ELASTI_PORT": str(port)},
        capture_output=True,
        text=True,
        timeout=60,  # starting Python on a busy machine
    )


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


# Compose.


def compose(**variables: str) -> dict[str, Any]:
    """compose.yaml with its variables filled in, as the specification says."""

    def value(found: re.Match[str]) -> str:
        name, how, word = found.groups()
        if variables.get(name):
            return variables[name]
        if how == ":?":
            raise KeyError(f"{name}: {word}")
        return word or ""

    text = VARIABLE.sub(value, (DOCKER / "compose.yaml").read_text("utf-8"))
    held = yaml.safe_load(text)
    assert isinstance(held, dict)
    return held


def test_compose_keeps_to_the_specification_with_every_merge_made():
    held = compose(GRAFANA_ADMIN_PASSWORD="of a test")
    whole = PyCompose.from_yaml(yaml.safe_dump(held))
    assert set(whole.service_names()) == {"server-cpu", "server-gpu", "prometheus", "grafana"}


def test_compose_is_refused_by_the_specification_when_a_field_is_wrong():
    held = compose(GRAFANA_ADMIN_PASSWORD="of a test")
    held["services"]["grafana"]["read_olny"] = True
    with pytest.raises(ValueError, match="read_olny"):
        PyCompose.from_yaml(yaml.safe_dump(held))


def test_grafana_has_no_password_until_somebody_sets_one():
    with pytest.raises(KeyError, match="GRAFANA_ADMIN_PASSWORD"):
        compose()


def services() -> dict[str, dict[str, Any]]:
    return dict(compose(GRAFANA_ADMIN_PASSWORD="of a test")["services"])


@pytest.mark.parametrize("name", services())
def test_a_service_is_read_only_without_rights_and_on_the_loopback_address(name):
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert re.search(r":v?\d+\.\d+\.\d+", service["image"])


@pytest.mark.parametrize(
    ("name", "profile", "target"), [("server-cpu", "cpu", "cpu"), ("server-gpu", "gpu", "cuda")]
)
def test_each_profile_builds_its_target_and_answers_to_the_scraped_name(name, profile, target):
    service = services()[name]
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text("utf-8"))
    (job,) = [job for job in scraped["scrape_configs"] if job["job_name"] == "elastiformer"]
    assert job["static_configs"][0]["targets"] == ["elastiformer:8000"]
    assert service["networks"]["default"]["aliases"] == ["elastiformer"]
    assert service["profiles"] == [profile]
    assert service["build"]["target"] == target in STAGES
    assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert ("deploy" in service) == (profile == "gpu")


def test_the_server_is_given_time_to_drain_and_variables_that_exist():
    known = {f"ELASTI_{field.upper()}" for field in Settings.model_fields}
    for name in ("server-cpu", "server-gpu"):
        service = services()[name]
        variables = service["environment"]
        assert {each for each in variables if each.startswith("ELASTI_")} <= known
        grace = int(service["stop_grace_period"].removesuffix("s"))
        assert grace >= float(variables["ELASTI_DRAIN_SECONDS"]) + 10


def test_what_compose_mounts_is_there():
    for service in services().values():
        for mount in service.get("volumes", ()):
            source = mount.partition(":")[0]
            if source.startswith(".") and source != "../deploy/grafana":  # generated
                assert (DOCKER / source).exists(), source


def test_grafana_is_provisioned_with_the_prometheus_beside_it():
    held = services()
    (source,) = provisioned("datasources")["datasources"]
    host, port = re.fullmatch(r"http://([\w-]+):(\d+)", source["url"]).groups()
    assert source["type"] == "prometheus" and source["isDefault"]
    assert f"127.0.0.1:{port}:{port}" in held[host]["ports"]
    (provider,) = provisioned("dashboards")["providers"]
    mounted = {mount.split(":")[1] for mount in held["grafana"]["volumes"]}
    assert provider["options"]["path"] in mounted
    assert "/etc/grafana/provisioning" in mounted


def provisioned(kind: str) -> dict[str, Any]:
    (path,) = (DOCKER / "provisioning" / kind).iterdir()
    held = yaml.safe_load(path.read_text("utf-8"))
    assert held["apiVersion"] == 1
    return dict(held)


# The steps themselves.


@pytest.mark.skipif(
    "ELASTI_TEST_IMAGE" not in os.environ, reason="ELASTI_TEST_IMAGE is not set: takes minutes"
)
def test_the_steps_of_the_cpu_image_make_a_server_from_a_bare_folder(tmp_path):
    for stage in ("build", "app", "packages-cpu"):
        for each in STAGES[stage].steps:
            run_step(each, STAGES[stage], tmp_path)
    with served(tmp_path) as address:
        body = {"prompt": "The sky is", "max_tokens": 8, "capacity": 0.8, "model": "smollm2"}
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=120).json()
        assert answer["usage"]["completion_tokens"] == 8
        assert health(int(address.rpartition(":")[2])).returncode == 0


def run_step(step: tuple[str, str], stage: Stage, root: Path) -> None:
    """A step with /opt, /src and /cache below `root`; a stage's own variables are its only ones."""
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
        kept = ("PIP_", "TORCH_INDEX_URL", "HOME")
        asked = {name: value for name, value in os.environ.items() if name.startswith(kept)}
        variables = {"PATH": f"{root}/opt/elasti/bin:{Path(sys.executable).parent}:/usr/bin:/bin"}
        for assigned in stage.texts("ARG"):
            name, _, default = assigned.partition("=")
            if default:
                variables[name] = default
        script = re.sub(r"(?<![\w}])/opt/", f"{root}/opt/", text)
        subprocess.run(
            ["/bin/sh", "-ec", script], cwd=src, env=variables | asked, check=True, timeout=1800
        )
    else:
        assert word in ("ARG", "ENV", "WORKDIR"), word


def runtime_variables(root: Path) -> Mapping[str, str]:
    (text,) = STAGES["runtime"].texts("ENV")
    pairs = (each.partition("=") for each in text.split())
    variables = {name: re.sub(r"(^|:)/(opt|cache)", rf"\1{root}/\2", v) for name, _, v in pairs}
    path = variables.pop("PATH")
    return variables | {"PATH": path.replace("$PATH", "/usr/bin:/bin"), "ELASTI_HOST": "127.0.0.1"}


class served:
    """The image's entry point under the image's variables, until the block is left."""

    def __init__(self, root: Path) -> None:
        self._port = free_port()
        (root / "cache").mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            ["python", "-m", "service"],
            executable=root / "opt/elasti/bin/python",
            cwd=root / "cache",
            env={**runtime_variables(root), "ELASTI_PORT": str(self._port)},
        )

    def __enter__(self) -> str:
        address = f"http://127.0.0.1:{self._port}"
        for _ in range(300):
            assert self._process.poll() is None, "the server did not start"
            try:
                httpx.get(f"{address}/ready").raise_for_status()
                return address
            except httpx.HTTPError:
                time.sleep(1)
        raise AssertionError("the server is not ready after five minutes")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        assert self._process.wait(timeout=60) == 0
