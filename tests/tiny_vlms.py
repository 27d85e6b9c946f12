"""Tiny real vision-language models, and what they read; as in tests/tiny.py."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
    ViTConfig,
    ViTImageProcessorPil,
)

from tests.tiny import VOCAB, draw_parameters, tiny, tiny_tokenizer

IMAGE = "<image>"
IMAGE_TOKEN = VOCAB  # id; it comes after all others
SIDE, PATCH = 20, 4
PATCHES = (SIDE // PATCH) ** 2

# A vision model has no dimension in common with the language model.
_VISION = {
    "hidden_size": 18,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 22,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_TOWERS = {
    "vit": (ViTConfig, {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "clip": (CLIPVisionConfig, {}),
    "siglip": (SiglipVisionConfig, {}),
}
TOWERS = tuple(_TOWERS)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + IMAGE + "' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_vlm(
    tower: str = "vit", language: str = "llama", seed: int = 0, **changes: object
) -> PreTrainedModel:
    """A random LLaVA: float32, in eval mode. SigLIP's tower has no class token to leave out."""
    kind, settings = _TOWERS[tower]
    text = tiny(language, vocab_size=VOCAB + 1, **changes).config
    config = LlavaConfig(
        vision_config=kind(**(_VISION | settings)),
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=PATCHES,
        vision_feature_layer=-2 if tower == "clip" else -1,
        vision_feature_select_strategy="full" if tower == "siglip" else "default",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        draw_parameters(model)
    return model.eval()


def tiny_vip_vlm(tower: str = "clip", language: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random ViP-LLaVA, which reads several layers of its tower."""
    kind, settings = _TOWERS[tower]
    config = VipLlavaConfig(
        vision_config=kind(**(_VISION | settings)),
        text_config=tiny(language, vocab_size=VOCAB + 1).config,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=PATCHES,
        vision_feature_layers=[-1, 1],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VipLlavaForConditionalGeneration(config)
        draw_parameters(model)
    return model.eval()


def tiny_aya_vlm(tower: str = "siglip", language: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random Aya Vision: of 10x10 patches, its projector makes 5x5 image tokens."""
    kind, settings = _TOWERS[tower]
    config = AyaVisionConfig(
        vision_config=kind(**(_VISION | settings | {"patch_size": PATCH // 2})),
        text_config=tiny(language, vocab_size=VOCAB + 1).config,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full" if tower == "siglip" else "default",
        downsample_factor=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AyaVisionForConditionalGeneration(config)
        draw_parameters(model)
    return model.eval()


def tiny_image_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_vlm_processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})


def save_tiny_vlm(folder: Path, model: PreTrainedModel) -> Path:
    """A model folder as it lies on the Hub."""
    model.save_pretrained(folder)
    tiny_image_tokenizer().save_pretrained(folder)
    tiny_vlm_processor().save_pretrained(folder)
    return folder
