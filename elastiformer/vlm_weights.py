"""From the name of a vision-language model to its weights, its tokenizer and image processor.

Files and names are found as for causal models (weights.py), images processed as for encoders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from elastiformer.encoder_weights import load_image_processor
from elastiformer.errors import UnsupportedModel
from elastiformer.vlms import VLMS
from elastiformer.weights import (
    BaseIdentity,
    as_base_model_error,
    check_complete,
    config_hash,
    device_of,
    dtype_of,
    load_tokenizer,
    read_json,
    resolve,
)


@dataclass(frozen=True, slots=True)
class LoadedVlm:
    """A vision-language model in eval mode, what prepares its inputs, and who it is."""

    model: PreTrainedModel
    tokenizer: Any | None
    images: Any
    identity: BaseIdentity


def is_vlm(base: str) -> bool:
    """Whether the config of a base says that it is a vision-language model.

    Raises:
        BaseModelError: naming the base and what is wrong with it.
    """
    resolved = resolve(base)
    architectures = read_json(resolved.path / "config.json", resolved.name).get("architectures")
    return isinstance(architectures, list) and any(name in VLMS for name in architectures)


def load_vlm(base: str, dtype: str = "auto", device: str = "auto") -> LoadedVlm:
    """Find and load a vision-language model.

    Raises:
        BaseModelError: it is not where its name says, or lacks a file or a weight.
        UnsupportedModel: it is none that is known here.
    """
    place = device_of(device)
    if not is_vlm(base):
        raise UnsupportedModel(
            f"base model '{base}': its config names no vision-language model (known: "
            f"{', '.join(sorted(VLMS))})"
        )
    resolved = resolve(base)
    with as_base_model_error(resolved.name):
        config = AutoConfig.from_pretrained(resolved.path, trust_remote_code=False)
        model, report = AutoModelForImageTextToText.from_pretrained(
            resolved.path,
            config=config,
            dtype=dtype_of(dtype, place),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    check_complete(report, resolved.name)
    model = model.eval().to(place)
    return LoadedVlm(
        model=model,
        tokenizer=load_tokenizer(resolved),
        images=load_image_processor(resolved),
        identity=BaseIdentity(resolved.name, resolved.revision, config_hash(model.config)),
    )
