"""The embedded vision-language model answers, also with few of its image tokens."""

from __future__ import annotations

from dataclasses import replace
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


@pytest.fixture(scope="module")
def whole(model, exchanges):
    return answered(model, exchanges, DENSE)


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


def test_it_answers_and_still_does_with_two_fifths_of_an_image(model, exchanges, whole):
    right, all_tokens = whole
    few, some_tokens = answered(model, exchanges, FEW)
    assert set(all_tokens) == {model.sight.tokens}
    assert set(some_tokens) == {round(0.4 * model.sight.tokens)}
    assert sum(right) >= 0.75 * len(exchanges)
    assert sum(few) >= sum(right) - 2


def spent_with(model: ElasticVlm, capacity: Capacity, exchange: Exchange, new: int):
    """What prompt and answer spent, and the answer's part alone, after so many generated tokens."""
    prompt = model.prompt(capacity, exchange.prompt, [picture_in(exchange, model)])
    sequence = model.imaged_sequence(prompt, new)
    (logits,) = model.step([Chunk(sequence, list(prompt.ids))])
    of_prompt = replace(sequence.usage)
    for _ in range(new - 1):
        (logits,) = model.step([Chunk(sequence, [int(logits[-1].argmax())])])
    sequence.release()
    usage = sequence.usage
    spent = usage.block_flops - of_prompt.block_flops
    dense = usage.dense_block_flops - of_prompt.dense_block_flops
    return usage.capacity_spent, spent / dense if dense else None


@pytest.mark.parametrize("capacity", [0.5, 0.25])
@pytest.mark.parametrize("new", [1, 8, 128])
def test_a_number_is_kept_however_long_the_answer_is(model, exchanges, capacity, new):
    spent, _ = spent_with(model, Capacity(capacity, capacity), exchanges[0], new)
    assert spent == pytest.approx(capacity, abs=0.02)


@pytest.mark.parametrize("prompt", [1.0, 0.4])
def test_a_share_of_what_is_generated_is_kept(model, exchanges, prompt):
    _, spent = spent_with(model, Capacity(prompt, 0.5), exchanges[0], 64)
    assert spent == pytest.approx(0.5, abs=0.02)


def test_text_without_an_image_keeps_a_capacity(model):
    ids = model.tokenizer.encode("It was a day like any other, and nobody thought of it. " * 12)
    for capacity in (0.9, 0.5, 0.25):
        sequence = model.sequence(Capacity(capacity, capacity), len(ids), len(ids) + 24)
        model.step([Chunk(sequence, ids)])
        for token in ids[:23]:
            model.step([Chunk(sequence, [token])])
        assert sequence.usage.capacity_spent == pytest.approx(capacity, abs=0.02)
        sequence.release()


@pytest.mark.parametrize("tokens", [1, 9, 150, 2000, 8000])
def test_no_length_of_a_prompt_or_an_answer_is_out_of_reach(model, exchanges, tokens):
    each = exchanges[0]
    picture = picture_in(each, model)
    for capacity in (0.25, 0.31, 0.5, 0.77, 0.99):
        asked = Capacity(capacity, capacity)
        model.blocks_for(asked, tokens, tokens)
        model.blocks_for(asked, tokens, tokens, scored=True)
        model.blocks_for(asked, 1, tokens)
        prompt = model.prompt(asked, [*each.prompt, *[9] * tokens], [picture])
        model.blocks_for(prompt.capacity, len(prompt.ids), len(prompt.ids) + 10)


def test_a_number_for_all_answers_as_well_as_image_tokens_alone(model, exchanges, whole):
    """An answer begins with whole tokens."""
    right, _ = answered(model, exchanges, Capacity(0.25, 0.25))
    assert sum(right) >= sum(whole[0]) - 2


def test_every_capacity_was_measured_on_answers(model):
    rows = model.calibration.measured
    assert [row.capacity for row in rows] == sorted((r.capacity for r in rows), reverse=True)
    assert all(row.accuracy is not None and row.kl_text is not None for row in rows)
