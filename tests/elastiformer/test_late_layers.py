"""The late layers of prompts: few rows run them in one call, and nothing else comes of it."""

from __future__ import annotations

import pytest
import torch

from elastiformer import (
    Chunk,
    ElasticModel,
    LayerPlan,
    Phase,
    Sequence,
    Unit,
    late_keys,
)
from elastiformer.capacity import DENSE
from elastiformer.costs import Trial
from elastiformer.late_keys import LateKeys
from elastiformer.late_layers import LateLayers
from tests.devices import cpu_only
from tests.elastiformer.elastic import PROMPT, TOKENS, elastic, run, text
from tests.tiny import LAYERS

pytestmark = cpu_only
LEFT = LayerPlan(attention_tokens=0.0, mlp_tokens=0.0)
LATE_LAYERS = 6  # of a model deep enough for two products
ENDS = 3  # tokens of a prompt that run whole at its end


def ending(model: ElasticModel, first: int, prompt: int = PROMPT) -> Sequence:
    """One whose prompt leaves all layers from `first` on, but for its last tokens."""
    pricing = model._planner.pricing
    layers = len(model.layout.layers)
    plan = (LayerPlan(),) * first + (LEFT,) * (layers - first)
    before, whole = pricing[Phase.PROMPT].of(plan), pricing[Phase.PROMPT].dense
    output = pricing[Phase.OUTPUT].dense
    sequence = model.sequence(DENSE, prompt, TOKENS)

    def plan_at(phase, position):
        if phase is Phase.OUTPUT:
            return output
        return whole if position >= prompt - 1 - ENDS else before

    sequence._plan_at = plan_at
    return sequence


def ran(monkeypatch) -> list[tuple[range, int, int]]:
    """The layers of each step that ran so, with how many rows run and left them."""
    found, run_them = [], LateLayers.run

    def noted(self, late, *rest):
        left = sum(rows.count for rows in late.leaving.values())
        found.append((late.layers, late.whole.count, left))
        run_them(self, late, *rest)

    monkeypatch.setattr(LateLayers, "run", noted)
    return found


def states_of(model: ElasticModel, sequence: Sequence) -> list[torch.Tensor]:
    """Its keys and values in each layer."""
    kept = [sequence.cache.held(layer) for layer in range(len(model.layout.layers))]
    return [torch.stack([held.keys_GKH, held.values_GKH]).clone() for held in kept]


def both_ways(model: ElasticModel, monkeypatch, pieces: list[int], first: int):
    """Logits, keys and values, and usage: with the late layers apart, and layer by layer."""
    ids = text()[0].tolist()
    results = []
    for apart in (True, False):
        with monkeypatch.context() as patched:
            if not apart:
                patched.setattr(LateLayers, "of", lambda self, packed, placing: None)
            sequence = ending(model, first)
            cuts, at = [], 0
            for size in pieces:
                cuts.append(ids[at : at + size])
                at += size
            logits = run(model, sequence, [*cuts, *([token] for token in ids[at:])])
            results.append((logits, states_of(model, sequence), sequence.usage))
            sequence.release()
    return results


@pytest.mark.parametrize("units", [(Unit.CHANNELS,), (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS)])
@pytest.mark.parametrize("pieces", [[PROMPT], [PROMPT - 2, 2], [2, PROMPT - 2], [1, 3, 5]])
@pytest.mark.parametrize("first", [0, 1])
def test_late_layers_leave_what_they_leave_layer_by_layer(units, pieces, first, monkeypatch):
    """With repairs of the rows that leave them, too."""
    model = elastic("llama", units, layers=LAYERS + 1)
    found = ran(monkeypatch)
    (logits, states, usage), (expected, expected_states, expected_usage) = both_ways(
        model, monkeypatch, pieces, first
    )
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    for own, other in zip(states, expected_states, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)
    assert usage == expected_usage
    assert found and all(layers == range(first, LAYERS) for layers, _, _ in found)
    left = PROMPT - 1 - ENDS - 1  # position 0 is kept everywhere
    assert sum(count for _, _, count in found) <= left


