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

Shape letters: W windows   T tokens   I inputs of a projection   M things of one router
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elastiformer import Calibration, ElasticModel, Phase
from elastiformer.calibration import Step
from elastiformer.capacity import Plan, Site
from elastiformer.families import Layer
from elastiformer.masked import PlanGrid, Selection
from elastiformer.routers import best
from training.allotment import (
    TOKEN_FIELDS,
    Allotment,
    Curves,
    fields_of,
    late_layers,
    uniform,
)
from training.quality import Quality, Setting, Window, asked_of, compare, recalibrate
from training.sensitivity import LATE, remembered

DROP, LAST, UNIFORM = "drop by sensitivity", "last layers", "uniform"
RANDOM, STATIC = "random", "static channels"
BASELINES = (DROP, LAST, UNIFORM, RANDOM, STATIC)
Means = Mapping[tuple[int, Site], Tensor]  # mean size of each input, [I]


def baseline_paths(
    model: ElasticModel, notes: Path, context: int
) -> dict[str, dict[Phase, tuple[Step, ...]]]:
    """The paths of the first three; without probes on disk there is no first."""
    assert model.adapter is not None
    shape, layers = model.shape, len(model.shape.layers)
    last = late_layers(layers)
    found = {
        LAST: dict.fromkeys(Phase, last),
        UNIFORM: {phase: uniform(shape, _lowered(model, phase)) for phase in Phase},
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


def _lowered(model: ElasticModel, phase: Phase) -> tuple[str, ...]:
    """The fields that our own path lowers in this phase: a baseline gets no worse units than we.

    All of the adapter's, where our path leaves out whole sub-layers only.
    """
    assert model.adapter is not None and model.calibration is not None
    used = {step.field for step in model.calibration.paths[phase] if step.share > 0}
    every = fields_of(model.adapter.units)
    return tuple(name for name in every if name in used) or every


@contextmanager
def calibrated_as(model: ElasticModel, calibration: Calibration | None) -> Iterator[None]:
    """The model under another calibration, for a while."""
    assert model.adapter is not None
    own = model.adapter.calibration
    recalibrate(model, calibration)
    try:
        yield
    finally:
        recalibrate(model, own)


@torch.inference_mode()
def mean_sizes(model: ElasticModel, ids_WT: Tensor) -> Means:
    """The mean size of every input of every projection over some text."""
    sums: dict[tuple[int, Site], Tensor] = {}

    def watch(layer: Layer, site: Site) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            sums[layer.index, site] = args[0].float().abs().mean((0, 1))

        return hook

    with ExitStack() as hooks:
        for layer in model.layout.layers:
            for site in Site:
                module = layer.at_site(site)[0].module
                hooks.callback(module.register_forward_pre_hook(watch(layer, site)).remove)
        model.teacher(ids_WT.to(model.device))
    return sums


@torch.inference_mode()
def measure_picked(
    model: ElasticModel,
    windows: Sequence[Window],
    capacity: float,
    setting: Setting,
    baseline: str,
    sizes: Means,
    seed: int,
) -> Quality:
    """One capacity under our own plans, with another way to pick what is kept."""
    generator = torch.Generator(device=model.device).manual_seed(seed)
    found = []
    for window in windows:
        under = _under(model, window, capacity, setting)
        logits_TV = _picked(model, window, under, setting, baseline, sizes, generator)
        found.append((logits_TV[window.compared(setting)], under.spent))
    return compare(windows, found, capacity, setting)


@dataclass(frozen=True, slots=True)
class _Under:
    """Which plan each token of a window runs under: `plans[plan_T]`."""

    plans: list[Plan]
    plan_T: Tensor
    spent: float


def _under(model: ElasticModel, window: Window, capacity: float, setting: Setting) -> _Under:
    """The very plans that our own run of this window is under, position by position."""
    tokens = len(window.ids_T)
    sequence = model.sequence(
        asked_of(capacity, setting), window.prompt_tokens, tokens, setting is Setting.SCORED
    )
    plan_of: dict[Plan, int] = {}
    plan_T = []
    spent, dense = 0.0, 0
    for position in range(tokens):
        plan = sequence.plan_at(position).plan
        plan_T.append(plan_of.setdefault(plan, len(plan_of)))
        # As in our own run: the prompt in one chunk, the continuation in another.
        keys = window.prompt_tokens if position < window.prompt_tokens else tokens
        shape = model.shape.of_phase(sequence.phase_at(position))
        spent += shape.planned_token_flops(plan, keys)
        dense += model.shape.dense_token_flops(keys)
    sequence.release()
    return _Under(list(plan_of), torch.tensor(plan_T, device=model.device), spent / dense)


def _picked(
    model: ElasticModel,
    window: Window,
    under: _Under,
    setting: Setting,
    baseline: str,
    sizes: Means,
    generator: torch.Generator,
) -> Tensor:
    """The logits of one window, [T, V]."""
    ids_WT = window.ids_T[None].to(model.device)
    output_T = torch.arange(ids_WT.shape[1], device=model.device) >= window.first_output(setting)
    # Channels are picked here; all else by the masked form, to which those look whole.
    rest = [_without_channels(plan) for plan in under.plans]
    with ExitStack() as stack:
        for handle in _channel_hooks(model, under, baseline, sizes, generator):
            stack.callback(handle.remove)
        if baseline == RANDOM:
            stack.enter_context(_random_scores(model, generator))
        result = model.masked(
            ids_WT, PlanGrid(rest, under.plan_T[None]), output_T[None], selection=Selection.RANK
        )
    return result.logits_BTV[0].float()


def _without_channels(plan: Plan) -> Plan:
    """The plan with every channel kept, but still not the dense one, so that its repair runs."""
    return tuple(
        replace(layer, **{site.value: 1 - 1e-9 for site in Site if getattr(layer, site) < 1})
        for layer in plan
    )


def _channel_hooks(
    model: ElasticModel,
    under: _Under,
    baseline: str,
    sizes: Means,
    generator: torch.Generator,
) -> Iterator[RemovableHandle]:
    tokens, device = len(under.plan_T), under.plan_T.device
    for layer in model.layout.layers:
        for site in Site:
            norm_I = model.layout.column_norms(layer, site)
            counts = [plan[layer.index].kept(site.value, len(norm_I)) for plan in under.plans]
            if min(counts) == len(norm_I):
                continue
            if baseline == RANDOM:
                scores_TI = torch.rand(tokens, len(norm_I), generator=generator, device=device)
            else:
                scores_TI = (sizes[layer.index, site] * norm_I).expand(tokens, -1)
            kept_TI = best(scores_TI, torch.tensor(counts, device=device)[under.plan_T])
            for module in {projection.module for projection in layer.at_site(site)}:
                yield module.register_forward_pre_hook(
                    lambda _, args, kept_TI=kept_TI: (args[0] * kept_TI,)
                )


@contextmanager
def _random_scores(model: ElasticModel, generator: torch.Generator) -> Iterator[None]:
    """Every router scores by chance."""
    assert model.adapter is not None
    routers = [
        router
        for layer in range(len(model.shape.layers))
        for unit in model.adapter.units
        if (router := model.adapter.router(layer, unit)) is not None
    ]
    for router in routers:
        outputs = router.bias.shape[0]

        def scores(x_BTD: Tensor, outputs: int = outputs) -> Tensor:
            shape = (*x_BTD.shape[:-1], outputs)
            return torch.randn(shape, generator=generator, device=x_BTD.device)

        router.forward = scores  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        for router in routers:
            del router.forward
