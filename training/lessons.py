"""What each training row learns from: where its text is cut, and the plans of the two phases.

One adapter serves every capacity, so every row draws its own: how much to spend, how to divide it
among units and layers, and where the prompt ends. Drawn is what calibration may later choose from:
uniform shares, shares that differ by layer, and for prompts whole late layers left out, which is
where a prompt's savings are. Every fourth row spends the least. Uniform lessons are the paper's:
every token is scored, and every layer keeps the same share of each unit. Calibrated lessons follow
the path of a calibration, so that what is trained is what will be served.

A lesson is a function of the seed, the step and the row: nothing here has a state.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from elastiformer.accounting import ModelShape
from elastiformer.calibration import Calibration
from elastiformer.capacity import LayerPlan, Phase, Plan, Site, Unit, UnitShares, dense_plan
from training.data import seed_of

GRID = 16  # shares are sixteenths: as fine as calibration's, and few enough to remember costs of
LEAST_SHARE = 0.25  # of heads, experts and channels; a token unit goes down to 0
LATE_LAYERS = 0.6  # how many prompts leave out whole late layers; the others draw by layer
DENSE_PHASE = 0.15  # how many rows route one phase only
LEAST_EVERY = 4  # rows
MOST_STRENGTH = 64.0  # of a plan's savings, before they are found

TOKEN_FIELDS = (Unit.ATTENTION_TOKENS.value, Unit.MLP_TOKENS.value)


@dataclass(frozen=True, slots=True)
class Lesson:
    """How one row runs: `prompt_tokens` of prompt, whose last one is already output."""

    prompt_tokens: int
    prompt: Plan
    output: Plan
    # What follows the prompt repeats it, in place of the row's own text.
    copied: bool = field(default=False, kw_only=True)

    def output_tokens(self, window: int) -> int:
        return window - self.first_output

    @property
    def first_output(self) -> int:
        return max(0, self.prompt_tokens - 1)


@dataclass(frozen=True, slots=True)
class Teacher:
    """Draws lessons for one adapter.

    `tolerance`, in [0, 1] by layer and field of its plan: how readily that share is lowered. What
    is not named is lowered as readily as anything.
    """

    shape: ModelShape
    prompt_units: tuple[Unit, ...]  # what may be left out, by phase; none: whole late layers
    output_units: tuple[Unit, ...]  # none: outputs run whole
    least: float  # the lowest capacity drawn
    window: int
    seed: int
    tolerance: Mapping[tuple[int, str], float] = field(default_factory=dict)
    uniform: bool = False  # the paper's lessons: what is drawn is the keep share of every layer
    calibration: Calibration | None = None  # whose path is followed; None: nothing is settled yet
    most: float = 1.0  # the highest capacity drawn
    copied: float = 0.0  # the share of rows whose output repeats their prompt

    def lesson(self, step: int, row: int, rows: int) -> Lesson:
        """The lesson of one row of the whole batch of `rows`."""
        rng = random.Random(seed_of("lesson", self.seed, step, row))
        lowest = (step * rows + row) % LEAST_EVERY == 0
        dense = dense_plan(len(self.shape.layers))
        if self.uniform:
            return Lesson(0, dense, self.output_plan(rng, lowest))
        prompt_tokens = rng.randint(0, self.window * 7 // 8)
        copying = random.Random(seed_of("copied", self.seed, step, row)).random() < self.copied
        copied = copying and prompt_tokens > 0
        if not self.output_units:
            plan = self.prompt_plan(rng, lowest)
            return Lesson(prompt_tokens, prompt=plan, output=dense, copied=copied)
        one_phase = rng.random() < DENSE_PHASE
        routed_prompt = not one_phase or (prompt_tokens > 1 and rng.random() < 0.5)
        routed_output = not one_phase or not routed_prompt
        return Lesson(
            prompt_tokens,
            prompt=self.prompt_plan(rng, lowest) if routed_prompt else dense,
            output=self.output_plan(rng, lowest) if routed_output else dense,
            copied=copied,
        )

    def output_plan(self, rng: random.Random, lowest: bool) -> Plan:
        if self.calibration is not None:
            return self._level(self.calibration, rng, lowest, Phase.OUTPUT)
        return self.plan(rng, self.capacity(rng, lowest), self.output_units)

    def prompt_plan(self, rng: random.Random, lowest: bool) -> Plan:
        if self.calibration is not None:
            return self._level(self.calibration, rng, lowest, Phase.PROMPT)
        capacity = self.capacity(rng, lowest)
        if self.uniform:
            return self.plan(rng, capacity, self.prompt_units)
        fields = [name for name in TOKEN_FIELDS if name in self.prompt_units]
        if not self.prompt_units:
            fields = list(TOKEN_FIELDS)  # whole sub-layers need no unit
        elif not fields or rng.random() >= LATE_LAYERS:
            return self.plan(rng, capacity, self.prompt_units)
        if len(fields) > 1 and rng.random() < 0.25:
            fields = [rng.choice(fields)]
        plan = list(dense_plan(len(self.shape.layers)))
        for layer in reversed(range(1, len(plan))):
            if self.shape.planned_share(tuple(plan), self.window) <= capacity:
                break
            plan[layer] = replace(plan[layer], **dict.fromkeys(fields, 0.0))
        return tuple(plan)

    def plan(self, rng: random.Random, capacity: float, units: Sequence[Unit]) -> Plan:
        """A plan that spends `capacity`, divided at random; the leanest there is when none can.

        Of uniform lessons, the plan that keeps this share of each unit in every layer.
        """
        if self.uniform:
            shares = UnitShares(**{unit.value: capacity for unit in units})
            return (shares.layer_plan(),) * len(self.shape.layers)
        weights = self._weights(rng, _some(rng, units))
        if self._share(weights, MOST_STRENGTH) > capacity:
            weights = self._weights(rng, units)
        low, high = 0.0, MOST_STRENGTH
        for _ in range(12):
            strength = (low + high) / 2
            if self._share(weights, strength) > capacity:
                low = strength
            else:
                high = strength
        return _plan(weights, high)

    def _level(
        self, calibration: Calibration, rng: random.Random, lowest: bool, phase: Phase
    ) -> Plan:
        """One of the two levels next to a capacity, with the odds of its part of the positions."""
        whole = dense_plan(len(self.shape.layers))
        if not calibration.paths[phase]:
            return whole
        dense = self.shape.of_phase(phase).planned_share(whole, self.window)
        most = min(self.most, dense)
        capacity = self.least if lowest else rng.uniform(self.least, most)
        schedule = calibration.schedule(capacity, phase, self.shape, self.window)
        return schedule.fuller if rng.random() < schedule.fraction else schedule.leaner

    def _share(self, weights: Sequence[dict[str, float]], strength: float) -> float:
        return self.shape.planned_share(_plan(weights, strength), self.window)

    def _weights(self, rng: random.Random, units: Sequence[Unit]) -> list[dict[str, float]]:
        """How much each layer's fields give: at random by field, and half the time by layer too."""
        fields: dict[str, float] = {}
        for unit in units:
            names: Sequence[str] = list(Site) if unit is Unit.CHANNELS else [unit]
            fields |= {str(name): rng.expovariate(1.0) + 0.1 for name in names}
        uniform = rng.random() < 0.5
        return [
            {
                name: weight
                * self.tolerance.get((layer, name), 1.0)
                * (1 if uniform else 2 * rng.random())
                for name, weight in fields.items()
            }
            for layer in range(len(self.shape.layers))
        ]

    def capacity(self, rng: random.Random, lowest: bool) -> float:
        return self.least if lowest else rng.uniform(self.least, self.most)


