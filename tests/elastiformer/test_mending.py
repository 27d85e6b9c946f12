"""The repair of keys and values lies in a copy of their weights, and is the same repair."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from elastiformer import Chunk, ElasticModel, LayerPlan, Unit
from elastiformer.capacity import DENSE
from elastiformer.mending import Mending
from elastiformer.repair import Folded, Joined
from tests.devices import cpu_only
from tests.elastiformer.elastic import PROMPT, TOKENS, cut, elastic, planned, run, text
from tests.tiny import LAYERS

pytestmark = cpu_only
LEFT = LayerPlan(attention_tokens=0.0, mlp_tokens=0.0)
PICKS = LayerPlan(attention_in=0.5, attention_out=0.5, mlp_in=0.5, mlp_out=0.5)
PLANS = ((LEFT,) * LAYERS, (PICKS,) * LAYERS)
UNITS = (Unit.CHANNELS,)


def repaired(family: str = "llama", **choices: object) -> ElasticModel:
    choices = {"lora_parts": ("key", "value"), "lora_phases": "prompt", **choices}
    return elastic(family, UNITS, **choices)


def products_run(monkeypatch) -> list[object]:
    """What ran with a repair: folded products, and pairs beside a product."""
    found: list[object] = []
    run_folded, mend = Folded.run, Joined.mend
    monkeypatch.setattr(
        Folded, "run", lambda self, reading: (found.append(self), run_folded(self, reading))[1]
    )
    monkeypatch.setattr(Joined, "mend", lambda self, *rest: (found.append(self), mend(self, *rest)))
    return found


def with_pairs_apart(monkeypatch, model: ElasticModel, ids: list[int]) -> torch.Tensor:
    with monkeypatch.context() as patched:
        patched.setattr("elastiformer.mending._may_fold", lambda product: False)
        model.attach(model.adapter)
        sequence = planned(model, PLANS, PROMPT, TOKENS)
        logits_RV = run(model, sequence, cut(ids, PROMPT))
        sequence.release()
    model.attach(model.adapter)
    return logits_RV


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_a_folded_repair_gives_what_its_pairs_give(family, monkeypatch):
    """Biases and fused modules included; of fused ones the queries' part, too."""
    model, ids = repaired(family), text()[0].tolist()
    expected_RV = with_pairs_apart(monkeypatch, model, ids)
    found = products_run(monkeypatch)
    given_RV = run(model, planned(model, PLANS, PROMPT, TOKENS), cut(ids, PROMPT))
    torch.testing.assert_close(given_RV, expected_RV, atol=1e-5, rtol=1e-4)
    assert any(isinstance(each, Folded) for each in found)


def test_rows_get_the_same_bits_beside_repaired_ones_and_alone():
    """Whole ones, and repaired ones; also where others pick channels in the same step."""
    model = repaired()
    texts = [text(seed=seed)[0].tolist() for seed in range(3)]
    dense, picking = ((LayerPlan(),) * LAYERS,) * 2, ((PICKS,) * LAYERS,) * 2
    every = (PLANS, dense, picking)

    def made() -> list[object]:
        return [planned(model, plans, PROMPT, TOKENS) for plans in every]

    alone = [run(model, each, [ids[:PROMPT]]) for each, ids in zip(made(), texts, strict=True)]
    chunks = [Chunk(each, ids[:PROMPT]) for each, ids in zip(made(), texts, strict=True)]
    for own_RV, other_RV in zip(alone, model.step(chunks), strict=True):
        assert torch.equal(own_RV, other_RV)


def test_whoever_trains_the_pairs_is_served_what_they_have_become(monkeypatch):
    model, ids = repaired(), text()[0].tolist()
    before_RV = run(model, planned(model, PLANS, PROMPT, TOKENS), cut(ids, PROMPT))
    with torch.no_grad():
        for parameter in model.adapter.lora.parameters():
            parameter.mul_(1.5)
    given_RV = run(model, planned(model, PLANS, PROMPT, TOKENS), cut(ids, PROMPT))
    assert not torch.allclose(given_RV, before_RV, atol=1e-4)
    expected_RV = with_pairs_apart(monkeypatch, model, ids)
    torch.testing.assert_close(given_RV, expected_RV, atol=1e-5, rtol=1e-4)


def test_who_counts_operators_sees_the_pairs(monkeypatch):
    """So what is counted is what a request is charged; whoever comes after gets the repair."""
    model, ids = repaired(), text()[0, :PROMPT].tolist()
    expected_RV = with_pairs_apart(monkeypatch, model, ids)
    found = products_run(monkeypatch)
    sequence = planned(model, PLANS, PROMPT, TOKENS)
    with FlopCounterMode(display=False) as counter:
        model.step([Chunk(sequence, ids)])
    assert found and all(isinstance(each, Joined) for each in found)
    assert counter.get_total_flops() == pytest.approx(sequence.usage.flops, rel=0.01)
    given_RV = run(model, planned(model, PLANS, PROMPT, TOKENS), [ids])
    torch.testing.assert_close(given_RV, expected_RV, atol=1e-5, rtol=1e-4)


def test_rows_at_capacity_one_meet_no_copy(monkeypatch):
    model, found = repaired(), products_run(monkeypatch)
    monkeypatch.setattr(Mending, "_form", lambda *_: pytest.fail("a repair was asked for"))
    run(model, model.sequence(DENSE, PROMPT, TOKENS), cut(text()[0].tolist(), PROMPT))
    assert not found


def test_weights_are_folded_before_a_request_waits_for_them():
    model = repaired()
    model.measure_costs(0.01)
    forms = model._sparse.workshop.mending._forms.values()
    folded = [form.folded for form in forms if form.folded is not None]
    assert len(folded) == LAYERS and all("_packed" in vars(each) for each in folded)
