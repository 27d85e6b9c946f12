"""Promises of the settings: every one by flag and by variable, and a mistake is told by name."""

import json
import re
import socket
from pathlib import Path

import pytest

from elastiformer import Capacity
from service.__main__ import flag, listen, main, parser
from service.hosts import Hosts
from service.settings import ModelSpec, Settings, read_keys

GIVEN = {
    "host": ("::1", "::1"),
    "port": ("8123", 8123),
    "models": ("a=x,adapter=d", (ModelSpec("a", "x", "d"),)),
    "dtype": ("bfloat16", "bfloat16"),
    "device": ("cpu", "cpu"),
    "threads": ("3", 3),
    "default_capacity": ("0.7", Capacity(0.7, 0.7)),
    "effort": ('{"low": 0.5}', {"low": Capacity(0.5, 0.5)}),
    "capacity_ceiling": ("0.9", 0.9),
    "load_limits": ("unnamed", "unnamed"),
    "load_patience_seconds": ("0.5", 0.5),
    "load_floor": ("0.7", 0.7),
    "image_hosts": ("a.example, 10.0.0.0/8", Hosts.parse("10.0.0.0/8,A.example")),
    "cors_origins": ("https://a.example, *", ("https://a.example", "*")),
    "max_waiting": ("5", 5),
    "max_decode_delay_seconds": ("0.1", 0.1),
    "prefix_cache": ("false", False),
    "request_timeout_seconds": ("1.5", 1.5),
    "drain_seconds": ("0", 0.0),
    "log_level": ("debug", "debug"),
}


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_described_and_has_a_flag(name):
    assert Settings.model_fields[name].description
    assert flag(name) in parser().format_help()
    assert f"[ELASTI_{name.upper()}]" in " ".join(parser().format_help().split())


@pytest.mark.parametrize("name", GIVEN)
def test_a_setting_comes_by_variable_and_by_flag_and_the_flag_wins(name, monkeypatch):
    text, value = GIVEN[name]
    monkeypatch.setenv(f"ELASTI_{name.upper()}", text)
    assert getattr(Settings(), name) == value
    monkeypatch.setenv(f"ELASTI_{name.upper()}", "nonsense")
    given = vars(parser().parse_args([flag(name), text]))[name]
    assert getattr(Settings(**{name: given}), name) == value


def test_several_models_come_in_one_variable_or_many_flags(monkeypatch):
    expected = (ModelSpec("a", "./x"), ModelSpec("b", "org/y", "./z", "classify"))
    monkeypatch.setenv("ELASTI_MODELS", "a=./x; b=org/y,adapter=./z,task=classify;")
    assert Settings().models == expected
    monkeypatch.delenv("ELASTI_MODELS")
    flags = ["--model", "a=./x", "--model", "b=org/y,task=classify,adapter=./z"]
    assert Settings(models=vars(parser().parse_args(flags))["models"]).served == expected


def test_without_models_the_embedded_ones_are_served_each_with_its_adapter():
    served = Settings().served
    assert [(spec.name, spec.base) for spec in served] == [
        ("smollm2", "smollm2-135m-instruct"),
        ("sentiment", "sentiment"),
        ("fashion-mnist", "fashion-mnist"),
        ("fashion-vlm", "fashion-vlm"),
    ]
    assert all((Path(spec.adapter) / "calibration.json").is_file() for spec in served)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--port", "70000"], "--port: .*65535"),
        (["--dtype", "int8"], "--dtype: .*bfloat16"),
        (["--model", "smollm2"], "--model: .*NAME=BASE"),
        (["--model", "a=b,task=sing"], "--model: .*generate, classify.*sing"),
        (["--model", "a=b,colour=red"], "--model: .*colour=red"),
        (["--model", "a@0.5=b"], "--model: .*'@'"),
        (["--model", "a=b", "--model", "a=c"], "--model: two models share a name: a"),
        (["--default-capacity", "1.5"], "--default-capacity: default_capacity: .*1.5"),
        (["--effort", '{"low": 0}'], "--effort: effort.low: "),
        (["--effort", "[]"], "--effort: an object"),
        (["--max-decode-delay-seconds", "0"], "--max-decode-delay-seconds: .*greater than 0"),
        (["--prefix-cache", "perhaps"], "--prefix-cache: .*boolean"),
        (["--image-hosts", "a.example:80"], "--image-hosts: a host is a name.*'a.example:80'"),
        (["--capacity-ceiling", "nan"], "--capacity-ceiling: .*finite"),
        (["--keys-file", "/nowhere.json"], "keys_file /nowhere.json: .*No such file"),
        (["--host", "203.0.113.7"], "cannot listen on 203.0.113.7 port 8000"),
    ],
)
def test_a_mistake_is_told_by_its_flag_before_anything_is_loaded(flags, says, capsys):
    assert main(flags) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert re.search(says, err), err


def test_small_answers_are_not_held_back():
    with listen(Settings(port=0)) as place:
        assert place.proto == socket.IPPROTO_TCP  # what asyncio looks at for TCP_NODELAY


def test_a_key_file_names_everything_that_is_wrong(tmp_path):
    path = tmp_path / "keys.json"
    good = {"key": "a", "name": "full"}
    path.write_text(json.dumps([good, {"key": "b", "name": "low", "capacity": 0.6, "ceiling": 1}]))
    full, low = read_keys(path)
    assert full.capacity is None and full.ceiling == 1.0
    assert low.capacity == Capacity(0.6, 0.6)
    assert "'a'" not in repr(full)  # a secret does not end in a log

    floors = [good | {"ceiling": 0.6, "floor": floor} for floor in (0.5, 0.7)]
    path.write_text(json.dumps(floors))
    with pytest.raises(ValueError, match=r"entry 1: floor: at most the ceiling, 0\.6; got 0\.7"):
        read_keys(path)
    path.write_text(json.dumps(floors[:1]))
    assert read_keys(path)[0].floor == 0.5 and full.floor is None

    path.write_text(json.dumps([good, good, {"key": 5}, 7, good | {"ceiling": 2}, good | {"x": 1}]))
    with pytest.raises(ValueError) as caught:
        read_keys(path)
    for said in ("entry 2: name", "entry 3: an object", "entry 4: ceiling", "entry 5: unknown: x"):
        assert said.split(": ")[0] in str(caught.value)
    assert "share a key" in str(caught.value)
    for text in ("", "{}", "[]", "[1"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"keys\.json"):
            read_keys(path)
