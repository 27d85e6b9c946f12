"""What one request really spent, counted where it was spent. Pure Python.

Usages add: a request's usage is the sum over its steps, a server's the sum over its requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from elastiformer.capacity import Phase, Unit

Key = tuple[Unit, Phase]


@dataclass(slots=True)
class Usage:
    """Counts, all integers; 1 multiply-add = 2 FLOPs, as PyTorch's counter has it.

    `flops` counts every matrix product (blocks, output head, routers, LoRA); `block_flops` those
    of the blocks with their routers and LoRA. The dense counts are what the pretrained model
    would have spent on the same tokens. `parameters` are parameter x token products.
    `routed` and `skipped` count decisions: one per token, layer and thing (a token unit has one
    thing, the others as many as there are heads, experts or channels), by unit and phase. A dense
    token takes no decision.
    """

    flops: int = 0
    dense_flops: int = 0
    block_flops: int = 0
    dense_block_flops: int = 0
    parameters_used: int = 0
    dense_parameters: int = 0
    routed: dict[Key, int] = field(default_factory=dict)
    skipped: dict[Key, int] = field(default_factory=dict)

    @property
    def capacity_spent(self) -> float:
        """Share of the dense block FLOPs that ran; 1.0 before anything ran."""
        return self.block_flops / self.dense_block_flops if self.dense_block_flops else 1.0

    def spend(
        self,
        flops: int,
        dense_flops: int,
        block_flops: int,
        dense_block_flops: int,
        parameters_used: int,
        dense_parameters: int,
    ) -> None:
        """Add what was run, and what the pretrained model would have run."""
        self.flops += flops
        self.dense_flops += dense_flops
        self.block_flops += block_flops
        self.dense_block_flops += dense_block_flops
        self.parameters_used += parameters_used
        self.dense_parameters += dense_parameters

    def decide_each(self, keys: Iterable[Key], counts: Iterable[tuple[int, int]]) -> None:
        """Add decisions: how many were made, and how many left something out."""
        mine, left_out = self.routed, self.skipped
        for key, (routed, skipped) in zip(keys, counts, strict=True):
            mine[key] = mine.get(key, 0) + routed
            left_out[key] = left_out.get(key, 0) + skipped

    def decide(self, unit: Unit, phase: Phase, routed: int, skipped: int) -> None:
        self.decide_each([(unit, phase)], [(routed, skipped)])

    def unit_routed(self, unit: Unit) -> int:
        return sum(count for (of, _), count in self.routed.items() if of is unit)

    def unit_skipped(self, unit: Unit) -> int:
        return sum(count for (of, _), count in self.skipped.items() if of is unit)

    def __iadd__(self, other: Usage) -> Usage:
        self.flops += other.flops
        self.dense_flops += other.dense_flops
        self.block_flops += other.block_flops
        self.dense_block_flops += other.dense_block_flops
        self.parameters_used += other.parameters_used
        self.dense_parameters += other.dense_parameters
        for mine, theirs in ((self.routed, other.routed), (self.skipped, other.skipped)):
            for key, count in theirs.items():
                mine[key] = mine.get(key, 0) + count
        return self
