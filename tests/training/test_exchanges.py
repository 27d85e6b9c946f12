"""Vision-language models learn which image tokens matter, from files to a report."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from elastiformer import Capacity, SavedAdapter, Unit, dense_plan
from elastiformer.capacity import DENSE
from elastiformer.vlm import ElasticVlm
from tests.elastiformer.test_vlm import elastic
from tests.service.encoders import content, uri
from tests.tiny import LAYERS, TURN_END
from tests.tiny_vlms import IMAGE_TOKEN, PATCH, PATCHES, SIDE, save_tiny_vlm, tiny_vlm
from training.__main__ import main
from training.choosers import CHOOSERS, answer_attention
from training.exchanges import collated, judged, read_exchanges
from training.files import DataError
from training.losses import kl_divergence
from training.picture_quality import answers_at, chosen_by, quality, scores_by
from training.picture_student import aligned

SPREAD = ("--image-spread", "0.5")
PLANS = (dense_plan(LAYERS), dense_plan(LAYERS))


def spotted(seed: int) -> Image.Image:
    """Grey, with one bright patch somewhere."""
    draw = np.random.default_rng(seed)
    grey = np.full((SIDE, SIDE, 3), 90, dtype=np.uint8)
    row, column = draw.integers(0, SIDE // PATCH, 2) * PATCH
    grey[row : row + PATCH, column : column + PATCH] = draw.integers(160, 255, 3)
    return Image.fromarray(grey)


@pytest.fixture
def data(tmp_path):
    """Exchanges, half of them with the image in a file."""
    lines = []
    for number in range(24):
        image = content(spotted(number // 2))
        place = f"{number}.png"
        if number % 2:
            (tmp_path / place).write_bytes(image)
        record = {"image": place if number % 2 else uri(image), "text": f"at {number}"}
        if number % 3:
            record["question"] = "Where is it?"
        lines.append(json.dumps(record))
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_an_exchange_is_the_chat_prompt_and_the_answer_with_its_end(data):
    model = elastic()
    exchanges = read_exchanges(str(data), model).each
    first, second = exchanges[:2]
    assert len(exchanges) == 24
    assert first.prompt.count(IMAGE_TOKEN) == PATCHES
    assert model.tokenizer.decode(first.answer) == "at 0<|im_end|>"
    said = model.tokenizer.decode([token for token in second.prompt if token != IMAGE_TOKEN])
    assert said == "<|im_start|>user\nWhere is it?<|im_end|>\n<|im_start|>assistant\n"
    assert first.answer[-1] == TURN_END

    batch = collated(exchanges[:2], model)
    for row, exchange in enumerate((first, second)):
        ids = batch.ids_BT[row][batch.mask_BT[row]].tolist()
        assert ids == [*exchange.prompt, *exchange.answer]
        following = batch.ids_BT[row].roll(-1)[judged(batch)[row]].tolist()
        assert following == list(exchange.answer)


def test_all_that_is_asked_about_an_image_is_on_one_side(data):
    exchanges = read_exchanges(str(data), elastic())
    train, held = exchanges.split(0.3)
    sides = [{each.digest[:32] for each in part.each} for part in (train, held)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert len(train.each) + len(held.each) == 24


def test_answers_are_aligned_though_the_student_is_shorter(data):
    """Where nothing is dropped the KL is zero; and it is taken on the same tokens where some is."""
    model = elastic()
    exchanges = read_exchanges(str(data), model).each[:3]
    batch = collated(exchanges, model)
    with torch.no_grad():
        teacher_BTV = model.teacher_images(batch)
        for share, same in ((1.0, True), (0.3, False)):
            result = model.masked_images(batch, [PLANS] * 3, share)
            teacher_BSV, student_BSV, mask_BS = aligned(batch, result, teacher_BTV)
            assert int(mask_BS.sum()) == sum(len(each.answer) for each in exchanges)
            assert torch.equal(teacher_BSV[mask_BS], teacher_BTV[judged(batch)])
            kl = float(kl_divergence(teacher_BSV, student_BSV, mask_BS))
            assert (kl < 1e-6) is same


def test_the_served_form_measures_what_the_masked_form_says(data):
    model = elastic()
    exchanges = read_exchanges(str(data), model).each[:5]
    dense = answers_at(model, exchanges, 1.0)
    batch = collated(exchanges, model)
    with torch.inference_mode():
        expected = model.teacher_images(batch)[judged(batch)]
    torch.testing.assert_close(torch.cat(dense.logits), expected, atol=2e-4, rtol=2e-4)
    row = quality(model, exchanges, 1.0, dense)
    assert row.kl == pytest.approx(0, abs=1e-6) and row.same == row.kept == 1.0
    assert row.missed is not None and row.missed <= 0


def commands(tmp_path, data, *options: str) -> tuple[str, str]:
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    save_tiny_vlm(tmp_path / "base", tiny_vlm())
    asked = ["distill", "--base", base, "--data", str(data), "--out", adapter, "--steps", "12"]
    asked += ["--batch-items", "6", "--held-out", "0.3", "--lr", "0.02", "--dtype", "float32"]
    assert main([*asked, *options]) == 0
    return base, adapter


def test_from_data_to_a_report(tmp_path, data, capsys):
    base, adapter = commands(tmp_path, data, "--image-scorer", "mlp", "--image-draws", "3", *SPREAD)
    learnt = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(learnt["held_out_kl"]) == {"before", "after"} and learnt["steps"] == 12
    saved = SavedAdapter.load(adapter)
    blank = SavedAdapter.load(f"{adapter}.run/blank")
    assert all(not torch.equal(saved.tensors[name], blank.tensors[name]) for name in blank.tensors)
    assert saved.spec.units == (Unit.IMAGE_TOKENS,) and saved.spec.lora_rank == 0

    given = ["--base", base, "--adapter", adapter, "--data", str(data), "--dtype", "float32"]
    wanted = ["--capacities", "0.6,0.5,0.4,0.05"]
    assert saved.spec.image_spread == 0.5
    assert main(["calibrate", *given, *wanted, "--image-spread", "2"]) == 0
    assert SavedAdapter.load(adapter).spec.image_spread == 2
    table = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert table["not_reached"] == [0.05]
    assert {row["capacity"] for row in table["measured"]} == {1.0, 0.6, 0.5, 0.4}
    spent = [row["spent"] for row in table["measured"]]  # answers run whole, and are much of it
    assert spent == sorted(spent, reverse=True) and spent[0] > spent[-1] + 0.1

    report = tmp_path / "report"
    options = ["--items", "6", "--repeats", "1", "--out", str(report)]
    assert main(["evaluate", *given, *wanted, *options]) == 0
    said = json.loads((report / "report.json").read_text())
    assert said["refused"] == [0.05] and set(said["choosers"]) == set(CHOOSERS)
    half = next(row for row in said["ours"] if row["capacity"] == 0.5)
    for rows in said["choosers"].values():
        assert next(row for row in rows if row["capacity"] == 0.5)["kept"] == half["kept"]
    assert said["prefill"]["0.5"]["flops_ratio"] < 1 and half["kept"] < 1
    assert "| 0.5 |" in (report / "report.md").read_text()

    model = ElasticVlm.load(base, adapter, dtype="float32")
    exchange = read_exchanges(str(data), model).each[0]
    picture = model.pictures.picture(str(exchange.image), "image")
    assert model.prompt(Capacity(0.5, 0.5), exchange.prompt, [picture]).dropped > 0
    assert model.prompt(DENSE, exchange.prompt, [picture]).dropped == 0


@pytest.mark.parametrize("draws", ["0", "2"])
def test_the_language_models_units_learn_beside_the_image_router(tmp_path, data, capsys, draws):
    asked = ["--units", "image_tokens,mlp_tokens,channels", "--lora-rank", "2"]
    _, adapter = commands(tmp_path, data, *asked, "--image-draws", draws)
    learnt = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert learnt["parameters"] > 25
    saved = SavedAdapter.load(adapter)
    moved = [name for name, tensor in saved.tensors.items() if "weight" in name]
    assert any("mlp_tokens" in name for name in moved) and "image.outer.weight" in moved
    assert any(float(each.abs().max()) > 0 for each in saved.lora["shared"].values())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--image-draws", "1"], "one set has none to be compared with"),
        (["--image-draws", "4", "--token-gate", "sigmoid"], "asks for --token-gate hard"),
        (["--units", "channels", *SPREAD], "--image-spread: what routes no image tokens"),
    ],
)
def test_what_could_teach_nothing_is_refused(tmp_path, data, capsys, options, told):
    save_tiny_vlm(tmp_path / "base", tiny_vlm())
    asked = ["--base", str(tmp_path / "base"), "--data", str(data), "--out", str(tmp_path / "a")]
    assert main(["distill", *asked, *options]) != 0
    assert told in capsys.readouterr().err


def test_of_a_language_model_no_spread_is_calibrated(tmp_path, capsys):
    asked = ["--base", "smollm2-135m-instruct", "--adapter", str(tmp_path), "--data", "none.txt"]
    assert main(["calibrate", *asked, *SPREAD]) != 0
    assert "--image-spread: what routes no image tokens" in capsys.readouterr().err


def test_choosers_keep_as_many_and_each_its_own(data):
    model = elastic()
    exchanges = read_exchanges(str(data), model).each[:4]
    dense = answers_at(model, exchanges, 1.0)
    scores = {name: choose(model, exchanges, 0) for name, choose in CHOOSERS.items()}
    assert all(each.shape == (4, PATCHES) for each in scores.values())
    # Attention is a distribution, here over all tokens of the tower or the prompt.
    for name in ("class attention", "early attention"):
        assert bool((scores[name] > 0).all()) and bool((scores[name].sum(1) < 1).all())
    assert torch.equal(scores["random"][2:], CHOOSERS["random"](model, exchanges[2:], 0))
    assert not torch.equal(scores["random"], CHOOSERS["random"](model, exchanges, 1))
    assert torch.equal(scores_by(model, "random", exchanges, 0), scores["random"])
    row = chosen_by(model, scores["random"], exchanges, 1.0, dense)
    assert row.kl == pytest.approx(0, abs=1e-6) and row.kept == 1.0


def test_where_the_teacher_looks_is_told_for_every_image_token(data):
    """And the router hears of it, of tokens that it drops as well."""
    model = elastic()
    exchanges = read_exchanges(str(data), model).each[:3]
    batch = collated(exchanges, model)
    features_BPD = model.vlm.features(batch.pixels_NCHW)
    looked_BP = answer_attention(model, batch, features_BPD)
    torch.testing.assert_close(looked_BP.sum(1), torch.ones(3))
    assert bool((looked_BP > 0).all())
    alone = collated(exchanges[:1], model)
    torch.testing.assert_close(
        answer_attention(model, alone, features_BPD[:1]), looked_BP[:1], atol=1e-5, rtol=1e-3
    )


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[]", "an object with"),
        ('{"image": 3, "text": "a"}', "a path beside the file or a data URI; got 3"),
        ('{"image": "none.png", "text": "a"}', "there is no image"),
        ('{"image": "data:image/png;base64,", "text": 1}', '"text" is a string; got 1'),
        ('{"image": "data:,", "text": "a", "question": "<image>"}', "another number of images"),
        ("{", "not JSON"),
    ],
)
def test_bad_data_is_named(tmp_path, line, told):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=told):
        read_exchanges(str(path), elastic())
    with pytest.raises(DataError, match=r"a .jsonl file"):
        read_exchanges(str(tmp_path), elastic())


def test_an_image_that_cannot_be_read_is_named_when_it_is_needed(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"image": uri(b"no image"), "text": "a"}))
    model = elastic()
    with pytest.raises(DataError, match=r"bad.jsonl, line 1: not an image in a format"):
        collated(read_exchanges(str(path), model).each, model)
