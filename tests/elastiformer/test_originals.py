"""A base in bfloat16 whose files hold finer weights: steps of few rows read those, in few bytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from elastiformer import DENSE, Chunk, ElasticModel
from elastiformer.capacity import Site
from elastiformer.originals import Originals
from tests.devices import cpu_only
from tests.elastiformer.test_tiles import grid

pytestmark = cpu_only  # where steps of few rows read tiles


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose every matrix lies on a grid, in float32; its head is its embedding."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data = grid(*module.weight.shape, 16, 8)
    folder = tmp_path_factory.mktemp("base") / "quantised"
    model.save_pretrained(folder)
    return folder


def step_of_one(model: ElasticModel) -> torch.Tensor:
    request = model.sequence(DENSE, 1, 2)
    model.step([Chunk(request, [5])])
    [logits_RV] = model.step([Chunk(request, [7])])
    request.release()
    return logits_RV


def test_few_rows_read_the_weights_that_the_files_hold(folder):
    whole, small = (ElasticModel.load(str(folder), dtype=d) for d in ("float32", "bfloat16"))
    assert small.dtype == torch.bfloat16
    assert small.bytes_per_weight == whole.bytes_per_weight < 1
    x_RI = torch.randn(1, 64)
    products = [m._sparse.workshop.at_site(m.layout.layers[1], Site.MLP_IN) for m in (whole, small)]
    expected_RO, found_RO = (product.dense(x_RI) for product in products)
    assert torch.equal(found_RO, expected_RO)
    assert not torch.equal(found_RO, x_RI @ products[1]._joined().float().T)
    # Beside float32 only what is stored of keys and values is rounded.
    torch.testing.assert_close(step_of_one(small), step_of_one(whole), rtol=0.02, atol=0.02)


def test_a_head_that_is_the_embedding_is_found(folder):
    small = ElasticModel.load(str(folder), dtype="bfloat16")
    assert small._sparse.workshop.head._tiles.form == "grid of 16"


def test_a_weight_that_was_changed_since_has_no_original(folder):
    small = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    originals, module = Originals(folder, small), small.model.layers[0].mlp.up_proj
    whole = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found_OI = originals.weight(module)
    assert torch.equal(found_OI, whole.model.layers[0].mlp.up_proj.weight)
    with torch.no_grad():
        module.weight[3, 2] += 1
    assert originals.weight(module) is None


def test_what_is_loaded_as_it_lies_in_the_files_has_no_originals(folder):
    whole = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    originals = Originals(folder, whole)
    assert all(originals.weight(module) is None for module in whole.modules())
