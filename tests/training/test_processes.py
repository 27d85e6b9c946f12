"""Commands that several processes cannot share say so, before anything is loaded."""

import importlib

import pytest

from training.__main__ import COMMANDS, SHARED, main

ALONE = [command for command in COMMANDS if command not in SHARED]


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch):
    def load(name):
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr(importlib, "import_module", load)


@pytest.mark.parametrize("command", ALONE)
def test_a_command_for_one_process_refuses_several(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command, "--base", "a"]) == 1
    told = capsys.readouterr()
    assert told.err.startswith(f"error: {command}: runs in 1 process, and WORLD_SIZE says 2")
    assert "distill" in told.err and not told.out


@pytest.mark.parametrize("size", ["0", "-1", "two", ""])
@pytest.mark.parametrize("command", ["distill", "calibrate"])
def test_a_number_of_processes_that_is_none_is_refused(command, size, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", size)
    assert main([command]) == 1
    assert f"WORLD_SIZE: a whole number of processes, at least 1; got {size!r}" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(("command", "size"), [("distill", "2"), ("calibrate", "1")])
def test_what_can_be_shared_and_what_is_alone_goes_on(command, size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(AssertionError, match=rf"training\.{command} was loaded"):
        main([command])
