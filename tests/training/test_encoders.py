"""Encoders learn, are calibrated and evaluated by the same commands; what is read, and refused."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from elastiformer import DENSE, Capacity, Phase, SavedAdapter
from elastiformer.encoder import ElasticEncoder
from tests.elastiformer.test_encoders import elastic_encoder, items
from tests.tiny_encoders import (
    IMAGE_FAMILIES,
    LABELS,
    LAYERS,
    PATCH,
    SIDE,
    WORDS,
    save_tiny_encoder,
    tiny_encoder,
    tiny_word_tokenizer,
)
from training.__main__ import main
from training.allotment import TOKEN_FIELDS
from training.encoder_reports import kept_patches
from training.encoder_student import ItemStudent, distances, judged
from training.examples import read_examples
from training.files import DataError

OPTIONS = {
    "distill": ["--steps", "24", "--batch-items", "12", "--lr", "1e-2", "--experts", "7"],
    "calibrate": [
        "--capacities",
        "0.8,0.6",
        "--items",
        "12",
        "--check-items",
        "12",
        "--sweeps",
        "0",
    ],
    "evaluate": ["--capacities", "1.0,0.8,0.6", "--items", "12", "--repeats", "1"],
}


def texts(path: Path, count: int = 60, label: bool = True) -> Path:
    rng = np.random.default_rng(1)
    lines = []
    for _ in range(count):
        words = rng.choice(WORDS, rng.integers(4, 30))
        record: dict[str, object] = {"text": " ".join(words)}
        if label:
            record["label"] = f"label {int('good' in words)}"
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines))
    return path


def pictures(folder: Path, count: int = 30) -> Path:
    rng = np.random.default_rng(2)
    for place in range(count):
        inside = folder / f"label {place % 2}"
        inside.mkdir(parents=True, exist_ok=True)
        across = np.linspace(0, 200, 24)[:, None, None] * np.ones((24, 24, 3))
        shade = across if place % 2 else across.transpose(1, 0, 2)
        shade = (shade + rng.integers(0, 50, shade.shape)).astype(np.uint8)
        Image.fromarray(shade).save(inside / f"{place}.png")
    return folder


def ran(capsys, command: str, *given: object) -> dict:
    options = OPTIONS.get(command, [])
    given = given if command == "reconstruct" else (*given, "--dtype", "float32")
    assert main([command, *options, *map(str, given)]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    ("family", "task"),
    [("bert", None), ("distilbert", "features"), ("vit", None), ("siglip", "features")],
)
def test_an_encoder_is_distilled_calibrated_and_evaluated(tmp_path, capsys, family, task):
    base = save_tiny_encoder(tmp_path / "base", tiny_encoder(family, task))
    images = family in IMAGE_FAMILIES
    data = pictures(tmp_path / "images") if images else texts(tmp_path / "data.jsonl")
    adapter, report = tmp_path / "adapter", tmp_path / "report"
    units = ["--units", "attention_tokens,mlp_tokens,heads"]
    distilled = ran(
        capsys,
        "distill",
        "--base",
        base,
        "--data",
        data,
        "--out",
        adapter,
        *units,
        "--held-out",
        0.2,
    )
    measured = distilled["held_out_distance"]
    assert measured["after"] < 0.9 * measured["before"]

    where = ["--base", base, "--adapter", adapter, "--data", data]
    calibrated = ran(capsys, "calibrate", *where)
    assert calibrated["lowest"] == 0.6
    assert calibrated["phase"] == ("output" if task == "features" else "prompt")
    assert calibrated["worst_miss"] <= 0.02 and calibrated["promise_kept"]
    name = "cosine" if task == "features" else "kl"
    whole, half = calibrated["measured"][0], calibrated["measured"][-1]
    best = 1.0 if task == "features" else 0.0
    assert whole[name] == pytest.approx(best, abs=1e-5) and half[name] != best
    if task != "features":
        assert whole["same_label"] == 1.0 and whole["accuracy"] is not None

    evaluated = ran(capsys, "evaluate", *where, "--out", report, "--update-adapter")
    assert evaluated["distance"]["1"] == pytest.approx(0.0, abs=1e-5)
    assert evaluated["time_ratio"]["1"] == 1.0
    written = json.loads((report / "report.json").read_text())
    assert {row["capacity"] for row in written["ours"]} == {1.0, 0.8, 0.6}
    assert set(written["baselines"]) == {"uniform", "random"}
    saved = ElasticEncoder.load(str(base), adapter, dtype="float32").adapter
    assert written["about"]["adapter"] == evaluated["adapter"] == saved.identity
    page = (report / "report.md").read_text()
    assert "| 0.6 |" in page
    drawn = ["frontier.png", "patches.png"] if images else ["frontier.png"]
    assert evaluated["files"] == [*drawn, "report.md", "report.json"]
    assert sorted(path.name for path in report.iterdir()) == sorted(evaluated["files"])
    assert all(f"({name})" in page for name in drawn)

    served = ElasticEncoder.load(str(base), adapter, dtype="float32")
    assert served.lowest == 0.6 and served.task == (
        task or f"{'image' if images else 'text'}-classification"
    )
    (item,) = read_examples(str(data), served).items([3])
    sequence = served.sequence(Capacity(0.6, 0.6), item)
    assert not sequence.plan_at(len(item.ids) - 1).is_dense
    card = (adapter / "README.md").read_text()
    assert "items of about" in card and f"Task: {served.task}" in card
    assert "prompt and continuation" not in card


@pytest.mark.parametrize(("family", "task"), [("vit", None), ("siglip", "features")])
def test_one_by_one_at_most_one_sub_layer_works_on_a_part_of_the_tokens(
    tmp_path, capsys, family, task
):
    base = save_tiny_encoder(tmp_path / "base", tiny_encoder(family, task))
    data, adapter = pictures(tmp_path / "images", 60), tmp_path / "adapter"
    units = ["--units", "attention_tokens,mlp_tokens", "--steps", 2]
    ran(capsys, "distill", "--base", base, "--data", data, "--out", adapter, *units)
    where = ["--base", base, "--adapter", adapter, "--data", data]
    calibrated = ran(capsys, "calibrate", *where, "--one-by-one", "--sweeps", 1)
    assert calibrated["promise_kept"] and "reordered" in list(calibrated["candidates"])[-1]

    served = ElasticEncoder.load(str(base), adapter, dtype="float32")
    for item in read_examples(str(data), served).items([3, 4]):
        for percent in range(60, 91):
            sequence = served.sequence(Capacity(percent / 100, percent / 100), item)
            plans = [sequence.plan_at(place).plan for place in range(len(item.ids))]
            routed = plans[1:]  # the first token keeps every sub-layer
            shares = {
                (layer, field): {getattr(plan[layer], field) for plan in routed}
                for layer in range(len(served.shape.layers))
                for field in TOKEN_FIELDS
            }
            parted = [place for place, each in shares.items() if each not in ({0.0}, {1.0})]
            assert len(parted) <= 1 or parted == [(parted[0][0], field) for field in TOKEN_FIELDS]


def test_late_layers_go_out_whole_and_the_last_first(tmp_path, capsys):
    base = save_tiny_encoder(tmp_path / "base", tiny_encoder("vit"))
    data, adapter = pictures(tmp_path / "images", 60), tmp_path / "adapter"
    units = ["--units", "attention_tokens,mlp_tokens", "--steps", 2]
    ran(capsys, "distill", "--base", base, "--data", data, "--out", adapter, *units)
    where = ["--base", base, "--adapter", adapter, "--data", data]
    calibrated = ran(capsys, "calibrate", *where, "--late-layers")
    assert calibrated["promise_kept"] and list(calibrated["candidates"]) == ["late layers"]
    order = [step.layer for step in SavedAdapter.load(adapter).calibration.paths[Phase.PROMPT]]
    assert order == sorted(order, reverse=True) and order[0] == LAYERS - 1


def test_late_layers_are_refused_where_every_token_is_read(tmp_path, capsys):
    base = save_tiny_encoder(tmp_path / "base", tiny_encoder("siglip", "features"))
    data, adapter = pictures(tmp_path / "images"), tmp_path / "adapter"
    units = ["--units", "attention_tokens,mlp_tokens", "--steps", 2]
    ran(capsys, "distill", "--base", base, "--data", data, "--out", adapter, *units)
    where = ["--base", base, "--adapter", adapter, "--data", data, "--dtype", "float32"]
    assert main(["calibrate", *OPTIONS["calibrate"], *map(str, where), "--late-layers"]) != 0
    assert "--late-layers: every token" in capsys.readouterr().err


def test_of_every_image_as_many_patches_are_kept_as_are_due():
    model = elastic_encoder("vit")
    given = items(model)
    assert torch.tensor(kept_patches(model, given, DENSE)).eq(1).all()
    shares = Capacity.parse({"attention_tokens": 0.6, "mlp_tokens": 0.4})
    kept_BHW = torch.tensor(kept_patches(model, given, shares))
    side = SIDE // PATCH
    assert kept_BHW.shape == (len(given), side, side)
    means = kept_BHW.mean((1, 2))
    assert means.min() > 0 and means.max() < 1
    torch.testing.assert_close(means, means[:1].expand_as(means))
    assert not torch.equal(kept_BHW[0], kept_BHW[1])


def test_a_run_that_was_stopped_goes_on_to_the_same_adapter(tmp_path, capsys, monkeypatch):
    base = save_tiny_encoder(tmp_path / "base", tiny_encoder("bert"))
    data = texts(tmp_path / "data.jsonl")
    given = ["--base", base, "--data", data, "--units", "mlp_tokens,heads", "--steps", 8]
    whole = ran(capsys, "distill", *given, "--out", tmp_path / "whole")
    learn, learnt = ItemStudent.learn, []

    def stopped_at_five(self, *rest):
        learnt.append(1)
        if len(learnt) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(self, *rest)

    monkeypatch.setattr(ItemStudent, "learn", stopped_at_five)
    given += ["--out", tmp_path / "again"]
    assert ran(capsys, "distill", *given)["step"] == 5
    resumed = ran(capsys, "distill", *given, "--resume")
    assert len(learnt) == 8
    assert resumed["identity"] == whole["identity"]


def test_how_many_texts_run_at_once_changes_rounding_alone(tmp_path, capsys):
    base = save_tiny_encoder(tmp_path / "base", tiny_encoder("bert"))
    data = texts(tmp_path / "data.jsonl")
    given = ["--base", base, "--data", data, "--units", "mlp_tokens,heads", "--steps", 4]
    after = [
        ran(capsys, "distill", *given, "--pass-tokens", tokens, "--out", tmp_path / str(tokens))[
            "held_out_distance"
        ]["after"]
        for tokens in (4096, 50)
    ]
    assert after[0] == pytest.approx(after[1], rel=1e-3)


@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
def test_a_distance_is_zero_between_equals_and_grows_apart(problem):
    model = elastic_encoder("bert")
    model.base.config.problem_type = problem
    batch = model.collate(items(model))
    with torch.no_grad():
        teacher = judged(model, model.teacher(batch), batch)
    assert distances(model, teacher, teacher).abs().max() < 1e-6
    near, far = (
        distances(model, teacher, teacher + by * torch.randn_like(teacher)) for by in (0.1, 2)
    )
    assert 0 < near.mean() < far.mean()


def test_a_distance_of_features_is_one_minus_their_cosine_on_real_tokens_only():
    model = elastic_encoder("bert", "features")
    given = items(model)
    batch = model.collate(given)
    outputs = model.teacher(batch)
    rows = judged(model, outputs, batch)
    assert len(rows) == sum(len(item.ids) for item in given)
    assert distances(model, rows, -rows) == pytest.approx(2 * torch.ones(len(rows)))


def test_every_form_of_data_is_read_with_its_labels(tmp_path):
    reads_text = ElasticEncoder(tiny_encoder("bert"), tokenizer=tiny_word_tokenizer())
    lines = [
        {"text": "a good film", "label": 3},
        {"text": "a good film", "text_pair": "bad", "label": "label 1"},
        {"text": "bad"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "b.txt").write_text("it is long\n\nit is dull\n")
    examples = read_examples(str(tmp_path), reads_text)
    assert [each.label for each in examples.each] == [3, 1, None, None, None]
    pair = examples.items([1])[0]
    assert pair.types is not None and sum(pair.types) == 2
    train, held = examples.split(0.4)
    assert {e.digest for e in train.each} | {e.digest for e in held.each} == {
        e.digest for e in examples.each
    }

    save_tiny_encoder(tmp_path / "vit", tiny_encoder("vit"))
    reads_images = ElasticEncoder.load(str(tmp_path / "vit"))
    folder = pictures(tmp_path / "images", 4)
    named = read_examples(str(folder), reads_images)
    assert [each.label for each in named.each] == [0, 0, 1, 1]
    into = io.BytesIO()
    Image.open(folder / "label 0" / "0.png").save(into, "PNG")
    inline = "data:image/png;base64," + base64.b64encode(into.getvalue()).decode()
    records = [{"image": "label 0/0.png", "label": 4}, {"image": inline}]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, records)))
    listed = read_examples(str(folder / "list.jsonl"), reads_images)
    assert [each.label for each in listed.each] == [LABELS - 1, None]
    first = [each.pixels_CHW for each in (*named.items([0]), *listed.items([0, 1]))]
    assert all(torch.equal(first[0], other) for other in first[1:])
    assert reads_images.encode(listed.items([0]), [DENSE])[0].shape == (LABELS,)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"text": 3}', '"text" is a string'),
        ('{"text": "a", "label": "poetry"}', '"label" is one of label 0'),
        ('{"text": "a", "label": 9}', "got 9"),
        ('{"text": "a", "text_pair": 1}', '"text_pair" is a string'),
        ("{", "not JSON"),
        ("3", "an object with"),
    ],
)
def test_wrong_data_is_refused_with_its_line(tmp_path, line, told):
    model = ElasticEncoder(tiny_encoder("bert"), tokenizer=tiny_word_tokenizer())
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n' + line)
    with pytest.raises(DataError, match=f"line 2: .*{told}"):
        read_examples(str(path), model)
