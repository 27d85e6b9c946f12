"""LoRA on disk in PEFT's own format, so that PEFT loads it onto the base model too."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from elastiformer.errors import AdapterError
from elastiformer.lora import Lora, LoraPair

_PREFIX = "base_model.model."
_NAMES = {"a_RI": "lora_A.weight", "b_OR": "lora_B.weight"}


def write_lora(lora: Lora, base_id: str) -> dict[str, bytes]:
    """The files of all sets, by path inside the adapter's folder."""
    files: dict[str, bytes] = {}
    for name, layers in lora.sets.items():
        folder = _folder(name)
        files[f"{folder}/adapter_model.safetensors"] = save_tensors(
            {
                f"{_PREFIX}{lora.layers_path}.{_peft_name(key)}": tensor.detach()
                .float()
                .cpu()
                .contiguous()
                for key, tensor in layers.state_dict().items()
            }
        )
        files[f"{folder}/adapter_config.json"] = _config(lora, layers, base_id)
    return files


def read_lora(folder: Path, contents: Mapping[str, bytes]) -> dict[str, dict[str, Tensor]]:
    """The sets by name, their tensors by Lora's own names.

    Raises:
        AdapterError: a file that is no safetensors file, or a name that PEFT would not write.
    """
    sets: dict[str, dict[str, Tensor]] = {}
    for path, content in contents.items():
        if not (path.startswith("lora/") and path.endswith(".safetensors")):
            continue
        inner = Path(path).parent.name
        try:
            tensors = load_tensors(content)
        except SafetensorError as error:
            raise AdapterError(f"{folder / path}: not a safetensors file: {error}") from error
        sets["shared" if inner == "lora" else inner] = {
            _own_name(folder / path, name): tensor for name, tensor in tensors.items()
        }
    return sets


def _folder(name: str) -> str:
    return "lora" if name == "shared" else f"lora/{name}"


def _config(lora: Lora, layers: nn.Module, base_id: str) -> bytes:
    paths = sorted(
        {
            key.split(".", 1)[1].replace("/", ".")
            for key, module in layers.named_modules()
            if isinstance(module, LoraPair)
        }
    )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.scale * lora.rank),
        target_modules=paths,
        layers_to_transform=list(range(lora.first, lora.layers)) if lora.first else None,
        fan_in_fan_out=lora.transposed,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_id,
        inference_mode=True,
    )
    with tempfile.TemporaryDirectory() as folder:  # PEFT writes to a folder only
        config.save_pretrained(folder)
        written = json.loads((Path(folder) / "adapter_config.json").read_text())
    # A set's order differs from run to run; the same adapter must give the same bytes.
    written["target_modules"] = paths
    return (json.dumps(written, indent=1, sort_keys=True) + "\n").encode()


def _peft_name(key: str) -> str:
    """`3.self_attn/q_proj.a_RI` -> `3.self_attn.q_proj.lora_A.weight`"""
    layer, path, name = key.split(".")
    return f"{layer}.{path.replace('/', '.')}.{_NAMES[name]}"


def _own_name(path: Path, name: str) -> str:
    for own, theirs in _NAMES.items():
        if name.startswith(_PREFIX) and name.endswith(f".{theirs}"):
            parts = name.removeprefix(_PREFIX).removesuffix(f".{theirs}").split(".")
            at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
            if at is not None:
                return f"{parts[at]}.{'/'.join(parts[at + 1 :])}.{own}"
    raise AdapterError(f"{path}: {name} is not a name that PEFT writes")
