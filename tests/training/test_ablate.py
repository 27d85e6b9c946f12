"""Promises of the ablation: rows as they are served, at equal cost, resumed, judged in pairs."""

from __future__ import annotations

import argparse
import json
import signal
from dataclasses import replace

import pytest
import torch

from elastiformer import ElasticModel, Phase, Unit
from elastiformer.calibration import Calibration, Step
from elastiformer.capacity import dense_plan
from tests.tiny import LAYERS
from tests.training.test_calibrate import prose
from training import ablate, ablation, signals
from training.__main__ import main
from training.ablation_report import Ablation, Point, beyond, sentences
from training.ablation_rows import (
    AS_MANY_FOR_EACH,
    AS_SHIPPED,
    EndingRow,
    LeavingRow,
    OutputRow,
    kept,
    rows_of,
)
from training.allotment import late_layers, without_layers
from training.calibrate import capacities
from training.channel_sizes import channel_quantiles
from training.data import some_windows
from training.losses import Divergence, kl_per_token
from training.repair import OWED

SITES = ("attention_in", "attention_out", "mlp_in", "mlp_out")
CHOSEN = (
    "as-many-for-each,as-shipped,uniform-shares,by-gradient,constant,up-0.9,"
    "ending-as-shipped,ending-0,ending-2,leave-1,leave-1-unrepaired,keep-attention-2"
)


@pytest.fixture
def ablated(tmp_path, tiny_folder, capsys):
    """The command on an adapter as the shipped one: channels of outputs, late layers of prompts."""
    for name, seed in (("train.jsonl", 0), ("test.jsonl", 1)):
        (tmp_path / name).write_text(prose(seed=seed))
    model = ElasticModel.load(str(tiny_folder), dtype="float32")
    adapter = model.blank_adapter(
        [Unit.CHANNELS], lora_rank=3, lora_parts=OWED, lora_phases="prompt"
    )
    for parameter in adapter.lora.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    lower = tuple(
        Step(layer, site, share)
        for share in (0.8, 0.6, 0.4, 0.2)
        for site in SITES
        for layer in (1, 0, 2)
    )
    paths = {Phase.PROMPT: late_layers(LAYERS), Phase.OUTPUT: lower}
    draft = Calibration(0.5, 48, paths, thresholds={}, measured=())
    ids_WT, _ = some_windows(str(tmp_path / "train.jsonl"), model.tokenizer, 4, 60, 0)
    model.attach(adapter)
    adapter.calibration = replace(draft, channel_quantiles=channel_quantiles(model, draft, ids_WT))
    adapter.save(tmp_path / "adapter")

    def run(*options):
        command = ["ablate", "--base", str(tiny_folder), "--adapter", str(tmp_path / "adapter")]
        command += ["--data", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "report")]
        command += ["--held-out", str(tmp_path / "test.jsonl"), "--capacities", "0.6,0.55"]
        command += ["--windows", "3", "--held-out-window", "60", "--learn-windows", "2"]
        code = main([*command, "--learn-window", "48", *options])
        printed = capsys.readouterr()
        return json.loads(printed.out.splitlines()[-1]) if code == 0 else printed.err

    return run


LEAVING = ("--leave-at", "1", "--keep", "attention:2")


