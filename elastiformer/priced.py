"""A plan with its price: what it keeps and costs in each layer, ready for a packed batch.

A row names its plan by the object itself, so that rows compare by identity, and what a step spent
is a few sums: what a plan's rows cost when every token router keeps them, less what routers left
out.

Shape letters: L layers   S sites
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

import numpy as np

from elastiformer.accounting import (
    NOWHERE,
    Direct,
    LayerCost,
    LayerCounts,
    ModelShape,
    layer_counts,
    repaired_from,
)
from elastiformer.capacity import (
    LayerPlan,
    Plan,
    Site,
    dense_plan,
    is_dense,
    leaves_only_channels_out,
    rooted,
)

_REMEMBERED = 4096  # plans; a caller may invent new shares for ever


@dataclass(frozen=True, slots=True)
class Price:
    """What one token costs and leaves out, in one layer or in all of them.

    `linear` FLOPs do not depend on the number of keys. A token that keeps a sub-layer leaves
    out heads and attention channels, or experts and MLP channels, of it.
    """

    linear: int = 0
    kept_attentions: int = 0
    kept_mlps: int = 0
    heads_left_out: int = 0
    experts_left_out: int = 0
    channels_left_out: int = 0

    @property
    def counts(self) -> tuple[int, ...]:
        """All of it, in order."""
        return tuple(getattr(self, f.name) for f in fields(self))

    def __add__(self, other: Price) -> Price:
        return Price(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: int) -> Price:
        return Price(*(times * getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True, eq=False)
class PricedPlan:
    """Compared by identity: equal plans of one `Pricing` are, as a rule, the same object."""

    plan: Plan
    is_dense: bool
    repaired_from: int  # the first layer in which its low-rank repair runs
    counts: tuple[LayerCounts, ...]
    costs: tuple[LayerCost, ...]
    total: Price  # of a token that every token router keeps
    per_key_L: np.ndarray  # FLOPs for each key that such a token attends to
    skipped_attention: Mapping[int, Price]  # what changes where a layer's router skips it
    skipped_mlp: Mapping[int, Price]
    channels: tuple[tuple[int, ...], ...]  # how many each site keeps, by layer, in order of Site
    picks: bool  # whether any site keeps less than all
    only_picks: bool  # whether channels are left out, and nothing else
    keeps_sub_layers: bool
    leaves_heads_out: bool
    leaves_experts_out: bool
    direct: frozenset[int]  # the layers of which its item makes no keys
    _root: Callable[[Plan], PricedPlan]

    @cached_property
    def keeps_by_plan(self) -> bool:
        """Whether it keeps each sub-layer whole or not at all, so that no router has a say."""
        return all(
            share in (0, 1)
            for layer in self.plan
            for share in (layer.attention_tokens, layer.mlp_tokens)
        )

    @cached_property
    def left_from(self) -> int:
        """The layer from which on, but for the last one, all sub-layers are left out."""
        return self._alike_from(lambda layer: layer.attention_tokens == 0 == layer.mlp_tokens)

    @cached_property
    def direct_from(self) -> int:
        """The layer from which on its item makes no keys; the number of layers: it makes all."""
        first = len(self.plan)
        while first - 1 in self.direct:
            first -= 1
        return first

    @cached_property
    def whole_from(self) -> int:
        """The layer from which on, but for the last one, nothing is left out."""
        return self._alike_from(lambda layer: layer == LayerPlan())

    def _alike_from(self, holds: Callable[[LayerPlan], bool]) -> int:
        first = len(self.plan) - 1
        while first and holds(self.plan[first - 1]):
            first -= 1
        return first

    @cached_property
    def rooted(self) -> PricedPlan:
        """The same plan for position 0, which skips no sub-layer."""
        plan = rooted(self.plan)
        return self if plan == self.plan else self._root(plan)


class Pricing:
    """Prices plans for one phase of one shape of model."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self._remembered = lru_cache(maxsize=_REMEMBERED)(self._price)
        self.dense = self._price(dense_plan(len(shape.layers)), True)

    def of(self, plan: Plan, direct: Direct = NOWHERE) -> PricedPlan:
        """The price of a plan.

        Args:
            direct: the layers of which the token's item makes no keys.
        """
        dense = is_dense(plan)
        if dense and not direct:
            return self.dense
        return self._remembered(plan, dense, direct)

    def _price(self, plan: Plan, dense: bool, direct: Direct = NOWHERE) -> PricedPlan:
        shapes = self.shape.layers
        counts = tuple(map(layer_counts, shapes, plan))
        costs = tuple(self.shape.costs(plan, direct))
        both = list(zip(shapes, counts, strict=True))
        total, per_key, channels = Price(), [], []
        no_attention: dict[int, Price] = {}
        no_mlp: dict[int, Price] = {}
        for place, (layer, cost) in enumerate(zip(plan, costs, strict=True)):
            shape, kept = both[place]
            heads_width = kept.heads * shape.head_dim
            attention = Price(
                linear=cost.attention_kept,
                kept_attentions=1,
                heads_left_out=shape.heads - kept.heads,
                channels_left_out=(shape.width - kept.attention_in)
                + (heads_width - kept.attention_out),
            )
            mlp = Price(
                linear=cost.mlp_kept,
                kept_mlps=1,
                experts_left_out=shape.experts - kept.experts if kept.experts else 0,
                channels_left_out=(shape.width - kept.mlp_in) + (kept.neurons - kept.mlp_out),
            )
            without_attention = Price(linear=cost.attention_skipped)
            without_mlp = Price(linear=cost.mlp_skipped)
            # In a last layer of which no keys are made, tokens of a prompt do not even ask.
            asked = layer.attention_tokens
            if direct and direct[place] and self.shape.last_unread:
                asked = 0.0
            total += attention if asked else without_attention
            total += mlp if layer.mlp_tokens else without_mlp
            per_key.append(cost.attention_per_key if asked else 0)
            if 0 < asked < 1:
                no_attention[place] = without_attention + attention * -1
            if 0 < layer.mlp_tokens < 1:
                no_mlp[place] = without_mlp + mlp * -1
            channels.append((kept.attention_in, kept.attention_out, kept.mlp_in, kept.mlp_out))
        return PricedPlan(
            plan=plan,
            is_dense=dense,
            repaired_from=repaired_from(plan),
            counts=counts,
            costs=costs,
            total=total,
            per_key_L=np.array(per_key, dtype=np.int64),
            skipped_attention=no_attention,
            skipped_mlp=no_mlp,
            channels=tuple(channels),
            picks=any(getattr(layer, site.value) < 1 for layer in plan for site in Site),
            only_picks=not is_dense(plan) and leaves_only_channels_out(plan),
            keeps_sub_layers=all(layer.attention_tokens == 1 == layer.mlp_tokens for layer in plan),
            leaves_heads_out=any(kept.heads < shape.heads for shape, kept in both),
            leaves_experts_out=any(kept.neurons < shape.mlp_width for shape, kept in both),
            direct=frozenset(place for place, sides in enumerate(direct) if sides),
            _root=lambda whole: self._remembered(whole, False, direct),
        )
