"""Channels chosen otherwise than the adapter chooses them, at the same count and the same cost.

A `Choice` is what the adapter does but for a decision or two: what a size is weighed by, whose
sizes count for a token, one number for each token or one threshold for all, what stands in for
channels left out, and whether up is computed for all neurons. `ChoicePicking` runs it on the
masked form, and counts what was really left out.

Position 0, to which every token attends and whose sizes are like no other's, chooses for itself
alone and tells no other token.

Shape letters: B rows   T tokens   R tokens after position 0   I inputs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from elastiformer import ElasticModel, Phase
from elastiformer.accounting import LayerShape
from elastiformer.capacity import LayerPlan, Plan, Site
from elastiformer.families import Layer
from elastiformer.routers import best
from training.picking import Picking, Sizes, Under, every_channel

EVERYWHERE = frozenset(Site)
INPUTS = frozenset({Site.ATTENTION_IN, Site.MLP_IN})
NEURONS = frozenset({Site.MLP_OUT})
NOWHERE: frozenset[Site] = frozenset()


class Weight(StrEnum):
    """What a channel's size is multiplied by before the largest are kept."""

    NORM = "column norm"
    NOTHING = "nothing"
    GRADIENT = "root mean square of the loss's gradient"


Seen = Callable[[Tensor], Tensor]

# Whose sizes count: from those of every token to those that it is judged by, both [B, R, I].


def own(sizes_BRI: Tensor) -> Tensor:
    return sizes_BRI


def block_mean(tokens: int) -> Seen:
    """The mean over its block of so many; the last block may be shorter."""

    def seen(sizes_BRI: Tensor) -> Tensor:
        blocks = torch.split(sizes_BRI, tokens, 1)
        return torch.cat([block.mean(1, keepdim=True).expand_as(block) for block in blocks], 1)

    return seen


def sequence_mean(sizes_BRI: Tensor) -> Tensor:
    return sizes_BRI.mean(1, keepdim=True).expand_as(sizes_BRI)


def token_before(sizes_BRI: Tensor) -> Tensor:
    """Those of the token before; the first has its own."""
    return torch.cat([sizes_BRI[:, :1], sizes_BRI[:, :-1]], 1)


def held(tokens: int) -> Seen:
    """Its own at every so many tokens, which those up to the next take over."""

    def seen(sizes_BRI: Tensor) -> Tensor:
        at_R = torch.arange(sizes_BRI.shape[1], device=sizes_BRI.device)
        return sizes_BRI[:, at_R - at_R % tokens]

    return seen


def mean_before(sizes_BRI: Tensor) -> Tensor:
    """The mean of all tokens before; the first has its own."""
    seen_R1 = torch.arange(1, sizes_BRI.shape[1] + 1, device=sizes_BRI.device)[:, None]
    return token_before(sizes_BRI.cumsum(1) / seen_R1)


def running_mean(part: float) -> Seen:
    """A mean of those before, to which each new one adds `part`; the first has its own."""

    def seen(sizes_BRI: Tensor) -> Tensor:
        means = [sizes_BRI[:, 0]]
        for sizes_BI in sizes_BRI.unbind(1)[:-1]:
            means.append(torch.lerp(means[-1], sizes_BI, part))
        return torch.stack(means, 1)

    return seen


@dataclass(frozen=True, slots=True)
class Choice:
    """How channels are chosen; with nothing said, as the adapter does it."""

    weight: Weight = Weight.NORM
    seen: Seen = own
    seen_at: frozenset[Site] = EVERYWHERE
    threshold_at: frozenset[Site] = NOWHERE  # one for all tokens: as many on average
    constant_at: frozenset[Site] = NOWHERE  # in place of 0, the mean of what is left out
    by_nearness: bool = False  # what lies nearest to its constant is left out
    up_share: float = 1.0  # of the neurons that up is computed for; more inputs make up for it


