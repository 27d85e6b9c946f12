"""What routing must beat at equal cost: chance, whole sub-layers, uniform shares, static pruning.

Three of them are paths of their own, run through the form that is served:
    drop by sensitivity   whole sub-layers for every token, the least sensitive first
    last layers           whole layers for every token, the last first
    uniform               the same keep share in every layer, of the units that we lower ourselves:
                          the paper's recipe
Two take our own plans, and only pick otherwise, through the masked form:
    random                which tokens, heads, experts and channels are kept is left to chance
    static channels       each place keeps the same channels for every token: those with the
                          largest mean size x column norm; routers as trained

None has a repair of its own; those that have one are in repaired.py.

Shape letters: W windows   T tokens   I inputs of a projection
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from elastiformer import CapacityError, ElasticModel, Phase
from elastiformer.calibration import Step
from elastiformer.capacity import Site
from elastiformer.families import Layer
from training.allotment import (
    TOKEN_FIELDS,
    Allotment,
    Curves,
    fields_of,
    late_layers,
    uniform,
)
from training.picking import ChannelPicking, Sizes, measure_picked, watching_inputs
from training.progress import track
from training.quality import Quality, Setting, Window, measure, recalibrate
from training.sensitivity import LATE, remembered

DROP, LAST, UNIFORM = "drop by sensitivity", "last layers", "uniform"
RANDOM, STATIC = "random", "static channels"
BASELINES = (DROP, LAST, UNIFORM, RANDOM, STATIC)
Measure = Callable[[float, Setting], Quality]


def measure_baseline(
    model: ElasticModel,
    name: str,
    windows: Sequence[Window],
    capacities: Sequence[float],
    sizing_WT: Tensor,
    notes: Path,
    context: int,
    seed: int,
) -> list[Quality]:
    """The rows of one baseline.

    Args:
        sizing_WT: texts that `static channels` learns from.
        notes: the probes of the adapter's calibration, that `drop by sensitivity` goes by.
    """
    if name in (RANDOM, STATIC):
        sizes = mean_sizes(model, sizing_WT) if name == STATIC else None

        def picked(capacity: float, setting: Setting) -> Quality:
            generator = torch.Generator(device=model.device).manual_seed(seed)
            picking = ChannelPicking(model, generator, sizes)
            return measure_picked(model, windows, capacity, setting, picking)

        return rows_of(name, capacities, settings_picked(model), picked)
    paths = baseline_paths(model, notes, context).get(name)
    if paths is None:
        return []
    with under_paths(model, paths):
        return rows_of(
            name,
            capacities,
            list(Setting),
            lambda capacity, setting: measure(model, windows, capacity, setting),
        )


def rows_of(
    name: str, capacities: Sequence[float], settings: Sequence[Setting], row: Measure
) -> list[Quality]:
    """A row for each capacity and setting; a capacity that a path does not reach has none."""
    asked = [(capacity, setting) for capacity in capacities for setting in settings]
    rows = []
    for capacity, setting in track(asked, label=f"baseline {name}"):
        try:
            rows.append(row(capacity, setting))
        except CapacityError:
            continue
    return rows


def settings_picked(model: ElasticModel) -> list[Setting]:
    """The settings in which our own path has anything picked."""
    assert model.calibration is not None
    prompt = any(step.share > 0 for step in model.calibration.paths[Phase.PROMPT])
    return [each for each in Setting if prompt or each is not Setting.PROMPT]


def baseline_paths(
    model: ElasticModel, notes: Path, context: int
) -> dict[str, dict[Phase, tuple[Step, ...]]]:
    """The paths of the first three; without probes on disk there is no first."""
    assert model.adapter is not None
    shape, layers = model.shape, len(model.shape.layers)
    last = late_layers(layers)
    found = {
        LAST: dict.fromkeys(Phase, last),
        UNIFORM: {phase: uniform(shape, lowered(model, phase)) for phase in Phase},
    }
    probed: dict[Phase, dict[tuple[int, str], dict[float, float]]] = {p: {} for p in Phase}
    for probe, kl in remembered(notes).items():
        if probe.field in TOKEN_FIELDS and probe.field != LATE and probe.share == 0:
            probed[probe.phase][probe.layer, probe.field] = {0.0: kl}
    if probed[Phase.OUTPUT]:
        # Where prompts were not probed by themselves, what outputs lose has to do.
        probed[Phase.PROMPT] = probed[Phase.PROMPT] or probed[Phase.OUTPUT]
        found[DROP] = {
            phase: Allotment(shape, context, Curves(layers, points), ()).path()
            for phase, points in probed.items()
        }
    return found


def lowered(model: ElasticModel, phase: Phase) -> tuple[str, ...]:
    """The fields that our own path lowers in this phase: a baseline gets no worse units than we.

    All of the adapter's, where our path leaves out whole sub-layers only.
    """
    assert model.adapter is not None and model.calibration is not None
    used = {step.field for step in model.calibration.paths[phase] if step.share > 0}
    every = fields_of(model.adapter.units)
    return tuple(name for name in every if name in used) or every


@contextmanager
def under_paths(model: ElasticModel, paths: Mapping[Phase, tuple[Step, ...]]) -> Iterator[None]:
    """The model under other paths, for a while."""
    own = model.calibration
    assert own is not None
    recalibrate(model, replace(own, lowest=0.01, paths=paths))
    try:
        yield
    finally:
        recalibrate(model, own)


@torch.inference_mode()
def mean_sizes(model: ElasticModel, ids_WT: Tensor) -> Sizes:
    """The mean size of every input of every projection over some text."""
    sums: dict[tuple[int, Site], Tensor] = {}

    def watch(layer: Layer, site: Site, x_WTI: Tensor) -> None:
        sums[layer.index, site] = x_WTI.float().abs().mean((0, 1))

    with watching_inputs(model, watch):
        model.teacher(ids_WT.to(model.device))
    return sums
