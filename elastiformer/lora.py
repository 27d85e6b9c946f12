"""Low-rank repair of the frozen weights, active only for tokens below capacity 1.

The two phases may have a repair each ("split"), share one, or only prompts have one. On disk it
is PEFT's own format, so that PEFT loads it too; here it is a plain module, because PEFT applies an
adapter to whole sequences and a mixed batch needs it token by token.

Source: LoRA (arXiv:2106.09685); in ElastiFormer rank 1 (arXiv:2411.15281).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from elastiformer.capacity import Phase
from elastiformer.families import Layer, Layout

LoraPhases = Literal["shared", "split", "prompt"]
_SETS: dict[LoraPhases, tuple[str, ...]] = {
    "shared": ("shared",),
    "split": (Phase.PROMPT.value, Phase.OUTPUT.value),
    "prompt": (Phase.PROMPT.value,),
}
PARTS = ("query", "key", "value", "out", "gate", "up", "down")


class LoraPair(nn.Module):
    """x -> scale * (x A^T) B^T, for one linear module of the base. Zero at first: B is zero."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.a_RI = nn.Parameter(torch.randn(rank, inputs) / math.sqrt(inputs))
        self.b_OR = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x_NI: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(x_NI, self.a_RI), self.b_OR)


class Lora(nn.Module):
    """The pairs of all layers, by phase, layer and the path of the base's module.

    Args:
        parts: which projections are repaired; a fused module is repaired when any of its parts is.
        first: the first layer that has pairs.
    """

    def __init__(
        self,
        layout: Layout,
        rank: int,
        parts: Sequence[str],
        phases: LoraPhases,
        first: int = 0,
    ) -> None:
        super().__init__()
        self.rank, self.parts, self.phases, self.first = rank, tuple(parts), phases, first
        self.scale = 2.0  # alpha / rank
        self.layers_path = layout.layers_path
        layers = layout.layers
        self.layers = len(layers)
        # How PEFT must be told that the base keeps its weights as inputs x outputs.
        self.transposed = isinstance(layers[0].out.module, Conv1D)
        self.sets = nn.ModuleDict({name: self._set(layers) for name in _SETS[phases]})

    def _set(self, layers: Sequence[Layer]) -> nn.ModuleList:
        pairs = []
        for layer in layers:
            of_layer = {}
            for path, held in layer.modules.items():
                repaired = layer.index >= self.first
                if repaired and any(projection.part in self.parts for projection in held):
                    inputs = held[0].weight_OI.shape[1]
                    outputs = max(projection.stop for projection in held)
                    of_layer[_key(path)] = LoraPair(inputs, outputs, self.rank, self.scale)
            pairs.append(nn.ModuleDict(of_layer))
        return nn.ModuleList(pairs)

    def set_name(self, phase: Phase) -> str | None:
        """The set that repairs tokens of this phase; None when nothing does."""
        if self.phases == "shared":
            return "shared"
        return phase.value if phase.value in self.sets else None

    def set_of(self, layer: int, name: str) -> dict[str, LoraPair]:
        """The pairs of one layer and set, by the path of the base's module."""
        of_layer: nn.ModuleDict = self.sets[name][layer]  # type: ignore[index]
        return {key.replace("/", "."): pair for key, pair in of_layer.items()}  # type: ignore[misc]

    def pair(self, layer: int, path: str, phase: Phase) -> LoraPair | None:
        name = self.set_name(phase)
        return None if name is None else self.set_of(layer, name).get(path)

    def repairs(self, layer: int, path: str) -> bool:
        """Whether this module is repaired, in any phase."""
        return any(self.pair(layer, path, phase) is not None for phase in Phase)

    @property
    def repaired_phases(self) -> tuple[Phase, ...]:
        return tuple(phase for phase in Phase if self.set_name(phase) is not None)


def _key(path: str) -> str:
    """A module's path as a ModuleDict takes it: without dots."""
    return path.replace(".", "/")
