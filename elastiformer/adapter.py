"""An adapter: what was trained and calibrated for one base model, in memory and on disk.

    adapter.json          format, base model, units and their shapes, gates, training record
    routers.safetensors   the routers, and which neurons belong to which expert
    lora/                 low-rank repair in PEFT's own format; lora/prompt and lora/output if split
    calibration.json      capacity -> plan, with what that plan cost and lost
    README.md             a model card with the measured table

Only JSON and safetensors are read (saved_adapter.py): no pickle, no remote code.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from elastiformer.accounting import KVPolicy, LayerShape, LoraShape, ModelShape
from elastiformer.adapter_files import to_hub
from elastiformer.calibration import Calibration
from elastiformer.capacity import Phase, Unit
from elastiformer.card import model_card
from elastiformer.errors import AdapterError
from elastiformer.families import Layout
from elastiformer.lora import Lora, LoraPhases
from elastiformer.lora_files import write_lora
from elastiformer.routers import (
    IMAGE_SCORERS,
    PART_GATES,
    TOKEN_GATES,
    TOKEN_UNITS,
    ImageScorer,
    PartGate,
    Router,
    Routers,
    TokenGate,
)
from elastiformer.tasks import TEXT_GENERATION
from elastiformer.weights import BaseIdentity
from elastiformer.whole_files import write_whole

FORMAT = 1
ExpertSplit = Literal["coactivation", "contiguous"]


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """The choices that shape an adapter; after training only `image_spread` can change."""

    units: tuple[Unit, ...]
    experts: int = 0  # 0: the MLPs are not divided
    expert_split: ExpertSplit = "coactivation"
    token_gate: TokenGate = "hard"
    part_gate: PartGate = "hard"
    kv: KVPolicy = "complete"
    lora_rank: int = 0  # 0: no repair
    lora_parts: tuple[str, ...] = ()
    lora_phases: LoraPhases = "shared"
    lora_first: int = 0  # the first layer that is repaired
    task: str = TEXT_GENERATION
    image_scorer: ImageScorer = "linear"  # of image tokens
    image_spread: float = 0.0  # what an even spread of the kept ones weighs beside their scores

    def problems(self) -> list[str]:
        found = []
        if Unit.EXPERTS in self.units and self.experts < 2:
            found.append(f"experts: at least 2 to route among; got {self.experts}")
        if self.token_gate not in TOKEN_GATES:
            found.append(f"token gate: one of {', '.join(TOKEN_GATES)}; got {self.token_gate!r}")
        if self.part_gate not in PART_GATES:
            found.append(f"part gate: one of {', '.join(PART_GATES)}; got {self.part_gate!r}")
        if self.image_scorer not in IMAGE_SCORERS:
            known = ", ".join(IMAGE_SCORERS)
            found.append(f"image scorer: one of {known}; got {self.image_scorer!r}")
        spread = self.image_spread
        if isinstance(spread, bool) or not isinstance(spread, int | float) or not 0 <= spread < inf:
            found.append(f"image spread: a finite number, at least 0; got {spread!r}")
        if self.kv not in ("complete", "kept"):
            found.append(f"kv: 'complete' or 'kept'; got {self.kv!r}")
        if self.lora_rank < 0:
            found.append(f"lora rank: at least 0; got {self.lora_rank}")
        if self.lora_first < 0:
            found.append(f"lora first layer: at least 0; got {self.lora_first}")
        return found


@dataclass(eq=False)
class Adapter:
    """Routers, repair, experts and calibration of one base model."""

    spec: AdapterSpec
    base: BaseIdentity
    routers: Routers
    lora: Lora | None
    neuron_order: list[Tensor] | None  # per layer: neurons by expert, int64 [mlp width]
    calibration: Calibration | None = None
    training: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def units(self) -> tuple[Unit, ...]:
        return self.spec.units

    @property
    def kv(self) -> KVPolicy:
        return self.spec.kv

    @property
    def identity(self) -> str:
        """A hash of all that decides what this adapter does."""
        digest = hashlib.sha256(json.dumps(self._header(), sort_keys=True).encode())
        digest.update(save_tensors(self._tensors()))
        if self.lora is not None:
            digest.update(save_tensors(dict(self.lora.state_dict())))
        if self.calibration is not None:
            digest.update(json.dumps(self.calibration.as_json(), sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def identity_in(self, phase: Phase) -> str:
        """A hash of all that decides, before calibration, what tokens of one phase meet."""
        spec = self.spec
        chosen = (self.base, spec.units, spec.experts, spec.token_gate, spec.part_gate, spec.kv)
        digest = hashlib.sha256(repr(chosen).encode())
        if spec.image_spread:
            digest.update(repr(spec.image_spread).encode())
        digest.update(save_tensors(self._tensors()))
        name = self.lora.set_name(phase) if self.lora is not None else None
        if self.lora is not None and name is not None:
            digest.update(repr((spec.lora_rank, spec.lora_parts, spec.lora_first)).encode())
            digest.update(save_tensors(dict(self.lora.sets[name].state_dict())))
        return digest.hexdigest()[:16]

    def router(self, layer: int, unit: Unit) -> Router | None:
        return self.routers.of(layer, unit)

    def threshold(self, unit: Unit, layer: int, phase: Phase, share: float) -> float:
        """The router score above which a token is kept; even odds before calibration."""
        known = self.calibration.thresholds if self.calibration is not None else {}
        if self.calibration is None or layer not in known.get(phase, {}).get(unit, {}):
            return 0.0
        return self.calibration.threshold(unit, layer, phase, share)

    def expert_of_neuron(self, layer: int) -> Tensor:
        """The expert that each neuron belongs to, int64 [mlp width]."""
        assert self.neuron_order is not None, "an adapter without experts"
        order_I = self.neuron_order[layer]
        expert_I = torch.empty_like(order_I)
        size = len(order_I) // self.spec.experts
        expert_I[order_I] = torch.arange(len(order_I), device=order_I.device) // size
        return expert_I

    def parameters(self) -> dict[str, nn.Parameter]:
        """What can be trained, by name."""
        named = {f"routers.{name}": p for name, p in self.routers.named_parameters()}
        if self.lora is not None:
            named |= {f"lora.{name}": p for name, p in self.lora.named_parameters()}
        return named

    def spread_images(self, spread: float) -> None:
        """From now on weigh an even spread of the kept image tokens like this.

        Raises:
            AdapterError: it is no finite number of at least 0, or nothing drops image tokens here.
        """
        if self.routers.image is None:
            raise AdapterError(f"image spread: this adapter has no router for {Unit.IMAGE_TOKENS}")
        spec = replace(self.spec, image_spread=spread)
        if problems := spec.problems():
            raise AdapterError("; ".join(problems))
        self.spec, self.routers.image.spread = spec, spread

    def to(self, device: torch.device) -> Adapter:
        self.routers.to(device)
        if self.lora is not None:
            self.lora.to(device)
        if self.neuron_order is not None:
            self.neuron_order = [order_I.to(device) for order_I in self.neuron_order]
        return self

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the adapter, each file beside its place and then renamed; adapter.json last.

        What is not calibrated leaves no calibration of a former adapter in the folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {"routers.safetensors": save_tensors(self._tensors())}
        if self.lora is not None:
            files |= write_lora(self.lora, self.base.id)
        header = self._header() | {
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        }
        if self.calibration is not None:
            # A path has hundreds of steps: one line holds them better than a thousand.
            files["calibration.json"] = json.dumps(self.calibration.as_json()).encode() + b"\n"
        else:
            (folder / "calibration.json").unlink(missing_ok=True)
        files["README.md"] = model_card(header, self.calibration).encode()
        files["adapter.json"] = (json.dumps(header, indent=1) + "\n").encode()
        for name, content in files.items():
            write_whole(folder / name, content)
        self.path = folder
        return folder

    def push(self, repository: str) -> None:
        """Upload the saved folder to the Hub, as a model repository."""
        if self.path is None:
            raise AdapterError("this adapter was never saved: save it to a folder, then push it")
        to_hub(self.path, repository)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: p.detach().float() for name, p in self.routers.state_dict().items()}
        for layer, order_I in enumerate(self.neuron_order or []):
            tensors[f"layers.{layer}.neuron_order"] = order_I.to(torch.int32)
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def _header(self) -> dict[str, Any]:
        spec = self.spec
        image: dict[str, Any] = {}
        if Unit.IMAGE_TOKENS in spec.units:
            image["image_scorer"] = spec.image_scorer
            if spec.image_spread:
                image["image_spread"] = spec.image_spread
        return image | {
            "format": FORMAT,
            "base": asdict(self.base),
            "task": spec.task,
            "units": [unit.value for unit in spec.units],
            "experts": {"count": spec.experts, "split": spec.expert_split},
            "gates": {"tokens": spec.token_gate, "parts": spec.part_gate},
            "kv": spec.kv,
            "lora": (
                {
                    "rank": spec.lora_rank,
                    "parts": list(spec.lora_parts),
                    "phases": spec.lora_phases,
                    "first_layer": spec.lora_first,
                }
                if spec.lora_rank
                else None
            ),
            "shapes": {name: list(tensor.shape) for name, tensor in self._tensors().items()},
            "training": self.training,
        }


def blank(spec: AdapterSpec, layout: Layout, base: BaseIdentity) -> Adapter:
    """An untrained adapter: routers of small noise, a repair of zero, contiguous experts."""
    shapes = [replace(layer.shape, experts=spec.experts) for layer in layout.layers]
    lora = None
    if spec.lora_rank:
        lora = Lora(layout, spec.lora_rank, spec.lora_parts, spec.lora_phases, spec.lora_first)
    order = [torch.arange(shape.mlp_width) for shape in shapes] if spec.experts else None
    routers = Routers(shapes, spec.units, spec.image_scorer, spec.image_spread)
    return Adapter(spec, base, routers, lora, order)


def elastic_shape(layout: Layout, adapter: Adapter | None) -> ModelShape:
    """The shape that accounting works on: the base's matrices, and what the adapter adds."""
    layers: list[LayerShape] = []
    for layer in layout.layers:
        shape = layer.shape
        if adapter is not None:
            pairs = []
            for path, held in layer.modules.items():
                if adapter.lora is not None and adapter.lora.repairs(layer.index, path):
                    pairs.append(LoraShape(tuple(p.part for p in held), adapter.lora.rank))
            routed = tuple(unit.value for unit in TOKEN_UNITS if unit in adapter.routers.units)
            shape = replace(
                shape, experts=adapter.spec.experts, token_routers=routed, lora=tuple(pairs)
            )
        layers.append(shape)
    kv: KVPolicy = adapter.spec.kv if adapter is not None else "complete"
    lora = adapter.lora if adapter is not None else None
    repaired = lora.repaired_phases if lora is not None else ()
    return ModelShape(tuple(layers), layout.width, layout.vocabulary, kv, repaired)
