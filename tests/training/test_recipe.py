"""The study of the paper's recipe: its rows, its resumption, and what it says of them."""

from __future__ import annotations

import argparse
import json
import signal

import pytest

from elastiformer import Unit
from tests.training.test_calibrate import prose
from training import signals
from training.__main__ import main
from training.recipe import ALONE, CHOICES, ROWS, Study, rows
from training.recipe_report import Choice, Point, Recipe, Row, ratio, sentences


@pytest.fixture
def recipe(tmp_path, tiny_folder, capsys):
    for name, seed in (("train.jsonl", 0), ("held-out.jsonl", 1)):
        (tmp_path / name).write_text(prose(seed=seed))

    def run(*options):
        command = ["recipe", "--base", str(tiny_folder), "--data", str(tmp_path / "train.jsonl")]
        command += ["--held-out", str(tmp_path / "held-out.jsonl"), "--experts", "7"]
        command += ["--out", str(tmp_path / "report"), "--batch-tokens", "64", "--window", "32"]
        command += ["--shares", "1.0,0.7,0.5", "--choice-shares", "0.5", "--windows", "2"]
        code = main([*command, "--held-out-window", "48", *options])
        printed = capsys.readouterr()
        return json.loads(printed.out.splitlines()[-1]) if code == 0 else printed.err

    return run


def test_rows_are_trained_measured_and_not_trained_again(recipe, tmp_path):
    names = "attention_tokens,attention_tokens-untrained,token-gate-sigmoid,experts+lora,channels"
    said = recipe("--rows", names, "--steps", "2")
    assert said["finished"] and said["rows"] == 5
    assert set(said["missing"]) == set(ROWS) - set(names.split(","))
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    found = {row["name"]: row for row in report["rows"]}
    for name, row in found.items():
        points = {point["share"]: point for point in row["points"]}
        if name == "token-gate-sigmoid":
            assert set(points) == {0.5}
        else:
            assert set(points) == {1.0, 0.7, 0.5}
            assert points[1.0]["kl"] == pytest.approx(0, abs=1e-6)
            assert points[1.0]["spent"] == 1.0
        assert points[0.5]["kl"] > 0 and points[0.5]["spent"] < 1
    assert found["channels"]["training"] is None
    training = found["experts+lora"]["training"]
    assert training["steps"] == 2 and training["tokens"] == 128
    assert training["parameters"] > 3 * 7 * 24  # routers, and LoRA beside them
    text = (tmp_path / "report" / "report.md").read_text()
    assert "recipe --base tiny-llama --data train.jsonl --held-out held-out.jsonl --out" in text
    assert "--steps 2 --batch-tokens 64" in text and str(tmp_path) not in text
    assert "| token gate | `attention_tokens` | sigmoid |" in text
    assert (tmp_path / "report" / "recipe.png").stat().st_size > 10_000

    folder = tmp_path / "report.run"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("adapter.json")}
    (folder / "token-gate-sigmoid.json").unlink()  # stopped between training and measuring
    again = recipe("--rows", "token-gate-sigmoid", "--steps", "2")
    assert again["rows"] == 5
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("adapter.json")} == before
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == report
    assert "holds a run with another steps" in recipe("--rows", "channels", "--steps", "3")


def test_whoever_stops_a_run_is_told_at_once_what_it_still_does(recipe, tmp_path, monkeypatch):
    measure, told = Study._measure, []

    def stopped(study, row):
        signal.raise_signal(signal.SIGINT)
        assert told == [
            "stopping after this row, or this step of its training; Ctrl-C again stops at once"
        ]
        return measure(study, row)

    monkeypatch.setattr(signals, "tell", told.append)
    monkeypatch.setattr(Study, "_measure", stopped)
    assert recipe("--rows", "channels,heads", "--steps", "2")["finished"] is False
    monkeypatch.undo()
    rows_done = {path.stem for path in (tmp_path / "report.run").glob("*.json")} - {"options"}
    assert rows_done == {"channels"}
    assert recipe("--rows", "channels,heads", "--steps", "2")["finished"]


def test_a_wrong_row_is_refused_with_those_there_are():
    assert rows("heads, heads,experts+lora") == ["heads", "experts+lora"]
    with pytest.raises(argparse.ArgumentTypeError, match="unknown row feet; known: attention_tok"):
        rows("heads,feet")


def test_choices_are_compared_at_the_shares_of_the_study(recipe):
    assert "--choice-shares: 0.6 is not among --shares" in recipe("--choice-shares", "0.6")


def test_every_choice_stands_beside_a_row_of_its_unit():
    names = [choice.row(form) for choice in CHOICES for form in choice.others]
    assert len(set(names)) == len(names) and not set(names) & set(ALONE)
    assert all(choice.reference in ALONE for choice in CHOICES)


def test_a_choice_is_judged_where_all_its_forms_were_measured():
    def row(name, *kls):
        points = (Point(1 - n / 10, 0.9, kl, kl, 1.0, 1.0) for n, kl in enumerate(kls))
        return Row(name, Unit.HEADS, points=tuple(points))

    reference, other = row("heads", 0.0, 0.1, 0.4, 7.0), row("gate-soft", 0.0, 0.2, 0.2)
    assert ratio(other, reference) == pytest.approx(1.0)  # twice, and half
    assert ratio(row("", 0.0, 0.05), reference) == pytest.approx(0.5)
    assert ratio(row("", 0.0), reference) is None
    choice = Choice("gate", "heads", "hard", {"soft": {}, "softer": {}})
    found = Recipe({}, [reference, other, row("gate-softer", 0.0, 0.05)], [choice])
    (said,) = sentences(found)
    assert said == "Gate (`heads`): softer loses least: hard 1.00, soft 1.00, softer 0.50."
    alone = [row("heads-untrained", 0, 0.4), row("heads", 0, 0.2), row("heads+lora", 0, 0.1)]
    (said,) = sentences(Recipe({}, alone, [choice]))
    assert said.endswith("0.50 times what untrained ones lose, with rank-1 LoRA 0.25 times.")
