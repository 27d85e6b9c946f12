"""A few rows that pick channels, beside many that do not: treated by themselves."""

from __future__ import annotations

import pytest
import torch

from elastiformer import Capacity, Chunk, Unit, workshop
from tests.elastiformer.elastic import by_thresholds, elastic, text

PROMPT = 60  # tokens, all whole but for the last, whose logits are read


def answer(model, capacity=None):
    ids = text(PROMPT)[0].tolist()
    sequence = model.sequence(capacity or Capacity(1.0, 0.75), PROMPT, PROMPT + 2)
    (logits_RV,) = model.step([Chunk(sequence, ids)])
    usage = sequence.usage
    sequence.release()
    return logits_RV, (usage.flops, usage.dense_flops, usage.parameters_used)


@pytest.fixture
def model():
    return by_thresholds(elastic(units=[Unit.CHANNELS], lora_rank=0))


@pytest.fixture
def split(monkeypatch):
    """Counts the readings of which a few rows picked."""
    seen = []
    picked = workshop.Workshop.picked

    def noting(self, layer, site, x_RI, packed, rows, own=False):
        seen.append(rows.count)
        return picked(self, layer, site, x_RI, packed, rows, own)

    monkeypatch.setattr(workshop.Workshop, "picked", noting)
    return seen


def test_they_get_the_same_bits(model, split, monkeypatch):
    by_itself_RV, spent = answer(model)
    assert set(split) == {1}
    split.clear()
    monkeypatch.setattr(workshop, "_WHOLE", float("inf"))
    together_RV, spent_together = answer(model)
    assert PROMPT in split  # all but in the last layer, which runs no other row
    assert torch.equal(by_itself_RV, together_RV)
    assert spent == spent_together


def test_in_bfloat16_others_come_rounded_and_these_do_not(model, split, monkeypatch):
    model.base.to(torch.bfloat16)
    model.attach(model.adapter)
    by_itself_RV, spent = answer(model)
    assert set(split) <= {1, PROMPT}  # where so many rows go row by row, all go the same way
    monkeypatch.setattr(workshop, "_WHOLE", float("inf"))
    together_RV, _ = answer(model)
    assert (by_itself_RV - together_RV).abs().max() < 0.05 * together_RV.abs().max()
    dense_RV, dense_spent = answer(model, Capacity(1.0, 1.0))
    assert spent[0] < dense_spent[0] and not torch.equal(by_itself_RV, dense_RV)
