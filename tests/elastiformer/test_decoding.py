"""Decode steps in one call for many layers give the bits that the sub-layers' parts give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from elastiformer import DENSE, Chunk, ElasticModel, Unit, dense_plan
from elastiformer.costs import TRIAL_TURNS
from elastiformer.decoding import Decoding
from elastiformer.sparse import SparseForm
from tests.devices import cpu_only
from tests.elastiformer.elastic import (
    PROMPT,
    TOKENS,
    any_plan,
    by_thresholds,
    elastic,
    planned,
    text,
)
from tests.tiny import LAYERS, WINDOW, tiny

pytestmark = cpu_only  # where decode steps are one call
ROWS = 3


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch, may: bool) -> Iterator[list[int]]:
    """How many rows each step had that went this way; none, where it may not."""
    run, fits, rows = Decoding.run, Decoding.fits, []

    def noted(self, h_ND, packed, *rest):
        rows.append(packed.count)
        run(self, h_ND, packed, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Decoding, "run", noted)
        if not may:
            patched.setattr(Decoding, "fits", lambda self, packed: False)
        else:
            patched.setattr(Decoding, "fits", fits)
        yield rows


def decoded(model: ElasticModel, plans: list, rows: int, steps: int = 4) -> torch.Tensor:
    """Logits of some steps, after prompts of different lengths."""
    sequences = [planned(model, plans[row % len(plans)], PROMPT, TOKENS) for row in range(rows)]
    ids = [text(PROMPT + steps, seed=row)[0].tolist() for row in range(rows)]
    for sequence, own in zip(sequences, ids, strict=True):
        model.step([Chunk(sequence, own[:PROMPT])])
    logits = []
    for step in range(PROMPT, PROMPT + steps):
        chunks = [Chunk(s, [own[step]]) for s, own in zip(sequences, ids, strict=True)]
        logits += model.step(chunks)
    return torch.cat(logits)


def channel_plans() -> list:
    """Dense; channels; other channels."""
    dense = (dense_plan(LAYERS), dense_plan(LAYERS))
    drawn = [any_plan(seed, LAYERS, (Unit.CHANNELS,)) for seed in (1, 2)]
    return [dense, (drawn[0], drawn[0]), (drawn[1], drawn[1])]


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("thresholds", [False, True])
def test_the_bits_are_those_of_the_parts(family, rows, dtype, thresholds, monkeypatch):
    model = elastic(family, (Unit.CHANNELS,), lora_rank=0)
    if thresholds:
        by_thresholds(model)
    model.base.to(dtype)
    model.attach(model.adapter)
    with counting(monkeypatch, may=False) as none:
        expected = decoded(model, channel_plans(), rows)
    with counting(monkeypatch, may=True) as steps:
        found = decoded(model, channel_plans(), rows)
    assert torch.equal(found, expected)
    assert none == [] and steps == [rows] * 4


@pytest.mark.parametrize("rows", [1, ROWS])
def test_where_layers_hold_keys_of_other_tokens_too(rows, monkeypatch):
    """With `kv: kept`, a prompt's tokens that skip a layer's attention leave nothing there."""
    model = elastic("llama", (Unit.ATTENTION_TOKENS, Unit.CHANNELS), kv="kept", lora_rank=0)
    skipping = any_plan(5, LAYERS, (Unit.ATTENTION_TOKENS,))
    plans = [(skipping, output) for _, output in channel_plans()]
    with counting(monkeypatch, may=False) as none:
        expected = decoded(model, plans, rows)
    with counting(monkeypatch, may=True) as steps:
        found = decoded(model, plans, rows)
    assert torch.equal(found, expected)
    assert none == [] and steps == [rows] * 4
    sequence = planned(model, plans[0], PROMPT, TOKENS)
    ids = text(PROMPT + 1)[0].tolist()
    model.step([Chunk(sequence, ids[:PROMPT])])
    held = sequence.cache.length_L.copy()
    assert len(set(held.tolist())) > 1  # layers differ
    model.step([Chunk(sequence, ids[PROMPT:])])
    assert (sequence.cache.length_L == held + 1).all()
    assert all(sequence.cache.positions_K(layer)[-1] == PROMPT for layer in range(LAYERS))


def test_many_rows_try_both_ways_and_get_the_same_bits(monkeypatch):
    model = elastic("llama", (Unit.CHANNELS,), lora_rank=0)
    rows, steps = 12, 12  # more rows than a table without measurements sends row by row
    with counting(monkeypatch, may=False):
        expected = decoded(model, channel_plans(), rows, steps)
    with counting(monkeypatch, may=True) as whole:
        found = decoded(model, channel_plans(), rows, steps)
    assert torch.equal(found, expected)
    assert set(whole) == {rows}
    assert TRIAL_TURNS <= len(whole) <= steps - TRIAL_TURNS  # and then the faster one has all


def test_many_rows_of_bfloat16_try_both_ways_and_differ_by_its_rounding(monkeypatch):
    model = elastic("llama", (Unit.CHANNELS,), lora_rank=0)
    model.base.to(torch.bfloat16)
    model.attach(model.adapter)
    rows, steps = 12, 12
    plans = channel_plans()[:1]  # of two nearly equal channels rounding may pick either
    with counting(monkeypatch, may=False):
        expected = decoded(model, plans, rows, steps)
    with counting(monkeypatch, may=True) as whole:
        found = decoded(model, plans, rows, steps)
    assert TRIAL_TURNS <= len(whole) <= steps - TRIAL_TURNS
    assert 0 < (found - expected).std() < 0.03 * expected.std()


@pytest.mark.parametrize(
    ("family", "what"),
    [
        ("qwen3", "norms of queries and keys"),
        ("gemma2", "capped scores"),
        ("gpt2", "no gate"),
        ("mistral", "a window that hides keys"),
    ],
)
def test_what_it_does_not_know_goes_by_the_parts(family, what, monkeypatch):
    assert PROMPT > WINDOW
    model = ElasticModel(tiny(family))
    with counting(monkeypatch, may=True) as steps:
        decoded(model, [(dense_plan(LAYERS), dense_plan(LAYERS))], 1)
    assert steps == [], what


@pytest.mark.parametrize("unit", [Unit.MLP_TOKENS, Unit.HEADS, Unit.EXPERTS])
def test_rows_that_leave_more_than_channels_out_go_by_the_parts(unit, monkeypatch):
    model = elastic("llama", (unit,))
    plan = any_plan(3, LAYERS, (unit,))
    with counting(monkeypatch, may=True) as steps:
        decoded(model, [(plan, plan)], 1)
    assert steps == []


def test_rows_that_are_repaired_go_by_the_parts(monkeypatch):
    model = elastic("llama", (Unit.CHANNELS,), lora_rank=2)
    with counting(monkeypatch, may=True) as steps:
        decoded(model, channel_plans()[1:], 1)
    assert steps == []


def test_a_chunk_of_a_prompt_goes_by_the_parts(monkeypatch):
    model = ElasticModel(tiny())
    sequence = model.sequence(DENSE, PROMPT, TOKENS)
    with counting(monkeypatch, may=True) as steps:
        model.step([Chunk(sequence, text(1)[0].tolist())])
        model.step([Chunk(sequence, text(2)[0].tolist())])
    assert steps == []


@pytest.mark.parametrize("thresholds", [False, True])
def test_beside_prompts_both_ways_are_tried_and_give_the_same_bits(thresholds, monkeypatch):
    model = elastic("llama", (Unit.CHANNELS,), lora_rank=0)
    if thresholds:
        by_thresholds(model)
    (_, plans, others), steps = channel_plans(), 2 * TRIAL_TURNS + 2

    def logits() -> tuple[torch.Tensor, list]:
        running = [planned(model, each, PROMPT, TOKENS) for each in (plans, others)]
        for row, sequence in enumerate(running):
            ids = text(PROMPT, seed=row)[0].tolist()
            for piece in (ids[:-1], ids[-1:]):  # as the end of a prompt that picks runs apart
                model.step([Chunk(sequence, piece)])
        found = []
        for step in range(steps):
            prompt = planned(model, (plans[0], dense_plan(LAYERS)), PROMPT, TOKENS)
            chunks = [Chunk(each, [step + row]) for row, each in enumerate(running)]
            chunks.insert(1, Chunk(prompt, text(PROMPT, seed=9)[0].tolist()))
            found += model.step(chunks)
        return torch.cat(found), [each.usage for each in running]

    with monkeypatch.context() as patched:
        patched.setattr(Decoding, "may_run_apart", False)
        expected, usages = logits()
    ran, run_apart = [], SparseForm._run_apart

    def noted(self, chunks, parts):
        ran.append([len(part) for part in parts])
        return run_apart(self, chunks, parts)

    monkeypatch.setattr(SparseForm, "_run_apart", noted)
    found, counted = logits()
    assert torch.equal(found, expected) and counted == usages
    assert TRIAL_TURNS <= len(ran) <= steps - TRIAL_TURNS and ran[0] == [2, 1]
