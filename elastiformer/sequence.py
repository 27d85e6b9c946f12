"""One request inside the sparse form: its plans, its cache, its debts, what it has spent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from elastiformer.accounting import ModelShape
from elastiformer.cache import LayerCache
from elastiformer.capacity import Phase, Unit
from elastiformer.priced import PricedPlan
from elastiformer.routers import Debt
from elastiformer.usage import Usage


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """The next tokens of one sequence: a part of its prompt, or one generated token."""

    sequence: Sequence
    ids: list[int]


class Sequence:
    """A request's state between steps. Made by `ElasticModel.sequence`.

    The last prompt token, and all after it, are of phase output; of a scored sequence all are.
    """

    def __init__(
        self,
        shape: ModelShape,
        plan_at: Callable[[Phase, int], PricedPlan],
        prompt_tokens: int,
        most_tokens: int,
        scored: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._plan_at = plan_at
        self.prompt_tokens, self.most_tokens, self.scored = prompt_tokens, most_tokens, scored
        self.length = 0
        self.usage = Usage()
        self.caches = [LayerCache(layer, most_tokens, dtype, device) for layer in shape.layers]
        self._debts: dict[tuple[int, Unit, Phase], Debt] = {}

    def phase_at(self, position: int) -> Phase:
        if self.scored or position >= self.prompt_tokens - 1:
            return Phase.OUTPUT
        return Phase.PROMPT

    def plan_at(self, position: int) -> PricedPlan:
        """The plan that this position runs under."""
        return self._plan_at(self.phase_at(position), position)

    def debt(self, layer: int, unit: Unit, phase: Phase) -> Debt:
        return self._debts.setdefault((layer, unit, phase), Debt())

    @property
    def cache_bytes(self) -> int:
        return sum(cache.bytes for cache in self.caches)

    def release(self) -> None:
        """Free the cache. The sequence must not be used after it."""
        self.caches.clear()
