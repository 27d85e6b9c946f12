"""The embedded vision-language model answers, also with few of its image tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

import elastiformer
from elastiformer import DENSE, Capacity, Chunk
from elastiformer.capacity import UnitShares
from elastiformer.vlm import ElasticVlm
from tests.training.fashion import sample
from training.canvases import SIDE, compose, questions
from training.corpora import data_uri
from training.exchanges import Exchange, exchange_of, picture_in

ADAPTER = Path(elastiformer.__file__).parent / "adapters" / "fashion-vlm"
FEW = Capacity(UnitShares(image_tokens=0.4), 1.0)
CANVASES = 8


@pytest.fixture(scope="module")
def model():
    return ElasticVlm.load("fashion-vlm", ADAPTER, dtype="float32")


@pytest.fixture(scope="module")
def exchanges(model):
    found = []
    for number in range(CANVASES):
        canvas = compose(sample(), 0, "heldout", number)
        image = data_uri(canvas.grey_HW.mul(255).round().byte(), SIDE)
        for asked in questions(canvas, 0, "heldout", number):
            record = {"image": image, "question": asked.text, "text": asked.answer}
            found.append(exchange_of(record, "a test", Path(), model))
    return found


def answered(model: ElasticVlm, exchanges: list[Exchange], capacity: Capacity):
    """Which answers are right, read off one pass; and what each prompt keeps of its image."""
    right, kept = [], []
    for each in exchanges:
        prompt = model.prompt(capacity, each.prompt, [picture_in(each, model)])
        sequence = model.imaged_sequence(prompt, len(each.answer))
        (logits,) = model.step([Chunk(sequence, [*prompt.ids, *each.answer[:-1]])])
        right.append(logits.argmax(-1).tolist() == list(each.answer))
        kept.append(sum(placed.kept for placed in prompt.pictures))
        sequence.release()
    return right, kept


def test_it_answers_and_still_does_with_two_fifths_of_an_image(model, exchanges):
    whole, all_tokens = answered(model, exchanges, DENSE)
    few, some_tokens = answered(model, exchanges, FEW)
    assert set(all_tokens) == {model.sight.tokens}
    assert set(some_tokens) == {round(0.4 * model.sight.tokens)}
    assert sum(whole) >= 0.75 * len(exchanges)
    assert sum(few) >= sum(whole) - 2


def test_every_capacity_was_measured_on_answers(model):
    rows = model.calibration.measured
    assert [row.capacity for row in rows] == sorted((r.capacity for r in rows), reverse=True)
    assert all(row.accuracy is not None for row in rows)
