"""Plans run otherwise than the adapter runs them: what is kept is chosen, or mended, another way.

The masked form does what it is left; the rest is done here by hooks on the base's modules, put
there for one pass and taken away after it. A window runs under the very plans, position by
position, that the sparse form would run it under.

Shape letters: B rows   T tokens   I inputs   J inputs and a 1   D width   C different counts
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastiformer import Capacity, ElasticModel, Phase, dense_plan
from elastiformer.capacity import Plan, Site
from elastiformer.families import Layer
from elastiformer.plan_grid import PlanGrid, Selection
from elastiformer.routers import best
from training.allotment import TOKEN_FIELDS
from training.quality import Quality, Setting, Window, asked_of, compare
from training.regression import READ_AT, SecondMoments, branches_of, skip_path, told_by_kept

Sizes = Mapping[tuple[int, Site], Tensor]  # of each input, [I]


@dataclass(frozen=True, slots=True, eq=False)
class Under:
    """What each token of a window runs under: `kinds[kind_T]`."""

    kinds: Sequence[tuple[Plan, Phase]]
    kind_T: Tensor

    @property
    def output_T(self) -> Tensor:
        return self.each(lambda plan, phase: phase is Phase.OUTPUT)

    def each(self, value: Callable[[Plan, Phase], int]) -> Tensor:
        """A whole number for each token, or bool."""
        values = [value(plan, phase) for plan, phase in self.kinds]
        return torch.tensor(values, device=self.kind_T.device)[self.kind_T]


@contextmanager
def watching_inputs(
    model: ElasticModel, watch: Callable[[Layer, Site, Tensor], None]
) -> Iterator[None]:
    """For a while, `watch` is told what the projections of every layer and site read: [B, T, I]."""

    def hook(layer: Layer, site: Site) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _, args: watch(layer, site, args[0])

    with ExitStack() as hooks:
        for layer in model.layout.layers:
            for site in Site:
                module = layer.at_site(site)[0].module
                hooks.callback(module.register_forward_pre_hook(hook(layer, site)).remove)
        yield


class Picking(ABC):
    """Another way to do what plans say. Holds for one run: what it draws, it draws once."""

    first_is_whole = True  # position 0, to which every token attends, leaves nothing out

    def rest(self, plan: Plan, phase: Phase) -> Plan:
        """What of a plan is left to the masked form."""
        return plan

    def added_flops(self, plan: Plan, phase: Phase) -> int:
        """What a token costs beyond its plan, or below it."""
        return 0

    @abstractmethod
    @contextmanager
    def applied(self, under: Under) -> Iterator[None]:
        """For a while, the base's modules do their part."""


class AsPlanned(Picking):
    """Nothing done otherwise: the masked form under plans laid out by position."""

    first_is_whole = False

    @contextmanager
    def applied(self, under: Under) -> Iterator[None]:
        yield


def every_channel(plan: Plan) -> Plan:
    """Every channel kept, but still not the dense plan, so that its repair runs."""
    return tuple(
        replace(layer, **{site.value: 1 - 1e-9 for site in Site if getattr(layer, site) < 1})
        for layer in plan
    )


