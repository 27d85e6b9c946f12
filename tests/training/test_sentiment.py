"""The sentiment model: what training changes, and that the written folder is what was trained."""

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

from elastiformer import shipped
from elastiformer.shipped import PackagedBase, changed
from training import sentiment
from training.reviews import Review

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "the", "film", "was", "plot", "a"]


@pytest.fixture
def base(tmp_path):
    """A tiny BERT with its tokenizer in a folder, as the package has it."""
    folder = tmp_path / "base"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    splitter = Tokenizer(models.WordLevel(dict(zip(WORDS, range(99), strict=False)), "[UNK]"))
    splitter.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    PreTrainedTokenizerFast(tokenizer_object=splitter, **special).save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder / "model.safetensors"


def reviews(count: int = 96) -> list[Review]:
    """Texts in which one word decides; of all lengths, so that padding is there."""
    made = []
    for number in range(count):
        good = number % 2 == 0
        filling = " ".join(WORDS[6 + (number * 7 + at) % 5] for at in range(1 + number % 6))
        part = ("train", "train", "train", "heldout", "heldout", "test", "test")[number % 7]
        text = f"{filling} {'good' if good else 'bad'} film {number}"
        made.append(Review("movie", text, 2.0 if good else -2.0, part))
    return made


OPTIONS = {"batch": 16, "epochs": 20, "lr": 0.02, "rank": 3, "seed": 0}


def test_untrained_the_student_is_the_base(base):
    student, trained = sentiment.student(base.parent, 3, 0)
    plain = BertForSequenceClassification.from_pretrained(base.parent)
    ids = torch.tensor([[2, 4, 7, 0], [2, 5, 6, 9]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])

    with torch.inference_mode():
        expected = plain.eval().bert(ids, mask).last_hidden_state
        actual = student.eval().bert(ids, mask).last_hidden_state
    torch.testing.assert_close(actual[mask > 0], expected[mask > 0], atol=1e-5, rtol=1e-5)
    assert not any("linear" in name or "embeddings" in name for name in trained)
    # Two matrices for each of six projections in two layers, pooler and classifier with biases.
    assert len(trained) == 2 * 6 * 2 + 4


def test_the_written_changes_give_the_model_that_was_trained(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base.parent)
    rated = sentiment.Rated.of(reviews(), tokenizer)
    student, trained = sentiment.student(base.parent, 3, 0)
    sentiment.train(student, trained, rated, tmp_path / "run", OPTIONS)
    sentiment.write_changes(student, trained, tmp_path / "changes")
    changed(tmp_path / "changes", base, "bert.", tmp_path / "whole")

    written = load_file(tmp_path / "changes" / "changes.safetensors")
    assert {str(each.dtype) for each in written.values()} == {"torch.float16"}
    served = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    assert isinstance(served, BertForSequenceClassification)
    assert served.config.id2label == {0: "negative", 1: "positive"}
    student.set_attn_implementation("sdpa")
    torch.testing.assert_close(
        sentiment.scores(served, rated), sentiment.scores(student, rated), atol=0.05, rtol=0.02
    )


def test_a_build_from_start_to_folder_learns_and_measures(base, tmp_path, monkeypatch):
    packaged = PackagedBase("tiny==1", "tiny", "model.safetensors", "", "bert.")
    monkeypatch.setattr(sentiment, "MINILM", packaged)
    monkeypatch.setattr(sentiment, "packaged", lambda *_: base)
    monkeypatch.setattr(sentiment, "fetch_reviews", lambda _: reviews())

    report = sentiment.build(tmp_path / "out", tmp_path / "run", tmp_path, OPTIONS)

    assert report["test"]["all"]["accuracy"] == 1.0
    assert report["test"]["all"]["texts"] == sum(each.part == "test" for each in reviews())
    assert 0 < report["bytes"] < 40_000
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| movie |" in card and "MIT licence" in card


def test_batches_hold_every_text_once_and_texts_of_like_length(base):
    rated = sentiment.Rated.of(reviews(), AutoTokenizer.from_pretrained(base.parent))
    made = sentiment.batches(rated, 16, seed=0, epoch=0)
    assert sorted(row for batch in made for row in batch) == list(range(96))
    assert made != sentiment.batches(rated, 16, seed=0, epoch=1)
    spans = [
        max(lengths) - min(lengths) for b in made if (lengths := [len(rated.ids[r]) for r in b])
    ]
    assert max(spans) <= 1


def test_a_logistic_head_separates_what_a_line_separates():
    torch.manual_seed(0)
    features = torch.randn(200, 4)
    ratings = features @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + 0.3
    head = sentiment.logistic(features, sentiment.Rated([], ratings))
    assert ((head(features)[:, 0] > 0) == (ratings > 0)).float().mean() > 0.98


def test_accuracy_counts_the_texts_that_are_rated_for_or_against():
    texts = [Review("a", "", rating, "test") for rating in (2.0, -0.2, 0.0, -3.0)]
    table = sentiment.accuracy(torch.tensor([1.0, 1.0, 1.0, -1.0]), texts)
    expected = {"texts": 3, "accuracy": 0.6667, "clear_texts": 2, "clear_accuracy": 1.0}
    assert table == {"all": expected, "a": expected}


def test_the_files_that_are_copied_are_those_the_package_has():
    folder = shipped.packaged("sentiment", shipped.MINILM).parent
    assert all((folder / name).is_file() for name in shipped.TOKENIZER)