def in_bfloat16(family: str = "llama", **choices) -> ElasticModel:
    model = elastic(family, (Unit.CHANNELS,), layers=LATE_LAYERS + 1, **choices)
    model.base.to(torch.bfloat16)
    model.attach(model.adapter)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("repair", [{"lora_rank": 0}, {}, {"lora_phases": "prompt"}], ids=str)
def test_keys_of_several_layers_come_of_one_product(family, first, repair, monkeypatch):
    """In bfloat16, whatever the repair; and are those of one layer after the other but for it."""
    model, placed = in_bfloat16(family, **repair), []
    place = LateKeys.place

    def noted(self, layers, *rest):
        placed.append(layers)
        place(self, layers, *rest)

    monkeypatch.setattr(LateKeys, "place", noted)
    (logits, states, usage), (expected, expected_states, expected_usage) = both_ways(
        model, monkeypatch, [PROMPT], first
    )
    # What is exact below the first layer that is left out is so in that layer, too.
    begins = first + (repair != {"lora_rank": 0})
    assert placed == [range(begins, LATE_LAYERS)]
    left = slice(1, PROMPT - 1 - ENDS)
    for own, other in zip(states, expected_states, strict=True):
        off, whole = (each[:, :, left].float().norm() for each in (own - other, other))
        assert off < 0.01 * whole
    assert (logits - expected).norm() < 0.06 * expected.norm()  # rounding, through six layers
    assert usage == expected_usage


def test_requests_leave_one_after_the_other_beside_whole_ones(monkeypatch):
    """Each makes all its keys as it leaves, and gives what it gives alone."""
    model, placed = in_bfloat16(), []
    firsts = (1, LATE_LAYERS + 1, 3, 1)
    texts = [text(seed=seed)[0, :PROMPT].tolist() for seed in range(len(firsts))]
    alone, kept = [], []
    for first, ids in zip(firsts, texts, strict=True):
        sequence = ending(model, first)
        alone.append(model.step([Chunk(sequence, ids)])[0])
        kept.append(states_of(model, sequence))
    place = LateKeys.place

    def noted(self, layers, h_ND, left, *rest):
        placed.append((layers, left.count))
        place(self, layers, h_ND, left, *rest)

    monkeypatch.setattr(LateKeys, "place", noted)
    made = [ending(model, first) for first in firsts]
    chunks = [Chunk(each, ids) for each, ids in zip(made, texts, strict=True)]
    together = model.step(chunks)
    left = PROMPT - 1 - ENDS - 1
    # In the first layer that they leave out all of it is exact still, and goes as ever.
    assert placed == [(range(2, LATE_LAYERS), 2 * left), (range(4, LATE_LAYERS), left)]
    for given_RV, expected_RV in zip(together, alone, strict=True):
        assert (given_RV - expected_RV).norm() < 0.06 * expected_RV.norm()
    for sequence, expected in zip(made, kept, strict=True):
        for own, other in zip(states_of(model, sequence), expected, strict=True):
            assert (own - other).float().norm() < 0.04 * other.float().norm()


def test_a_repair_that_learns_is_laid_out_anew(monkeypatch):
    model = in_bfloat16()
    both_ways(model, monkeypatch, [PROMPT], 1)
    with torch.no_grad():
        for parameter in model.adapter.lora.parameters():
            parameter.mul_(3)
    (_, states, _), (_, expected_states, _) = both_ways(model, monkeypatch, [PROMPT], 1)
    for own, other in zip(states, expected_states, strict=True):
        assert (own - other).float().norm() < 0.03 * other.float().norm()


def test_what_late_layers_need_is_laid_out_at_start(monkeypatch):
    model, made = in_bfloat16(), []
    model.measure_costs(0.05)
    monkeypatch.setattr(late_keys, "Stacked", lambda *given: made.append(given))
    sequence = ending(model, 1)
    model.step([Chunk(sequence, text()[0, :PROMPT].tolist())])
    assert made == []


