"""Public corpora: the Brown corpus back to prose; reviews and images with their labels."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.training.fashion import sample
from training.canvases import SIDE, compose, questions
from training.corpora import (
    asked_canvases,
    join_sentences,
    labelled_images,
    labelled_reviews,
    untag,
    write_parts,
)
from training.data import read_corpus
from training.fashion_mnist import LABELS
from training.files import DataError
from training.reviews import Review


def test_tags_go_and_punctuation_is_rejoined():
    tagged = (
        "\n\n\tThe/at City/nn-tl ,/, ``/`` deserves/vbz praise/nn ''/'' ,/, said/vbd Mr./np "
        "Jones/np Jr./np ./.\n"
        "Why/wrb ?/. ?/.\nHe/pps (/( it/pps 's/bez so/rb )/) left/vbd --/-- twice/rb ;/. ;/.\n\n\n"
        "\t``/`` I/ppss ran/vbd 3/cd 1/2/cd miles/nns ''/'' ./.\n"
    )

    assert untag(tagged) == (
        'The City, "deserves praise," said Mr. Jones Jr. Why? He (it \'s so) left -- twice;\n\n'
        '"I ran 3 1/2 miles."'
    )


def test_parts_share_no_document_and_training_reads_them(tmp_path, tiny_tokenizer):
    texts = [f"Document {number}." for number in range(500)]

    report = write_parts("brown", list(texts), tmp_path)

    parts = [
        read_corpus(report[name]["path"], tiny_tokenizer).documents
        for name in ("train", "heldout", "test")
    ]
    assert [len(part) for part in parts] == [400, 50, 50]
    assert sorted(text for part in parts for text in part) == sorted(texts)


def test_a_corpus_that_is_not_whole_is_refused(tmp_path):
    with pytest.raises(DataError, match="499 documents, expected 500"):
        write_parts("brown", ["text"] * 499, tmp_path)


def rows(folder, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_reviews_have_a_label_and_those_rated_neither_way_are_left_out(tmp_path):
    rated = [("Good.", 1.5, "train"), ("So so.", 0.0, "train"), ("Bad.", -0.1, "test")]
    report = labelled_reviews([Review("a", *each) for each in rated], tmp_path)
    for part, text, label in (("train", "Good.", "positive"), ("test", "Bad.", "negative")):
        told = {"text": text, "label": label, "source": "a"}
        assert rows(tmp_path, f"reviews-{part}.jsonl") == [told]
    assert report["heldout"]["examples"] == 0


def test_images_are_written_as_they_are_and_read_by_others(tmp_path):
    labelled_images(sample(), sample(), 14, tmp_path)
    names = [f"fashion-mnist-{part}.jsonl" for part in ("train", "heldout", "test")]
    train, held, test = (rows(tmp_path, name) for name in names)
    assert (len(train), len(held), len(test)) == (50, 14, 64)
    assert train + held == test
    for row, pixels, label in zip(test, sample().pixels_NHW, sample().labels_N, strict=True):
        file = io.BytesIO(base64.b64decode(row["image"].partition(",")[2]))
        assert np.array_equal(np.array(Image.open(file)), pixels.numpy())
        assert row["label"] == LABELS[int(label)]


def test_canvases_are_written_with_what_is_asked_of_them(tmp_path):
    parts = {"train": sample(), "test": sample()}
    report = asked_canvases(parts, {"train": 1, "heldout": 1, "test": 4}, tmp_path)
    written = rows(tmp_path, "fashion-vlm-test.jsonl")
    canvases = [compose(sample(), 0, "test", number) for number in range(4)]
    asked = [questions(canvas, 0, "test", number) for number, canvas in enumerate(canvases)]
    expected = [(each.text, each.answer) for some in asked for each in some]
    assert [(row["question"], row["text"]) for row in written] == expected
    assert report["test"]["examples"] == len(written)
    file = io.BytesIO(base64.b64decode(written[0]["image"].partition(",")[2]))
    shown = np.array(Image.open(file))
    assert shown.shape == (SIDE, SIDE)
    assert np.abs(shown / 255 - canvases[0].grey_HW.numpy()).max() <= 0.5 / 255 + 1e-6


def test_an_editorial_is_its_sentences_in_order_without_their_ratings():
    rated = "1_1\t0.4\tIt rains.\n1_2\t-1\tThey say ''so''.\n2_1\t0\tAnother\tone.\n"

    assert join_sentences(rated) == ['It rains. They say "so".', "Another\tone."]
