"""How a number becomes a plan: what calibration measured, and the schedule it gives. Pure Python.

For each phase calibration found a *path*: steps that lower one keep share each, cheapest loss
first. Level k is the dense plan after the first k steps. A capacity lies between two neighbouring
levels; a request spreads them evenly over its positions, so that its mean is what was asked. What
a level costs is closed-form (accounting.py), so nothing here looks at the tokens.

It does not know how a path is found (training/calibrate.py) nor how a plan is run.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from elastiformer.accounting import NOWHERE, Direct, ModelShape
from elastiformer.capacity import LayerPlan, Phase, Plan, Site, Unit, dense_plan
from elastiformer.errors import AdapterError, CapacityError

FORMAT = 1
QUANTILES = 33  # of a router's scores, or of channels' sizes: at 0, 1/32, … 1
OUTPUT_BLOCK = 64  # generated positions that share one schedule

Quantiles = tuple[tuple[tuple[float, ...], ...], ...]  # ascending, for each layer and site

FIELDS = tuple(field.name for field in fields(LayerPlan))
TOKEN_FIELDS = (Unit.ATTENTION_TOKENS.value, Unit.MLP_TOKENS.value)


def unit_of(field: str) -> Unit:
    """The unit that a field of LayerPlan belongs to."""
    return Unit.CHANNELS if field in set(Site) else Unit(field)


def output_context(position: int) -> int:
    """The keys that stand for a generated token's own in its schedule: the middle of its block.

    So a block of generated tokens shares one schedule, and on average none is misjudged.
    """
    return position // OUTPUT_BLOCK * OUTPUT_BLOCK + OUTPUT_BLOCK // 2


def output_block_end(position: int) -> int:
    """The position after the last one of its block."""
    return (position // OUTPUT_BLOCK + 1) * OUTPUT_BLOCK


@dataclass(frozen=True, slots=True)
class Step:
    """One move along a path: this layer now keeps `share` of `field` (a field of LayerPlan)."""

    layer: int
    field: str
    share: float


@dataclass(frozen=True, slots=True)
class Measured:
    """One row of the table: what a capacity cost and lost on held-out text; absent is None.

    KL is to the pretrained model, in nats per token. `kl` is what a user gets: the continuation
    of a routed prompt, itself routed. `kl_prompt` leaves the continuation whole, so it shows the
    prompt's part. `kl_scored`, `kl_p95` and the perplexities are over every token of a text
    scored in the output phase. Times are over those at capacity 1.0 in the same run.

    Of a vision-language model, `kl` is that of answers about images, and `kl_text` what a user
    gets on text without any.

    Of an encoder, `kl` is that of its labels and `cosine` that of its features; `same_label` the
    share of items whose likeliest label is the pretrained model's, `accuracy` the true one.
    """

    capacity: float
    spent: float
    kl: float | None = None
    kl_prompt: float | None = None
    kl_text: float | None = None
    kl_scored: float | None = None
    kl_p95: float | None = None
    perplexity: float | None = None
    perplexity_ratio: float | None = None
    greedy_agreement: float | None = None
    prefill_time_ratio: float | None = None
    decode_time_ratio: float | None = None
    cosine: float | None = None
    same_label: float | None = None
    accuracy: float | None = None
    time_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class DataRecord:
    """What the calibration saw: enough to tell whether another one saw the same."""

    name: str
    sha256: str
    windows: int
    window_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class SearchRecord:
    """What finding the paths took: with the same seed and limits, another search ends the same."""

    probes: int  # answered, of both phases
    unanswered: int  # that were not asked, or not in time
    paths_judged: int  # whole ones, tuning included
    ended_by_clock: bool  # then another machine may end it elsewhere


@dataclass(frozen=True, slots=True)
class Schedule:
    """Two neighbouring levels of a path, and the fraction of positions under the fuller one."""

    fuller: Plan
    leaner: Plan
    fuller_spent: float
    leaner_spent: float
    fraction: float  # of the positions, under `fuller`
    direct: Direct = NOWHERE  # layers of which an item whose prompt tokens run so makes no keys

    @property
    def spent(self) -> float:
        """Share of the dense block FLOPs, the mean over positions."""
        return self.fraction * self.fuller_spent + (1 - self.fraction) * self.leaner_spent

    @property
    def nearest(self) -> Plan:
        """The one plan that stands for the whole schedule where only one can be run."""
        return self.fuller if self.fraction >= 0.5 else self.leaner

    def is_fuller(self, position: int) -> bool:
        """Whether this position runs under the fuller plan; any run of positions holds its part."""
        return math.floor((position + 1) * self.fraction) > math.floor(position * self.fraction)

    def plan_at(self, position: int) -> Plan:
        return self.fuller if self.is_fuller(position) else self.leaner


@dataclass(frozen=True, order=True, slots=True)
class ImageFloor:
    """Asked for this capacity, an image keeps this share at least of its tokens."""

    capacity: float
    share: float


@dataclass(frozen=True)
class Calibration:
    """The table capacity -> plan of one adapter, and what was measured along it."""

    lowest: float  # the lowest capacity that was measured; below it nothing is promised
    context: int  # tokens of the windows it was measured on
    paths: Mapping[Phase, tuple[Step, ...]]
    thresholds: Mapping[Phase, Mapping[Unit, Mapping[int, tuple[float, ...]]]]
    measured: tuple[Measured, ...]
    data: DataRecord | None = None
    image_tokens: float | None = None  # the lowest keep share of image tokens that was measured
    image_floors: tuple[ImageFloor, ...] = ()  # ascending; none: `image_tokens` at every capacity
    channel_quantiles: Quantiles = ()  # of outputs' sizes x column norm; none: only counted
    search: SearchRecord | None = None  # of the paths; None: nothing was searched, or noted

    @cached_property
    def _pairs(self) -> dict[Phase, tuple[ModelShape, tuple[_Pair, ...]]]:
        return {}

    @cached_property
    def _levels(self) -> dict[tuple[Phase, int], tuple[Plan, ...]]:
        return {}

    def levels(self, phase: Phase, layers: int) -> tuple[Plan, ...]:
        """The plans along a phase's path, from dense to leanest."""
        key = (phase, layers)
        if key not in self._levels:
            self._levels[key] = tuple(walk(self.paths[phase], layers))
        return self._levels[key]

    def image_floor(self, capacity: float) -> float | None:
        """The keep share down to which image tokens give what a prompt is asked for.

        Between the capacities that were measured it is interpolated, and 1 at capacity 1. None:
        image tokens are never left out.
        """
        if not self.image_floors or self.image_tokens is None:
            return self.image_tokens
        known = (*self.image_floors, ImageFloor(1.0, 1.0))
        if capacity <= known[0].capacity:
            return known[0].share
        at = bisect_left(known, capacity, key=lambda floor: floor.capacity)
        below, above = known[at - 1], known[at]
        part = (capacity - below.capacity) / (above.capacity - below.capacity)
        return below.share + part * (above.share - below.share)

    def refuse_below(self, share: float) -> None:
        """Raises CapacityError for a share below the calibrated range."""
        if share < self.lowest - 1e-9:
            raise CapacityError(
                f"capacity {share:g} is below the calibrated range {self.lowest:.2f} to 1.0"
            )

    def schedule(
        self, share: float, phase: Phase, shape: ModelShape, context: int, promised: bool = True
    ) -> Schedule:
        """The plans of tokens over `context` keys that spend `share` on average.

        Args:
            promised: whether a caller may have asked for it; else it may be below the range.

        Raises:
            CapacityError: below the calibrated range, or out of this path's reach at `context`.
        """
        levels = self.levels(phase, len(shape.layers))
        whole, shape = shape, shape.of_phase(phase)
        direct = shape.direct(levels[0]) if phase is Phase.PROMPT else NOWHERE
        dense_spent = shape.planned_share(levels[0], context, direct)  # of a prompt less than 1
        if share >= min(dense_spent, 1.0):
            return Schedule(levels[0], levels[0], dense_spent, dense_spent, 1.0, direct)
        if promised:
            self.refuse_below(share)
        if phase is Phase.PROMPT and shape.absorbing:
            pairs, dense = self._pairs_of(whole), shape.dense_token_flops(context)
            found = _of_item(pairs, share, dense, context)
            if found is None:
                least = shape.planned_share(levels[-1], context, pairs[-1].direct)
                raise _out_of_reach(share, least, phase, context)
            return found
        # Bisection keeps fuller > share >= leaner, whatever single steps do to the cost.
        fuller, leaner = 0, len(levels) - 1
        fuller_spent = shape.planned_share(levels[fuller], context)  # above 1 where LoRA runs
        leaner_spent = shape.planned_share(levels[leaner], context)
        if leaner_spent > share:
            raise _out_of_reach(share, leaner_spent, phase, context)
        while leaner - fuller > 1:
            middle = (fuller + leaner) // 2
            spent = shape.planned_share(levels[middle], context)
            if spent > share:
                fuller, fuller_spent = middle, spent
            else:
                leaner, leaner_spent = middle, spent
        fraction = (share - leaner_spent) / (fuller_spent - leaner_spent)
        return Schedule(levels[fuller], levels[leaner], fuller_spent, leaner_spent, fraction)

    def _pairs_of(self, shape: ModelShape) -> Sequence[_Pair]:
        """Those of prompt tokens of items; made once for a model."""
        known = self._pairs.get(Phase.PROMPT)
        if known is None or known[0] is not shape:
            levels = self.levels(Phase.PROMPT, len(shape.layers))
            known = shape, tuple(_item_pairs(levels, shape.of_phase(Phase.PROMPT)))
            self._pairs[Phase.PROMPT] = known
        return known[1]

    def threshold(self, unit: Unit, layer: int, phase: Phase, share: float) -> float:
        """The router score that `share` of held-out tokens lie above.

        Raises:
            AdapterError: nothing was calibrated for this unit, layer and phase.
        """
        assert 0 < share < 1, f"{unit} of layer {layer}: {share} needs no threshold"
        quantiles = self.thresholds.get(phase, {}).get(unit, {}).get(layer)
        if quantiles is None:
            raise AdapterError(
                f"the calibration has no thresholds for {unit} of layer {layer}, {phase} tokens"
            )
        at = (1 - share) * (len(quantiles) - 1)
        below = min(int(at), len(quantiles) - 2)
        part = at - below
        return quantiles[below] * (1 - part) + quantiles[below + 1] * part

    def misfits(self, layers: int, units: Collection[Unit]) -> list[str]:
        """Everything that keeps this calibration from a model of `layers` layers and `units`."""
        problems: dict[str, None] = {}  # in order, each once
        for phase, path in self.paths.items():
            for step in path:
                if step.layer >= layers:
                    problems[
                        f"calibration: the {phase} path names layer {step.layer}, "
                        f"this model has {layers}"
                    ] = None
                unit = unit_of(step.field)
                # Channels need no router, and tokens can be spread evenly without one.
                if unit in (Unit.HEADS, Unit.EXPERTS) and unit not in units:
                    problems[
                        f"calibration: the {phase} path uses {unit}, which the adapter lacks"
                    ] = None
        if len(self.channel_quantiles) not in (0, layers):
            problems[
                f"calibration: channel quantiles of {len(self.channel_quantiles)} layers, "
                f"this model has {layers}"
            ] = None
        return list(problems)

    def as_json(self) -> dict[str, Any]:
        optional: dict[str, Any] = {}
        if self.image_tokens is not None:
            optional["image_tokens"] = self.image_tokens
        if self.image_floors:
            optional["image_floors"] = [asdict(floor) for floor in self.image_floors]
        if self.channel_quantiles:
            optional["channel_quantiles"] = {
                site.value: [list(of_layer[place]) for of_layer in self.channel_quantiles]
                for place, site in enumerate(Site)
            }
        if self.search is not None:
            optional["search"] = asdict(self.search)
        return optional | {
            "format": FORMAT,
            "lowest": self.lowest,
            "context": self.context,
            "paths": {
                phase.value: [asdict(step) for step in path] for phase, path in self.paths.items()
            },
            "thresholds": {
                phase.value: {
                    unit.value: {str(layer): list(values) for layer, values in by_layer.items()}
                    for unit, by_layer in by_unit.items()
                }
                for phase, by_unit in self.thresholds.items()
            },
            "measured": [
                {name: value for name, value in asdict(row).items() if value is not None}
                for row in self.measured
            ],
            "data": asdict(self.data) if self.data else None,
        }


