"""Tiny real encoders with a head, one per family, and what they read; as in tests/tiny.py."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DeiTImageProcessorPil,
    Dinov2Config,
    DistilBertConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    ViTConfig,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    XLMRobertaConfig,
)

from tests.tiny import draw_parameters

LAYERS, WIDTH, HEADS, MLP_WIDTH, LABELS, PROJECTED = 3, 24, 4, 56, 5, 14
TEXT_TOKENS, SIDE, PATCH = 48, 20, 4
TEXT = "a good bad film was not very dull bright long and the it is one of my days"
WORDS = tuple(dict.fromkeys(TEXT.split()))
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
VOCAB = len(SPECIAL) + len(WORDS) + 26

_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": MLP_WIDTH,
    "pad_token_id": 0,
    "max_position_embeddings": TEXT_TOKENS,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_IMAGE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": MLP_WIDTH,
    "image_size": SIDE,
    "patch_size": PATCH,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_TOWER = {name: value for name, value in _IMAGE.items() if "dropout" not in name} | {
    "projection_dim": PROJECTED
}
_CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, object]]] = {
    "bert": (BertConfig, {**_TEXT, "type_vocab_size": 2}),
    "roberta": (
        RobertaConfig,
        {**_TEXT, "type_vocab_size": 1, "max_position_embeddings": TEXT_TOKENS + 1},
    ),
    "xlm-roberta": (
        XLMRobertaConfig,
        {**_TEXT, "type_vocab_size": 1, "max_position_embeddings": TEXT_TOKENS + 1},
    ),
    "distilbert": (
        DistilBertConfig,
        {
            "vocab_size": VOCAB,
            "dim": WIDTH,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_dim": MLP_WIDTH,
            "pad_token_id": 0,
            "max_position_embeddings": TEXT_TOKENS,
        },
    ),
    "modernbert": (
        ModernBertConfig,
        {
            **_TEXT,
            "local_attention": 8,
            "global_attn_every_n_layers": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "vit": (ViTConfig, _IMAGE),
    "deit": (DeiTConfig, _IMAGE),
    "dinov2": (Dinov2Config, {**_IMAGE, "mlp_ratio": 3, "layerscale_value": 0.7}),
    "clip": (CLIPVisionConfig, _TOWER),
    "clip-projected": (CLIPVisionConfig, _TOWER),
    "siglip": (SiglipVisionConfig, _TOWER),
    "vit-mae": (
        ViTMAEConfig,
        {
            **_IMAGE,
            "mask_ratio": 0.6,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 20,
        },
    ),
}
TOWERS = {"clip": CLIPConfig, "siglip": SiglipConfig}  # of what holds a text part, too
_OF_TEXT = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
IMAGE_FAMILIES = ("vit", "deit", "dinov2", "clip", "siglip", "clip-projected", "vit-mae")
FEATURES_ONLY = ("clip-projected", "vit-mae")
TEXT_FAMILIES = tuple(name for name in _CONFIGS if name not in IMAGE_FAMILIES)
_HEADS = {
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "image-classification": AutoModelForImageClassification,
    "features": AutoModel,
}


def own_task(family: str) -> str:
    if family in FEATURES_ONLY:
        return "features"
    return "image-classification" if family in IMAGE_FAMILIES else "text-classification"


def tiny_encoder(
    family: str = "bert", task: str | None = None, seed: int = 0, **changes: object
) -> PreTrainedModel:
    """A random encoder with the head of its task: float32, in eval mode."""
    config_class, settings = _CONFIGS[family]
    labels = {"id2label": {place: f"label {place}" for place in range(LABELS)}}
    auto = _HEADS[task or own_task(family)]
    if family in TOWERS and auto is AutoModelForImageClassification:
        # A whole's config: of its text part nothing is used.
        config = TOWERS[family](vision_config=settings | changes, text_config=_OF_TEXT, **labels)
    else:
        config = config_class(**(settings | labels | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "deit" and auto is AutoModelForImageClassification:
            model: PreTrainedModel = DeiTForImageClassificationWithTeacher(config)
        elif family == "clip-projected":
            model = CLIPVisionModelWithProjection(config)
        else:
            model = auto.from_config(config, dtype=torch.float32)
        draw_parameters(model)
    return model.eval()


def tiny_whole(family: str, seed: int = 0) -> PreTrainedModel:
    """What holds a tower among other things: `CLIPModel`, `SiglipModel`, `ViTMAEForPreTraining`."""
    config_class, settings = _CONFIGS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "vit-mae":
            model: PreTrainedModel = ViTMAEForPreTraining(config_class(**settings))
        else:
            of_text = _OF_TEXT | {name: settings[name] for name in _SHAPE}
            config = TOWERS[family](
                vision_config=settings, text_config=of_text, projection_dim=PROJECTED
            )
            model = AutoModel.from_config(config, dtype=torch.float32)
        draw_parameters(model)
    return model.eval()


def tiny_word_tokenizer() -> PreTrainedTokenizerFast:
    """A few words and all letters; texts begin with [CLS] and end with [SEP], as BERT's do."""
    vocabulary = [*SPECIAL, *WORDS, *(letter for letter in "bcdefghijklmnopqrstuvwxyzABCDE")]
    ids = {word: place for place, word in enumerate(vocabulary[:VOCAB])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_max_length=TEXT_TOKENS,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_image_processor(family: str = "vit", height: int = SIDE, width: int = SIDE) -> object:
    size = {"height": height, "width": width}
    if family.startswith("clip"):
        return CLIPImageProcessorPil(size={"shortest_edge": max(height, width)}, crop_size=size)
    if family == "deit":
        return DeiTImageProcessorPil(size=size, crop_size=size)
    return (SiglipImageProcessorPil if family.startswith("siglip") else ViTImageProcessorPil)(
        size=size
    )


def save_tiny_encoder(folder: Path, model: PreTrainedModel, pooling: str | None = None) -> Path:
    """A model folder as it lies on the Hub; `pooling`: with sentence-transformers' files."""
    model.save_pretrained(folder)
    if "image" in model.input_modalities:
        tiny_image_processor(model.config.model_type).save_pretrained(folder)
    else:
        tiny_word_tokenizer().save_pretrained(folder)
    if pooling is not None:
        kind = "sentence_transformers.models."
        modules = [
            {"idx": 0, "name": "0", "path": "", "type": f"{kind}Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{kind}Normalize"},
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        modes = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
        config = {name: mode == pooling for mode, name in modes.items()}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return folder
