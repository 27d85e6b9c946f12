"""Where modules live, what a layer costs, how neurons are grouped: the ground of both forms."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel, GPTNeoXConfig, GPTNeoXForCausalLM

from elastiformer import Capacity, CapacityError, ElasticModel, LayerPlan, Unit, UnsupportedModel
from elastiformer.accounting import LayerShape, LoraShape, ModelShape, layer_cost
from elastiformer.experts import balanced_clusters
from elastiformer.families import describe
from tests.devices import DEVICE
from tests.elastiformer.elastic import EXPERTS, elastic, text
from tests.tiny import HEADS, KV_HEADS, LAYERS, MLP_WIDTH, WIDTH, tiny


def test_projections_are_slices_of_the_base_and_never_copies(family):
    base = tiny(family)
    storages = {parameter.untyped_storage().data_ptr() for parameter in base.parameters()}
    for layer in describe(base).layers:
        for projection in layer.projections:
            assert projection.weight_OI.untyped_storage().data_ptr() in storages
            inputs, outputs = layer.shape.width_of(projection.part)
            assert tuple(projection.weight_OI.shape) == (outputs, inputs)


def test_wrapping_and_running_leaves_the_base_as_it_was(family):
    base = tiny(family)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = elastic(family)
    model.masked(text(), [model.plans(Capacity.parse({"heads": 0.5}), 8)], text() > 0)

    assert not any(module._forward_hooks for module in model.base.modules())
    assert not any(module._forward_pre_hooks for module in model.base.modules())
    after = model.base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_unknown_architecture_is_named_with_what_it_lacks():
    small = {
        "vocab_size": 50,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    with pytest.raises(UnsupportedModel, match=r"GPTNeoXForCausalLM .* lacks model\.embed_tokens"):
        ElasticModel(GPTNeoXForCausalLM(GPTNeoXConfig(**small)))
    with pytest.raises(UnsupportedModel, match="BertModel has no entry"):
        ElasticModel(BertModel(BertConfig(**small)))


def test_costs_add_up_to_the_count_by_hand():
    """Two layers counted with pencil and paper: 2 FLOPs for each multiply-add."""
    shape = LayerShape(
        width=6, heads=4, kv_heads=2, head_dim=3, mlp_width=10, gated=True, experts=5
    )
    dense = layer_cost(shape, LayerPlan(), "complete", True)
    assert dense.attention_kept == 2 * (6 * 12 + 2 * 6 * 6 + 12 * 6)
    assert dense.attention_per_key == 2 * 2 * 12
    assert dense.mlp_kept == 2 * 3 * 6 * 10
    assert ModelShape((shape, shape), 6, 11).dense_token_flops(7) == 2 * (
        dense.attention_kept + 7 * dense.attention_per_key + dense.mlp_kept
    )

    half = LayerPlan(heads=0.5, experts=0.4, attention_out=0.5, mlp_in=0.5)
    cost = layer_cost(shape, half, "complete", False)
    router = 2 * 6 * 4
    assert cost.attention_kept == router + 2 * (6 * 6 + 2 * 6 * 6 + 3 * 6)
    assert cost.attention_per_key == 2 * 2 * 6
    assert cost.mlp_kept == 2 * 6 * 5 + 2 * (2 * 3 * 4 + 4 * 6)
    assert cost.attention_skipped == 2 * 2 * 6 * 6  # the keys and values are still written
    assert layer_cost(shape, half, "kept", False).attention_skipped == 0


def test_repair_is_counted_for_routed_rows_only():
    lora = (LoraShape(("query",), 2), LoraShape(("key", "value"), 2), LoraShape(("down",), 2))
    shape = LayerShape(
        width=6, heads=4, kv_heads=2, head_dim=3, mlp_width=10, gated=True, lora=lora
    )
    without = layer_cost(shape, LayerPlan(), "complete", True)
    repaired = layer_cost(shape, LayerPlan(), "complete", False)
    queries, keys_values, down = 2 * (6 + 12), 2 * (6 + 6 + 6), 2 * (10 + 6)
    assert repaired.attention_kept - without.attention_kept == 2 * (queries + keys_values)
    assert repaired.mlp_kept - without.mlp_kept == 2 * down
    assert repaired.attention_skipped == without.attention_skipped + 2 * keys_values


def test_all_experts_together_are_the_dense_mlp_whatever_their_order(family):
    """The split is lossless: the sum over all experts, each alone, is the whole MLP."""
    model = elastic(family, units=[Unit.EXPERTS], lora_rank=0)
    layer = model.layout.layers[1]
    x_RD = torch.randn(5, WIDTH).to(DEVICE)
    with torch.no_grad():
        expected = layer.mlp(x_RD)
        experts = model._sparse.workshop.experts(layer)
        total = torch.zeros_like(expected)
        for expert in range(EXPERTS):
            a_TS = experts.up.run(expert, x_RD, None)
            if experts.gate is None:
                a_TS = layer.activation(a_TS)
            else:
                a_TS = layer.activation(experts.gate.run(expert, x_RD, None)) * a_TS
            total += a_TS @ experts.down_MOS[expert].T
        if layer.down.bias_O is not None:
            total = total + layer.down.bias_O

    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-4)
    assert sorted(experts.order_I.tolist()) == list(range(MLP_WIDTH))


def test_neurons_that_fire_together_stand_together():
    """Rows drawn around four directions, shuffled: the clusters find them again, in equal sizes."""
    directions = torch.eye(4).repeat_interleave(6, 0)
    shuffled = torch.randperm(24)
    features = (directions + 0.05 * torch.randn(24, 4))[shuffled]
    order = balanced_clusters(features, 4)
    found = (shuffled[order] // 6).view(4, 6)
    assert all(len(set(cluster.tolist())) == 1 for cluster in found)


def test_gpt2_and_llama_have_the_heads_that_their_configs_say():
    llama, gpt2 = describe(tiny("llama")), describe(tiny("gpt2"))
    assert [layer.shape.kv_heads for layer in llama.layers] == [KV_HEADS] * LAYERS
    assert [layer.shape.kv_heads for layer in gpt2.layers] == [HEADS] * LAYERS
    assert not gpt2.layers[0].shape.gated


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (0, "above 0 and at most 1; got 0"),
        (1.2, "above 0 and at most 1; got 1.2"),
        (float("nan"), "above 0 and at most 1; got nan"),
        ("fast", "a number above 0 and at most 1, or an object of keep shares; got 'fast'"),
        (True, "got True"),
        (None, "got None"),
        ([0.5], r"got \[0.5\]"),
        ({}, "an empty object names no unit"),
        ({"layers": 0.5}, "unknown unit 'layers'; known: attention_tokens"),
        ({"heads": 0}, "capacity.heads: a keep share is above 0"),
        ({"heads": "half"}, "capacity.heads: a keep share is a number; got 'half'"),
        ({"prompt": 0.5, "heads": 0.5}, "nothing else may stand; got heads"),
        ({"output": 2}, "capacity.output: a fraction"),
    ],
)
def test_a_capacity_that_cannot_be_is_refused_with_its_bound(value, complaint):
    with pytest.raises(CapacityError, match=complaint):
        Capacity.parse(value)


@pytest.mark.parametrize(
    "value",
    [1.0, 0.5, {"heads": 0.5}, {"prompt": 0.5}, {"prompt": {"experts": 0.5}, "output": 0.9}],
)
def test_a_capacity_reads_back_from_its_own_json(value):
    capacity = Capacity.parse(value)
    assert Capacity.parse(capacity.as_json()) == capacity


def test_a_ceiling_lowers_what_is_above_it_and_nothing_else():
    capacity = Capacity.parse({"prompt": 0.5, "output": 0.9})
    assert capacity.limited(0.7).as_json() == {"prompt": 0.5, "output": 0.7}
    assert capacity.limited(1.0) is capacity
    assert Capacity.parse({"heads": 0.5}).limited(0.7).as_json() == 0.7
