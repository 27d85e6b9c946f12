"""A tiny vision-language model with an adapter, prompts for it, and both ways to run them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from elastiformer import (
    Capacity,
    Chunk,
    Unit,
)
from elastiformer.imaged import ImagedPrompt, ImagedSequence
from elastiformer.picture_inputs import picture_of
from elastiformer.vlm import ElasticVlm, ImagedBatch
from tests.tiny_vlms import (
    IMAGE_TOKEN,
    PATCHES,
    SIDE,
    tiny_image_tokenizer,
    tiny_vlm,
    tiny_vlm_processor,
)

BEFORE, BETWEEN, AFTER, NEW = (7, 30, 4), (9, 9), (65, 66, 67, 68, 69), (70, 71, 72)
CLOSE = {"atol": 2e-4, "rtol": 2e-4}  # float32, other shapes, so other rounding
UNITS = (Unit.IMAGE_TOKENS, Unit.ATTENTION_TOKENS, Unit.HEADS, Unit.CHANNELS)
HALF = Capacity.parse({"image_tokens": 0.4})


def pixels(seed: int, count: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, SIDE, SIDE, generator=generator)


def elastic(
    tower: str = "vit", language: str = "llama", scorer: str = "linear", **options: object
) -> ElasticVlm:
    """A tiny model whose routers are noise, so that no two tokens score alike."""
    return routed(tiny_vlm(tower, language), scorer, **options)


def routed(base: PreTrainedModel, scorer: str = "linear", **options: object) -> ElasticVlm:
    """The same of this base."""
    model = ElasticVlm(base, tokenizer=tiny_image_tokenizer(), images=tiny_vlm_processor())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapter = model.blank_adapter(UNITS, image_scorer=scorer, lora_rank=1, **options)
        for parameter in adapter.parameters().values():
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.attach(adapter)
    return model


def ids_of(images: int = 1) -> list[int]:
    ids = [*BEFORE, *[IMAGE_TOKEN] * PATCHES]
    for _ in range(images - 1):
        ids += [*BETWEEN, *[IMAGE_TOKEN] * PATCHES]
    return [*ids, *AFTER]


def asked(model: ElasticVlm, capacity: Capacity, images: int = 1, seed: int = 0) -> ImagedPrompt:
    pictures = [picture_of(each, PATCHES) for each in pixels(seed, images)]
    return model.prompt(capacity, ids_of(images), pictures)


def run(
    model: ElasticVlm, prompt: ImagedPrompt, cuts: tuple[int, ...] = ()
) -> tuple[ImagedSequence, torch.Tensor]:
    """The logits of the last prompt token and of some tokens that follow it."""
    sequence = model.imaged_sequence(prompt, len(NEW))
    rest, outputs = list(prompt.ids)[sequence.length :], []
    for cut in (*cuts, len(rest) - sum(cuts)):
        outputs += model.step([Chunk(sequence, rest[:cut])])
        rest = rest[cut:]
    for token in NEW:
        outputs += model.step([Chunk(sequence, [token])])
    return sequence, torch.cat(outputs)


def batch_of(images: int = 1, seed: int = 0) -> ImagedBatch:
    ids = ids_of(images)
    ids_BT = torch.tensor([ids + list(NEW)])
    output_BT = torch.arange(ids_BT.shape[1])[None] >= len(ids) - 1
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    return ImagedBatch(ids_BT, pixels(seed, images), mask_BT, output_BT)
