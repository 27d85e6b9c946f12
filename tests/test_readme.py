"""README names what exists, and all of it: settings, metrics, routes, commands, files."""

from __future__ import annotations

import ast
import importlib
import json
import re

import pytest

from benchmarks.__main__ import COMMANDS as BENCHMARKS
from elastiformer.encoder_families import ENCODERS
from elastiformer.families import FAMILIES
from service.metrics import Metrics
from service.routes import router
from service.schemas import ChatRequest, ClassifyRequest, EmbeddingRequest, PredictRequest
from service.settings import Settings
from tests.documents import ROOT, blocks, is_ours, lines, settings_rows, targets, words_of
from training.__main__ import COMMANDS

README = (ROOT / "README.md").read_text("utf-8")


# Settings, metrics and routes.


@pytest.mark.parametrize("row", settings_rows())
def test_every_setting_is_documented_with_its_flag_and_default(row):
    assert row in README


def test_every_variable_in_the_readme_is_a_setting():
    settings = {f"ELASTI_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"\bELASTI_[A-Z_]+", README)) == settings | {"ELASTI_CACHE"}


def test_the_metrics_in_the_readme_are_the_metrics():
    page = Metrics().page().decode()
    exported = set(re.findall(r"^# TYPE (elasti_\w+) ", page, flags=re.MULTILINE))
    assert set(re.findall(r"\belasti_[a-z0-9_]+", README)) == exported


def test_the_routes_in_the_readme_are_the_routes():
    documented = set(re.findall(r"`(GET|POST) (/\S*)`", README))
    served = {
        (method, route.path)
        for route in router.routes
        for method in route.methods & {"GET", "POST"}
    }
    assert documented == served | {("GET", "/docs")}


def test_the_families_in_the_readme_are_the_families():
    sentence = README.partition("of the families ")[2].partition(", as a folder")[0]
    named = re.split(r",\s|\sand\s", sentence.replace(" (text)", ""))
    known = {re.sub(r"(ForCausalLM|LMHeadModel)$", "", family).lower() for family in FAMILIES}
    assert {name.lower().replace("-", "") for name in named} == known


def test_the_encoders_in_the_readme_are_the_encoders():
    sentence = README.partition("of the encoders ")[2].partition(", as a folder")[0]
    plain = re.sub(r" \([^)]*\)", "", " ".join(sentence.split()))
    named = re.split(r", | and ", plain)
    known = {re.sub(r"(Vision)?Model$", "", name).lower() for name in ENCODERS}
    assert {name.lower().replace("-", "") for name in named} == known


# Commands.


def commands() -> list[str]:
    shown = [line.partition("#")[0].strip() for line in lines(README, "bash")]
    inline = re.findall(r"`((?:[A-Z_]+=\S+ )?(?:make|python -m|torchrun) [^`]*)`", README)
    return sorted({line for line in [*shown, *inline] if line})


@pytest.mark.parametrize("command", commands())
def test_a_command_in_the_readme_exists(command):
    words = words_of(command)
    if words[:3] == ["python", "-m", "training.corpora"]:
        corpora = importlib.import_module("training.corpora")
        assert words[3] in corpora.WRITERS and words[4] == "--out"
    elif not is_ours(words) and not is_a_request(words):
        assert words[0] in ("source", "torchrun"), command


def test_every_command_is_in_the_readme():
    shown = commands()
    for target in targets():
        assert f"make {target}" in shown, target
    for command in COMMANDS:
        assert any(line.startswith(f"python -m training {command} ") for line in shown), command
    for command in BENCHMARKS:
        assert any(line.startswith(f"python -m benchmarks {command}") for line in shown), command
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "exec make test"


def test_the_first_example_is_valid_python_in_five_lines_and_the_others_hardly_longer():
    first, *others = (ast.parse(example).body for example in blocks(README, "python"))
    assert len(first) == 5
    assert all(len(example) <= 7 for example in others)


REQUESTS = {
    "/v1/chat/completions": ChatRequest,
    "/v1/classify": ClassifyRequest,
    "/predict": PredictRequest,
    "/v1/embeddings": EmbeddingRequest,
}


def is_a_request(words: list[str]) -> bool:
    """Whether a command asks the server for something that its schemas take."""
    if words[0] != "curl":
        return False
    (address,) = [word for word in words if word.startswith("127.0.0.1:8000")]
    body = json.loads(words[words.index("-d") + 1])
    REQUESTS[address.removeprefix("127.0.0.1:8000")].model_validate(body)
    return True


# Files.


def test_the_map_names_every_file_and_no_other():
    (house,) = blocks(README, "text")
    room, named = "", set()
    for line in house.splitlines():
        first = line.split()[0]
        if line.startswith(" "):
            named.add(room + first)
        else:
            room = first
            assert (ROOT / room).is_dir()
    there = {
        str(path.relative_to(ROOT))
        for package in ("elastiformer", "service", "training")
        for path in (ROOT / package).glob("*.py")
        if not path.name.startswith("__")
    }
    assert named == there


FILES = sorted(set(re.findall(r"`([\w./]+\.(?:py|txt|sh|toml))`", README)))


@pytest.mark.parametrize("name", FILES)
def test_a_file_named_in_the_readme_is_there(name):
    assert (ROOT / name).is_file()


def test_every_package_asked_for_is_pinned_to_one_release():
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    constraints = (ROOT / "constraints.txt").read_text("utf-8")
    wanted = dict(re.findall(r'^    "([\w-]+)==([^";]+)[^"]*",$', project, flags=re.MULTILINE))
    pinned = {
        name.lower().replace("_", "-"): release
        for name, release in re.findall(r"^([\w-]+)==(\S+)$", constraints, flags=re.MULTILINE)
    }
    assert len(wanted) > 20
    assert {name: pinned.get(name) for name in wanted} == wanted
