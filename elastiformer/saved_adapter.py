"""An adapter's files: read, checked, and fitted to the base model at hand."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from elastiformer.adapter import FORMAT, Adapter, AdapterSpec, blank
from elastiformer.adapter_files import (
    from_hub,
    parse_tensors,
    read_file,
    read_json,
)
from elastiformer.calibration import Calibration
from elastiformer.calibration_reading import read_calibration
from elastiformer.capacity import Unit
from elastiformer.errors import AdapterError
from elastiformer.families import Layout
from elastiformer.lora_files import read_lora
from elastiformer.misfits import base_misfits, misfit_message, order_misfits, shape_misfits
from elastiformer.weights import BaseIdentity


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """An adapter's files, read and checked in themselves, not yet fitted to a base model."""

    path: Path
    spec: AdapterSpec
    base: BaseIdentity
    tensors: Mapping[str, Tensor]
    lora: Mapping[str, Mapping[str, Tensor]]  # by set, then by Lora's own names
    calibration: Calibration | None
    training: dict[str, Any]

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> SavedAdapter:
        """Read a folder, or a Hub repository when there is no such folder.

        Raises:
            AdapterError: a file is missing, cut short, altered, or not what it should be.
        """
        folder = Path(source)
        if not folder.is_dir():
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
                raise AdapterError(f"adapter {str(source)!r}: there is no such folder")
            folder = from_hub(str(source))
        header = read_json(folder / "adapter.json")
        if header.get("format") != FORMAT:
            raise AdapterError(
                f"{folder / 'adapter.json'}: format {header.get('format')!r}; "
                f"this version reads {FORMAT}"
            )
        try:
            spec = _spec(header)
            base = BaseIdentity(**header["base"])
            files = dict(header["files"])
        except (KeyError, TypeError, ValueError) as error:
            raise AdapterError(f"{folder / 'adapter.json'}: cannot be read: {error!r}") from error
        if problems := spec.problems():
            raise AdapterError(f"{folder / 'adapter.json'}:\n  " + "\n  ".join(problems))
        contents = {name: read_file(folder, name, digest) for name, digest in files.items()}
        calibration = None
        if (folder / "calibration.json").exists():
            calibration = read_calibration(read_json(folder / "calibration.json"))
        return cls(
            path=folder,
            spec=spec,
            base=base,
            tensors=parse_tensors(
                folder / "routers.safetensors", contents.get("routers.safetensors")
            ),
            lora=read_lora(folder, contents) if spec.lora_rank else {},
            calibration=calibration,
            training=dict(header.get("training") or {}),
        )

    def fit(self, layout: Layout, base: BaseIdentity) -> Adapter:
        """This adapter on a base model.

        Raises:
            AdapterError: listing every misfit at once.
        """
        misfits = base_misfits(self.base, base)
        spec = self.spec
        widths = {layer.shape.mlp_width for layer in layout.layers}
        if spec.experts and any(width % spec.experts for width in widths):
            misfits.append(
                f"experts: saved {spec.experts}, which do not divide {sorted(widths)} neurons"
            )
            raise AdapterError(misfit_message(misfits))
        adapter = blank(spec, layout, base)
        expected = {name: tuple(tensor.shape) for name, tensor in adapter._tensors().items()}
        misfits += shape_misfits(self.tensors, expected)
        for name, tensors in self.lora.items():
            of_set = {}
            if adapter.lora is not None and name in adapter.lora.sets:
                of_set = adapter.lora.sets[name].state_dict()
            expected = {key: tuple(tensor.shape) for key, tensor in of_set.items()}
            misfits += [f"lora {name}: {text}" for text in shape_misfits(tensors, expected)]
        if adapter.lora is not None:
            misfits += [f"lora {name}: missing" for name in adapter.lora.sets.keys() - self.lora]
        if self.calibration is not None:
            misfits += self.calibration.misfits(len(layout.layers), spec.units)
        if not misfits and spec.experts:
            misfits += order_misfits(self.tensors)
        if misfits:
            raise AdapterError(misfit_message(misfits))
        routers = {name: t for name, t in self.tensors.items() if "neuron_order" not in name}
        adapter.routers.load_state_dict(routers)
        if adapter.neuron_order is not None:
            adapter.neuron_order = [
                self.tensors[f"layers.{layer}.neuron_order"].long()
                for layer in range(len(layout.layers))
            ]
        if adapter.lora is not None:
            for name, tensors in self.lora.items():
                adapter.lora.sets[name].load_state_dict(tensors)
        adapter.calibration, adapter.training = self.calibration, self.training
        adapter.path = self.path
        return adapter


def _spec(header: Mapping[str, Any]) -> AdapterSpec:
    lora = header["lora"] or {"rank": 0, "parts": [], "phases": "shared"}
    return AdapterSpec(
        units=tuple(Unit(unit) for unit in header["units"]),
        experts=int(header["experts"]["count"]),
        expert_split=header["experts"]["split"],
        token_gate=header["gates"]["tokens"],
        part_gate=header["gates"]["parts"],
        kv=header["kv"],
        lora_rank=int(lora["rank"]),
        lora_parts=tuple(lora["parts"]),
        lora_phases=lora["phases"],
        lora_first=int(lora.get("first_layer", 0)),
        task=str(header["task"]),
        image_scorer=header.get("image_scorer", "linear"),
        image_spread=header.get("image_spread", 0.0),
    )
