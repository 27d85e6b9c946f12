"""From the name of an encoder to its weights, its tokenizer or image processor, and its task.

Files and names are found as for causal models (weights.py). The task is asked for, or read off
the architecture that the config names. How features become one is read from the files that
sentence-transformers writes. Images are processed by Pillow, as torchvision may not be there.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING,
    MODEL_MAPPING_NAMES,
)

from elastiformer.encoder_families import ENCODERS, FEATURES_OF, HEADS
from elastiformer.errors import BaseModelError, UnsupportedModel
from elastiformer.tasks import Task
from elastiformer.weights import (
    BaseIdentity,
    Resolved,
    as_base_model_error,
    check_complete,
    config_hash,
    device_of,
    dtype_of,
    load_tokenizer,
    read_json,
    resolve,
)

_AUTO: dict[Task, tuple[Any, Any]] = {
    Task.TEXT_CLASSIFICATION: (
        AutoModelForSequenceClassification,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    Task.TOKEN_CLASSIFICATION: (
        AutoModelForTokenClassification,
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    Task.IMAGE_CLASSIFICATION: (
        AutoModelForImageClassification,
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ),
    Task.FEATURES: (AutoModel, MODEL_MAPPING_NAMES),
}
_POOLINGS = {"pooling_mode_cls_token": "class", "pooling_mode_mean_tokens": "mean"}


@dataclass(frozen=True, slots=True)
class LoadedEncoder:
    """An encoder in eval mode, what prepares its inputs, and who it is."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    images: Any | None  # an image processor
    identity: BaseIdentity
    pooling: str | None  # None where its files say nothing
    normalized: bool
    most_tokens: int | None


def task_of(base: str) -> Task | None:
    """What the config of a base says that it is for; None for a causal model.

    Raises:
        BaseModelError: naming the base and what is wrong with it.
    """
    return _task_of(resolve(base))


def load_encoder(
    base: str, task: Task | None = None, dtype: str = "auto", device: str = "auto"
) -> LoadedEncoder:
    """Find and load an encoder, with the head that its task needs.

    Raises:
        BaseModelError: it is not where its name says, or lacks a file or a weight.
        UnsupportedModel: Transformers has no such head for it.
    """
    place = device_of(device)
    resolved = resolve(base)
    task = task or _task_of(resolved)
    if task is None:
        raise UnsupportedModel(
            f"base model '{resolved.name}': its config names no encoder; tasks are "
            f"{', '.join(Task)}"
        )
    model = _load_model(resolved, task, dtype_of(dtype, place)).to(place)
    reads_images = "pixel_values" in model.main_input_name
    pooling, normalized = _pooling(resolved)
    return LoadedEncoder(
        model=model,
        tokenizer=None if reads_images else _tokenizer(resolved),
        images=load_image_processor(resolved) if reads_images else None,
        identity=BaseIdentity(resolved.name, resolved.revision, config_hash(model.config)),
        pooling=pooling,
        normalized=normalized,
        most_tokens=_most_tokens(resolved) if task is Task.FEATURES else None,
    )


def _task_of(resolved: Resolved) -> Task | None:
    for name in _architectures(resolved):
        if name in HEADS:
            return HEADS[name][0]
        if name in ENCODERS or name in FEATURES_OF:
            return Task.FEATURES
    return None


def _architectures(resolved: Resolved) -> list[str]:
    """What the config names, usually one."""
    named = read_json(resolved.path / "config.json", resolved.name).get("architectures")
    return [str(name) for name in named] if isinstance(named, list) else []


def _load_model(resolved: Resolved, task: Task, dtype: torch.dtype) -> PreTrainedModel:
    parts = [FEATURES_OF[name] for name in _architectures(resolved) if name in FEATURES_OF]
    if task is Task.FEATURES and parts:
        return _load_part(resolved, parts[0], dtype)
    kind = read_json(resolved.path / "config.json", resolved.name).get("model_type")
    auto, known = _AUTO[task]
    if kind not in known:
        raise UnsupportedModel(
            f"base model '{resolved.name}': its architecture '{kind}' has no head for {task} in "
            "Transformers"
        )
    with as_base_model_error(resolved.name):
        config = AutoConfig.from_pretrained(resolved.path, trust_remote_code=False)
        extra: dict[str, Any] = {}
        if task is Task.FEATURES:
            # The pooler is not read, and the files of many a base hold none.
            built = inspect.signature(MODEL_MAPPING[type(config)].__init__)
            if "add_pooling_layer" in built.parameters:
                extra["add_pooling_layer"] = False
        loaded = auto.from_pretrained(resolved.path, config=config, **_how(dtype), **extra)
    return _complete(loaded, resolved)


def _load_part(resolved: Resolved, name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of this name out of files that hold more; its config lies within theirs."""
    with as_base_model_error(resolved.name):
        loaded = getattr(transformers, name).from_pretrained(resolved.path, **_how(dtype))
    return _complete(loaded, resolved)


def _how(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "use_safetensors": True,
        "trust_remote_code": False,
        "output_loading_info": True,
    }


def _complete(loaded: tuple[PreTrainedModel, dict[str, set[str]]], of: Resolved) -> PreTrainedModel:
    model, report = loaded
    check_complete(report, of.name)
    return model.eval()


def _tokenizer(resolved: Resolved) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(resolved)
    if tokenizer is None:
        raise BaseModelError(f"base model '{resolved.name}': the folder has no tokenizer")
    return tokenizer


def load_image_processor(resolved: Resolved) -> Any:
    names = ("preprocessor_config.json", "processor_config.json")
    if not any((resolved.path / name).is_file() for name in names):
        raise BaseModelError(f"base model '{resolved.name}': the folder has no {names[0]}")
    with as_base_model_error(resolved.name):
        return AutoImageProcessor.from_pretrained(
            resolved.path, backend="pil", trust_remote_code=False
        )


def _pooling(resolved: Resolved) -> tuple[str | None, bool]:
    """The pooling that sentence-transformers' files name, and whether they make a unit vector."""
    modules = resolved.path / "modules.json"
    if not modules.is_file():
        return None, False
    pooling: str | None = None
    normalized = False
    try:
        for module in json.loads(modules.read_text("utf-8")):
            kind, folder = str(module["type"]), Path(str(module["path"]))
            normalized |= kind.endswith(".Normalize")
            if kind.endswith(".Pooling"):
                pooling = _pooling_mode(resolved, resolved.path / folder / "config.json")
    except (ValueError, KeyError, TypeError) as error:
        raise BaseModelError(f"base model '{resolved.name}': modules.json: {error!r}") from error
    return pooling, normalized


def _pooling_mode(resolved: Resolved, path: Path) -> str:
    config = read_json(path, resolved.name)
    asked = [name for name, value in config.items() if name.startswith("pooling_mode") and value]
    if len(asked) == 1 and asked[0] in _POOLINGS:
        return _POOLINGS[asked[0]]
    raise BaseModelError(
        f"base model '{resolved.name}': {path.parent.name}/{path.name}: pooling is one of "
        f"{', '.join(_POOLINGS)}; got {', '.join(asked) or 'none'}"
    )


def _most_tokens(resolved: Resolved) -> int | None:
    path = resolved.path / "sentence_bert_config.json"
    if not path.is_file():
        return None
    most = read_json(path, resolved.name).get("max_seq_length")
    return most if isinstance(most, int) and most > 0 else None
