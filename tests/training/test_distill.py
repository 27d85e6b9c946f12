"""Distillation: it learns, and no interruption and no number of processes changes what."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from elastiformer import Capacity, Chunk, ElasticModel, Selection, Unit, UnitShares, dense_plan
from training.__main__ import main
from training.checkpoint import latest_checkpoint
from training.lessons import Lesson
from training.losses import Divergence, Weights
from training.student import LEAST_ROW_KL, Objective, Whole, as_taught, student_losses

ROOT = Path(__file__).parents[2]
WINDOW, ROWS = 24, 4
SIZES = ["--window", str(WINDOW), "--batch-tokens", str(WINDOW * ROWS), "--experts", "8"]
SIZES += ["--dtype", "float32"]  # on every processor
QUICK = [*SIZES, "--probe-windows", "0", "--held-out", "0"]
TEXT = (
    "The routers of a model learn which of its parts a token can do without, and the part that "
    "repairs it learns to say what the whole one would have said. "
)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n}. {TEXT}"}) + "\n" for n in range(20)))
    return str(path)


@pytest.fixture
def distill(tiny_folder, data, tmp_path, capsys):
    def run(out, *options):
        command = ["distill", "--base", str(tiny_folder), "--data", data]
        code = main([*command, "--out", str(tmp_path / out), *options])
        printed = capsys.readouterr()
        return json.loads(printed.out.splitlines()[-1]) if code == 0 else printed.err

    return run


def tensors(folder: Path):
    return load_file(folder / "routers.safetensors") | load_file(
        folder / "lora" / "adapter_model.safetensors"
    )


def tensors_of_run(folder: Path):
    return latest_checkpoint(folder).weights


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_the_loss_falls_and_the_adapter_serves(distill, tiny_folder, tmp_path):
    report = distill(
        "a", *SIZES, "--steps", "60", "--lr", "0.02", "--lora-rank", "8", "--held-out", "0.1"
    )

    assert report["finished"]
    assert report["held_out_kl"]["after"] < 0.85 * report["held_out_kl"]["before"]
    assert report["tokens"] == 60 * WINDOW * ROWS

    run = tmp_path / "a.run"
    lines = [json.loads(line) for line in (run / "progress.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert lines[-1]["held_out"] == report["held_out_kl"]["after"]
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").iterdir())

    model = ElasticModel.load(str(tiny_folder), adapter=tmp_path / "a")
    assert model.adapter.training["data_sha256"] == report["data_sha256"]
    half = UnitShares(mlp_tokens=0.5, heads=0.5)
    sequence = model.sequence(Capacity(half, half), 9, 9)
    (logits,) = model.step([Chunk(sequence, list(range(9)))])
    assert logits.isfinite().all()
    assert sequence.usage.unit_skipped(Unit.HEADS) == 9 * 2 * 3  # tokens, of four heads, layers
    assert sequence.usage.unit_skipped(Unit.MLP_TOKENS) > 0


# `python -m training`, killed when a step of this number is in the log.
KILLED = """
import os, runpy, signal, sys
from training.progress import Log

last, step = int(sys.argv.pop(1)), Log.step

def step_of_life(self, number, values):
    step(self, number, values)
    if number == last:
        os.kill(os.getpid(), signal.SIGKILL)

