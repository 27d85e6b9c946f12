"""A run may begin with an adapter: with its weights and its shape, along the path it was given."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from elastiformer import Calibration, ElasticModel, Phase, SavedAdapter, Step, Unit
from elastiformer.encoder import ElasticEncoder
from tests.tiny_encoders import WORDS, save_tiny_encoder, tiny_encoder
from training.__main__ import main

LAYERS = 3
PATH = tuple(
    Step(layer, name, 0.0)
    for layer in range(LAYERS - 1, 0, -1)
    for name in ("mlp_tokens", "attention_tokens")
)
SHAPE = {"lora_rank": 3, "lora_parts": ("key", "value"), "lora_phases": "prompt"}
CALIBRATED = ["--lessons", "calibrated", "--min-capacity", "0.4"]


@pytest.fixture
def base(tmp_path) -> Path:
    return save_tiny_encoder(tmp_path / "base", tiny_encoder("bert"))


@pytest.fixture
def start(base, tmp_path) -> Path:
    """A calibrated adapter whose weights are not those of a blank one."""
    model = ElasticEncoder.load(str(base), dtype="float32")
    adapter = model.blank_adapter([Unit.MLP_TOKENS], **SHAPE)
    with torch.no_grad():
        for weight in adapter.parameters().values():
            weight.add_(0.1)
    assert len(model.shape.layers) == LAYERS
    adapter.calibration = Calibration(0.35, 16, {Phase.PROMPT: PATH, Phase.OUTPUT: ()}, {}, ())
    adapter.training = {"steps": 7}
    return adapter.save(tmp_path / "start")


@pytest.fixture
def distill(base, start, tmp_path, capsys):
    drawn = random.Random(1)
    lines = [{"text": " ".join(drawn.choices(WORDS, k=4 + at % 9))} for at in range(80)]
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))

    def run(*options, base=base, start=start):
        words = ["distill", "--base", base, "--data", data, "--out", tmp_path / "out"]
        words += ["--start", start, "--batch-items", 4, "--dtype", "float32", *options]
        code = main(list(map(str, words)))
        printed = capsys.readouterr()
        return json.loads(printed.out.splitlines()[-1]) if code == 0 else printed.err

    return run


def weights(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    trained = ElasticEncoder.load(str(base), folder, dtype="float32").trainable()
    return {name: weight.detach() for name, weight in trained.items()}


def test_training_goes_on_from_the_weights_and_the_shape_of_an_adapter(
    distill, base, start, tmp_path
):
    report = distill("--steps", 2, "--lr", "1e-6", "--held-out", 0, *CALIBRATED)

    assert report["finished"]
    before, after = weights(base, start), weights(base, tmp_path / "out")
    changes = [float((after[name] - before[name]).abs().max()) for name in before]
    assert before.keys() == after.keys() and 0 < max(changes) < 1e-5
    made = SavedAdapter.load(tmp_path / "out")
    assert made.spec == SavedAdapter.load(start).spec
    assert made.calibration is None  # it was of other weights
    begun = made.training["start"]
    assert begun["training"] == {"steps": 7} and len(begun["identity"]) == 16
    assert made.training["lora_modules"] == "key,value" and made.training["lora_rank"] == 3


def test_what_is_lost_along_the_calibrated_path_falls(distill):
    options = ["--steps", 60, "--batch-items", 12, "--lr", "1e-2", "--held-out", 0.2]

    measured = distill(*options, *CALIBRATED)["held_out_distance"]

    assert measured["after"] < 0.8 * measured["before"]


def test_a_run_goes_on_with_the_adapter_that_it_began_with_alone(distill, start, tmp_path):
    options = ["--steps", 2, "--held-out", 0, *CALIBRATED]
    distill(*options)
    other = shutil.copytree(start, tmp_path / "other")
    assert distill(*options, "--resume", start=other)["finished"]  # it lies elsewhere, no more

    header = json.loads((other / "calibration.json").read_text()) | {"lowest": 0.36}
    (other / "calibration.json").write_text(json.dumps(header))
    told = distill(*options, "--resume", start=other)
    assert "not the run that was stopped" in told and "start: was" in told


def test_what_does_not_fit_is_refused_with_the_reason(distill, start, tmp_path):
    other = save_tiny_encoder(tmp_path / "another", tiny_encoder("distilbert"))
    told = distill("--steps", 2, base=other)
    assert "does not fit" in told and "routers" not in told
    assert "--lora-rank: 3 in the adapter" in distill("--lora-rank", 2)
    assert "--units: " in distill("--units", "heads")
    below = distill("--lessons", "calibrated", "--min-capacity", 0.3)
    assert "0.3 is below the calibrated range 0.35 to 1.0" in below
    assert "there is no such folder" in distill(start=str(tmp_path / "nowhere"))
    (start / "calibration.json").unlink()
    assert "not calibrated; run python" in distill("--lessons", "calibrated")
    assert not (tmp_path / "out").exists()


def test_calibration_goes_along_the_path_that_was_trained(distill, base, start, tmp_path, capsys):
    out = tmp_path / "out"
    distill("--steps", 2, "--held-out", 0, *CALIBRATED)
    command = ["calibrate", "--base", base, "--adapter", out, "--data", tmp_path / "texts.jsonl"]
    command += ["--capacities", "0.8,0.6", "--items", 6, "--check-items", 6, "--dtype", "float32"]

    assert main([*map(str, command), "--keep-paths", str(start)]) == 0

    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["chosen"] == "kept" and report["lowest"] == 0.6
    made = SavedAdapter.load(out).calibration
    assert made.paths == {Phase.PROMPT: PATH, Phase.OUTPUT: ()}
    assert [row.capacity for row in made.measured] == [1.0, 0.8, 0.6]
    (start / "calibration.json").unlink()
    assert main([*map(str, command), "--keep-paths", str(start)]) == 1
    assert "--keep-paths: this adapter is not calibrated" in capsys.readouterr().err


def test_a_causal_model_follows_its_paths_too(tiny_folder, tmp_path, capsys):
    model = ElasticModel.load(str(tiny_folder), dtype="float32")
    adapter = model.blank_adapter([Unit.MLP_TOKENS], lora_rank=1)
    layers = len(model.shape.layers)
    path = tuple(Step(layer, "mlp_tokens", 0.0) for layer in range(layers - 1, 0, -1))
    adapter.calibration = Calibration(0.8, 24, dict.fromkeys(Phase, path), {}, ())
    adapter.save(tmp_path / "start")
    data = tmp_path / "text.txt"
    data.write_text("What is trained is what will be served. " * 40)
    command = ["distill", "--base", str(tiny_folder), "--data", str(data), "--window", "24"]
    command += ["--batch-tokens", "96", "--steps", "2", "--held-out", "0", "--dtype", "float32"]
    needed = ["--out", str(tmp_path / "out"), "--lessons", "calibrated", "--min-capacity", "0.8"]

    assert main([*command, *needed]) == 1
    assert "needs --start" in capsys.readouterr().err
    assert main([*command, *needed, "--start", str(tmp_path / "start")]) == 0
    assert json.loads((tmp_path / "out.run" / "tolerance.json").read_text()) == {}
