"""Plans as numbers, and what each costs in each layer as tensors.

A packed batch names its rows' plans by number; whatever depends on the plan alone is looked up
here, so that a step's usage is one sum over the routes that it took.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from elastiformer.accounting import LayerCounts, ModelShape, layer_cost, layer_counts
from elastiformer.capacity import LayerPlan, Plan, dense_plan, is_dense

DENSE_PLAN = 0  # the number of the plan that keeps everything


class Column(IntEnum):
    """What the table holds for a plan and a layer; FLOPs and counts, for one token."""

    ATTENTION_KEPT = 0
    ATTENTION_SKIPPED = 1
    ATTENTION_PER_KEY = 2
    MLP_KEPT = 3
    MLP_SKIPPED = 4
    HEADS_LEFT_OUT = 5
    EXPERTS_LEFT_OUT = 6
    ATTENTION_CHANNELS_LEFT_OUT = 7
    MLP_CHANNELS_LEFT_OUT = 8


class PlanTable:
    """The plans in use. They are never forgotten: there are few, and sequences hold numbers."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.plans: list[Plan] = []
        self._numbers: dict[Plan, int] = {}
        self._rows: list[Tensor] = []
        self._stacked_PLC: Tensor | None = None
        self.number(dense_plan(len(shape.layers)))

    def number(self, plan: Plan) -> int:
        known = self._numbers.get(plan)
        if known is None:
            known = self._numbers[plan] = len(self.plans)
            self.plans.append(plan)
            self._rows.append(self._row(plan))
            self._stacked_PLC = None
        return known

    def counts(self, number: int, layer: int) -> LayerCounts:
        return layer_counts(self.shape.layers[layer], self.plans[number][layer])

    def layer(self, number: int, layer: int) -> LayerPlan:
        return self.plans[number][layer]

    @property
    def columns_PLC(self) -> Tensor:
        """int64 [plans, layers, columns], on the CPU."""
        if self._stacked_PLC is None:
            self._stacked_PLC = torch.stack(self._rows)
        return self._stacked_PLC

    def _row(self, plan: Plan) -> Tensor:
        dense = is_dense(plan)
        rows = []
        for shape, layer in zip(self.shape.layers, plan, strict=True):
            cost = layer_cost(shape, layer, self.shape.kv, dense)
            counts = layer_counts(shape, layer)
            heads_width = counts.heads * shape.head_dim
            rows.append(
                [
                    cost.attention_kept,
                    cost.attention_skipped,
                    cost.attention_per_key,
                    cost.mlp_kept,
                    cost.mlp_skipped,
                    shape.heads - counts.heads,
                    shape.experts - counts.experts if counts.experts else 0,
                    shape.width - counts.attention_in + heads_width - counts.attention_out,
                    shape.width - counts.mlp_in + counts.neurons - counts.mlp_out,
                ]
            )
        return torch.tensor(rows, dtype=torch.long)
