"""Promises of the base models that ship with us."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from elastiformer import shipped
from elastiformer.calibration_reading import read_calibration
from elastiformer.card import model_card
from elastiformer.errors import BaseModelError
from elastiformer.shipped import MODELS, SHIPPED, EmbeddedBase, PackagedBase, added
from elastiformer.weights import resolve
from tests.training.fashion import sample

REQUIREMENT = "shipped-tiny==1"


def test_a_change_is_added_to_its_weight_and_whole_tensors_stand_for_themselves():
    weights = {"a.weight": torch.ones(3, 2), "b.weight": torch.zeros(2), "ids": torch.arange(4)}
    changes = {
        "a.down_RF": torch.tensor([[1.0, 2.0]], dtype=torch.float16),
        "a.up_GR": torch.tensor([[1.0], [0.0], [-1.0]], dtype=torch.float16),
        "head.weight": torch.full((2,), 0.5, dtype=torch.float16),
    }
    done = added(weights, changes)

    assert done.keys() == {"a.weight", "b.weight", "head.weight"}  # position ids are no weights
    assert torch.equal(done["a.weight"], torch.tensor([[2.0, 3.0], [1.0, 1.0], [0.0, -1.0]]))
    assert torch.equal(done["head.weight"], torch.tensor([0.5, 0.5]))
    assert {each.dtype for each in done.values()} == {torch.float32}


def test_a_change_to_a_weight_that_is_not_there_is_refused():
    changes = {"c.down_RF": torch.ones(1, 2), "c.up_GR": torch.ones(3, 1)}
    with pytest.raises(BaseModelError, match=r"changes to 'c\.weight'"):
        added({"a.weight": torch.ones(3, 2)}, changes)


@pytest.fixture
def tiny_shipped(tmp_path, monkeypatch):
    """A package with weights, changes to them, and an empty cache."""
    package = tmp_path / "site" / "shipped_tiny_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    save_file({"w.weight": torch.eye(2)}, package / "model.safetensors")
    for name in shipped.TOKENIZER:
        (package / name).write_text("{}")
    changes = tmp_path / "models" / "tiny"
    changes.mkdir(parents=True)
    (changes / "config.json").write_text(json.dumps({"model_type": "bert"}))
    save_file({"head.weight": torch.ones(1)}, changes / "changes.safetensors")
    sha256 = hashlib.sha256((package / "model.safetensors").read_bytes()).hexdigest()
    entry = PackagedBase(REQUIREMENT, package.name, "model.safetensors", sha256, "bert.")
    monkeypatch.setitem(shipped.SHIPPED, "tiny", entry)
    monkeypatch.setattr(shipped, "MODELS", tmp_path / "models")
    monkeypatch.setenv("ELASTI_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(package.parent)
    return package


def test_the_sum_is_written_once_and_found_again(tiny_shipped):
    first = resolve("tiny")
    assert load_file(first.path / "model.safetensors").keys() == {"bert.w.weight", "head.weight"}
    assert json.loads((first.path / "config.json").read_text()) == {"model_type": "bert"}
    assert all((first.path / name).is_file() for name in shipped.TOKENIZER)

    (tiny_shipped / "model.safetensors").unlink()  # not read again
    assert resolve("tiny") == first


def test_other_changes_are_another_model(tiny_shipped):
    first = resolve("tiny")
    changes = shipped.MODELS / "tiny" / "changes.safetensors"
    save_file({"head.weight": torch.zeros(1)}, changes)
    second = resolve("tiny")
    assert first.revision != second.revision and first.path != second.path


def test_a_package_that_is_missing_or_another_one_is_refused(tiny_shipped):
    (tiny_shipped / "model.safetensors").write_bytes(b"other")
    with pytest.raises(
        BaseModelError, match=r"has sha256 [0-9a-f]{64}, not .*; install shipped-tiny"
    ):
        resolve("tiny")
    (tiny_shipped / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="shipped-tiny==1, which is not installed"):
        resolve("tiny")


def test_changes_to_an_embedded_model_are_a_larger_one_with_a_token_of_its_own(
    tmp_path, monkeypatch
):
    language, changes = tmp_path / "language", tmp_path / "models" / "seeing"
    language.mkdir()
    changes.mkdir(parents=True)
    save_file({"model.w.weight": torch.eye(2)}, language / "model.safetensors")
    (language / "tokenizer.json").write_text('{"a": 1, "<unused>": 2}')
    (changes / "config.json").write_text("{}")
    own = {"inner.w.down_RF": torch.ones(1, 2), "inner.w.up_GR": torch.ones(2, 1)}
    save_file(own | {"tower.weight": torch.zeros(1)}, changes / "changes.safetensors")
    base = EmbeddedBase("language", "inner.", ("<unused>", "<seen>"))
    monkeypatch.setitem(shipped.SHIPPED, "seeing", base)
    monkeypatch.setattr(shipped, "MODELS", tmp_path / "models")
    monkeypatch.setenv("ELASTI_CACHE", str(tmp_path / "cache"))

    folder, revision = shipped.shipped("seeing", lambda _: (language, "sha256:1"))
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(weights["inner.w.weight"], torch.eye(2) + 1)
    assert weights.keys() == {"inner.w.weight", "tower.weight"}
    assert json.loads((folder / "tokenizer.json").read_text()) == {"a": 1, "<seen>": 2}
    assert (folder / "config.json").is_file() and not (folder / "changes.safetensors").exists()
    # Above another language model it is another one.
    assert shipped.shipped("seeing", lambda _: (language, "sha256:2"))[1] != revision


# What really comes along.


@pytest.mark.parametrize("name", SHIPPED)
def test_each_has_a_card_and_is_small(name):
    folder = MODELS / name
    assert (folder / "README.md").read_text("utf-8").startswith(f"# {name}: ")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12_000_000


def test_fashion_mnist_tells_clothes_apart():
    folder = resolve("fashion-mnist").path
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
    prepare = AutoImageProcessor.from_pretrained(folder, backend="pil")
    images = sample()
    pixels = list(images.pixels_NHW[:, None].expand(-1, 3, -1, -1).numpy())
    with torch.inference_mode():
        said = model.eval()(**prepare(pixels, return_tensors="pt")).logits.argmax(1)
    assert (said == images.labels_N).sum() >= 55  # of 64


def test_sentiment_tells_praise_from_blame():
    folder = resolve("sentiment").path
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = {
        "A wonderful film, I loved every minute.": "positive",
        "The battery died after two days. Awful.": "negative",
        "Best purchase I have made this year!": "positive",
        "Dull, slow and far too long.": "negative",
    }
    with torch.inference_mode():
        logits = model.eval()(**tokenizer(list(said), padding=True, return_tensors="pt")).logits
    labels = [model.config.id2label[int(each)] for each in logits.argmax(1)]
    assert labels == list(said.values())


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("smollm2-135m-instruct", "KL, prompt and continuation routed"),
        ("sentiment", "KL to the full model"),
        ("fashion-mnist", "KL to the full model"),
        ("fashion-vlm", "KL of answers"),
    ],
)
def test_the_card_of_an_adapter_that_comes_along_says_what_its_files_say(name, loss):
    folder = MODELS.parent / "adapters" / name
    header, table = (
        json.loads((folder / file).read_text("utf-8"))
        for file in ("adapter.json", "calibration.json")
    )
    card = (folder / "README.md").read_text("utf-8")
    assert card == model_card(header, read_calibration(table))
    assert f"| capacity | spent | {loss} |" in card