def test_requests_of_a_step_run_them_together(monkeypatch):
    model = elastic("llama", (Unit.CHANNELS,), layers=LAYERS + 1)
    found = ran(monkeypatch)
    ids = [text(seed=seed)[0].tolist() for seed in range(2)]
    alone = []
    for own in ids:
        sequence = ending(model, 1)
        alone.append(model.step([Chunk(sequence, own[:PROMPT])])[0])
    found.clear()
    together = [ending(model, 1) for _ in ids]
    logits = model.step([Chunk(s, own[:PROMPT]) for s, own in zip(together, ids, strict=True)])
    torch.testing.assert_close(torch.cat(logits), torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert len(found) == 1 and found[0][1:] == (2 * (1 + ENDS + 1), 2 * (PROMPT - 1 - ENDS - 1))


def test_nobody_but_whole_rows_goes_that_way(monkeypatch):
    """Dense prompts, and rows that leave out something else in those layers."""
    model = elastic("llama", (Unit.CHANNELS, Unit.HEADS), layers=LAYERS + 1)
    found = ran(monkeypatch)
    dense = ending(model, LAYERS + 1)
    model.step([Chunk(dense, text()[0, :PROMPT].tolist())])
    pricing = model._planner.pricing[Phase.OUTPUT]
    some = pricing.of((LayerPlan(heads=0.5),) * (LAYERS + 1))
    sequence = ending(model, 1)
    plan_at = sequence._plan_at
    sequence._plan_at = lambda phase, position: (
        some if phase is Phase.OUTPUT else plan_at(phase, position)
    )
    model.step([Chunk(sequence, text()[0, :PROMPT].tolist())])
    assert not found


@pytest.mark.parametrize("picks", [True, False])
def test_rows_that_pick_do_not_keep_a_prompt_from_it(picks, monkeypatch):
    """They run by themselves; whole ones go along."""
    model = elastic("llama", (Unit.CHANNELS,), layers=LAYERS + 1)
    found = ran(monkeypatch)
    output = model._planner.pricing[Phase.OUTPUT]
    share = 0.5 if picks else 1.0
    plan = output.of((LayerPlan(mlp_out=share),) * (LAYERS + 1))
    ids = text()[0].tolist()
    decodes = model.sequence(DENSE, 4, TOKENS)
    model.step([Chunk(decodes, ids[:4])])
    decodes._plan_at = lambda phase, position: plan
    found.clear()
    piece = ending(model, 1, prompt=2 * PROMPT)
    monkeypatch.setattr(Trial, "goes_first_way", lambda self, work: True)  # together
    model.step([Chunk(decodes, ids[4:5]), Chunk(piece, ids[:PROMPT])])
    with_it = 0 if picks else 1
    assert found == [(range(1, LAYERS), 1 + with_it, PROMPT - 1)]


@pytest.mark.parametrize("long", [True, False])
def test_whole_prompts_do_not_keep_others_from_it_where_both_are_long(long, monkeypatch):
    """They run apart, and give what they give alone, in the order they came in."""
    monkeypatch.setattr("elastiformer.late_layers._LONG", PROMPT if long else PROMPT + 1)
    model = elastic("llama", (Unit.CHANNELS,), layers=LAYERS + 1)
    texts = [text(seed=seed)[0, :PROMPT].tolist() for seed in range(2)]

    def made() -> list[Sequence]:
        return [ending(model, 1), ending(model, LAYERS + 1)]

    alone = [run(model, each, [ids]) for each, ids in zip(made(), texts, strict=True)]
    found = ran(monkeypatch)
    chunks = [Chunk(each, ids) for each, ids in zip(made(), texts, strict=True)]
    for given_RV, expected_RV in zip(model.step(chunks), alone, strict=True):
        torch.testing.assert_close(given_RV, expected_RV, atol=1e-5, rtol=1e-5)
    own = (range(1, LAYERS), 1 + ENDS + 1, PROMPT - 1 - ENDS - 1)
    assert (found == [own]) is long