class ChannelPicking(Picking):
    """Channels by chance, or the same for every token; with or without what they tell of others.

    Args:
        sizes: channels with the largest of these x column norm are kept for every token; None:
            chance decides, of channels and of all that routers score.
        moments: what is left out is guessed from what is kept. The guess is linear, so weights
            that hold it in themselves would do the same at no cost.
    """

    def __init__(
        self,
        model: ElasticModel,
        generator: torch.Generator,
        sizes: Sizes | None = None,
        moments: SecondMoments | None = None,
    ) -> None:
        self._model, self._generator = model, generator
        self._sizes, self._moments = sizes, moments
        self._maps: dict[tuple[int, Site, int], Tensor] = {}
        self.first_is_whole = moments is not None

    def rest(self, plan: Plan, phase: Phase) -> Plan:
        return every_channel(plan)

    @contextmanager
    def applied(self, under: Under) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in self._model.layout.layers:
                for site in Site:
                    only = self._only(under, layer, site)
                    if only is None:
                        continue
                    for module in {projection.module for projection in layer.at_site(site)}:
                        stack.callback(module.register_forward_pre_hook(only).remove)
            if self._sizes is None:
                stack.enter_context(_random_scores(self._model, self._generator))
            yield

    def _only(
        self, under: Under, layer: Layer, site: Site
    ) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]] | None:
        """The hook of one site; None where every token keeps all of it."""
        norm_I = self._model.layout.column_norms(layer, site)
        inputs = len(norm_I)
        count_T = under.each(lambda plan, _: plan[layer.index].kept(site.value, inputs))
        if int(count_T.min()) == inputs:
            return None
        counts = sorted(set(count_T.tolist()))
        if self._sizes is None:
            shape = (len(count_T), inputs)
            scores_TI = torch.rand(shape, generator=self._generator, device=norm_I.device)
            kept_TI = best(scores_TI, count_T)
        else:
            scores_I = self._sizes[layer.index, site] * norm_I
            counts_C = torch.tensor(counts, device=count_T.device)
            kept_CI = best(scores_I.expand(len(counts), -1), counts_C)
            kept_TI = kept_CI[torch.searchsorted(counts_C, count_T)]
        maps = {
            count: self._map(layer.index, site, count, kept_TI[count_T == count][0])
            for count in counts
            if self._moments is not None and count < inputs
        }
        # Query, key and value read one input: what is made of it is made once.
        last: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            x_BTI = args[0]
            if not last or last[0] is not x_BTI:
                only_BTI = x_BTI * kept_TI
                for count, map_IJ in maps.items():
                    at_T = count_T == count
                    only_BTI[:, at_T] = F.linear(only_BTI[:, at_T], map_IJ[:, :-1], map_IJ[:, -1])
                last[:] = [x_BTI, only_BTI]
            return (last[1],)

        return hook

    def _map(self, layer: int, site: Site, count: int, kept_I: Tensor) -> Tensor:
        key = (layer, site, count)
        if key not in self._maps:
            assert self._moments is not None
            chance_I = kept_I.float()
            if self._sizes is None:
                chance_I = torch.full_like(chance_I, count / len(kept_I))
            self._maps[key] = told_by_kept(self._moments.inputs[layer, site], chance_I)
        return self._maps[key]


class SkipPicking(Picking):
    """Whole sub-layers that outputs leave out have a thin map in their place."""

    def __init__(self, model: ElasticModel, moments: SecondMoments, rank: int) -> None:
        self._layers = model.layout.layers
        # Where all outputs leave an attention out, nobody reads its keys and values.
        self._unread_flops = [2 * each.width * 2 * each.kv_width for each in model.shape.layers]
        self._paths = {
            (layer, name): skip_path(moments.inputs[layer, READ_AT[name]], branch_DJ, rank)
            for (layer, name), branch_DJ in moments.branches.items()
        }

    def rest(self, plan: Plan, phase: Phase) -> Plan:
        if phase is Phase.PROMPT:
            return plan
        return tuple(
            replace(layer, **{name: 1.0 for name in TOKEN_FIELDS if getattr(layer, name) == 0})
            for layer in plan
        )

    def added_flops(self, plan: Plan, phase: Phase) -> int:
        if phase is Phase.PROMPT:
            return 0
        return sum(
            path.flops_per_token - (self._unread_flops[layer] if name == TOKEN_FIELDS[0] else 0)
            for (layer, name), path in self._paths.items()
            if getattr(plan[layer], name) == 0
        )

    @contextmanager
    def applied(self, under: Under) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in self._layers:
                for name, branch in branches_of(layer).items():
                    skips_T = under.each(
                        lambda plan, phase, at=layer.index, name=name: (  # type: ignore[misc]
                            phase is Phase.OUTPUT and getattr(plan[at], name) == 0
                        )
                    )
                    if bool(skips_T.any()):
                        reader = layer.at_site(READ_AT[name])[0].module
                        path = self._paths[layer.index, name]
                        for handle in _skipping(reader, branch, path, skips_T):
                            stack.callback(handle.remove)
            yield


def _skipping(
    reader: nn.Module, branch: nn.Module, path: Callable[[Tensor], Tensor], skips_T: Tensor
) -> Iterator[Any]:
    """Where a token skips, the branch gives what the path makes of the reader's input."""
    read: list[Tensor] = []

    def after(_: nn.Module, args: Any, out: Any) -> Any:
        y_BTD = (out[0] if isinstance(out, tuple) else out).clone()
        y_BTD[:, skips_T] = path(read.pop()[:, skips_T].float()).to(y_BTD.dtype)
        return (y_BTD, *out[1:]) if isinstance(out, tuple) else y_BTD

    yield reader.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    yield branch.register_forward_hook(after)


