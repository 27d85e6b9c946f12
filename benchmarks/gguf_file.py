"""A Llama as a GGUF file, for llama.cpp to run the very weights that we run.

Only shapes, weights and no vocabulary: tokens go in and out as numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from elastiformer import ElasticModel

_ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
_MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def unfit(model: ElasticModel) -> str | None:
    """Why this model cannot be written; None if it can."""
    if not isinstance(model.base, LlamaForCausalLM):
        return "written for Llamas only"
    if (model.config.rope_parameters or {}).get("rope_type", "default") != "default":
        return "its rotation is not a plain Llama's"
    return None


def write(model: ElasticModel, path: Path) -> None:
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    _add(writer, "token_embd.weight", model.base.get_input_embeddings().weight)
    _add(writer, "output_norm.weight", model.base.get_submodule("model.norm").weight)
    _add(writer, "output.weight", model.base.lm_head.weight)
    for index, layer in enumerate(model.base.get_submodule("model.layers").children()):
        block = f"blk.{index}."
        _add(writer, block + "attn_norm.weight", layer.input_layernorm.weight)
        _add(writer, block + "ffn_norm.weight", layer.post_attention_layernorm.weight)
        for theirs, ours in _ATTENTION.items():
            weight_OI = layer.self_attn.get_submodule(theirs).weight
            if theirs in ("q_proj", "k_proj"):
                heads = len(weight_OI) // config.head_dim
                weight_OI = _interleaved(weight_OI, heads)
            _add(writer, f"{block}{ours}.weight", weight_OI)
        for theirs, ours in _MLP.items():
            _add(writer, f"{block}{ours}.weight", layer.mlp.get_submodule(theirs).weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, name: str, weight: Tensor) -> None:
    weight = weight.detach().cpu().contiguous()
    if weight.ndim == 1 or weight.dtype == torch.float32:
        writer.add_tensor(name, weight.float().numpy())
        return
    # numpy has no bfloat16: its bytes are handed over as they are.
    kind = gguf.GGMLQuantizationType.BF16
    writer.add_tensor(name, weight.view(torch.uint8).numpy(), raw_dtype=kind)


def _interleaved(weight_OI: Tensor, heads: int) -> Tensor:
    """llama.cpp rotates neighbours where Transformers rotates halves: the rows are reordered."""
    outputs, inputs = weight_OI.shape
    halves = weight_OI.view(heads, 2, outputs // heads // 2, inputs)
    return halves.transpose(1, 2).reshape(outputs, inputs)
