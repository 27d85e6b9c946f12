"""Channel shares for a capacity, from what the channels next to each cut are worth.

Probes lower one place alone; but errors meet, and what a channel is worth hangs on all that is
left out beside it. So this asks at the plan itself, of every place at once: the channels on either
side of a place's cut get a gate of one half, and the gradient of the KL by that gate says what
they are worth together. FLOPs move from where they are worth little to where they are worth much.

Shape letters: W windows   T tokens   I inputs of a projection
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from elastiformer import ElasticModel, Phase
from elastiformer.accounting import ModelShape
from elastiformer.calibration import Step
from elastiformer.capacity import WHOLE_LAYER, Plan, Site
from elastiformer.masked import PlanGrid, Selection
from training.allotment import LEAST_SHARE, STEEPNESS
from training.losses import kl_divergence
from training.progress import track
from training.sensitivity import whole_lines

Place = tuple[int, str]  # layer, site
Shares = dict[Place, float]

BAND = 0.04  # of a place's channels, on either side of the cut
RATES = (0.8, 0.5)  # how far each round goes towards where all FLOPs are worth the same
MOST_MOVE = 0.15  # of a share in one round: what is worth little by chance can come back
LEAST_WORTH = 1e-2  # of the median place's: what lies below is noise
NEARLY_WHOLE = 0.85  # above this capacity little is lost, and its gradient is mostly noise
APART = 0.12  # so far at least, as a rule
PIECES = 6  # in which every place goes from one capacity's share to the next one's
ROWS_AT_ONCE = 2


class Margins:
    """Asks what channels are worth, of one model on a fixed set of windows.

    Args:
        notes: a file in which every answer is remembered.
    """

    def __init__(self, model: ElasticModel, ids_WT: Tensor, notes: Path) -> None:
        self._model, self._ids_WT, self._notes = model, ids_WT, notes
        self._rows = torch.split(ids_WT.to(model.device), ROWS_AT_ONCE)
        self._tokens = ids_WT.numel()

    @cached_property
    def _teachers(self) -> list[Tensor]:
        with torch.no_grad():
            return [self._model.teacher(ids_BT) for ids_BT in self._rows]

    def worth(self, shares: Mapping[Place, float]) -> dict[Place, float]:
        """Nats per token that one more channel at each place saves, every token scored."""
        key = self._key(shares)
        for entry in whole_lines(self._notes):
            if entry["about"] == key:
                return {_place(name): value for name, value in entry["worth"].items()}
        found = self._measure(shares)
        named = {f"{layer}.{site}": value for (layer, site), value in found.items()}
        with self._notes.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"about": key, "worth": named}) + "\n")
        return found

    def _key(self, shares: Mapping[Place, float]) -> str:
        """A short hash of all that an answer hangs on."""
        adapter = self._model.adapter
        assert adapter is not None, "an adapter that is calibrated"
        asked = [(*place, round(share, 9)) for place, share in sorted(shares.items())]
        digest = hashlib.sha256(f"{adapter.identity_in(Phase.OUTPUT)}/{asked}".encode())
        digest.update(self._ids_WT.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _measure(self, shares: Mapping[Place, float]) -> dict[Place, float]:
        layout = self._model.layout
        gates = {place: torch.full((), 0.5, requires_grad=True) for place in shares}
        widths: dict[Place, int] = {}
        # Channels are picked here: to the masked form they are whole, and yet its repair runs.
        whole = replace(WHOLE_LAYER, **{site.value: 1 - 1e-9 for site in Site})
        plan = (whole,) * len(layout.layers)
        teachers = self._teachers  # before anything is left out
        with ExitStack() as hooks:
            for layer in layout.layers:
                for site in Site:
                    place = (layer.index, site.value)
                    norm_I = layout.column_norms(layer, site)
                    inner, outer = _band(shares[place], len(norm_I))
                    widths[place] = outer - inner
                    hook = _gated(norm_I, inner, outer, gates[place])
                    for module in {projection.module for projection in layer.at_site(site)}:
                        hooks.callback(module.register_forward_pre_hook(hook).remove)
            for ids_BT, teacher_BTV in zip(self._rows, teachers, strict=True):
                output_BT = torch.ones_like(ids_BT, dtype=torch.bool)
                grid = PlanGrid([plan], torch.zeros_like(ids_BT))
                found = self._model.masked(ids_BT, grid, output_BT, selection=Selection.RANK)
                loss = kl_divergence(teacher_BTV, found.logits_BTV, output_BT, tokens=self._tokens)
                loss.backward()  # type: ignore[no-untyped-call]
        found_worth = {}
        for place, gate in gates.items():
            assert gate.grad is not None, "a place that no token passed"
            found_worth[place] = -float(gate.grad) / widths[place]
        return found_worth


def _place(name: str) -> Place:
    layer, _, site = name.partition(".")
    return int(layer), site


def _band(share: float, inputs: int) -> tuple[int, int]:
    """How many channels are whole, and how many are whole or gated."""
    kept, wide = max(1, round(share * inputs)), max(1, round(BAND * inputs))
    return max(0, kept - wide), min(inputs, kept + wide)


def _gated(
    norm_I: Tensor, inner: int, outer: int, gate: Tensor
) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x_BTI = args[0]
        weighed_BTI = x_BTI.detach().abs().float() * norm_I
        inside_BTI, reached_BTI = (_largest(weighed_BTI, count) for count in (inner, outer))
        scale_BTI = torch.where(inside_BTI, 1.0, gate * reached_BTI)
        return (x_BTI * scale_BTI.to(x_BTI.dtype),)

    return hook


def _largest(weighed_BTI: Tensor, count: int) -> Tensor:
    inputs = weighed_BTI.shape[-1]
    if count in (0, inputs):
        return torch.full_like(weighed_BTI, count > 0, dtype=torch.bool)
    return weighed_BTI >= weighed_BTI.kthvalue(inputs - count + 1, -1, keepdim=True).values


def balanced(
    shape: ModelShape,
    context: int,
    shares: Shares,
    worth: Mapping[Place, float],
    rate: float,
    capacity: float,
) -> Shares:
    """The shares after one round: they spend `capacity`, and FLOPs are worth more alike.

    What a channel is worth falls by a factor of e for each 1/steepness of the share.
    """
    costs = {place: channel_flops(shape, *place) for place in shares}
    per_flop = {place: worth[place] / costs[place] for place in shares}
    middle = sorted(per_flop.values())[len(per_flop) // 2]
    least = LEAST_WORTH * max(middle, 1e-12)
    wanted = {
        place: math.log(max(value, least) / max(middle, 1e-12)) / STEEPNESS[place[1]]
        for place, value in per_flop.items()
    }

    def at(level: float) -> Shares:
        return {
            place: min(1.0, max(LEAST_SHARE, share + _bounded(rate * wanted[place]) - level))
            for place, share in shares.items()
        }

    low, high = -1.0, 1.0
    for _ in range(60):
        level = (low + high) / 2
        if shape.planned_share(plan_of(at(level), len(shape.layers)), context) > capacity:
            low = level
        else:
            high = level
    return at(high)


def _bounded(move: float) -> float:
    return min(MOST_MOVE, max(-MOST_MOVE, move))


def channel_flops(shape: ModelShape, layer: int, site: str) -> int:
    """What one channel of a site costs a token."""
    of = shape.layers[layer]
    return (
        2
        * {
            Site.ATTENTION_IN.value: of.attention_width + 2 * of.kv_width,
            Site.ATTENTION_OUT.value: of.width,
            Site.MLP_IN.value: of.mlp_width * (2 if of.gated else 1),
            Site.MLP_OUT.value: of.width,
        }[site]
    )


def plan_of(shares: Mapping[Place, float], layers: int) -> Plan:
    return tuple(
        replace(WHOLE_LAYER, **{site.value: shares[layer, site.value] for site in Site})
        for layer in range(layers)
    )


def margin_path(
    model: ElasticModel,
    margins: Margins,
    context: int,
    capacities: Sequence[float],
    until: float = math.inf,
) -> tuple[Step, ...]:
    """A path of channels alone through the best shares found at each capacity.

    Empty when the clock reads `until` before all are found.
    """
    shape = model.shape.of_phase(Phase.OUTPUT)
    layers = len(shape.layers)
    places = [(layer, site.value) for layer in range(layers) for site in Site]
    now = dict.fromkeys(places, 1.0)
    best, steps = now, list[Step]()
    for capacity in track(anchors(capacities), label="channels at the margin"):
        # At first every place gives up alike from what it has.
        now = balanced(shape, context, now, _alike(shape, places), 0.0, capacity)
        for rate in RATES:
            if time.monotonic() > until:
                return ()
            now = balanced(shape, context, now, margins.worth(now), rate, capacity)
        now = {place: min(share, best[place]) for place, share in now.items()}
        steps += _between(best, now)
        best = now
    # Long texts spend more on attention, and so need a leaner plan for the same capacity.
    return (*steps, *_between(best, dict.fromkeys(places, LEAST_SHARE)))


def anchors(capacities: Sequence[float]) -> list[float]:
    """The capacities whose shares are sought, largest first; between them shares are drawn out."""
    asked = sorted({each for each in capacities if each < NEARLY_WHOLE}, reverse=True)
    chosen: list[float] = []
    for capacity in asked:
        if not chosen or chosen[-1] - capacity > APART or capacity == asked[-1]:
            chosen.append(capacity)
    return chosen


def _alike(shape: ModelShape, places: Sequence[Place]) -> dict[Place, float]:
    """What channels are worth if all FLOPs are worth the same."""
    return {place: float(channel_flops(shape, *place)) for place in places}


def _between(before: Shares, after: Shares) -> list[Step]:
    steps, now = [], dict(before)
    for piece in range(1, PIECES + 1):
        for place, last in after.items():
            share = round(before[place] + (last - before[place]) * piece / PIECES, 4)
            if share < now[place]:
                steps.append(Step(*place, share))
                now[place] = share
    return steps
