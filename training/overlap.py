"""What an adapter's routers keep of given items or texts, and how alike two adapters choose.

Shape letters: N items or texts side by side   T tokens   M heads or experts   P tokens, or T x M
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastiformer import Capacity, ElasticModel
from elastiformer.encoder import ElasticEncoder
from elastiformer.encoding import padded
from elastiformer.plan_grid import PlanGrid, Route
from elastiformer.sequence import Item
from elastiformer.sequence import Sequence as Request


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """What routers kept, bool [N, P] for each layer and unit, and where they had a choice."""

    kept: tuple[Tensor, ...]
    asked: tuple[Tensor, ...]


@torch.inference_mode()
def choice_of(model: ElasticEncoder, items: Sequence[Item], capacity: float) -> Choice:
    """What the routers keep of these items, each under its own request's plan.

    Where class tokens alone are read, what the last layer keeps of the others is no choice: nobody
    reads it, and its routers have learnt nothing.
    """
    found = model.masked(model.collate(items), item_grid(model, items, capacity))
    return _choice(found.routes, len(model.layout.layers) - model.reads_class)


@torch.inference_mode()
def choice_of_texts(model: ElasticModel, ids_NT: Tensor, capacity: float) -> Choice:
    """What the routers keep of these texts, every token scored, as serving chooses."""
    ids_NT = ids_NT.to(model.device)
    texts, tokens = ids_NT.shape
    request = model.sequence(Capacity(capacity, capacity), tokens, tokens, scored=True)
    grid = _grid([request] * texts, model.device)
    request.release()
    output_NT = torch.ones_like(ids_NT, dtype=torch.bool)
    return _choice(model.masked(ids_NT, grid, output_NT).routes, len(model.layout.layers))


def _choice(routes: Sequence[Route], layers: int) -> Choice:
    """Of the first `layers`."""
    kept, asked = [], []
    for route in routes:
        if route.layer < layers:
            active = route.active_BT if route.kept.ndim == 2 else route.active_BT[..., None]
            kept.append((route.kept & active).flatten(1))
            asked.append(active.expand_as(route.kept).flatten(1))
    return Choice(tuple(kept), tuple(asked))


def item_grid(model: ElasticEncoder, items: Sequence[Item], capacity: float) -> PlanGrid:
    """The plans that requests of this capacity run under, token by token."""
    asked = Capacity(capacity, capacity)
    return _grid([model.sequence(asked, item) for item in items], model.device)


def _grid(requests: Sequence[Request], device: torch.device) -> PlanGrid:
    plans: dict[object, int] = {}
    rows = []
    for request in requests:
        at = [request.plan_at(place).plan for place in range(request.most_tokens)]
        rows.append([plans.setdefault(plan, len(plans)) for plan in at])
    return PlanGrid(list(plans), padded(rows, 0).to(device))  # type: ignore[arg-type]


def jaccard(one: Choice, other: Choice) -> float:
    """What both keep over what either keeps; the mean over layers, units and items.

    1 where nobody had a choice.
    """
    shares = [
        _over_either((a_NP & b_NP).sum(1), (a_NP | b_NP).sum(1), asked_NP)
        for a_NP, b_NP, asked_NP in zip(one.kept, other.kept, one.asked, strict=True)
    ]
    return _mean(shares)


def by_chance(choice: Choice) -> float:
    """The same of two that keep as much of the same at random, about."""
    shares = []
    for kept_NP, asked_NP in zip(choice.kept, choice.asked, strict=True):
        share_N = kept_NP.sum(1) / asked_NP.sum(1).clamp_min(1)
        shares.append((share_N / (2 - share_N))[asked_NP.any(1)])
    return _mean(shares)


def _mean(shares: Sequence[Tensor]) -> float:
    every = torch.cat([torch.empty(0), *(each.cpu() for each in shares)])
    return float(every.mean()) if len(every) else 1.0


def _over_either(both_N: Tensor, either_N: Tensor, asked_NP: Tensor) -> Tensor:
    there_N = asked_NP.any(1) & (either_N > 0)
    return both_N[there_N] / either_N[there_N]
