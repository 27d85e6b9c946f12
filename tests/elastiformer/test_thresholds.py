"""Channels by thresholds: who takes how many, that a capacity is kept, the same in every form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from elastiformer import DENSE, AdapterError, Capacity, Chunk, LayerPlan, Phase, Site, Unit
from elastiformer.calibration_reading import read_calibration
from elastiformer.capacity import dense_plan
from elastiformer.thresholds import SEARCHED, Grants, ladders, take
from tests.elastiformer.elastic import (
    PROMPT,
    TOKENS,
    any_plan,
    by_thresholds,
    cut,
    elastic,
    masked_logits,
    planned,
    run,
    text,
)
from tests.examples import examples
from tests.tiny import LAYERS

INPUTS = 120
CLOSE = {"atol": 2e-4, "rtol": 2e-4}
CHANNELS = (any_plan(1, LAYERS, (Unit.CHANNELS,)),) * 2
A_THIRD_LESS = (LayerPlan(**{site.value: 0.66 for site in Site}),) * LAYERS


def rows(tokens: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    """Tokens of very different sizes."""
    draw = np.random.default_rng(seed)
    sizes_R1 = scale * np.exp(0.5 * draw.standard_normal((tokens, 1)))
    return (sizes_R1 * draw.standard_normal((tokens, INPUTS))).astype(np.float32)


NORMS = np.linspace(0.5, 2, INPUTS, dtype=np.float32)
LADDER = np.quantile(np.abs(rows(500, seed=9)) * NORMS, np.linspace(1, 0, 33)).astype(np.float32)
LADDER[-1] = 0


def taken(x_RI: np.ndarray, granted: int, owner_R: np.ndarray | None = None, owners: int = 1):
    """How many each row takes, what these reach, and what the owners then owe."""
    rows_R = np.arange(len(x_RI))
    owner_R = np.zeros(len(x_RI), dtype=np.int64) if owner_R is None else owner_R
    beyond = [np.zeros(len(x_RI), dtype=np.int64) for _ in range(2)]
    debts_11O = np.zeros((1, 1, owners), dtype=np.int64)
    channels_111, kind_R = np.full((1, 1, 1), granted), np.zeros(len(x_RI), dtype=np.int64)
    grants = Grants(LADDER[None, None], channels_111, kind_R, owner_R, debts_11O, *beyond)
    start_S, least_R = take(x_RI, NORMS, grants, 0, 0, rows_R, 7)
    counts_R = np.diff(start_S)
    assert (beyond[0] == 7 * beyond[1]).all()
    assert (beyond[1] == counts_R - min(granted, INPUTS)).all()
    return counts_R, least_R, debts_11O[0, 0]


def test_a_token_takes_what_reaches_the_rung_that_its_grant_and_its_debt_say():
    x_RI, debt = rows(40), 0
    counts_R, least_R, debts_O = taken(x_RI, 70)
    for x_I, count, least in zip(x_RI, counts_R, least_R, strict=True):
        due = debt / 16 + (debt - np.clip(debt, -70, 70)) / 4
        rung = np.floor(32 * (70 - due) / INPUTS + 0.5)
        assert least == LADDER[int(np.clip(rung, 1, 32))]
        assert count == (np.abs(x_I) * NORMS >= least).sum()
        debt += count - 70
    assert debts_O.tolist() == [debt]
    assert len(set(counts_R.tolist())) > 20  # tokens differ


@examples(60)
@given(scale=st.floats(0.5, 2.0), granted=st.integers(20, INPUTS - 1), seed=st.integers(0, 2**20))
def test_whatever_the_text_the_mean_is_what_was_granted(scale, granted, seed):
    counts_R, _, (debt,) = taken(rows(128, scale, seed), granted)
    assert counts_R.sum() == 128 * granted + debt
    assert abs(debt) <= 0.05 * 128 * INPUTS
    nearer_R, _, (debt,) = taken(rows(128, 1.0, seed), granted)
    assert abs(debt) <= 0.02 * 128 * INPUTS and nearer_R.std() > 0


@pytest.mark.parametrize("scale", [0.4, 0.6])
@pytest.mark.parametrize("granted", [50, 70])
def test_a_token_again_and_again_owes_little_more_than_one_grant(scale, granted):
    same_RI = np.repeat(rows(1, scale, seed=3), 128, axis=0)
    counts_R, _, (debt,) = taken(same_RI, granted)
    assert len(set(counts_R.tolist())) > 1  # it is far from what the ladder was made of
    assert granted < abs(debt) <= 2.5 * granted


def test_rows_of_other_requests_between_change_nothing():
    x_RI = rows(30)
    alone, least_R, _ = taken(x_RI, 50)
    mixed_RI = np.repeat(x_RI, 2, axis=0)
    mixed_RI[1::2] *= 3
    together, both_R, _ = taken(mixed_RI, 50, np.arange(60) % 2, owners=2)
    assert (together[::2] == alone).all() and (both_R[::2] == least_R).all()


def test_whole_rows_and_rows_without_an_owner_take_their_grant():
    counts_R, least_R, debts_O = taken(rows(3), INPUTS)
    assert (counts_R == INPUTS).all() and (least_R == SEARCHED).all() and not debts_O.any()
    counts_R, least_R, debts_O = taken(rows(3), 40, np.full(3, -1))
    assert (counts_R == 40).all() and (least_R == SEARCHED).all() and not debts_O.any()


def test_what_is_no_number_is_taken_and_nothing_may_be_taken_at_all():
    x_RI = np.zeros((2, INPUTS), dtype=np.float32)
    x_RI[1, 7] = np.nan
    counts_R, _, debts_O = taken(x_RI, 60)
    assert counts_R.tolist() == [0, 1] and debts_O.tolist() == [-119]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("rank", [0, 2])
def test_cached_and_in_pieces_it_is_the_masked_form(family, rank):
    model = by_thresholds(elastic(family, (Unit.CHANNELS,), lora_rank=rank))
    ids_BT = text()
    expected = masked_logits(model, ids_BT, CHANNELS)
    for sizes in ((PROMPT,), (4, 5), (PROMPT, 6)):
        sequence = planned(model, CHANNELS, PROMPT, TOKENS)
        found = run(model, sequence, cut(ids_BT[0].tolist(), *sizes))
        torch.testing.assert_close(found, expected, **CLOSE)
        assert sequence.channel_debts.any()
    model.adapter.calibration = None
    model.attach(model.adapter)
    assert not torch.allclose(masked_logits(model, ids_BT, CHANNELS), expected, **CLOSE)


def test_prompts_and_rows_that_leave_out_more_than_channels_take_their_grant():
    model = by_thresholds(elastic(units=(Unit.CHANNELS, Unit.HEADS)))
    for plans in (
        (A_THIRD_LESS, dense_plan(LAYERS)),
        (dense_plan(LAYERS), any_plan(2, LAYERS, (Unit.CHANNELS, Unit.HEADS))),
    ):
        sequence = planned(model, plans, PROMPT, TOKENS)
        run(model, sequence, cut(text()[0].tolist(), PROMPT))
        assert sequence.channel_debts is None


def test_position_0_takes_its_grant():
    model = by_thresholds(elastic(units=(Unit.CHANNELS,), lora_rank=0))
    sequence = model.sequence(DENSE, 1, TOKENS)
    priced = model._planner.pricing[Phase.OUTPUT].of(A_THIRD_LESS)
    sequence._plan_at = lambda phase, position: priced
    model.step([Chunk(sequence, [5])])
    assert sequence.channel_debts is None
    assert sequence.usage.block_flops == model.shape.planned_token_flops(A_THIRD_LESS, 1)


@pytest.mark.parametrize("tokens", [1, 4])
def test_usage_is_what_pytorch_counts(tokens):
    model = by_thresholds(elastic(units=(Unit.CHANNELS,)))
    sequence = planned(model, CHANNELS, PROMPT, TOKENS)
    model.step([Chunk(sequence, text(PROMPT)[0].tolist())])
    before = sequence.usage.flops
    with FlopCounterMode(display=False) as counter:
        model.step([Chunk(sequence, text(tokens, seed=5)[0].tolist())])
    assert sequence.usage.flops - before == counter.get_total_flops()


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("capacity", [0.8, 0.9])
def test_a_request_spends_what_it_asked(capacity, scored):
    model = by_thresholds(elastic(units=(Unit.CHANNELS,), lora_rank=0))
    asked = Capacity(prompt=1.0, output=capacity)
    prompt = 128 if scored else 1
    sequence = model.sequence(asked, prompt, 128, scored=scored)
    run(model, sequence, cut(text(128)[0].tolist(), prompt))
    skipped = sequence.usage.unit_skipped(Unit.CHANNELS)
    assert abs(sequence.usage.capacity_spent - capacity) <= 0.02
    assert 0 < skipped < sequence.usage.unit_routed(Unit.CHANNELS)


def test_quantiles_that_cannot_be_are_named():
    model = by_thresholds(elastic(units=(Unit.CHANNELS,)))
    calibration = model.adapter.calibration
    stored = calibration.as_json()
    assert read_calibration(stored) == calibration
    assert ladders(()) is None
    assert calibration.misfits(LAYERS, (Unit.CHANNELS,)) == []
    (misfit,) = calibration.misfits(LAYERS + 1, (Unit.CHANNELS,))
    assert f"quantiles of {LAYERS} layers, this model has {LAYERS + 1}" in misfit
    by_site = stored["channel_quantiles"]
    for site, values, says in (
        ("mlp_in", by_site["mlp_in"][:-1], "as many layers"),
        ("mlp_in", [[2.0, 1.0]] * LAYERS, "must not fall"),
        ("mlp_out", [[-1.0, 1.0]] * LAYERS, "a finite number, at least 0; got -1"),
        ("attention_in", None, "channel_quantiles.attention_in: a list is expected"),
    ):
        wrong = stored | {"channel_quantiles": by_site | {site: values}}
        with pytest.raises(AdapterError, match=says):
            read_calibration(wrong)
