"""From sensitivities to a path: what each saving loses, and the order in which to take them.

The loss of a plan is modelled as a sum over what it leaves out. Each `(layer, field)` was probed
at a share or two; between and beyond, its loss grows exponentially with what is left out. A path
takes, again and again, the move that loses least per FLOP saved, routers and LoRA counted.

For prompt tokens the sum misleads: only their keys and values are owed, so leaving out whole late
layers costs far less together than one by one. Those moves have a measured loss of their own.

Pure Python: nothing is measured here, and no model is run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from elastiformer.accounting import ModelShape
from elastiformer.calibration import Step, unit_of, walk
from elastiformer.capacity import WHOLE_LAYER, LayerPlan, Plan, Unit

TOKEN_FIELDS = ("attention_tokens", "mlp_tokens")
INSIDE = {
    "attention_tokens": ("heads", "attention_in", "attention_out"),
    "mlp_tokens": ("experts", "mlp_in", "mlp_out"),
}
FIELDS = tuple(name for token, inner in INSIDE.items() for name in (token, *inner))

# A field's loss is about exp(steepness x what is left out) - 1, until a second probe tells:
# fits what SmolLM2-135M loses. Single tokens cost nearly alike; the first channels nearly nothing.
STEEPNESS = {
    "attention_tokens": 1.5,
    "mlp_tokens": 1.5,
    "heads": 7.5,
    "experts": 3.3,
    "attention_in": 8.5,
    "attention_out": 8.5,
    "mlp_in": 8.5,
    "mlp_out": 8.5,
}
PROBES = {"attention_tokens": 0.5, "mlp_tokens": 0.5, "heads": 0.6, "experts": 0.5}
PROBE = 0.5  # of channels
LEAST_KL = 1e-6  # what lies below is rounding
GRID = 20  # a channel's or token's share moves in steps of 1/20
_EVEN_GRID = tuple(round(kept / GRID, 6) for kept in range(GRID - 1, 0, -1))
LEAST_SHARE = 0.1  # of things inside a sub-layer; below, the sub-layer is left out whole


def probe_share(name: str) -> float:
    return PROBES.get(name, PROBE)


def fields_of(units: Sequence[Unit]) -> tuple[str, ...]:
    """The fields of a layer's plan that these units can lower."""
    return tuple(name for name in FIELDS if unit_of(name) in units)


@dataclass(slots=True)
class Curves:
    """What it loses to lower one field of one layer, in nats per token, from what was probed.

    `probed` maps (layer, field) to {share: KL}. A layer that was not probed takes the geometric
    mean of its nearest probed neighbours.
    """

    layers: int
    probed: dict[tuple[int, str], dict[float, float]]
    steepness: dict[str, float] = field(default_factory=lambda: dict(STEEPNESS))

    def loss(self, layer: int, name: str, share: float) -> float:
        """The KL of keeping `share` of this field; 0 for the whole, infinite if never probed."""
        if share >= 1:
            return 0.0
        here = self.probed.get((layer, name))
        if here:
            return self._through(here, name, share)
        below = next((at for at in range(layer - 1, -1, -1) if (at, name) in self.probed), None)
        above = next(
            (at for at in range(layer + 1, self.layers) if (at, name) in self.probed), None
        )
        near = [
            self._through(self.probed[at, name], name, share)
            for at in (below, above)
            if at is not None
        ]
        return math.exp(sum(map(math.log, near)) / len(near)) if near else math.inf

    def _through(self, points: Mapping[float, float], name: str, share: float) -> float:
        """Through the probes: up to the first by the law, then straight in the logarithm."""
        known: list[tuple[float, float]] = []
        for at, kl in sorted(points.items(), reverse=True):
            # Noise must not make less loss of more left out.
            floor = known[-1][1] if known else LEAST_KL
            known.append((1 - at, max(floor, kl)))
        left_out, steepness = 1 - share, self.steepness[name]
        first, first_kl = known[0]
        if left_out <= first or len(known) == 1:
            return first_kl * math.expm1(steepness * left_out) / math.expm1(steepness * first)
        for (low, low_kl), (high, high_kl) in pairwise(known):
            slope = math.log(high_kl / low_kl) / (high - low)
            if left_out <= high:
                break
        return low_kl * math.exp(slope * (left_out - low))


@dataclass(frozen=True, slots=True)
class Move:
    """One or more steps in one layer that are taken together."""

    steps: tuple[Step, ...]
    loss_per_flop: float


