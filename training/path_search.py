"""From probes to the path of each phase: the order in which a causal model's units are given up.

Both phases are probed, candidate paths made from the answers and compared as wholes, the best one
tuned. It does not know what is run: a meter says what a plan loses, on text (sensitivity.py) or on
images and what is asked about them (picture_meter.py).

Shape letters: N tokens
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from elastiformer import AdapterError, Calibration, CapacityError, Phase, Unit
from elastiformer.accounting import ModelShape
from elastiformer.calibration import QUANTILES, Schedule, SearchRecord, Step, walk
from training.allotment import LEAST_KL, Allotment, Curves, fields_of, late_layers, uniform
from training.progress import track
from training.sensitivity import Judge, Notebook, Probe, ask, curves, late_losses, probes
from training.tuning import Score, tune

LATE_LAYERS, UNIFORM = "late layers", "uniform"
# Of the time allowed, when a phase's probes end, and when the tuning of its path does.
PROBING = {Phase.OUTPUT: 0.35, Phase.PROMPT: 0.6}
TUNING = {Phase.OUTPUT: 0.75, Phase.PROMPT: 0.85}
COMPARED = 3  # capacities at which candidate paths are compared

Paths = dict[Phase, tuple[Step, ...]]
Maker = Callable[[Curves], tuple[Step, ...]]
Thresholds = dict[Phase, dict[Unit, dict[int, tuple[float, ...]]]]


class Scale(Judge, Protocol):
    """Says what a plan loses, and what two do that take turns."""

    def scheduled_kl(self, phase: Phase, schedule: Schedule) -> float:
        """What is lost when the tokens of `phase` take turns between a schedule's two plans."""