@torch.inference_mode()
def measure_picked(
    model: ElasticModel,
    windows: Sequence[Window],
    capacity: float,
    setting: Setting,
    picking: Picking,
) -> Quality:
    """One capacity under the model's own plans, run another way, at the same cost."""
    found = []
    known: dict[tuple[int, int], tuple[Under, float]] = {}
    for window in windows:
        key = (window.prompt_tokens, len(window.ids_T))  # windows alike run alike
        if key not in known:
            known[key] = laid_out(model, window, capacity, setting, picking)
        under, spent = known[key]
        logits_TV = run_picked(model, window.ids_T[None], under, picking)[0].float()
        found.append((logits_TV[window.compared(setting)], spent))
    return compare(windows, found, capacity, setting)


def run_picked(model: ElasticModel, ids_BT: Tensor, under: Under, picking: Picking) -> Tensor:
    """The logits of windows that all run under the same plans, [B, T, V]."""
    ids_BT = ids_BT.to(model.device)
    rest = [picking.rest(plan, phase) for plan, phase in under.kinds]
    with picking.applied(under):
        grid = PlanGrid(rest, under.kind_T.expand(ids_BT.shape))
        output_BT = under.output_T.expand(ids_BT.shape)
        return model.masked(ids_BT, grid, output_BT, selection=Selection.RANK).logits_BTV


def laid_out(
    model: ElasticModel, window: Window, capacity: float, setting: Setting, picking: Picking
) -> tuple[Under, float]:
    """What a window's tokens run under, and the share of the block FLOPs that they spend.

    Outputs ask for less by as much as this way of running plans adds.
    """
    asked = asked_of(capacity, setting)
    under, spent, added = _laid_out(model, window, asked, setting, picking)
    wanted = spent
    tokens = len(window.ids_T)
    for _ in range(3 if added else 0):
        over = (spent + added - wanted) * tokens / (tokens - window.first_output(setting))
        assert isinstance(asked.output, float)
        asked = replace(asked, output=asked.output - over)
        under, spent, added = _laid_out(model, window, asked, setting, picking)
    return under, spent + added


def _laid_out(
    model: ElasticModel, window: Window, asked: Capacity, setting: Setting, picking: Picking
) -> tuple[Under, float, float]:
    """Also the shares that the plans spend, and that running them this way adds."""
    tokens = len(window.ids_T)
    scored = setting is Setting.SCORED
    sequence = model.sequence(asked, window.prompt_tokens, tokens, scored)
    placed = [
        (sequence.plan_at(position).plan, sequence.phase_at(position)) for position in range(tokens)
    ]
    sequence.release()
    return counted(model, window, placed, picking)


def counted(
    model: ElasticModel, window: Window, placed: Sequence[tuple[Plan, Phase]], picking: Picking
) -> tuple[Under, float, float]:
    """A plan and phase for each position as `Under`, what that spends, and what picking adds.

    Both are shares of the dense block FLOPs of the window.
    """
    number: dict[tuple[Plan, Phase], int] = {}
    kinds = []
    spent, added = 0.0, 0
    for position, (plan, phase) in enumerate(placed):
        if position == 0 and picking.first_is_whole:
            plan = dense_plan(len(plan))
        kinds.append(number.setdefault((plan, phase), len(number)))
        keys = keys_at(window, position)
        spent += model.shape.of_phase(phase).planned_token_flops(plan, keys)
        added += picking.added_flops(plan, phase)
    dense = dense_flops(model, window)
    kind_T = torch.tensor(kinds, device=model.device)
    return Under(list(number), kind_T), spent / dense, added / dense


def dense_flops(model: ElasticModel, window: Window) -> int:
    """Block FLOPs of a window at capacity 1.0."""
    places = range(len(window.ids_T))
    return sum(model.shape.dense_token_flops(keys_at(window, place)) for place in places)


def keys_at(window: Window, position: int) -> int:
    """As in our own run: the prompt in one chunk, the continuation in another."""
    return window.prompt_tokens if position < window.prompt_tokens else len(window.ids_T)


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
