"""Real models, small enough to run in milliseconds: one per family, made from its config.

Every axis has a size of its own, so that a swapped axis cannot pass unseen, and every parameter
is drawn anew: fresh Transformers models have zero biases, norms of one and nearly flat logits,
behind which many mistakes hide. Two calls with the same arguments give the same weights.
"""

from __future__ import annotations

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tests.devices import DEVICE

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP_WIDTH = 3, 24, 4, 2, 10, 56
CONTEXT, WINDOW = 512, 5
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, TURN_START, TURN_END = 256, 257, 258  # ids; the 256 bytes come first
VOCAB = 259

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_TOKENS = {
    "vocab_size": VOCAB,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": TURN_END,
    "pad_token_id": END_OF_TEXT,
}
_SHAPE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": MLP_WIDTH,
    "max_position_embeddings": CONTEXT,
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

# family: (config class, what it needs beside the common shape)
_FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, object]]] = {
    "llama": (LlamaConfig, {**_SHAPE, "tie_word_embeddings": False}),
    "mistral": (MistralConfig, {**_SHAPE, "sliding_window": WINDOW}),
    "qwen2": (Qwen2Config, {**_SHAPE, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {**_SHAPE, "attention_bias": True}),
    "phi3": (Phi3Config, {**_SHAPE, "resid_pdrop": 0.0}),
    "gemma2": (
        Gemma2Config,
        {**_SHAPE, "sliding_window": WINDOW, "layer_types": _ALTERNATING},
    ),
    "gemma3": (
        Gemma3TextConfig,
        {**_SHAPE, "sliding_window": WINDOW, "layer_types": _ALTERNATING},
    ),
    # One key-value head per head, and width = heads x head size, by construction.
    "gpt2": (
        GPT2Config,
        {
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": MLP_WIDTH,
            "n_positions": CONTEXT,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
}
FAMILIES = tuple(_FAMILIES)


def tiny(family: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model of one family: float32, in eval mode; `changes` go into its config.

    Drawn on the CPU, so that every device gets the same weights.
    """
    config_class, settings = _FAMILIES[family]
    config = config_class(**(_TOKENS | settings | changes))
    with torch.random.fork_rng(devices=[]):  # who calls keeps their own stream of numbers
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        draw_parameters(model)
    return model.eval().to(DEVICE)


@torch.no_grad()
def draw_parameters(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.add_(0.2 * noise)  # a norm: around its neutral value, which differs by family
        elif parameter.ndim == 1:
            parameter.copy_(0.2 * noise)
        elif "embed" in name or "wte" in name or "wpe" in name:
            parameter.copy_(noise / WIDTH**0.5)
        else:
            # Layers that outweigh the embedding: else a tied head only echoes the last token.
            parameter.copy_(2 * noise / WIDTH**0.5)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, three special ones, and a chat template: fits every tiny model."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={ch: i for i, ch in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
