"""Class tokens that read the others without keys: the same answers, for less work."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from elastiformer import (
    DENSE,
    Capacity,
    Chunk,
    ElasticModel,
    LayerPlan,
    Phase,
    Plan,
    Unit,
    UnitShares,
    direct_reading,
)
from elastiformer.calibration import Calibration, Step
from elastiformer.encoder import ElasticEncoder
from elastiformer.sequence import Item, ItemKinds, Kind, WholeSequence
from tests.elastiformer.test_encoders import (
    CLOSE,
    elastic_encoder,
    items,
    masked_outputs,
    planned,
    stepped,
)
from tests.tiny import tiny
from tests.tiny_encoders import LAYERS, tiny_encoder

FAMILIES = ("bert", "distilbert", "vit", "deit", "clip-projected")
WHOLE, GONE = LayerPlan(), LayerPlan(attention_tokens=0.0, mlp_tokens=0.0)
DENSE_PLAN = (WHOLE,) * LAYERS
TOKEN_UNITS = (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS)


def leaving(first: int) -> Plan:
    return (WHOLE,) * first + (GONE,) * (LAYERS - first)


def without_keys(model: ElasticEncoder, item: Item, *prompts: Plan) -> WholeSequence:
    """A request whose other tokens run under these plans by turns, and class tokens whole."""
    direct, pricing = model.shape.direct(*prompts), model._planner.pricing
    others = [Kind(pricing[Phase.PROMPT].of(plan, direct), Phase.PROMPT) for plan in prompts]
    read = Kind(pricing[Phase.OUTPUT].of(DENSE_PLAN, direct), Phase.OUTPUT)
    kinds = (read if at < model._outputs else others[at % len(others)] for at in range(10**6))
    return WholeSequence(ItemKinds.of(next(kinds) for _ in item.ids), item)


def late(lowest: float = 0.1) -> Calibration:
    path = tuple(
        Step(layer, unit.value, 0.0) for layer in range(LAYERS - 1, 0, -1) for unit in TOKEN_UNITS
    )
    return Calibration(lowest, 32, {Phase.PROMPT: path, Phase.OUTPUT: ()}, {}, ())


@pytest.mark.parametrize("first", range(1, LAYERS + 1))
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_with_keys_and_of_the_masked_form(family, first):
    """Repaired as well; beside items that make keys everywhere, and beside whole ones."""
    model = elastic_encoder(family)
    given = items(model)
    prompts = leaving(first)
    with_keys = [planned(model, each, (prompts, DENSE_PLAN)) for each in given]
    expected = stepped(model, *with_keys)
    ours = [without_keys(model, each, prompts) for each in given]
    whole = model.sequence(DENSE, given[0])

    assert sum(model.shape.direct(prompts)) >= LAYERS - first
    for actual, wanted in zip(stepped(model, *ours, whole), expected, strict=False):
        torch.testing.assert_close(actual, wanted, **CLOSE)
    mixed = [ours_or_keys(model, prompts, place, each) for place, each in enumerate(given)]
    for actual, wanted in zip(stepped(model, *mixed), expected, strict=True):
        torch.testing.assert_close(actual, wanted, **CLOSE)
    masked = masked_outputs(model, given, (prompts, DENSE_PLAN))
    for actual, wanted in zip(expected, masked, strict=True):
        torch.testing.assert_close(actual, wanted, **CLOSE)


def ours_or_keys(model: ElasticEncoder, prompts: Plan, place: int, item: Item) -> WholeSequence:
    if place % 2:
        return planned(model, item, (prompts, DENSE_PLAN))
    return without_keys(model, item, prompts)


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_usage_is_what_pytorch_counts_and_counting_changes_no_answer(family, lora_rank):
    model = elastic_encoder(family, lora_rank=lora_rank)
    no_attention = LayerPlan(attention_tokens=0.0)
    plans = (WHOLE, no_attention, *leaving(2)[2:]), (WHOLE, GONE, *leaving(2)[2:])
    for given in items(model):
        counted, plain = (without_keys(model, given, *plans) for _ in range(2))
        with FlopCounterMode(display=False) as counter:
            (actual,) = stepped(model, counted)
        (expected,) = stepped(model, plain)

        assert counted.usage.flops == plain.usage.flops == counter.get_total_flops()
        torch.testing.assert_close(actual, expected, **CLOSE)


def test_in_bfloat16_it_is_near_what_keys_give():
    model = ElasticEncoder(tiny_encoder("vit").to(torch.bfloat16))
    given = items(model)
    prompts = leaving(1)
    expected = stepped(model, *(planned(model, each, (prompts, DENSE_PLAN)) for each in given))
    actual = stepped(model, *(without_keys(model, each, prompts) for each in given))
    for ours, wanted in zip(actual, expected, strict=True):
        assert (ours - wanted).abs().max() <= wanted.abs().max() / 20 + 0.05


@pytest.mark.parametrize(
    ("family", "choices"),
    [
        ("modernbert", {}),  # keys turn with their positions
        ("bert", {"kv": "kept"}),  # who skips attention is not attended to
        ("dinov2", {}),  # all tokens are read
        ("bert", {"task": "token-classification"}),
    ],
)
def test_where_it_cannot_be_keys_are_made(family, choices):
    assert elastic_encoder(family, **choices).shape.absorbing == frozenset()


def test_norms_are_copied_for_those_alone_who_read_so(monkeypatch):
    copied = []
    monkeypatch.setattr(direct_reading, "affine_of", lambda norm: copied.append(norm))
    causal = ElasticModel(tiny("gpt2"))  # its norms have a scale and a shift
    causal.step([Chunk(causal.sequence(DENSE, 5, 6), [1, 2, 3, 4, 5])])
    assert not copied
    encoder = ElasticEncoder(tiny_encoder("bert"))
    stepped(encoder, without_keys(encoder, items(encoder)[0], leaving(1)))
    assert len(copied) == LAYERS


def test_class_tokens_that_give_something_up_themselves_need_keys():
    model = elastic_encoder("deit", units=TOKEN_UNITS)
    half = UnitShares(attention_tokens=0.5)
    for output, sides in ((half, {0}), (1.0, {0, 1})):
        sequence = model.sequence(Capacity(half, output), items(model)[0])
        kinds = {sequence.kinds.each[0], sequence.kinds.each[-1]}
        assert {int(LAYERS - 1 in kind.plan.direct) for kind in kinds} == {max(sides)}


def test_a_tail_begins_where_the_last_of_the_others_left():
    model = elastic_encoder("bert")
    sequence = without_keys(model, items(model)[0], leaving(1), leaving(2))
    assert sequence.kinds.tail == 2
    dense = model.sequence(DENSE, items(model)[0])
    assert dense.kinds.tail == LAYERS - 1


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_capacity_is_kept_where_keys_become_free_at_once(family, lora_rank):
    """To a token's worth, at any capacity and length: what is leapt over is spent elsewhere."""
    model = elastic_encoder(family, units=TOKEN_UNITS, lora_rank=lora_rank)
    model.adapter.calibration = late()
    model.attach(model.adapter)
    for given in items(model, (40, 20)):
        tokens = len(given.ids)
        most = model.sequence(DENSE, given)
        stepped(model, most)
        for percent in range(45, 100):
            share = percent / 100
            sequence = model.sequence(Capacity(share, share), given)
            stepped(model, sequence)
            spent = sequence.usage.capacity_spent
            assert spent <= share + 1.5 / tokens
            assert spent >= min(share, most.usage.capacity_spent) - 1.5 / tokens, share