class _Pair(NamedTuple):
    """Two plans between which prompt tokens of an item are shared out, and what each spends."""

    fuller: Plan
    leaner: Plan
    direct: Direct
    most: tuple[float, float]  # FLOPs of a token, and for each key that it attends to
    least: tuple[float, float]


def _item_pairs(levels: Sequence[Plan], shape: ModelShape) -> Iterator[_Pair]:
    """The pairs along a path whose keys nobody needs where no prompt token asks, fullest first.

    Where the last of them stop asking in a layer, all of its keys become free at once. What that
    leaps over is spent on its MLP by some of them; if that goes out later, they run it whole.
    """

    def pair(fuller: Plan, leaner: Plan) -> _Pair:
        direct, spent = shape.direct(fuller), []
        for plan in (fuller, leaner):
            linear, with_key = (shape.planned_token_flops(plan, keys, direct) for keys in (0, 1))
            spent.append((linear, with_key - linear))
        return _Pair(fuller, leaner, direct, *spent)

    for at, (fuller, leaner) in enumerate(pairwise(levels)):
        yield pair(fuller, leaner)
        if shape.direct(leaner).count(0) == shape.direct(fuller).count(0):
            continue
        place = next(place for place, one in enumerate(fuller) if one != leaner[place])
        if leaner[place].mlp_tokens == 0:
            with_mlp = replace(leaner[place], mlp_tokens=1.0)
            yield pair((*leaner[:place], with_mlp, *leaner[place + 1 :]), leaner)
        else:
            yield pair(fuller, levels[min(at + 2, len(levels) - 1)])
    yield pair(levels[-1], levels[-1])