class Allotment:
    """Finds a path: greedily, the least loss per FLOP first.

    Args:
        late: KL of leaving out whole late layers, by the first layer left out (`layers` itself:
            0). When given, sub-layers are left out whole in that order only, at that loss.
        whole: whether whole sub-layers may be left out at all.
    """

    def __init__(
        self,
        shape: ModelShape,
        context: int,
        curves: Curves,
        fields: Sequence[str],
        late: Mapping[int, float] | None = None,
        whole: bool = True,
    ) -> None:
        self._shape = shape
        self._layers = len(shape.layers)
        self._context = context
        self._curves = curves
        self._fields = fields
        self._late = _cumulative(late, self._layers) if late is not None else None
        self._whole = whole
        self._known: dict[tuple[int, str, float], float] = {}
        self._grids = {
            (layer, name): _grid(shape, layer, name)
            for layer in range(self._layers)
            for name in fields
        }

    def path(self, after: Sequence[Step] = ()) -> tuple[Step, ...]:
        """Steps from where these lead, the dense plan, down to where nothing is left to give."""
        *_, reached = walk(after, self._layers)
        plans: list[LayerPlan] = list(reached)
        best = [self._best(layer, plans) for layer in range(self._layers)]
        steps: list[Step] = []
        while True:
            moves = [move for move in best if move is not None]
            if not moves:
                return tuple(steps)
            move = min(moves, key=lambda each: each.loss_per_flop)
            touched = move.steps[0].layer
            for step in move.steps:
                plans[touched] = replace(plans[touched], **{step.field: step.share})
            steps.extend(move.steps)
            best[touched] = self._best(touched, plans)
            if self._late is not None and touched > 0:
                best[touched - 1] = self._best(touched - 1, plans)

    def _best(self, layer: int, plans: Sequence[LayerPlan]) -> Move | None:
        plan = plans[layer]
        now_loss, now_flops = self._loss(layer, plan), self._flops(layer, plan)
        found: Move | None = None
        for steps in self._moves(layer, plans):
            after = plan
            for step in steps:
                after = replace(after, **{step.field: step.share})
            saved = now_flops - self._flops(layer, after)
            if saved <= 0:
                continue
            lost = max(self._loss(layer, after) - now_loss, LEAST_KL * 1e-3)
            if math.isfinite(lost) and (found is None or lost / saved < found.loss_per_flop):
                found = Move(steps, lost / saved)
        return found

    def _moves(self, layer: int, plans: Sequence[LayerPlan]) -> Iterator[tuple[Step, ...]]:
        plan = plans[layer]
        for token, inner in INSIDE.items():
            if getattr(plan, token) == 0:
                continue
            for name in (token, *inner):
                lower = [s for s in self._grids.get((layer, name), ()) if s < getattr(plan, name)]
                # Along such a curve the next share is the best one, or the last.
                for share in dict.fromkeys([*lower[:2], *lower[-1:]]):
                    yield (Step(layer, name, share),)
            if self._whole and self._late is None:
                yield (Step(layer, token, 0.0),)
        if self._late is not None and not _left_out(plan) and self._is_last(layer, plans):
            yield tuple(Step(layer, token, 0.0) for token in INSIDE if getattr(plan, token) > 0)

    def _is_last(self, layer: int, plans: Sequence[LayerPlan]) -> bool:
        """Whether every later layer has gone already."""
        return all(_left_out(later) for later in plans[layer + 1 :])

    def _loss(self, layer: int, plan: LayerPlan) -> float:
        if self._late is not None and _left_out(plan):
            return self._late[layer] - self._late[layer + 1]
        total = 0.0
        for token, inner in INSIDE.items():
            share = getattr(plan, token)
            total += self._field_loss(layer, token, share)
            if share > 0:
                total += sum(self._field_loss(layer, name, getattr(plan, name)) for name in inner)
        return total

    def _field_loss(self, layer: int, name: str, share: float) -> float:
        if share == 1:
            return 0.0
        key = (layer, name, share)
        if key not in self._known:
            self._known[key] = self._curves.loss(*key)
        return self._known[key]

    def _flops(self, layer: int, plan: LayerPlan) -> float:
        return self._shape.planned_layer_flops(layer, plan, self._context)


def late_layers(layers: int) -> tuple[Step, ...]:
    """Whole layers left out, the last one first, down to the second."""
    return tuple(
        Step(layer, token, 0.0) for layer in range(layers - 1, 0, -1) for token in TOKEN_FIELDS
    )


def gradually(step: Step) -> tuple[Step, ...]:
    """Leaving out a whole sub-layer a grid step at a time."""
    return tuple(replace(step, share=share) for share in (*_EVEN_GRID, 0.0))


def without_layers(first: int, layers: int) -> Plan:
    """The plan that leaves out every layer from `first` on."""
    gone = LayerPlan(attention_tokens=0.0, mlp_tokens=0.0)
    return (*(WHOLE_LAYER for _ in range(first)), *(gone for _ in range(first, layers)))


def uniform(shape: ModelShape, fields: Sequence[str]) -> tuple[Step, ...]:
    """The same keep share in every layer, lowered a grid step at a time: the paper's recipe."""
    steps: list[Step] = []
    reached: dict[tuple[int, str], float] = {}
    for part in range(GRID - 1, 0, -1):
        for name in fields:
            for layer in range(len(shape.layers)):
                fits = [share for share in _grid(shape, layer, name) if share >= part / GRID - 1e-9]
                share = min(fits, default=1.0)
                if share < reached.get((layer, name), 1.0):
                    reached[layer, name] = share
                    steps.append(Step(layer, name, share))
    return tuple(steps)


def _left_out(plan: LayerPlan) -> bool:
    return plan.attention_tokens == 0 and plan.mlp_tokens == 0


def _grid(shape: ModelShape, layer: int, name: str) -> tuple[float, ...]:
    """The shares a field can take, largest first."""
    of = {"heads": shape.layers[layer].heads, "experts": shape.layers[layer].experts}.get(
        name, GRID
    )
    return tuple(
        round(kept / of, 6) for kept in range(of - 1, 0, -1) if kept / of >= LEAST_SHARE - 1e-9
    )


def _cumulative(late: Mapping[int, float], layers: int) -> list[float]:
    """The loss of leaving out all layers from each one on: interpolated, and never falling."""
    known = sorted({**late, layers: 0.0}.items(), reverse=True)
    losses = [math.inf] * (layers + 1)
    for (later, loss_later), (earlier, loss_earlier) in pairwise(known):
        for layer in range(earlier, later + 1):
            part = (later - layer) / (later - earlier)
            losses[layer] = loss_later + part * (loss_earlier - loss_later)
    for layer in range(layers - 1, -1, -1):
        losses[layer] = max(losses[layer], losses[layer + 1])
    return losses
