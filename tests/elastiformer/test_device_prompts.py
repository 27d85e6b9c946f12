"""Steps with prompts as a GPU runs them: the same answers, channels and debts as by operators.

On a CPU Triton's interpreter runs the kernels; on a GPU (`ELASTI_TEST_DEVICE=cuda`) they are
compiled.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from elastiformer import Chunk, ElasticModel, LayerPlan, Plan, Unit, dense_plan
from elastiformer.workshop import Workshop
from tests.devices import DEVICE
from tests.elastiformer.elastic import PROMPT, TOKENS, any_plan, by_thresholds, elastic, text
from tests.elastiformer.elastic import planned as planned_sequence
from tests.tiny import LAYERS, tiny

pytest.importorskip("triton", exc_type=ImportError)
device_prompts = pytest.importorskip("elastiformer.device_prompts")
device_prompt_attention = pytest.importorskip("elastiformer.device_prompt_attention")

from tests.elastiformer.test_device_decoding import (  # noqa: E402  (needs Triton)
    CLOSE,
    layer_by_layer,
    on_device,
)

DENSE = dense_plan(LAYERS)
PIECES = (4, 4, 1)  # of a prompt of 9 tokens; then one by one


@pytest.fixture(autouse=True)
def _as_on_a_device(monkeypatch):
    monkeypatch.setattr(Workshop, "takes_on_device", True)


def without(*left: int, layers: int = LAYERS) -> Plan:
    """A plan that leaves out sub-layers: attention of layer i is 2 * i, its MLP 2 * i + 1."""
    return tuple(
        LayerPlan(
            attention_tokens=float(2 * at not in left), mlp_tokens=float(2 * at + 1 not in left)
        )
        for at in range(layers)
    )


def any_without(seed: int) -> Plan:
    draw = random.Random(seed)
    return without(*(at for at in range(2 * LAYERS) if draw.random() < 0.5))


def ran(model: ElasticModel, plans: list, pieces: list) -> tuple[torch.Tensor, list, list]:
    """Requests that come one after the other, in pieces, beside those that decode already."""
    sequences = [planned_sequence(model, plan, PROMPT, TOKENS) for plan in plans]
    left = [text(seed=row)[0].tolist() for row in range(len(plans))]
    logits = []
    for step in range(2 * len(plans) + 1):
        chunks = []
        for row, sequence in enumerate(sequences):
            place = step - 2 * row
            if place < 0:
                continue
            size = pieces[row][place] if place < len(pieces[row]) else 1
            chunks.append(Chunk(sequence, left[row][:size]))
            left[row] = left[row][size:]
        logits += model.step(chunks)
    debts = [
        None if sequence.channel_debts is None else sequence.channel_debts.tolist()
        for sequence in sequences
    ]
    usages = [sequence.usage for sequence in sequences]
    for sequence in sequences:
        sequence.release()
    return torch.cat(logits), debts, usages


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """The rows of each step that these kernels ran."""
    rows, run = [], device_prompts.DevicePrompts.run

    def noted(self, h_ND, *rest):
        rows.append(len(h_ND))
        return run(self, h_ND, *rest)

    monkeypatch.setattr(device_prompts.DevicePrompts, "run", noted)
    return rows


def same(model: ElasticModel, plans: list, pieces: list) -> tuple[list, list]:
    """Both ways give the same; debts and usages."""
    expected, debts, usages = ran(layer_by_layer(model), plans, pieces)
    found, own_debts, own_usages = ran(on_device(model, 0.0), plans, pieces)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert own_debts == debts and own_usages == usages
    return debts, usages


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_at_full_capacity_it_is_the_base(family, counted):
    model = ElasticModel(tiny(family).to(DEVICE))
    whole = [model.teacher(text(seed=row).to(DEVICE))[0] for row in range(2)]
    sequences = [planned_sequence(model, (DENSE, DENSE), PROMPT, TOKENS) for _ in whole]
    on_device(model, 0.0)
    for step, (begin, end) in enumerate(((0, 5), (5, 8), (8, 12))):
        chunks = [
            Chunk(sequence, text(seed=row)[0, begin:end].tolist())
            for row, sequence in enumerate(sequences)
        ]
        logits = model.step(chunks)
        for row, of_row_RV in enumerate(logits):
            expected_RV = whole[row][max(begin, PROMPT - 1) : end]
            torch.testing.assert_close(of_row_RV, expected_RV, **CLOSE)
        assert len(counted) == step + 1


@pytest.mark.parametrize(("family", "seed"), [("llama", 1), ("qwen2", 2)])
def test_rows_that_leave_sub_layers_out_are_left_out(family, seed, counted):
    units = (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS, Unit.CHANNELS)
    model = by_thresholds(elastic(family, units, lora_rank=0))
    outputs = any_plan(seed, LAYERS, (Unit.CHANNELS,))
    late = without(*range(LAYERS, 2 * LAYERS))
    plans = [(late, outputs), (any_without(seed), DENSE), (any_without(seed + 7), outputs)]
    debts, _ = same(model, plans, [PIECES, (PROMPT,), (3, 6)])
    assert any(each is not None and np.any(each) for each in debts)
    assert len(counted) >= 4


def test_repaired_rows_are_repaired(counted):
    units = (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS, Unit.CHANNELS)
    model = by_thresholds(elastic("llama", units))
    late = without(*range(LAYERS, 2 * LAYERS))
    same(model, [(late, DENSE), (DENSE, DENSE), (late, any_plan(3, LAYERS, (Unit.CHANNELS,)))],
         [PIECES, (5, 4), (PROMPT,)])  # fmt: skip
    assert counted


def test_long_texts_go_over_several_programs(counted, monkeypatch):
    monkeypatch.setattr(device_prompt_attention, "QUERIES", 16)
    monkeypatch.setattr(device_prompt_attention, "_KEYS", 16)
    model = elastic("llama", (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS), lora_rank=0)
    late = without(*range(LAYERS, 2 * LAYERS))
    tokens, ids = 50, [text(50, seed=row)[0].tolist() for row in range(2)]
    found = []
    for form in (layer_by_layer, lambda each: on_device(each, 0.0)):
        form(model)
        sequences = [planned_sequence(model, (late, DENSE), tokens, tokens) for _ in ids]
        logits = []
        for begin, end in ((0, 23), (23, 50)):
            chunks = [
                Chunk(sequence, own[begin:end])
                for sequence, own in zip(sequences, ids, strict=True)
            ]
            logits = model.step(chunks)
        found.append(torch.cat(logits))
        for sequence in sequences:
            sequence.release()
    torch.testing.assert_close(*found, **CLOSE)
    assert counted == [46, 54]


def test_rows_of_scored_texts_take_one_after_the_other(counted):
    """Several of a request in one step, in pieces, beside a request that takes one by one."""
    model = by_thresholds(elastic("llama", (Unit.CHANNELS,), lora_rank=0))
    plans = [(DENSE, any_plan(seed, LAYERS, (Unit.CHANNELS,))) for seed in (1, 4)]
    steps = (((0, 6), (0, 4)), ((6, 9), (4, 5)), ((9, 16), (5, 12)))
    found = []
    for form in (layer_by_layer, lambda each: on_device(each, 0.0)):
        form(model)
        scored, other = (planned_sequence(model, plan, 4, TOKENS) for plan in plans)
        scored.scored = True
        logits = []
        for (begin, end), of_other in steps:
            chunks = [
                Chunk(scored, text(seed=1)[0, begin:end].tolist()),
                Chunk(other, text(seed=2)[0, slice(*of_other)].tolist()),
            ]
            logits += model.step(chunks)
        debts = [each.channel_debts.tolist() for each in (scored, other)]
        found.append((torch.cat(logits), debts, [scored.usage, other.usage]))
        scored.release()
        other.release()
    torch.testing.assert_close(found[0][0], found[1][0], **CLOSE)
    assert found[0][1:] == found[1][1:]
    assert np.any(found[0][1][0])
    assert counted == [10, 4, 14]


@pytest.mark.parametrize("rows", [1, 16, 17, 128, 129, 2048, 2049])
def test_steps_are_filled_up_by_little(rows):
    filled = device_prompts.filled(rows)
    assert rows <= filled <= max(rows * 9 / 8, rows + 15)
    assert device_prompts.filled(filled) == filled


def test_what_only_operators_know_is_theirs(counted):
    """Routers that decide, channels taken as granted, keys of those kept alone, whole texts."""
    units = (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS, Unit.CHANNELS)
    model = by_thresholds(elastic("llama", units, lora_rank=0))
    routed = any_plan(2, LAYERS, (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS))
    picking = any_plan(2, LAYERS, (Unit.CHANNELS,))
    for plans in ((routed, DENSE), (picking, DENSE)):
        same(model, [plans], [(PROMPT,)])
    kept = elastic("llama", units, lora_rank=0, kv="kept")
    same(kept, [(without(1, 2), DENSE)], [(PROMPT,)])
    assert not counted
