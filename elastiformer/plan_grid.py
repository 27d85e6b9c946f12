"""What a masked forward is told, a plan for each token, and what it tells: each router's decisions.

Shape letters: B rows   T tokens   M heads or experts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from elastiformer.capacity import Plan, Unit


class Selection(StrEnum):
    """How token routers choose: over the whole window, or causally as in serving."""

    RANK = "rank"
    THRESHOLD = "threshold"


@dataclass(frozen=True, slots=True, eq=False)
class PlanGrid:
    """Which plan each token runs under: `plans[plan_BT]`."""

    plans: Sequence[Plan]
    plan_BT: Tensor

    @classmethod
    def by_phase(cls, rows: Sequence[tuple[Plan, Plan]], output_BT: Tensor) -> PlanGrid:
        """One (prompt plan, output plan) for each row of a batch."""
        plans = [plan for row in rows for plan in row]
        first_B = 2 * torch.arange(len(rows), device=output_BT.device)
        return cls(plans, first_B[:, None] + output_BT.long())


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """One router's decision on one batch.

    `scores` are logits, [B, T] for token units and [B, T, M] for heads and experts; `kept` has
    their shape. `active_BT`: where the router decided; elsewhere the plan itself did.
    """

    layer: int
    unit: Unit
    scores: Tensor
    kept: Tensor
    active_BT: Tensor
