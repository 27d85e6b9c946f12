"""Ctrl-C ends every command with a line that says how to go on, and nothing half-written."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from elastiformer import ElasticModel
from tests.training.test_calibrate import calibrate, folders
from tests.training.test_seeds import command as seeds_command
from training import distill
from training.__main__ import COMMANDS, STOPPED, main
from training.sensitivity import Notebook
from training.signals import Stop

__all__ = ["folders", "seeds_command"]  # fixtures
ROOT = Path(__file__).parents[2]
ANEW = {"repair", "ranks", "evaluate", "reconstruct", "summarize", "goals"}
RESUME = {"build", "distill"}


def interrupted(args):
    signal.raise_signal(signal.SIGINT)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_becomes_of_it(command, monkeypatch, capsys):
    stub = SimpleNamespace(__doc__="", add_arguments=lambda parser: None, run=interrupted)
    monkeypatch.setattr(importlib, "import_module", lambda name: stub)
    assert main([command]) == STOPPED == 130
    said = capsys.readouterr()
    assert not said.out
    (line,) = said.err.splitlines()
    assert line.startswith(f"{command}: stopped; ")
    assert ("begins anew" in line) == (command in ANEW)
    assert ("--resume" in line) == (command in RESUME)


# `python -m training`, interrupted when it begins to load torch.
LOADING = """
import runpy, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
runpy.run_module("training", run_name="__main__", alter_sys=True)
"""


def test_ctrl_c_while_the_library_loads_is_no_traceback():
    ended = subprocess.run(
        [sys.executable, "-c", LOADING, "evaluate"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == STOPPED
    assert ended.stderr.splitlines() == [
        "evaluate: stopped; nothing of it is kept, so the same command begins anew"
    ]


def test_a_calibration_keeps_its_answers_and_leaves_the_adapter_as_it_was(
    folders, monkeypatch, capsys
):
    _, adapter, _ = folders
    before = contents(adapter)
    note = Notebook.note

    def interrupted_third(notebook, *answer):
        note(notebook, *answer)
        if len(notebook.answers) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Notebook, "note", interrupted_third)
    assert main(calibrate(folders)) == STOPPED
    monkeypatch.undo()

    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "calibrate: stopped; the same command goes on where it was"
    assert "Traceback" not in said.err and not said.out
    notes = adapter / "sensitivity.jsonl"
    asked = notes.read_text()
    assert len(asked.splitlines()) == 3
    assert contents(adapter) == before | {notes: asked.encode()}

    assert main(calibrate(folders, "--probes", "4")) == 0
    assert notes.read_text().startswith(asked)
    assert ElasticModel.load(str(folders[0]), str(adapter)).calibration is not None


def test_a_first_signal_is_answered_at_once_and_a_second_ends_it(capfd):
    with pytest.raises(KeyboardInterrupt), Stop("row") as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        assert "stopping after this row; Ctrl-C again stops at once\n" in capfd.readouterr().err
        signal.raise_signal(signal.SIGINT)
    with Stop(None) as stop:  # of a process that speaks to nobody
        signal.raise_signal(signal.SIGTERM)
    assert stop.asked and not capfd.readouterr().err


def test_seeds_stop_where_a_training_in_them_stops(seeds_command, monkeypatch, capsys, tmp_path):
    train = distill.run

    def stopped(args):
        monkeypatch.setattr(distill.Stop, "__enter__", told)
        return train(args)

    def told(stop):
        stop.asked = True
        return stop

    monkeypatch.setattr(distill, "run", stopped)
    one = [*seeds_command, "--seeds", "0"]
    assert main(one) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == {"finished": False, "work": str(tmp_path / "work")}
    assert not (tmp_path / "out").exists()

    monkeypatch.undo()
    assert main(one) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["finished"] is True
