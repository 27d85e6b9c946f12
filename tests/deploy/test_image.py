"""Promises of docker/: linted, whole, without secrets. Its steps run in test_image_steps.py,
and an engine in test_image_built.py."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from service.settings import Settings
from tests.deploy.dockerfile import DOCKER, ROOT, STAGES, line_of, variables_of

HEALTH = DOCKER / "health.py"
HADOLINT = Path(sys.executable).with_name("hadolint")
VARIABLE = re.compile(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}")


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


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_variables_of_a_target_are_settings_and_name_its_build(target):
    known = {f"ELASTI_{name.upper()}" for name in Settings.model_fields} | {"ELASTI_CACHE"}
    variables = variables_of(target, {"ELASTI_BUILD": "0123abc"})
    assert {name for name in variables if name.startswith("ELASTI_")} <= known
    assert variables["ELASTI_BUILD"] == "0123abc"
    assert variables_of(target)["ELASTI_BUILD"] == ""


def test_a_build_that_nobody_named_has_no_name(monkeypatch):
    monkeypatch.setenv("ELASTI_BUILD", variables_of("cpu")["ELASTI_BUILD"])
    assert Settings().build is None


def test_the_cpu_image_finds_openmp_where_its_packages_put_it():
    (link,) = [run for run in STAGES["packages-cpu"].texts("RUN") if "libgomp.so.1.0.0" in run]
    assert link.endswith(f" {variables_of('cpu')['LD_LIBRARY_PATH']}/libgomp.so.1.0.0")


def test_images_have_traces_and_the_cuda_image_reads_the_energy_of_gpus():
    extras = {name: STAGES[f"packages-{name}"].arguments()["EXTRAS"] for name in ("cpu", "cuda")}
    assert extras == {"cpu": "tracing", "cuda": "tracing,energy"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for name, value in extras.items():
        (step,) = [run for run in STAGES[f"packages-{name}"].texts("RUN") if "needed.py" in run]
        assert step == 'python needed.py "service,${EXTRAS}" > needed.txt'
        wanted = ["service", *value.split(",")]
        assert needed(f"service,{value}").stdout.splitlines() == [
            *project["dependencies"],
            *(each for extra in wanted for each in project["optional-dependencies"][extra]),
        ]


def test_an_image_with_no_extras_is_the_server_alone():
    assert needed("service,").stdout == needed("service").stdout != needed("").stdout != ""


def test_an_extra_that_there_is_not_ends_the_build_by_name():
    done = needed("service,tracng,energy")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no extra is called tracng; there are service, tracing, energy, ray" in done.stderr


def needed(extras: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, DOCKER / "needed.py", extras]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_what_cuda_needs_is_pinned_once():
    pins = [(ROOT / name).read_text("utf-8") for name in ("constraints.txt", "docker/cuda.txt")]
    names = [re.findall(r"^([\w-]+)==\S+$", text, flags=re.MULTILINE) for text in pins]
    assert "triton" in names[0] and {"nvidia-cublas", "cuda-bindings"} <= set(names[1])
    assert not set(names[0]) & set(names[1])
    for run in STAGES["packages-cuda"].texts("RUN"):
        assert "pip install" not in run or "--constraint cuda.txt" in run


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
        assert "ELASTI_BUILD" not in variables  # the image's own
        assert {each for each in variables if each.startswith("ELASTI_")} <= known
        grace = int(service["stop_grace_period"].removesuffix("s"))
        assert grace >= float(variables["ELASTI_DRAIN_SECONDS"]) + 10


@pytest.mark.parametrize("name", ["server-cpu", "server-gpu"])
def test_arguments_of_the_shell_reach_the_build_and_others_stay_as_they_are(name):
    build = services()[name]["build"]
    declared = {
        argument
        for stage in (build["target"], f"packages-{build['target']}")
        for each in line_of(stage)
        for argument in each.arguments()
    }
    asked = set(build["args"])
    assert {"ELASTI_BUILD", "EXTRAS", "PIP_INDEX_URL"} <= asked
    assert asked - declared <= {"TORCH_INDEX_URL"}  # of CPUs alone
    assert not any("=" in each for each in build["args"])  # a name alone takes the shell's value


def test_what_compose_mounts_is_there():
    mounts = [mount for service in services().values() for mount in service.get("volumes", ())]
    sources = {mount.partition(":")[0] for mount in mounts if mount.startswith(".")}
    assert "../deploy/grafana" in sources
    missing = {source for source in sources if not (DOCKER / source).exists()}
    assert not missing
    assert list((DOCKER / "../deploy/grafana").glob("*.json"))


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