@dataclass(frozen=True, slots=True, eq=False)
class Learnt:
    """What training text says of a model: for each site the gradients, for each layer up's size."""

    gradients: Sizes = field(default_factory=dict)  # root mean squares, [I]
    up_sizes: Mapping[int, Tensor] = field(default_factory=dict)  # likewise, a number a neuron


class ChoicePicking(Picking):
    """Runs a choice, and counts what it left out.

    Args:
        constants: what stands in for a channel left out, [I] of each place of `constant_at`;
            0 where none is given.
    """

    first_is_whole = False

    def __init__(
        self,
        model: ElasticModel,
        choice: Choice,
        learnt: Learnt | None = None,
        constants: Sizes | None = None,
    ) -> None:
        self._model, self._choice = model, choice
        self._learnt, self._constants = learnt or Learnt(), constants or {}
        self._sums: dict[tuple[int, Site], tuple[Tensor, Tensor]] = {}
        self._left_out_flops = 0

    def rest(self, plan: Plan, phase: Phase) -> Plan:
        return every_channel(plan)

    @contextmanager
    def applied(self, under: Under) -> Iterator[None]:
        self._left_out_flops = 0
        with ExitStack() as stack:
            for layer in self._model.layout.layers:
                for site in Site:
                    if (hook := self._only(under, layer, site)) is not None:
                        for module in {projection.module for projection in layer.at_site(site)}:
                            stack.callback(module.register_forward_pre_hook(hook).remove)
                if self._choice.up_share < 1:
                    for remove in self._without_neurons(under, layer):
                        stack.callback(remove)
            yield

    def more_flops(self, under: Under) -> int:
        """What the last run computed beyond the plans that it ran under; below 0: less."""
        layers = self._model.layout.layers
        planned = sum(_left_out_flops(under, layer, site) for layer in layers for site in Site)
        return planned - self._left_out_flops

    def left_out_means(self) -> Sizes:
        """The mean of each channel over the tokens that left it out; 0 where none did."""
        return {
            place: sum_I / count_I.clamp(min=1) for place, (sum_I, count_I) in self._sums.items()
        }

    def _only(
        self, under: Under, layer: Layer, site: Site
    ) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]] | None:
        """The hook of one site; None where every token keeps all of it."""
        choice, place = self._choice, (layer.index, site)
        inputs, outputs = _size(layer, site)
        count_T = under.each(lambda plan, _: self._kept(layer.shape, plan[layer.index], site))
        if int(count_T.min()) == inputs:
            return None
        weight_I = self._weight(layer, site)
        constant_I = self._constants.get(place)
        # Query, key and value read one input: it is chosen from once.
        last: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            x_BTI = args[0]
            if not last or last[0] is not x_BTI:
                away_BTI = x_BTI
                if choice.by_nearness and constant_I is not None:
                    away_BTI = x_BTI - constant_I
                kept_BTI = chosen(away_BTI.abs().float() * weight_I, count_T, choice, site)
                self._left_out_flops += 2 * outputs * int((~kept_BTI).sum())
                only_BTI = x_BTI * kept_BTI
                if site in choice.constant_at:
                    self._add_left_out(place, x_BTI, ~kept_BTI)
                    if constant_I is not None:
                        only_BTI = torch.where(kept_BTI, x_BTI, constant_I)
                last[:] = [x_BTI, only_BTI]
            return (last[1],)

        return hook

    def _kept(self, shape: LayerShape, plan: LayerPlan, site: Site) -> int:
        if site is Site.MLP_IN and self._choice.up_share < 1:
            return fewer_neurons(shape, plan, self._choice.up_share)[0]
        inputs = {Site.ATTENTION_OUT: shape.attention_width, Site.MLP_OUT: shape.mlp_width}
        return plan.kept(site.value, inputs.get(site, shape.width))

    def _weight(self, layer: Layer, site: Site) -> Tensor:
        if self._choice.weight is Weight.GRADIENT:
            return self._learnt.gradients[layer.index, site]
        norm_I = self._model.layout.column_norms(layer, site)
        return torch.ones_like(norm_I) if self._choice.weight is Weight.NOTHING else norm_I

    def _add_left_out(self, place: tuple[int, Site], x_BTI: Tensor, out_BTI: Tensor) -> None:
        sums = ((x_BTI * out_BTI)[:, 1:].sum((0, 1)), out_BTI[:, 1:].sum((0, 1)))
        before = self._sums.get(place)
        self._sums[place] = sums if before is None else (before[0] + sums[0], before[1] + sums[1])

    def _without_neurons(self, under: Under, layer: Layer) -> Iterator[Callable[[], None]]:
        """Up gives nothing for the neurons that the gate, once computed, says least of."""
        gate, up, shape = layer.gate, layer.up, layer.shape
        assert gate is not None, "neurons are chosen by the gate"
        share = self._choice.up_share
        kept_T = under.each(lambda plan, _: fewer_neurons(shape, plan[layer.index], share)[1])
        inputs_T = under.each(lambda plan, _: fewer_neurons(shape, plan[layer.index], share)[0])
        norm_I = self._model.layout.column_norms(layer, Site.MLP_OUT)
        weight_I = self._learnt.up_sizes[layer.index] * norm_I
        told: list[Tensor] = []

        def of_gate(_: nn.Module, args: Any, out: Tensor) -> None:
            told[:] = [layer.activation(out[..., gate.start : gate.stop]).abs().float() * weight_I]

        def of_up(_: nn.Module, args: Any, out: Tensor) -> Tensor:
            sizes_BTI = told.pop()
            kept_BTI = best(sizes_BTI, kept_T.expand(sizes_BTI.shape[:2]))
            self._left_out_flops += 2 * int(((~kept_BTI).sum(-1) * inputs_T).sum())
            before, here, after = out.tensor_split((up.start, up.stop), -1)
            return torch.cat([before, here * kept_BTI, after], -1)

        yield gate.module.register_forward_hook(of_gate).remove
        yield up.module.register_forward_hook(of_up).remove