def _of_item(pairs: Sequence[_Pair], share: float, dense: int, context: int) -> Schedule | None:
    """The schedule that spends a share, or the most below it; None: all spend more.

    Args:
        dense: FLOPs of a token at capacity 1.0.
    """
    nearest: Schedule | None = None
    for pair in pairs:
        most, least = (
            (linear + context * per_key) / dense for linear, per_key in (pair.most, pair.least)
        )
        if least <= share < most:
            fraction = (share - least) / (most - least)
            return Schedule(pair.fuller, pair.leaner, most, least, fraction, pair.direct)
        for plan, spent in ((pair.fuller, most), (pair.leaner, least)):
            if spent <= share and (nearest is None or spent > nearest.spent):
                nearest = Schedule(plan, plan, spent, spent, 1.0, pair.direct)
    return nearest


def _out_of_reach(share: float, least: float, phase: Phase, context: int) -> CapacityError:
    return CapacityError(
        f"capacity {share:g} is below the calibrated range "
        f"{math.ceil(least * 100) / 100:.2f} to 1.0 of {phase} tokens "
        f"that attend to {context} others"
    )


def walk(path: Sequence[Step], layers: int) -> Iterator[Plan]:
    """The dense plan, and the plan after each step."""
    plan = dense_plan(layers)
    yield plan
    for step in path:
        changed = replace(plan[step.layer], **{step.field: step.share})
        plan = (*plan[: step.layer], changed, *plan[step.layer + 1 :])
        yield plan
