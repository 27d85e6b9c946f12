"""A plan with its price: what it keeps and costs in each layer, ready for a packed batch.

A row names its plan by the object itself, so that rows compare by identity, and a step's usage is
one sum over the routes that it took.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

from elastiformer.accounting import LayerCounts, ModelShape, layer_cost, layer_counts
from elastiformer.capacity import Plan, dense_plan, is_dense

_REMEMBERED = 4096  # plans; a caller may invent new shares for ever


class Column(IntEnum):
    """What is held for a plan and a layer; FLOPs and counts, for one token."""

    ATTENTION_KEPT = 0
    ATTENTION_SKIPPED = 1
    ATTENTION_PER_KEY = 2
    MLP_KEPT = 3
    MLP_SKIPPED = 4
    HEADS_LEFT_OUT = 5
    EXPERTS_LEFT_OUT = 6
    ATTENTION_CHANNELS_LEFT_OUT = 7
    MLP_CHANNELS_LEFT_OUT = 8


@dataclass(frozen=True, slots=True, eq=False)
class PricedPlan:
    """Compared by identity: equal plans of one `Pricing` are, as a rule, the same object."""

    plan: Plan
    is_dense: bool
    counts: tuple[LayerCounts, ...]
    columns_LC: Tensor  # int64, on the CPU


class Pricing:
    """Prices plans for one shape of model."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.dense = self._price(dense_plan(len(shape.layers)))
        self._remembered = lru_cache(maxsize=_REMEMBERED)(self._price)

    def of(self, plan: Plan) -> PricedPlan:
        return self.dense if is_dense(plan) else self._remembered(plan)

    def _price(self, plan: Plan) -> PricedPlan:
        dense = is_dense(plan)
        counts = []
        rows = []
        for shape, layer in zip(self.shape.layers, plan, strict=True):
            cost, kept = layer_cost(shape, layer, self.shape.kv, dense), layer_counts(shape, layer)
            counts.append(kept)
            heads_width = kept.heads * shape.head_dim
            rows.append(
                [
                    cost.attention_kept,
                    cost.attention_skipped,
                    cost.attention_per_key,
                    cost.mlp_kept,
                    cost.mlp_skipped,
                    shape.heads - kept.heads,
                    shape.experts - kept.experts if kept.experts else 0,
                    shape.width - kept.attention_in + heads_width - kept.attention_out,
                    shape.width - kept.mlp_in + kept.neurons - kept.mlp_out,
                ]
            )
        return PricedPlan(plan, dense, tuple(counts), torch.tensor(rows, dtype=torch.long))