def _some(rng: random.Random, units: Sequence[Unit]) -> Sequence[Unit]:
    return [unit for unit in units if rng.random() < 0.5] or [rng.choice(units)]


def _plan(weights: Sequence[dict[str, float]], strength: float) -> Plan:
    return tuple(_layer_plan(of_layer, strength) for of_layer in weights)


def _layer_plan(weights: dict[str, float], strength: float) -> LayerPlan:
    return LayerPlan(
        **{name: _snapped(name, 1 - strength * weight) for name, weight in weights.items()}
    )


def tolerances(losses: Mapping[tuple[int, str], float]) -> dict[tuple[int, str], float]:
    """How readily each share is lowered, from what lowering it alone loses (KL, in nats).

    Half for the median, near 0 for what ruins the model: drawn like that, plans resemble those
    that calibration will choose, and no step is spent on a model beyond repair.
    """
    if not losses:
        return {}
    known = sorted(losses.values())
    middle = max(known[len(known) // 2], 1e-6)
    return {place: 1 / (1 + max(0.0, loss) / middle) for place, loss in losses.items()}


def _snapped(name: str, share: float) -> float:
    least = 0.0 if name in TOKEN_FIELDS else LEAST_SHARE
    return max(least, min(1.0, round(share * GRID) / GRID))
