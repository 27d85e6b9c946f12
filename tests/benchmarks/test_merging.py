"""Token merging by its published rule, worked out by hand and against the plain model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.images_report import (
    AT_ONCE,
    DROPPED,
    MERGED,
    MIXED,
    ROUTED,
    UNIFORM,
    best_within,
)
from benchmarks.merging import ShrinkingEncoder, drop_random, merge_alike
from elastiformer import Calibration, Phase, Step, Unit
from elastiformer.encoder import ElasticEncoder
from elastiformer.encoders import describe_encoder
from elastiformer.errors import UnsupportedModel
from tests.tiny_encoders import LAYERS, SIDE, save_tiny_encoder, tiny_encoder
from tests.training.test_encoders import pictures, texts


def test_the_likest_pairs_merge_into_the_mean_of_their_patches():
    # Class token 0 and tokens 2, 4 offer themselves to 1, 3, 5; 4 is most like 1, 2 like 3.
    key_BTK = torch.tensor([[[9.0, 9], [1, 0], [1, 2], [0, 1], [1, 0.1], [-1, 0]]])
    x_BTD = torch.tensor([[[7.0], [1], [2], [3], [4], [5]]])
    size_BT1 = torch.tensor([[[1.0], [2], [1], [1], [1], [1]]])
    once_BTD, sizes_BT1 = merge_alike(x_BTD, key_BTK, size_BT1, 1)
    assert once_BTD.flatten().tolist() == [7, 2, 2, 3, 5]  # 4 went into 1: (2 x 1 + 4) / 3
    assert sizes_BT1.flatten().tolist() == [1, 1, 3, 1, 1]
    twice_BTD, sizes_BT1 = merge_alike(x_BTD, key_BTK, size_BT1, 2)
    assert twice_BTD.flatten().tolist() == [7, 2, 2.5, 5]
    assert sizes_BT1.flatten().tolist() == [1, 3, 2, 1]


def test_two_may_merge_into_the_same_one():
    key_BTK = torch.tensor([[[0.0, 1], [1, 0], [1, 0], [0, 1], [1, 0], [-1, 0]]])
    x_BTD = torch.tensor([[[7.0], [1], [2], [3], [6], [5]]])
    merged_BTD, size_BT1 = merge_alike(x_BTD, key_BTK, torch.ones(1, 6, 1), 2)
    assert merged_BTD.flatten().tolist() == [7, 3, 3, 5]
    assert size_BT1.flatten().tolist() == [1, 3, 1, 1]


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2"])
def test_without_merging_it_is_the_plain_model(family):
    if family != "vit":
        with pytest.raises(UnsupportedModel, match="read one class token"):
            ShrinkingEncoder(describe_encoder(tiny_encoder(family)))
        return
    base = tiny_encoder(family)
    pixels_BCHW = torch.randn(3, 3, SIDE, SIDE)
    shrinking = ShrinkingEncoder(describe_encoder(base))
    with torch.inference_mode():
        expected = base(pixels_BCHW).logits
    actual = shrinking.logits(pixels_BCHW, merge_alike, 0)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_alike_tokens_merge_without_a_trace_and_random_drops_leave_one():
    base = tiny_encoder("vit")
    base.vit.embeddings.position_embeddings.data.zero_()
    # One colour everywhere: all patches are the same token, and only their number counts.
    pixels_BCHW = torch.randn(2, 3, 1, 1).expand(-1, -1, SIDE, SIDE).contiguous()
    pixels_BCHW[:, :, :4, :4] = 1.0
    shrinking = ShrinkingEncoder(describe_encoder(base))
    whole = shrinking.logits(pixels_BCHW, merge_alike, 0)
    merged = shrinking.logits(pixels_BCHW, merge_alike, 4)
    torch.testing.assert_close(merged, whole, atol=1e-4, rtol=1e-4)
    dropped = shrinking.logits(pixels_BCHW, drop_random(torch.Generator().manual_seed(0)), 4)
    assert not torch.allclose(dropped, whole, atol=1e-3)


def test_dropping_keeps_the_class_token_and_the_order():
    x_BTD = torch.arange(20.0).view(2, 10, 1)
    size_BT1 = torch.ones(2, 10, 1)
    kept_BTD, _ = drop_random(torch.Generator().manual_seed(0))(x_BTD, x_BTD, size_BT1, 4)
    assert kept_BTD.shape == (2, 6, 1)
    assert torch.equal(kept_BTD[:, 0], x_BTD[:, 0])
    assert bool((kept_BTD.diff(dim=1) > 0).all())


def test_the_best_within_a_time_lies_between_two_strengths():
    curve = [(0.5, 0.7), (0.9, 0.9), (1.0, 0.85)]
    assert best_within(curve, 0.4) is None
    assert best_within(curve, 0.5) == 0.7
    assert best_within(curve, 0.7) == pytest.approx(0.8)
    assert best_within(curve, 2.0) == 0.9


def calibrated(base: Path, folder: Path) -> None:
    """An adapter that leaves out whole sub-layers, the late ones first."""
    model = ElasticEncoder.load(str(base), dtype="float32")
    made = model.blank_adapter((Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS), lora_rank=0)
    path = tuple(
        Step(layer, unit.value, 0.0)
        for layer in reversed(range(LAYERS))
        for unit in (Unit.MLP_TOKENS, Unit.ATTENTION_TOKENS)
    )
    made.calibration = Calibration(
        lowest=0.5,
        context=model.context,
        paths={Phase.PROMPT: path, Phase.OUTPUT: ()},
        thresholds={},
        measured=(),
    )
    made.save(folder)


@pytest.fixture
def options(tmp_path):
    """A tiny image model with a calibrated adapter, and pictures."""
    base = save_tiny_encoder(tmp_path / "base", tiny_encoder("vit"))
    calibrated(base, tmp_path / "adapter")
    data = pictures(tmp_path / "images", 48)
    given = ["--base", base, "--adapter", tmp_path / "adapter", "--data", data, "--threads", "1"]
    return [*map(str, given), "--dtype", "float32", "--out", str(tmp_path / "out")]


def test_routing_is_held_against_merging_and_dropping_in_the_same_time(options, tmp_path, capsys):
    quick = ["--seconds", "0", "--least", "1", "--less", "3", "--batch", "4"]
    assert main(["images", *options, *quick, "--capacities", "1.0,0.5,0.3"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(last["goals"]) == 4
    found = json.loads((tmp_path / "out" / "images.json").read_text())["results"]
    settings = {row["way"]: set() for row in found["measured"]}
    for row in found["measured"]:
        settings[row["way"]].add(row["setting"])
        assert 0 <= row["accuracy"] <= 1 and row["milliseconds"]["median"] > 0
        assert (row["realised"] is None) == (row["flop_ratio"] > 0.98)
        if row["setting"] in ("1", "0 a layer", "0"):
            # Who merges or drops makes the last layer's keys; what is served does without.
            most = 1.05 if row["way"] == ROUTED else 1.1
            assert 0.95 <= row["flop_ratio"] <= most
        if row["realised"] is not None:
            saved = (1 - row["ratio"]["median"]) / (1 - row["flop_ratio"])
            assert row["realised"] == pytest.approx(saved)
    assert settings[ROUTED] == {"1", "0.5"}  # 0.3 is below what was calibrated
    assert settings[MERGED] == settings[DROPPED] == {f"{less} a layer" for less in range(4)}
    assert {row["way"] for row in found["batched"]} == {UNIFORM, MIXED}
    whole = {
        row["accuracy"] for row in found["measured"] if row["setting"] in ("1", "0 a layer", "0")
    }
    # Unchanged, all are one model, but for rounding where its labels are as good as tied.
    assert max(whole) - min(whole) < 0.1
    assert {each["capacity"] for each in found["equal_time"]} == {1.0, 0.5}
    assert all(set(each["others"]) == {MERGED, DROPPED, AT_ONCE} for each in found["equal_time"])


def test_a_classifier_of_texts_is_routed_alone(tmp_path, capsys):
    base = save_tiny_encoder(tmp_path / "base", tiny_encoder("bert"))
    calibrated(base, tmp_path / "adapter")
    given = ["--base", base, "--adapter", tmp_path / "adapter", "--data"]
    given += [texts(tmp_path / "data.jsonl", 48), "--dtype", "float32", "--out", tmp_path / "out"]
    quick = ["--seconds", "0", "--least", "1", "--batch", "4", "--capacities", "1.0,0.5"]
    assert main(["images", *map(str, given), *quick]) == 0
    goals = json.loads(capsys.readouterr().out.splitlines()[-1])["goals"]
    assert [goal["wanted"] for goal in goals] == [1.0, 1.6, 0.97]
    found = json.loads((tmp_path / "out" / "texts.json").read_text())["results"]
    assert [(row["way"], row["setting"]) for row in found["measured"]] == [
        (ROUTED, "1"),
        (ROUTED, "0.5"),
    ]
    assert found["measured"][1]["realised"] is not None
    assert {row["way"] for row in found["batched"]} == {UNIFORM, MIXED}