def test_rows_lose_what_is_served(ablated, tmp_path, tiny_folder, capsys):
    assert ablated("--rows", CHOSEN, *LEAVING)["rows"] == len(CHOSEN.split(","))
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    rows = {
        row["name"]: {(point["text"], point["capacity"]): point for point in row["points"]}
        for row in report["rows"]
    }
    folder = str(tmp_path / "evaluated")
    command = ["evaluate", "--base", str(tiny_folder), "--adapter", str(tmp_path / "adapter")]
    command += ["--data", str(tmp_path / "test.jsonl"), "--window", "60", "--windows", "3"]
    command += ["--baselines", "none", "--greedy-tokens", "0", "--repeats", "0"]
    command += ["--dtype", "float32"]
    assert main([*command, "--capacities", "0.6,0.55", "--out", folder]) == 0
    served = {
        (row["setting"], row["capacity"]): row
        for row in json.loads((tmp_path / "evaluated" / "report.json").read_text())["ours"]
    }
    for capacity in (0.6, 0.55):
        for name, setting in ((AS_SHIPPED, "scored"), ("ending-as-shipped", "prompt")):
            point, row = rows[name]["prose", capacity], served[setting, capacity]
            assert point["kl"] == pytest.approx(row["kl"], rel=1e-3) and point["kl"] > 1e-4
            assert point["kl_error"] == pytest.approx(row["kl_error"], rel=1e-2)
            assert point["spent"] == pytest.approx(row["spent"], abs=2e-3)
    for name in (AS_SHIPPED, "uniform-shares", "by-gradient", "constant", "up-0.9"):
        for place, point in rows[name].items():
            there = rows[AS_MANY_FOR_EACH][place]
            assert point["kl"] != there["kl"]
            assert point["beyond_reference"] == pytest.approx(point["kl"] - there["kl"])
            # What thresholds take lies within a token or so of what was granted.
            apart = 1 / 60 if name == AS_SHIPPED else ablation.EQUAL
            assert abs(point["spent"] - there["spent"]) <= apart

    model = ElasticModel.load(str(tiny_folder), str(tmp_path / "adapter"), dtype="float32")
    ids_WT, _ = some_windows(str(tmp_path / "test.jsonl"), model.tokenizer, 3, 60, 0)
    output_WT = (torch.arange(60) >= 39).expand(3, 60)
    plans = [(without_layers(1, LAYERS), dense_plan(LAYERS))] * 3
    with torch.inference_mode():
        logits_WTV = model.masked(ids_WT, plans, output_WT).logits_BTV[:, 39:59]
        teacher_WTV = model.teacher(ids_WT)[:, 39:59]
    lost = float(kl_per_token(teacher_WTV, logits_WTV, Divergence()).mean())
    assert rows["leave-1"]["prose", None]["kl"] == pytest.approx(lost, rel=1e-3)
    unrepaired = rows["leave-1-unrepaired"]["prose", None]
    assert unrepaired["kl"] != pytest.approx(lost, rel=0.05)
    assert unrepaired["spent"] < rows["leave-1"]["prose", None]["spent"]
    assert rows["keep-attention-2"]["prose", None]["spent"] > unrepaired["spent"]


def test_a_run_that_was_stopped_goes_on(ablated, tmp_path, monkeypatch):
    run_row = ablation.Study.measured

    def stopped(study, row):
        found = run_row(study, row)
        if row.name == "by-size":
            signal.raise_signal(signal.SIGTERM)
            assert told == ["stopping after this row; Ctrl-C again stops at once"]
        return found

    told = []
    monkeypatch.setattr(signals, "tell", told.append)

    monkeypatch.setattr(ablation.Study, "measured", stopped)
    said = ablated("--rows", "as-many-for-each,by-size,token-before")
    assert said["finished"] is False and not (tmp_path / "report").exists()
    done = {path.stem: path.stat().st_mtime_ns for path in (tmp_path / "report.run").glob("*.json")}
    assert set(done) == {"options", "as-many-for-each", "by-size"}

    monkeypatch.undo()
    said = ablated("--rows", "as-many-for-each,by-size,token-before")
    assert said["finished"] and said["rows"] == 3 and "held-2" in said["missing"]
    for name in ("as-many-for-each", "by-size"):
        assert (tmp_path / "report.run" / f"{name}.json").stat().st_mtime_ns == done[name]
    assert (tmp_path / "report" / "ablation.png").stat().st_size > 10_000
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| whose sizes choose | `token-before` | those of the token before |" in text
    assert "ablate --base tiny-llama --adapter adapter --data train.jsonl" in text
    assert str(tmp_path) not in text
    assert "holds a run with another seed" in ablated("--seed", "1", "--rows", "by-size")


def test_a_row_that_spends_something_else_is_refused(ablated, monkeypatch):
    monkeypatch.setattr(ablation, "EQUAL", -1.0)
    said = ablated("--rows", "as-many-for-each")
    assert "as-many-for-each: spends 0." in said and "leave it out with --rows" in said


