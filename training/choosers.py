"""Who chooses which image tokens stay: chance, the tower, the language model; and who should.

A chooser gives each image token a score, [B, P]. `answer_attention` is what a router is taught by:
which tokens the pretrained model looks at while it writes the answer, which is known only then.

Shape letters: B exchanges   P image tokens   T tokens   D width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from elastiformer.vlm import ElasticVlm, ImagedBatch
from training.data import seed_of
from training.exchanges import Exchange, collated, judged

EARLY_LAYER = 1  # the second one, as FastV takes it


def at_random(model: ElasticVlm, exchanges: Sequence[Exchange], seed: int) -> Tensor:
    """Noise, the same for an exchange whoever stands beside it: [B, P]."""
    rows = [
        torch.rand(
            model.sight.tokens,
            generator=torch.Generator().manual_seed(seed_of("dropped", seed, each.digest.hex())),
        )
        for each in exchanges
    ]
    return torch.stack(rows).to(model.device)


def by_class_attention(model: ElasticVlm, exchanges: Sequence[Exchange], seed: int) -> Tensor:
    """How much the tower's class token attends to each: [B, P].

    Of a tower without one, how much all its tokens do. Source: LLaVA-PruMerge (arXiv:2403.15388),
    of which the merging is left out.
    """
    config: Any = model.vlm.whole.config
    tower: Any = model.vlm.tower
    batch = collated(exchanges, model)
    # ViP-LLaVA reads several layers, and no class token.
    layer = getattr(config, "vision_feature_layer", None)
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    with eager(tower):
        attended = tower(batch.pixels_NCHW, output_attentions=True).attentions
    read = layer if isinstance(layer, int) and layer < 0 else -1
    attention_BTT: Tensor = attended[read].float().mean(1)
    if strategy == "default":
        return attention_BTT[:, 0, 1:]
    return attention_BTT.mean(1)[:, -model.sight.tokens :]


def by_early_attention(model: ElasticVlm, exchanges: Sequence[Exchange], seed: int) -> Tensor:
    """How much the last prompt token attends to each in an early layer: [B, P].

    It alone knows the question. What it costs to run these layers over all tokens is not counted.
    Source: FastV (arXiv:2403.06764), which leaves them out from there on and not before.
    """
    batch = collated(exchanges, model)
    attended = attentions(model, batch, model.vlm.features(batch.pixels_NCHW))
    attention_BTT = attended[min(EARLY_LAYER, len(attended) - 1)].float().mean(1)
    last_B = torch.tensor([len(each.prompt) - 1 for each in exchanges], device=model.device)
    asked_BT = attention_BTT[torch.arange(len(exchanges), device=model.device), last_B]
    image_BT = batch.ids_BT == model.vlm.image_token
    return asked_BT[image_BT].view(len(exchanges), -1)


CHOOSERS: dict[str, Callable[[ElasticVlm, Sequence[Exchange], int], Tensor]] = {
    "random": at_random,
    "class attention": by_class_attention,
    "early attention": by_early_attention,
}


@torch.no_grad()
def answer_attention(model: ElasticVlm, batch: ImagedBatch, features_NPD: Tensor) -> Tensor:
    """How much the tokens before the answer's attend to each image token, a share of all: [B, P].

    The mean over layers, heads and those tokens.
    """
    judged_BT = judged(batch)
    total_BT = torch.zeros(judged_BT.shape, device=judged_BT.device)
    for attention_BHTT in attentions(model, batch, features_NPD):
        from_BTT = attention_BHTT.float().mean(1) * judged_BT[..., None]
        total_BT += from_BTT.sum(1)
    image_BT = batch.ids_BT == model.vlm.image_token
    seen_BP = total_BT[image_BT].view(len(features_NPD), -1)
    return seen_BP / seen_BP.sum(1, keepdim=True)


def attentions(model: ElasticVlm, batch: ImagedBatch, features_NPD: Tensor) -> tuple[Tensor, ...]:
    """Of each of the language model's layers, who attends to whom: [B, H, T, T], H heads."""
    language: Any = model.vlm.language.base_model
    with eager(language):
        attended: tuple[Tensor, ...] = language(
            inputs_embeds=model.embedded(batch, features_NPD),
            attention_mask=batch.mask_BT,
            output_attentions=True,
            use_cache=False,
        ).attentions
    return attended


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """Attention as plain products, which alone says who attends to whom."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
