"""The promises that hold the library together, on real models of every family."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from elastiformer import DENSE, Capacity, Chunk, ElasticModel, LayerPlan, Phase, Unit, dense_plan
from elastiformer.accounting import layer_cost, repaired_from
from tests.elastiformer.elastic import (
    EVERY_UNIT,
    PROMPT,
    TOKENS,
    any_plan,
    cut,
    elastic,
    masked_logits,
    planned,
    run,
    text,
)
from tests.tiny import LAYERS, tiny

PLANS = (any_plan(1, LAYERS), any_plan(2, LAYERS))
DENSE_PLANS = (dense_plan(LAYERS), dense_plan(LAYERS))
CLOSE = {"atol": 2e-4, "rtol": 2e-4}  # float32, other shapes, so other rounding


# 1. Capacity 1.0 is the pretrained model.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_plan_is_the_pretrained_model_bit_for_bit(family, dtype):
    model = elastic(family)
    model.base.to(dtype)
    ids_BT = torch.cat([text(seed=1), text(seed=2)])
    with torch.inference_mode():
        expected = tiny(family).to(dtype)(ids_BT).logits
        actual = model.masked(
            ids_BT, [DENSE_PLANS] * 2, torch.ones_like(ids_BT, dtype=torch.bool)
        ).logits_BTV

    assert torch.equal(actual, expected)


def test_packed_dense_rows_are_the_pretrained_model_to_rounding(family):
    model, ids_BT = elastic(family), text()
    with torch.inference_mode():
        expected = tiny(family)(ids_BT).logits[0, PROMPT - 1 :]
    sequence = model.sequence(DENSE, PROMPT, TOKENS)
    actual = run(model, sequence, cut(ids_BT[0].tolist(), 4, PROMPT - 4))

    torch.testing.assert_close(actual, expected, **CLOSE)
    # Of the last layer, prompt tokens need keys and values only; what else is dense is spent.
    usage, unread = sequence.usage, _unread_flops(model)
    assert usage.flops == usage.dense_flops - unread
    assert usage.routed == {}


def _unread_flops(model: ElasticModel) -> int:
    """What the prompt tokens of the request above leave out of the last layer."""
    layer = model.shape.layers[-1]
    whole = layer_cost(layer, LayerPlan(), "complete", True)
    unread = layer_cost(layer, LayerPlan(), "complete", True, unread=True)
    keys = 4 * 4 + (PROMPT - 4 - 1) * PROMPT  # of two chunks, the last prompt token aside
    per_token = whole.attention_kept - unread.attention_kept + whole.mlp_kept
    return (PROMPT - 1) * per_token + keys * whole.attention_per_key


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_router_and_no_repair_runs_for_a_dense_row_beside_a_routed_one(family):
    """Adapter weights that are not numbers would poison any row that met them."""
    model, ids = elastic(family), text()[0].tolist()
    expected = run(model, model.sequence(DENSE, PROMPT, TOKENS), cut(ids, PROMPT))
    for parameter in model.trainable().values():
        parameter.data.fill_(torch.nan)
    dense = model.sequence(DENSE, PROMPT, TOKENS)
    units = tuple(unit for unit in EVERY_UNIT if unit not in (Unit.HEADS, Unit.EXPERTS))
    poisoned = (any_plan(1, LAYERS, units), any_plan(2, LAYERS, units))
    routed = planned(model, poisoned, PROMPT, TOKENS)
    actual = []
    for piece in cut(ids, PROMPT):
        actual.append(model.step([Chunk(routed, piece), Chunk(dense, piece)])[1])

    torch.testing.assert_close(torch.cat(actual), expected, **CLOSE)


# 2. Skipping is skipping.


@pytest.mark.parametrize(("kv", "phases"), [("complete", "prompt"), ("kept", "shared")])
def test_usage_counts_what_pytorch_counts(family, kv, phases):
    model, ids = elastic(family, kv=kv, lora_phases=phases), text()[0].tolist()
    sequence = planned(model, PLANS, PROMPT, TOKENS)
    with FlopCounterMode(display=False) as counter:
        run(model, sequence, cut(ids, PROMPT))

    assert sequence.usage.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert sequence.usage.flops < 0.9 * sequence.usage.dense_flops


GONE = LayerPlan(attention_tokens=0.0, mlp_tokens=0.0)
PICKED = LayerPlan(mlp_in=0.5, mlp_out=0.5)
WHOLE = LayerPlan()
# Plans that leave nothing out at first, and where their repair begins.
LATER = [
    ((WHOLE, WHOLE, WHOLE), 3),
    ((WHOLE, GONE, GONE), 2),
    ((WHOLE, WHOLE, GONE), 3),
    ((WHOLE, PICKED, WHOLE), 1),
    ((PICKED, WHOLE, WHOLE), 0),
    ((GONE, WHOLE, WHOLE), 1),
    ((WHOLE, LayerPlan(attention_tokens=0.5), PICKED), 2),
    ((WHOLE, LayerPlan(attention_tokens=0.5, mlp_in=0.5), WHOLE), 1),
]


@pytest.mark.parametrize(("plan", "begins"), LATER)
def test_repair_begins_after_the_first_thing_left_out(plan, begins):
    assert repaired_from(plan) == begins


@pytest.mark.parametrize("kv", ["complete", "kept"])
@pytest.mark.parametrize("phases", ["shared", "split", "prompt"])
@pytest.mark.parametrize("plan", [plan for plan, _ in LATER])
def test_a_repair_that_begins_late_is_the_same_in_both_forms_and_counted(plan, phases, kv):
    """Also for position 0, which skips no sub-layer, and beside rows that begin elsewhere."""
    model, ids_BT = elastic(kv=kv, lora_phases=phases), text()
    plans = (plan, PLANS[1])
    expected = masked_logits(model, ids_BT, plans)
    sequence, mate = (planned(model, each, PROMPT, TOKENS) for each in (plans, PLANS))
    pieces, rows = cut(ids_BT[0].tolist(), PROMPT), []
    for piece in pieces:
        rows.append(model.step([Chunk(sequence, piece), Chunk(mate, piece)])[0])
    torch.testing.assert_close(torch.cat(rows), expected, **CLOSE)

    alone = planned(model, plans, PROMPT, TOKENS)
    with FlopCounterMode(display=False) as counter:
        run(model, alone, pieces)
    assert alone.usage.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert alone.usage.flops == sequence.usage.flops


def test_a_repair_that_training_changes_is_served_as_it_is_then():
    model, ids_BT = elastic(), text()
    pieces = cut(ids_BT[0].tolist(), PROMPT)
    before = run(model, planned(model, PLANS, PROMPT, TOKENS), pieces)
    with torch.no_grad():
        for name, parameter in model.trainable().items():
            if name.startswith("lora"):
                parameter.mul_(1.5)
    after = run(model, planned(model, PLANS, PROMPT, TOKENS), pieces)
    torch.testing.assert_close(after, masked_logits(model, ids_BT, PLANS), **CLOSE)
    assert not torch.allclose(after, before, **CLOSE)


def test_what_was_computed_before_anything_was_left_out_is_not_repaired():
    model, ids_BT = elastic(lora_phases="prompt", lora_parts=("key", "value")), text()
    last = (WHOLE, WHOLE, GONE)
    before = masked_logits(model, ids_BT, (last, DENSE_PLANS[0]))
    with torch.no_grad():
        for name, parameter in model.trainable().items():
            if name.startswith("lora"):
                parameter.mul_(100.0)
    # Keys and values of the layer that is left are exact, too: all are as in the base.
    assert torch.equal(masked_logits(model, ids_BT, (last, DENSE_PLANS[0])), before)
    torch.testing.assert_close(before, masked_logits(model, ids_BT, DENSE_PLANS), **CLOSE)


def test_a_layer_that_no_token_keeps_costs_no_product_and_changes_nothing():
    model, ids = elastic(units=[Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS], lora_rank=0), text()
    nothing = Capacity.parse({"attention_tokens": 0.01, "mlp_tokens": 0.01})
    plans = tuple(model.plans(nothing, TOKENS))
    zero = tuple(type(layer)(attention_tokens=0.0, mlp_tokens=0.0) for layer in plans[0])
    sequence = planned(model, (zero, zero), PROMPT, TOKENS)
    # Position 0 is never skipped; what comes after it costs the keys and values, and no more.
    run(model, sequence, cut(ids[0].tolist(), 1))
    first = sequence.usage.block_flops
    assert first > 0
    width, kv_width = model.shape.width, model.shape.layers[0].kv_width
    rest = sequence.usage.block_flops - _first_token_flops(model)
    assert rest == (TOKENS - 1) * LAYERS * 2 * width * 2 * kv_width


def _first_token_flops(model: ElasticModel) -> int:
    sequence = planned(model, DENSE_PLANS, PROMPT, TOKENS)
    run(model, sequence, [text()[0, :1].tolist()])
    return sequence.usage.block_flops


# 4. Causal, and cached = uncached. 6. Masked = sparse.


@pytest.mark.parametrize("kv", ["complete", "kept"])
@pytest.mark.parametrize("phases", ["shared", "split", "prompt"])
def test_cached_decoding_is_the_masked_form_over_the_whole_text(family, kv, phases):
    model, ids_BT = elastic(family, kv=kv, lora_phases=phases), text()
    expected = masked_logits(model, ids_BT, PLANS)
    sequence = planned(model, PLANS, PROMPT, TOKENS)
    actual = run(model, sequence, cut(ids_BT[0].tolist(), PROMPT))

    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize(
    "units", [c for n in (1, 2) for c in itertools.combinations(EVERY_UNIT, n)], ids="+".join
)
def test_masked_and_sparse_agree_for_any_subset_of_units(units):
    plans = (any_plan(3, LAYERS, units), any_plan(4, LAYERS, units))
    model, ids_BT = elastic(units=units, kv="kept"), text()
    expected = masked_logits(model, ids_BT, plans)
    actual = run(
        model, planned(model, plans, PROMPT, TOKENS), cut(ids_BT[0].tolist(), 3, PROMPT - 3)
    )

    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("token_gate", ["hard", "sigmoid", "raw"])
@pytest.mark.parametrize("part_gate", ["hard", "softmax", "renormalised", "mean"])
def test_masked_and_sparse_agree_for_every_form_of_gate(token_gate, part_gate):
    model = elastic("gemma3", token_gate=token_gate, part_gate=part_gate)
    ids_BT = text()
    expected = masked_logits(model, ids_BT, PLANS)
    actual = run(model, planned(model, PLANS, PROMPT, TOKENS), cut(ids_BT[0].tolist(), PROMPT))

    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("kv", ["complete", "kept"])
def test_a_later_token_never_changes_an_earlier_one(family, kv):
    model, ids_BT = elastic(family, kv=kv), text()
    changed_BT = ids_BT.clone()
    changed_BT[0, 17:] = text(seed=11)[0, 17:]
    before = masked_logits(model, ids_BT, PLANS)[: 17 - PROMPT + 1]
    after = masked_logits(model, changed_BT, PLANS)[: 17 - PROMPT + 1]

    torch.testing.assert_close(after, before, **CLOSE)


# 5. Batch-mates, chunks and capacities don't change each other.


@pytest.mark.parametrize("kv", ["complete", "kept"])
def test_batch_mates_do_not_change_each_other(family, kv):
    model = elastic(family, kv=kv)
    other_plans = (any_plan(5, LAYERS), any_plan(6, LAYERS))
    requests = [(text(seed=1), PLANS), (text(seed=2), DENSE_PLANS), (text(seed=4), other_plans)]
    alone = [
        run(model, planned(model, plans, PROMPT, TOKENS), cut(ids[0].tolist(), PROMPT))
        for ids, plans in requests
    ]
    # Together, each prompt cut elsewhere, so that prefill chunks meet decode steps.
    cuts = [cut(requests[0][0][0].tolist(), 2, 7), cut(requests[1][0][0].tolist(), 9)]
    cuts.append(cut(requests[2][0][0].tolist(), 1, 1, 1, 6))
    sequences = [planned(model, plans, PROMPT, TOKENS) for _, plans in requests]
    together: list[list[torch.Tensor]] = [[], [], []]
    for pieces in itertools.zip_longest(*cuts):
        here = [at for at, piece in enumerate(pieces) if piece]
        logits = model.step([Chunk(sequences[at], pieces[at]) for at in here])
        for at, rows in zip(here, logits, strict=True):
            together[at].append(rows)

    for mixed, single in zip(together, alone, strict=True):
        torch.testing.assert_close(torch.cat(mixed), single, **CLOSE)


# What is kept, and for whom.


def test_the_cache_shrinks_where_skipped_tokens_leave_no_keys():
    ids = text()[0].tolist()
    sizes = {}
    for kv in ("complete", "kept"):
        model = elastic(units=[Unit.ATTENTION_TOKENS], kv=kv)
        share = Capacity.parse({"attention_tokens": 0.5})
        sequence = model.sequence(share, TOKENS, TOKENS)
        run(model, sequence, [ids])
        sizes[kv] = sequence.cache_bytes
    assert sizes["kept"] <= 0.6 * sizes["complete"]


def test_the_last_prompt_token_is_output_and_a_scored_prompt_is_all_output():
    model = elastic()
    sequence = model.sequence(DENSE, PROMPT, TOKENS)
    phases = [sequence.phase_at(position) for position in range(PROMPT + 1)]
    assert phases == [Phase.PROMPT] * (PROMPT - 1) + [Phase.OUTPUT] * 2
    scored = model.sequence(DENSE, PROMPT, TOKENS, scored=True)
    assert {scored.phase_at(position) for position in range(PROMPT)} == {Phase.OUTPUT}


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("unit", [Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS])
def test_a_token_share_is_kept_however_the_router_scores(unit, share):
    model = elastic(units=[unit])
    tokens = 200
    ids_BT = text(tokens)
    grid = tuple(model.plans(Capacity.parse({unit.value: share}), tokens))
    for bias in (-9.0, 0.0, 9.0):  # a router that would keep none, some, all
        for name, parameter in model.trainable().items():
            if name.endswith("bias"):
                parameter.data.fill_(bias)
        with torch.no_grad():
            output_BT = torch.ones_like(ids_BT, dtype=torch.bool)
            routes = model.masked(ids_BT, [grid], output_BT).routes
        for route in routes:
            assert route.kept.float().mean().item() == pytest.approx(share, abs=0.02)
            assert bool(route.kept[0, 0])