class PathSearch:
    """One search under way: its questions, its answers, its deadlines.

    Args:
        context: mean tokens of what the meter runs.
        until: when the clock reads so, it has ended.
        sweeps: of tuning, at most.
        most: probes of each phase, at most; None: all there are.
    """

    def __init__(
        self,
        meter: Scale,
        notebook: Notebook,
        shape: ModelShape,
        context: int,
        units: Mapping[Phase, Sequence[Unit]],
        capacities: Sequence[float],
        until: float,
        sweeps: int,
        most: int | None = None,
    ) -> None:
        self._meter, self.notebook, self._shape = meter, notebook, shape
        self._layers = len(shape.layers)
        self._context, self._units, self._capacities = context, units, capacities
        self._started, self._until = time.monotonic(), until
        self._sweeps, self._most = sweeps, most
        self._answers: dict[Probe, float] = {}
        self._judged, self._by_clock = 0, False
        self.chosen: dict[Phase, str] = {}
        self.compared: dict[str, dict[str, dict[str, float]]] = {}
        self.knobs: dict[str, dict[str, Any]] = {}
        self.unanswered = 0

    def find_paths(self, phases: Sequence[Phase] = (Phase.OUTPUT, Phase.PROMPT)) -> Paths:
        """Probe these phases, make candidate paths from the answers, keep the best of each."""
        for phase in phases:
            until = self._deadline(PROBING[phase])
            known = list(probes(phase, self._layers, fields_of(self._units[phase])))
            asked = known[: self._most]
            label = f"probing {phase} tokens"
            late = ask(self._meter, self.notebook, asked, self._layers, until, label)
            self.unanswered += late + len(known) - len(asked)
            self._by_clock |= late > 0
            # What an earlier search asked beyond these must not count: it would not end the same.
            said = self.notebook.answers
            self._answers |= {probe: said[probe] for probe in asked if probe in said}
        return {phase: self._path(phase) for phase in phases}

    @property
    def record(self) -> SearchRecord:
        """What it took."""
        return SearchRecord(len(self._answers), self.unanswered, self._judged, self._by_clock)

    def draw(self, picture: Path, calibration: Calibration, served: Sequence[float]) -> None:
        from training.pictures import draw_calibration

        kept = {
            phase: {
                capacity: calibration.schedule(capacity, phase, self._shape, self._context).nearest
                for capacity in served
                if capacity < 1
            }
            for phase in Phase
        }
        draw_calibration(picture, self.notebook.answers, kept, self._layers)

    def _deadline(self, part: float) -> float:
        # Without an end in time, a part of it is without an end as well.
        return self._started + part * (self._until - self._started)

    def _path(self, phase: Phase) -> tuple[Step, ...]:
        """The best of the candidates, tuned."""
        fields = fields_of(self._units[phase])
        known = curves(self._answers, phase, self._layers)
        makers = self._makers(phase, fields, late_losses(self._answers))
        judged = {
            name: (self._score(phase, name, path), path)
            for name, make in track(
                list(makers.items()), label=f"comparing paths for {phase} tokens"
            )
            if (path := make(known))
        }
        if not judged:
            raise AdapterError(f"nothing that can be left out was measured for {phase} tokens")
        best = min(judged, key=lambda name: judged[name][0])
        self.chosen[phase] = best
        if best in (LATE_LAYERS, UNIFORM) or not fields:  # no curve shaped it: nothing to turn
            return judged[best][1]
        until = self._deadline(TUNING[phase])
        path, _, knobs = tune(
            known,
            fields,
            makers[best],
            lambda path: self._score(phase, f"{best}, tuned", path),
            until,
            self._sweeps,
        )
        self._by_clock |= time.monotonic() > until  # perhaps after the last turn: to be sure
        self.knobs[phase.value] = asdict(knobs)
        self._score(phase, f"{best}, tuned", path)
        return path

    def _makers(
        self, phase: Phase, fields: Sequence[str], late: Mapping[int, float]
    ) -> dict[str, Maker]:
        """Ways to make a path from loss curves, by name."""

        def greedy(
            late: Mapping[int, float] | None = None, whole: bool = True
        ) -> Callable[[Curves], tuple[Step, ...]]:
            return lambda known: Allotment(
                self._shape, self._context, known, fields, late=late, whole=whole
            ).path()

        makers: dict[str, Maker] = {"greedy": greedy()}
        if fields:
            makers[UNIFORM] = lambda _: uniform(self._shape, fields)
        if phase is Phase.PROMPT:
            makers[LATE_LAYERS] = lambda _: late_layers(self._layers)
            if fields and late:
                makers["late layers and greedy"] = greedy(late=late)
        elif fields:
            makers["greedy, no whole sub-layers"] = greedy(whole=False)
        return makers

    def _score(self, phase: Phase, name: str, path: tuple[Step, ...]) -> Score:
        """A path's loss over a few capacities, each weighed alike; the less, the better."""
        self._judged += 1
        asked = [each for each in self._capacities if each < 1]
        asked = asked[len(asked) // 4 :]  # near 1 all paths are good
        asked = asked[:: -max(1, math.ceil(len(asked) / COMPARED))]
        draft = draft_of({phase: path}, self._context)
        found: dict[str, float] = {}
        for capacity in asked:
            try:
                schedule = draft.schedule(capacity, phase, self._shape, self._context)
            except CapacityError:
                continue
            found[f"{capacity:g}"] = self._meter.scheduled_kl(phase, schedule)
        self.compared.setdefault(phase.value, {})[name] = found
        mean = sum(math.log(max(kl, LEAST_KL)) for kl in found.values()) / max(1, len(found))
        return len(asked) - len(found), mean


def units_asked(args: argparse.Namespace, units: Sequence[Unit]) -> dict[Phase, tuple[Unit, ...]]:
    """What may be lowered in each phase: what the options name, else all units of the adapter.

    Raises:
        AdapterError: a unit that needs routers, and the adapter has none for it.
    """
    named = {Phase.PROMPT: args.prompt_units, Phase.OUTPUT: args.output_units}
    asked = {phase: tuple(units if each is None else each) for phase, each in named.items()}
    for unit in {unit for each in asked.values() for unit in each}:
        if unit in (Unit.HEADS, Unit.EXPERTS) and unit not in units:
            raise AdapterError(f"{args.adapter}: has no routers for {unit}")
    return asked


def draft_of(paths: Paths, context: int) -> Calibration:
    """A calibration that promises nothing yet: only to walk its paths."""
    return Calibration(lowest=0.0, context=context, paths=paths, thresholds={}, measured=())


def lowest(paths: Paths, shape: ModelShape, context: int, asked: Sequence[float]) -> float:
    """The lowest of the asked capacities that both phases can reach."""
    draft = draft_of(paths, context)

    def reached(capacity: float) -> bool:
        try:
            for phase in Phase:
                # A short text and a long one weigh attention differently: both must be in reach.
                for length in (1, context):
                    draft.schedule(capacity, phase, shape, length)
        except CapacityError:
            return False
        return True

    return min(capacity for capacity in asked if reached(capacity))


def thresholds(scores: Iterable[tuple[Phase, Unit, int, Tensor]]) -> Thresholds:
    """Quantiles of every token router's scores, all tokens kept."""
    at = torch.linspace(0, 1, QUANTILES)
    found: Thresholds = {phase: {} for phase in Phase}
    for phase, unit, layer, scores_N in scores:
        values = tuple(torch.quantile(scores_N, at).tolist())
        found[phase].setdefault(unit, {})[layer] = values
    return found


def trimmed(
    path: Sequence[Step], shape: ModelShape, least: float, lengths: Sequence[int]
) -> tuple[Step, ...]:
    """The path as far as it is needed to spend `least` at each of these lengths of text."""
    for taken, plan in enumerate(walk(path, len(shape.layers))):
        if all(shape.planned_share(plan, length) <= least for length in lengths):
            return tuple(path[:taken])
    return tuple(path)