def chosen(sizes_BTI: Tensor, count_T: Tensor, choice: Choice, site: Site) -> Tensor:
    """True for the channels that are kept, by token or, under one threshold, by all together."""
    first_B1I, later_BRI = sizes_BTI[:, :1], sizes_BTI[:, 1:]
    if site in choice.seen_at:
        sizes_BTI = torch.cat([first_B1I, choice.seen(later_BRI)], 1)
    rows = len(sizes_BTI)
    if site not in choice.threshold_at:
        return best(sizes_BTI, count_T.expand(rows, -1))
    all_kept_BN = best(later_BRI.flatten(1), count_T[1:].sum().expand(rows))
    first_kept_B1I = best(first_B1I, count_T[:1].expand(rows, -1))
    return torch.cat([first_kept_B1I, all_kept_BN.view_as(later_BRI)], 1)


def fewer_neurons(shape: LayerShape, plan: LayerPlan, share: float) -> tuple[int, int]:
    """(inputs of gate and up, neurons that up is computed for) at the FLOPs of the plan.

    Up is computed for no fewer neurons than down reads, nor for fewer than all inputs leave it.
    """
    inputs, neurons = plan.kept("mlp_in", shape.width), shape.mlp_width
    if inputs == shape.width:
        return inputs, neurons
    least = max(round(share * neurons), plan.kept("mlp_out", neurons))
    more = min(shape.width, round(2 * inputs * neurons / (neurons + least)))
    return more, min(neurons, round(2 * inputs * neurons / more) - neurons)


def _left_out_flops(under: Under, layer: Layer, site: Site) -> int:
    """What the plans themselves leave out of the products at a site."""
    inputs, outputs = _size(layer, site)
    count_T = under.each(lambda plan, _: plan[layer.index].kept(site.value, inputs))
    return 2 * outputs * int((inputs - count_T).sum())


def _size(layer: Layer, site: Site) -> tuple[int, int]:
    """(inputs, outputs) of a site's projections together."""
    weights = [projection.weight_OI for projection in layer.at_site(site)]
    return weights[0].shape[1], sum(len(weight_OI) for weight_OI in weights)
