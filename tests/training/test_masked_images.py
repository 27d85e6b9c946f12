"""Masked autoencoders: built from nothing, made elastic, and drawing what they did not see."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForPreTraining

from elastiformer.encoder import ElasticEncoder
from elastiformer.errors import InputError
from tests.tiny_encoders import SIDE, save_tiny_encoder, tiny_encoder, tiny_whole
from tests.training.fashion import sample
from tests.training.test_encoders import pictures, ran
from training import masked_images
from training.examples import read_examples
from training.masked_images import PATCHES, Size, spread, squares
from training.reconstruct import Painter, hidden

TINY = Size(width=32, layers=2, heads=2, inner=48, decoder_width=16, decoder_layers=1)


def test_a_build_from_start_to_folder_draws_better_than_the_mean_image(tmp_path, monkeypatch):
    monkeypatch.setattr(
        masked_images, "fetch_images", lambda _: {"train": sample(), "test": sample()}
    )
    monkeypatch.setattr(masked_images, "Size", lambda: TINY)
    options = {**masked_images.OPTIONS, "batch": 32, "epochs": 40, "lr": 0.02, "seed": 0}
    report = masked_images.build(tmp_path / "model", tmp_path / "run", tmp_path, options)
    assert report["test_squares"] < report["test_squares_of_the_mean"] == spread(sample())
    model = AutoModelForPreTraining.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert squares(model, sample(), 0) == pytest.approx(report["test_squares"], abs=1e-6)
    assert "without their labels" in (tmp_path / "model" / "README.md").read_text()
    served = ElasticEncoder.load(str(tmp_path / "model"), dtype="float32")
    assert served.task == "features" and served.context == 1 + PATCHES


@pytest.fixture
def base(tmp_path):
    """A random autoencoder, as a folder."""
    return save_tiny_encoder(tmp_path / "base", tiny_whole("vit-mae"))


def test_an_image_shows_the_same_patches_every_time(tmp_path, base):
    model = ElasticEncoder.load(str(base), dtype="float32")
    data = str(pictures(tmp_path / "images", 6))
    first, again = (read_examples(data, model, 0.4).items(range(6)) for _ in range(2))
    assert [item.ids for item in first] == [item.ids for item in again]
    assert all(len(item.ids) == 1 + 10 and item.ids[0] == 0 for item in first)
    assert len({item.ids for item in first}) > 1
    whole = read_examples(data, model).items([0])[0]
    assert len(whole.ids) == 26 and torch.equal(whole.pixels_CHW, first[0].pixels_CHW)
    other = ElasticEncoder(tiny_encoder("vit"), images=model.images)
    with pytest.raises(InputError, match="masked autoencoders alone"):
        read_examples(data, other, 0.4).items([0])


@pytest.mark.parametrize("normed", [False, True])
def test_what_a_whole_encoder_draws_is_what_the_base_draws(normed):
    whole = tiny_whole("vit-mae")
    whole.config.norm_pix_loss = normed
    model, painter = ElasticEncoder(tiny_whole("vit-mae").vit), Painter(whole)
    pixels_BCHW = torch.randn(2, 3, SIDE, SIDE)
    batch = model.collate([model.image(each, range(3, 13)) for each in pixels_BCHW])
    with torch.inference_mode():
        said = whole(pixels_BCHW, noise=batch.inputs["noise"])
        painted_BPX = painter.patches(model.teacher(batch), batch)
    assert torch.equal(hidden(batch), said.mask.bool())
    if not normed:
        assert torch.equal(painted_BPX, said.logits)
        assert painter.squares(painted_BPX, batch).mean() == pytest.approx(float(said.loss))
    pasted = painter.pasted(painted_BPX, batch)
    seen = ~painter.hidden_from(batch).isnan()
    assert torch.equal(pasted[seen], pixels_BCHW[seen])
    assert seen.float().mean() == pytest.approx(10 / 25)


def test_an_elastic_autoencoder_is_drawn_at_every_capacity(tmp_path, capsys, base):
    data = pictures(tmp_path / "images")
    where = ["--base", base, "--data", data, "--seen", 0.4]
    adapter = tmp_path / "adapter"
    ran(capsys, "distill", *where, "--out", adapter, "--units", "mlp_tokens,heads")
    calibrated = ran(capsys, "calibrate", *where, "--adapter", adapter)
    assert calibrated["phase"] == "output"  # the decoder reads every token
    out = tmp_path / "drawn"
    given = ["--base", base, "--data", data, "--adapter", adapter, "--out", out, "--items", 8]
    drawn = ran(capsys, "reconstruct", *given, "--capacities", "1.0,0.8,0.6", "--shown", 3)

    report = json.loads((out / "report.json").read_text())
    assert (report["units"], report["lora_rank"]) == (["mlp_tokens", "heads"], 1)
    rows = report["rows"]
    assert [(row["seen"], row["capacity"]) for row in rows] == [
        (seen, capacity) for seen in (pytest.approx(0.4), 1.0) for capacity in (1.0, 0.8, 0.6)
    ]
    assert drawn["cosine"]["1"] == pytest.approx(1.0, abs=1e-6)
    assert drawn["cosine"]["1"] > drawn["cosine"]["0.8"] > drawn["cosine"]["0.6"]
    assert all(row["spent"] <= row["capacity"] + 0.05 for row in rows)
    assert all((row["squares"] is None) == (row["seen"] == 1.0) for row in rows)
    assert (out / "reconstructions.png").stat().st_size > 5_000
    text = (out / "report.md").read_text()
    assert "| 100% | 0.6 |" in text
    assert f"`{report['adapter']}` (mlp_tokens, heads; low-rank repair of rank 1; " in text
    assert f"{report['training_steps']} steps); 8 images of {data.name}." in text


def test_only_masked_autoencoders_are_drawn(tmp_path, capsys):
    base = save_tiny_encoder(tmp_path / "vit", tiny_encoder("vit"))
    given = ["--base", base, "--data", base, "--adapter", base, "--out", tmp_path / "drawn"]
    with pytest.raises(AssertionError):
        ran(capsys, "reconstruct", *given)
    assert "not a masked autoencoder" in capsys.readouterr().err
