"""Baselines with a repair, fitted to as much text as the adapter's: what static pruning can be.

Their prompts run as the adapter's own, with its repair; what outputs leave out differs:
    uniform         the units that the adapter lowers, the same share in every layer
    random          the adapter's plans, but chance picks the channels; what is left out is
                    guessed from what is kept
    static channels the same channels for every token, largest root mean square x column norm
                    first, what is left out guessed from them; how many where, from probes of its
                    own, as the adapter's, or uniform, whichever loses least
    drop by sensitivity  whole sub-layers, a thin map of its input in the place of each; the order
                    from probes of its own

A guess is linear and fitted by least squares: folded into the weights that read it, it costs
nothing. The thin maps are paid for out of the same capacity.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from elastiformer import Calibration, CapacityError, ElasticModel, Phase, Unit, dense_plan
from elastiformer.calibration import Step
from elastiformer.capacity import Plan
from elastiformer.plan_grid import PlanGrid
from training.allotment import TOKEN_FIELDS, Allotment, fields_of, uniform
from training.baselines import (
    DROP,
    RANDOM,
    STATIC,
    UNIFORM,
    lowered,
    rows_of,
    under_paths,
)
from training.picking import (
    ChannelPicking,
    Picking,
    SkipPicking,
    Under,
    measure_picked,
    run_picked,
)
from training.quality import Quality, Setting, Window, measure
from training.regression import second_moments
from training.sensitivity import Meter, Notebook, Probe, ask, curves, probes

REPAIRED = {f"repaired {name}": name for name in (UNIFORM, RANDOM, STATIC, DROP)}
SETTINGS = [Setting.BOTH, Setting.SCORED]  # of prompts alone, nothing differs
STEEP_LAYERS = 3  # of which a second share is probed, for the steepness of all
JUDGED_AT = (0.8, 0.65, 0.5)

Steps = tuple[Step, ...]


class Repaired:
    """What all these baselines share: moments of some text, and probes on some other.

    Args:
        fit_WT: the text of the fits.
        probe_WT: windows that probes run on.
        notes: the file in which probes are remembered.
        rank: of the maps in place of sub-layers.
    """

    def __init__(
        self,
        model: ElasticModel,
        fit_WT: Tensor,
        probe_WT: Tensor,
        notes: Path,
        rank: int,
        seed: int,
    ) -> None:
        assert model.calibration is not None
        self._model, self._probe_WT, self._notes = model, probe_WT, notes
        self._rank, self._seed = rank, seed
        self._own = model.calibration
        self._layers, self._context = len(model.shape.layers), self._own.context
        self._moments = second_moments(model, fit_WT)
        digest = hashlib.sha256(f"{model.identity.revision}/{rank}/".encode())
        for ids_WT in (fit_WT, probe_WT):
            digest.update(ids_WT.cpu().numpy().tobytes())
        self._about = digest.hexdigest()[:12]

    def rows(
        self, name: str, windows: Sequence[Window], capacities: Sequence[float]
    ) -> list[Quality]:
        """The rows of one of REPAIRED."""
        kind = REPAIRED[name]
        with under_paths(
            self._model,
            {Phase.PROMPT: self._own.paths[Phase.PROMPT], Phase.OUTPUT: self._path(kind)},
        ):
            if kind == UNIFORM:
                return rows_of(
                    name,
                    capacities,
                    SETTINGS,
                    lambda capacity, setting: measure(self._model, windows, capacity, setting),
                )
            return rows_of(
                name,
                capacities,
                SETTINGS,
                lambda capacity, setting: measure_picked(
                    self._model, windows, capacity, setting, self._picking(kind)
                ),
            )

    @cached_property
    def _skips(self) -> SkipPicking:
        return SkipPicking(self._model, self._moments, self._rank)

    def _picking(self, kind: str) -> Picking:
        if kind == DROP:
            return self._skips
        generator = torch.Generator(device=self._model.device).manual_seed(self._seed)
        sizes = self._moments.sizes() if kind == STATIC else None
        return ChannelPicking(self._model, generator, sizes, self._moments)

    def _path(self, kind: str) -> Steps:
        if kind == RANDOM:
            return self._own.paths[Phase.OUTPUT]
        if kind == UNIFORM:
            return self._uniform
        fields = fields_of([Unit.CHANNELS]) if kind == STATIC else ()
        answers = self._answers(kind, fields)
        known = curves(answers, Phase.OUTPUT, self._layers)
        shape = self._model.shape
        if kind == DROP:  # what all outputs leave out leaves nothing behind
            shape = replace(shape, kv="kept")
        greedy = Allotment(shape, self._context, known, fields, whole=kind == DROP).path()
        if kind == DROP:
            return greedy
        own = self._own.paths[Phase.OUTPUT]
        return min((greedy, own, self._uniform), key=lambda path: self._loss(kind, path))

    @property
    def _uniform(self) -> Steps:
        return uniform(self._model.shape, lowered(self._model, Phase.OUTPUT))

    def _answers(self, kind: str, fields: Sequence[str]) -> dict[Probe, float]:
        if kind == DROP:
            asked = [
                Probe(Phase.OUTPUT, layer, name, 0.0)
                for layer in range(self._layers)
                for name in TOKEN_FIELDS
            ]
        else:
            every = probes(Phase.OUTPUT, self._layers, fields, whole=False)
            asked = list(every)[: len(fields) * (self._layers + STEEP_LAYERS)]
        notebook = Notebook(self._notes, dict.fromkeys(Phase, f"{kind}/{self._about}"))
        ask(self._meter(kind), notebook, asked, self._layers, math.inf, f"probing {kind}")
        return {probe: notebook.answers[probe] for probe in asked}

    def _loss(self, kind: str, path: Steps) -> float:
        """The mean logarithm of what a path loses at a few capacities; infinite beyond its end."""
        draft = Calibration(
            lowest=0.0,
            context=self._context,
            paths={Phase.OUTPUT: path},
            thresholds={},
            measured=(),
        )
        meter = self._meter(kind)
        total = 0.0
        for capacity in JUDGED_AT:
            try:
                schedule = draft.schedule(capacity, Phase.OUTPUT, self._model.shape, self._context)
            except CapacityError:
                return math.inf
            total += math.log(max(1e-9, meter.kl(Phase.OUTPUT, schedule.nearest)))
        return total / len(JUDGED_AT)

    def _meter(self, kind: str) -> PickedMeter:
        return PickedMeter(self._model, self._probe_WT, lambda: self._picking(kind))


class PickedMeter(Meter):
    """Says what output tokens lose when plans are run another way."""

    def __init__(self, model: ElasticModel, ids_WT: Tensor, picking: Callable[[], Picking]) -> None:
        super().__init__(model, ids_WT, prompt_tokens=ids_WT.shape[1])
        self._picking = picking

    def _logits(self, phase: Phase, plans: Plan | PlanGrid) -> Tensor:
        assert not isinstance(plans, PlanGrid), "one plan for all tokens"
        kind_T = torch.ones(self._ids_WT.shape[1], dtype=torch.long, device=self._ids_WT.device)
        kind_T[0] = 0
        kinds = [(dense_plan(len(plans)), phase), (plans, phase)]
        return run_picked(self._model, self._ids_WT, Under(kinds, kind_T), self._picking())