Log.step = step_of_life
runpy.run_module("training", run_name="__main__", alter_sys=True)
"""


def test_a_run_killed_in_the_middle_goes_on_to_the_same_bits(distill, tiny_folder, data, tmp_path):
    options = [*QUICK, "--steps", "12", "--checkpoint-every", "3"]
    distill("whole", *options)

    command = [sys.executable, "-c", KILLED, "5", "distill", "--base", str(tiny_folder)]
    command += ["--data", data, "--out", str(tmp_path / "killed"), *options]
    log = tmp_path / "killed.run" / "progress.jsonl"
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(log.read_text().splitlines()) == 5
    assert latest_checkpoint(tmp_path / "killed.run").step == 3
    assert not (tmp_path / "killed").exists()

    report = distill("killed", *options, "--resume")

    assert report["finished"]
    assert same_bits(tensors(tmp_path / "whole"), tensors(tmp_path / "killed"))
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 13))


def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(distill, tmp_path):
    options = [*QUICK, "--steps", "2000", "--checkpoint-every", "1000", "--lora-rank", "0"]
    log = tmp_path / "a.run" / "progress.jsonl"

    def stop():
        while not (log.exists() and log.read_text().count("\n") >= 2):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    report = distill("a", *options)
    thread.join()

    assert not report["finished"]
    assert latest_checkpoint(tmp_path / "a.run").step == report["step"] >= 2


def test_a_run_is_never_mixed_with_another(distill, tmp_path):
    options = [*QUICK, "--steps", "2"]
    distill("a", *options)

    assert "--resume goes on with it" in distill("a", *options)
    changed = distill("a", *options, "--seed", "5", "--lr", "0.5", "--resume")
    assert "seed: was 0, now 5" in changed
    assert "lr: was 0.001, now 0.5" in changed
    assert distill("a", *options, "--resume")["finished"]  # a finished run has nothing left to do


def test_what_cannot_be_trained_is_refused_with_the_reason(distill, tmp_path):
    assert "a multiple of --window" in distill("a", "--window", "24", "--batch-tokens", "25")
    assert "context of this model" in distill("a", "--window", "600", "--batch-tokens", "600")
    assert "do not divide 56 neurons" in distill("a", *QUICK, "--experts", "5")
    assert "(held out)" in distill("a", "--window", "200", "--batch-tokens", "200")
    above = distill("a", *QUICK, "--min-capacity", "0.8", "--max-capacity", "0.7")
    assert "--max-capacity 0.7: at least --min-capacity, 0.8" in above
    assert "--units: at least one" in distill("a", *QUICK, "--units", "none")
    assert "--image-draws: what routes no image" in distill("a", *QUICK, "--image-draws", "4")
    uniform = [*QUICK, "--lessons", "uniform"]
    assert "--copied: --lessons uniform, which has no" in distill("a", *uniform, "--copied", "0.5")
    assert "at least one; outputs are whole" in distill("a", *uniform, "--output-units", "none")
    nothing = ["--prompt-units", "none", "--output-units", "none", "--lora-rank", "0"]
    assert "prompts' units or repair; name one" in distill("a", *QUICK, *nothing)


@pytest.mark.parametrize(
    ("option", "value", "bound"),
    [
        ("--steps", "0", "at least 1; got 0"),
        ("--steps", "many", "a whole number; got 'many'"),
        ("--lr", "nan", "above 0; got nan"),
        ("--min-capacity", "1", "above 0 and below 1; got 1"),
        ("--units", "heads,tails", "known: attention_tokens, mlp_tokens"),
    ],
)
def test_an_option_outside_its_bounds_is_refused_with_both(distill, capsys, option, value, bound):
    with pytest.raises(SystemExit):
        distill("a", *QUICK, option, value)

    assert bound in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        "--units heads,experts --lora-rank 0 --part-gate renormalised --expert-split contiguous",
        "--units attention_tokens --kv kept --token-gate sigmoid --selection threshold",
        "--units channels,mlp_tokens --kl reverse --top-k 5 --temperature 2 --lora-modules down",
        "--units mlp_tokens --lora-rank 0 --pass-tokens 1",
        "--units mlp_tokens --output-units none --prompt-units none --even-rows --copied 0.5",
    ],
)
def test_every_choice_of_what_and_how_can_be_trained(distill, tmp_path, options):
    report = distill("a", *QUICK, "--steps", "3", *options.split())

    assert report["finished"]
    before = ElasticModel.load(report["base"], adapter=tmp_path / "a.run" / "blank")
    after = ElasticModel.load(report["base"], adapter=tmp_path / "a")
    assert after.adapter.spec == before.adapter.spec
    assert any(
        not torch.equal(weight, before.trainable()[name])
        for name, weight in after.trainable().items()
    )


def test_a_batch_in_several_passes_gives_the_same_gradient(distill, tmp_path):
    distill("one", *QUICK, "--steps", "3")
    distill("four", *QUICK, "--steps", "3", "--pass-tokens", str(WINDOW))

    for name, weight in tensors_of_run(tmp_path / "one.run").items():
        torch.testing.assert_close(
            tensors_of_run(tmp_path / "four.run")[name], weight, rtol=1e-3, atol=2e-5
        )


def test_a_row_counts_by_the_logarithm_of_its_loss_where_rows_are_even(tiny_folder):
    model = ElasticModel.load(str(tiny_folder), dtype="float32")
    model.attach(model.blank_adapter([Unit.CHANNELS], experts=0, lora_rank=4))
    ids_BT = torch.arange(2 * WINDOW).view(2, WINDOW) % 64
    whole, layers = dense_plan(len(model.shape.layers)), len(model.shape.layers)
    leaner = [(replace(whole[0], mlp_out=share),) * layers for share in (0.9, 0.3)]
    lessons = [Lesson(0, whole, plan) for plan in leaner]
    counts = Whole.of(model, lessons, WINDOW)

    def loss(rows: slice, even: bool) -> float:
        form = Objective(Divergence(), Weights(0, 0), Selection.RANK, even_rows=even)
        return float(
            student_losses(model, ids_BT[rows], lessons[rows], form, counts).distil.detach()
        )

    one, other = (2 * loss(slice(row, row + 1), even=False) for row in range(2))
    assert other > 2 * one > 0
    expected = (math.log(one + LEAST_ROW_KL) + math.log(other + LEAST_ROW_KL)) / 2
    assert loss(slice(0, 2), even=True) == pytest.approx(expected, rel=1e-3)


def test_a_row_that_is_copied_repeats_its_prompt():
    ids_BT = torch.arange(12).view(2, 6)
    plan = dense_plan(1)
    lessons = [Lesson(4, plan, plan, copied=True), Lesson(4, plan, plan)]

    assert as_taught(ids_BT, lessons).tolist() == [[0, 1, 2, 3, 0, 1], [6, 7, 8, 9, 10, 11]]


def test_two_processes_learn_what_one_does_also_with_a_sharded_base(
    distill, tiny_folder, data, tmp_path
):
    options = [*QUICK, "--steps", "4", "--lora-phases", "split", "--lora-rank", "2"]
    distill("one", *options)

    # Both ways in one launch: starting Python twice takes longer than the training.
    given = ["--base", str(tiny_folder), "--data", data, *options, "--out"]
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import argparse, json
from training.distill import add_arguments, train
from training.processes import joined

parser = argparse.ArgumentParser()
add_arguments(parser)
with joined() as world:
    for options in (["{tmp_path / "whole"}"], ["{tmp_path / "sharded"}", "--shard-base"]):
        report = train(parser.parse_args([*{given}, *options]), world)
        if report is not None:
            print(json.dumps(report))
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(program)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(each["adapter"]).name for each in reports] == ["whole", "sharded"]

    expected = tensors_of_run(tmp_path / "one.run")
    for name in ("whole", "sharded"):
        weights = tensors_of_run(tmp_path / f"{name}.run")
        for parameter in expected:
            torch.testing.assert_close(
                weights[parameter], expected[parameter], rtol=1e-3, atol=2e-5
            )
