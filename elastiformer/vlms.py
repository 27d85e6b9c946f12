"""Where each vision-language model of Transformers keeps tower, projector and language model.

`describe_vlm(base)` gives the language model as a causal LM of its own family, made of the base's
own modules, so that everything written for causal models holds for it; and what turns pixels into
image tokens, which is the base's own code, called and never copied.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from elastiformer.errors import UnsupportedModel
from elastiformer.families import has_module


@dataclass(frozen=True, slots=True)
class VlmFamily:
    """Paths of one architecture's modules, and what its config says of the tower's features."""

    language: str = "model.language_model"
    tower: str = "model.vision_tower"
    projector: str = "model.multi_modal_projector"
    features: tuple[str, ...] = ("vision_feature_layer", "vision_feature_select_strategy")


VLMS: dict[str, VlmFamily] = {
    "LlavaForConditionalGeneration": VlmFamily(),
    "VipLlavaForConditionalGeneration": VlmFamily(features=("vision_feature_layers",)),
    # Its projector makes one token of a square of patches. Published ones stand on Cohere2.
    "AyaVisionForConditionalGeneration": VlmFamily(),
}


@dataclass(frozen=True, slots=True, eq=False)
class VlmLayout:
    """A vision-language model's parts."""

    whole: PreTrainedModel
    language: PreTrainedModel  # a causal LM of the base's own modules
    tower: PreTrainedModel
    image_token: int  # stands in a prompt for each token of an image
    image_shape: tuple[int, int, int]  # channels, rows and columns that the tower takes
    family: VlmFamily = VlmFamily()

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """The image tokens as the projector gives them: [B, P, D]."""
        whole: Any = self.whole
        settings = {name: getattr(whole.config, name) for name in self.family.features}
        given = whole.get_image_features(pixel_values=pixels_BCHW, return_dict=True, **settings)
        return torch.stack(list(given.pooler_output))


def describe_vlm(base: PreTrainedModel) -> VlmLayout:
    """The layout of a pretrained vision-language model.

    Raises:
        UnsupportedModel: naming the architecture, and what of it is not known.
    """
    name = type(base).__name__
    family = VLMS.get(name)
    if family is None:
        raise UnsupportedModel(
            f"{name} has no entry in elastiformer/vlms.py (known: {', '.join(sorted(VLMS))})"
        )
    paths = (family.language, family.tower, family.projector, "lm_head")
    if missing := [path for path in paths if not has_module(base, path)]:
        raise UnsupportedModel(f"{name}: this model lacks {', '.join(missing)}")
    config: Any = base.config
    side = config.vision_config.image_size
    height, width = (side, side) if isinstance(side, int) else side
    return VlmLayout(
        whole=base,
        language=_language(base, family),
        tower=base.get_submodule(family.tower),
        image_token=int(config.image_token_id),
        image_shape=(getattr(config.vision_config, "num_channels", 3), height, width),
        family=family,
    )


def _language(base: PreTrainedModel, family: VlmFamily) -> PreTrainedModel:
    inner: Any = base.get_submodule(family.language)
    with torch.device("meta"):  # its own weights are never made
        language: Any = AutoModelForCausalLM.from_config(inner.config)
    setattr(language, language.base_model_prefix, inner)
    language.set_output_embeddings(base.get_submodule("lm_head"))
    language.config = copy.copy(inner.config)
    if hasattr(language.config, "final_logit_softcapping"):
        language.config.final_logit_softcapping = None  # the whole model's forward has no such cap
    language.generation_config = base.generation_config
    made: PreTrainedModel = language.eval()
    return made
