"""Which tokens an adapter keeps of given items, and how alike two adapters choose.

Shape letters: N items side by side   T tokens   S sets: one for each layer and token unit
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastiformer import Capacity
from elastiformer.encoder import ElasticEncoder
from elastiformer.masked import PlanGrid
from elastiformer.routers import TOKEN_UNITS
from elastiformer.sequence import Item


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """What token routers kept, bool [N, T] for each layer and unit, and where they had a choice."""

    kept: tuple[Tensor, ...]
    asked: tuple[Tensor, ...]


@torch.inference_mode()
def choice_of(model: ElasticEncoder, items: Sequence[Item], capacity: float) -> Choice:
    """The tokens that the routers keep of these items, each under its own request's plan.

    Where class tokens alone are read, what the last layer keeps of the others is no choice: nobody
    reads it, and its routers have learnt nothing.
    """
    batch = model.collate(items)
    found = model.masked(batch, plan_grid(model, items, capacity))
    read = len(model.layout.layers) - model.reads_class
    routes = [each for each in found.routes if each.unit in TOKEN_UNITS and each.layer < read]
    return Choice(
        tuple(route.kept & route.active_BT for route in routes),
        tuple(route.active_BT for route in routes),
    )


def plan_grid(model: ElasticEncoder, items: Sequence[Item], capacity: float) -> PlanGrid:
    """The plans that requests of this capacity run under, token by token."""
    plans: dict[object, int] = {}
    rows = []
    for item in items:
        sequence = model.sequence(Capacity(capacity, capacity), item)
        at = [sequence.plan_at(place).plan for place in range(len(item.ids))]
        rows.append([plans.setdefault(plan, len(plans)) for plan in at])
    longest = max(map(len, rows))
    plan_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    return PlanGrid(list(plans), plan_BT.to(model.device))  # type: ignore[arg-type]


def jaccard(one: Choice, other: Choice) -> float:
    """Tokens kept by both over tokens kept by either; the mean over layers, units and items.

    1 where nobody had a choice.
    """
    shares = [
        _over_either((a_NT & b_NT).sum(1), (a_NT | b_NT).sum(1), asked_NT)
        for a_NT, b_NT, asked_NT in zip(one.kept, other.kept, one.asked, strict=True)
    ]
    return _mean(shares)


def by_chance(choice: Choice) -> float:
    """The same of two that keep as many of the same tokens at random, about."""
    shares = []
    for kept_NT, asked_NT in zip(choice.kept, choice.asked, strict=True):
        share_N = kept_NT.sum(1) / asked_NT.sum(1).clamp_min(1)
        shares.append((share_N / (2 - share_N))[asked_NT.any(1)])
    return _mean(shares)


def _mean(shares: Sequence[Tensor]) -> float:
    every = torch.cat([torch.empty(0), *(each.cpu() for each in shares)])
    return float(every.mean()) if len(every) else 1.0


def _over_either(both_N: Tensor, either_N: Tensor, asked_NT: Tensor) -> Tensor:
    there_N = asked_NT.any(1) & (either_N > 0)
    return both_N[there_N] / either_N[there_N]
