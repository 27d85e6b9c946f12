"""The weights of a base as its files hold them, where they are finer than those that were loaded.

A base that computes in bfloat16 may come from float32 files whose weights lie on a grid of few
steps: rounded, they no longer do, and a step of few rows would read three times the bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn


class _Place(NamedTuple):
    file: Path
    name: str


class Originals:
    """Finds a loaded module's weight in the files it was read from. It holds no weights."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        """Of a folder of safetensors; nothing, where the model was loaded in float32."""
        self._places: dict[nn.Module, _Place] = {}
        modules = {
            f"{path}.weight": module for path, module in model.named_modules() if _is_small(module)
        }
        for path in sorted(folder.glob("*.safetensors")) if modules else ():
            with safe_open(path, framework="pt") as file:
                for name in modules.keys() & set(file.keys()):
                    if file.get_slice(name).get_dtype() == "F32":
                        self._places[modules[name]] = _Place(path, name)
        _share_with_ties(self._places, model)

    def weight(self, module: nn.Module) -> Tensor | None:
        """The float32 weight that a module's own was rounded from, in its layout, if that is so."""
        place = self._places.get(module)
        if place is None:
            return None
        with safe_open(place.file, framework="pt") as file:
            original: Tensor = file.get_tensor(place.name)
        own: Tensor = module.weight  # type: ignore[assignment]
        # Whatever else was done to it since, such as a merge, is no rounding.
        return original if torch.equal(original.to(own.dtype), own.detach().cpu()) else None


def _is_small(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dtype == torch.bfloat16


def _share_with_ties(places: dict[nn.Module, _Place], model: nn.Module) -> None:
    """A head that is the embedding's own weight is in the files once."""
    by_weight = {id(module.weight): place for module, place in places.items()}
    for module in model.modules():
        if module not in places and id(getattr(module, "weight", None)) in by_weight:
            places[module] = by_weight[id(module.weight)]