def test_a_row_that_reaches_less_than_the_adapter_says_so_in_the_table(
    ablated, tmp_path, tiny_folder
):
    model = ElasticModel.load(str(tiny_folder), str(tmp_path / "adapter"), dtype="float32")
    # Whole layers and what `down` reads: of the latter alone much less can be left out.
    few = tuple(Step(layer, "mlp_out", 0.3) for layer in range(LAYERS))
    paths = dict.fromkeys(Phase, (*few, *late_layers(LAYERS)))
    model.adapter.calibration = replace(model.calibration, paths=paths)
    model.adapter.save(tmp_path / "adapter")
    rows = "as-many-for-each,uniform-shares"
    assert ablated("--rows", rows, "--capacities", "0.9,0.6")["rows"] == 2
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    measured = {row["name"]: [p["capacity"] for p in row["points"]] for row in report["rows"]}
    assert measured == {"as-many-for-each": [0.9, 0.6], "uniform-shares": [0.9]}
    text = (tmp_path / "report" / "report.md").read_text()
    (line,) = [each for each in text.splitlines() if each.startswith("| shares | `uniform-shares`")]
    assert line.endswith(" | out of reach |")


def test_what_cannot_be_measured_is_refused(ablated, tmp_path, tiny_folder):
    assert "--rows: unknown row feet; known: as-many-for-each" in ablated("--rows", "feet")
    assert "--capacities: 0.3 is below 0.5" in ablated("--capacities", "0.7,0.3")
    assert "layers 1 to 2; got 3" in ablated("--leave-at", "3")
    assert "--keep: say with --leave-at" in ablated("--keep", "2")
    assert "a window of 9999: the context" in ablated("--held-out-window", "9999")
    model = ElasticModel.load(str(tiny_folder), dtype="float32")
    adapter = model.blank_adapter([Unit.HEADS], lora_rank=0)
    (tmp_path / "adapter" / "calibration.json").unlink()
    assert "not calibrated" in ablated()
    paths = dict.fromkeys(Phase, (Step(0, "heads", 0.5),))
    adapter.calibration = Calibration(0.5, 48, paths, thresholds={}, measured=())
    adapter.save(tmp_path / "adapter")
    assert "this one's plans keep a share of heads" in ablated()


def test_sub_layers_are_named_by_part_and_layer():
    assert list(kept("2+4-5")) == [
        (layer, name) for layer in (2, 4, 5) for name in ("attention_tokens", "mlp_tokens")
    ]
    assert list(kept("mlp:3")) == [(3, "mlp_tokens")]
    for wrong in ("feet:3", "3,4", "attention:", "5-"):
        with pytest.raises(argparse.ArgumentTypeError, match="layers as in 17"):
            list(kept(wrong))
    parser = argparse.ArgumentParser()
    ablate.add_arguments(parser)
    assert parser.get_default("capacities") == capacities("0.8,0.65,0.5")
    row = rows_of([1], ["attention:2"])["keep-attention-2"]
    assert isinstance(row, LeavingRow) and row.says == "the attention of layer 2"
    plan = row.plan(4)
    assert [(layer.attention_tokens, layer.mlp_tokens) for layer in plan] == [
        *((1, 1), (0, 0), (1, 0), (0, 0)),
    ]


def test_differences_are_judged_window_by_window():
    def point(*kls):
        return Point("prose", 0.5, 0.5, kls)

    reference, better, noisy = point(1.0, 2.0, 3.0), point(0.9, 1.9, 2.89), point(0.1, 2.9, 2.8)
    by, of = beyond(better, reference)
    assert by == pytest.approx(-0.31 / 3) and of == pytest.approx(0.01 / 3)
    assert beyond(point(1.0), point(0.5)) == (0.5, None)
    rows = [
        (OutputRow(AS_MANY_FOR_EACH, "", ""), (reference,)),
        (OutputRow("better", "", ""), (better,)),
        (OutputRow("noisy", "", ""), (noisy,)),
        (OutputRow("worse", "", ""), (point(2.0, 3.0, 4.0),)),
        (EndingRow("ending-3", "", "", 3), (point(1.0, 1.0, 1.0),)),  # without its reference
    ]
    (said,) = sentences(Ablation({}, rows))
    assert said.endswith(
        "0.5: clearly less than `as-many-for-each` lose `better`; rows that lose clearly "
        "more: 1, neither: 1."
    )
