"""A few rows that pick channels, beside many that do not: treated by themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from elastiformer import Capacity, Chunk, Site, Unit, UnitShares, workshop
from elastiformer.packed import Packed
from elastiformer.thresholds import SEARCHED
from tests.devices import cpu_only
from tests.elastiformer.elastic import by_thresholds, elastic, text

PROMPT = 60  # tokens, all whole but for the last, whose logits are read
LAST_PICKS = Capacity(1.0, UnitShares(channels=0.75))


def answer(model, capacity=None):
    ids = text(PROMPT)[0].tolist()
    sequence = model.sequence(capacity or LAST_PICKS, PROMPT, PROMPT + 2)
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


@cpu_only  # a GPU runs such a step otherwise
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


@cpu_only  # where it is the host that tells
def test_who_reads_the_same_site_again_is_told_the_same_and_others_take_all(model):
    """Keys are read of all rows, of which one picks; queries of so few that it is not split off."""
    sequence = model.sequence(LAST_PICKS, PROMPT, PROMPT + 2)
    tools = model._sparse.workshop
    packed = Packed([Chunk(sequence, text(PROMPT)[0].tolist())], model.device)
    allowances = tools.allowances(packed)
    norms_I = tools.layout.column_norms(tools.layout.layers[0], Site.ATTENTION_IN).numpy()
    x_RI = torch.randn(PROMPT, len(norms_I)).numpy()
    last, some = packed.picking.rows_R, np.array([2, 7, PROMPT - 1])
    first = allowances.take(0, 0, last, x_RI[last], norms_I)
    start_S, least_R = allowances.take(0, 0, some, x_RI[some], norms_I)
    assert np.diff(start_S).tolist() == [len(norms_I), len(norms_I), first[0][1]]
    assert least_R.tolist() == [SEARCHED, SEARCHED, first[1][0]]
    assert first[0][1] < len(norms_I)
