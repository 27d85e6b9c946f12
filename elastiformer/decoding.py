"""Steps of rows that each ask with one token: a compiled call or a few for all layers, on a CPU.

It stands in for SparseAttention and SparseMlp where nothing is left out but channels and nothing
is repaired, and gives their bits (sub_layers.py). Whatever else a step holds is theirs.

Shape letters: L layers   N rows   D width
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import log2
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from elastiformer import sub_layers
from elastiformer.capacity import Phase, Site
from elastiformer.device_allowances import DeviceAllowances
from elastiformer.families import Layer
from elastiformer.packed import Packed, Rows
from elastiformer.placing import Placing
from elastiformer.pointwise import CompiledGate, CompiledNorm, Rotation
from elastiformer.products import one_after_another
from elastiformer.sub_layers import Heads, Layers, Turns
from elastiformer.taken import Taken
from elastiformer.thresholds import Grants
from elastiformer.workshop import SITES, Workshop

MOST_ROWS = 128  # that are worth a trial
MOST_LATE_ROWS = 32  # more are faster layer by layer
_NO_COUNTS = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class _Run:
    """Layers in a row that are alike."""

    first: int
    stop: int
    layer_type: str | None
    layers: Layers


class Prompts(Protocol):
    """Runs steps that hold prompts, where a device has kernels of its own for them."""

    def takes(self, packed: Packed) -> bool:
        """Whether it runs this step; what is below is asked for only then."""

    def allowances(self, packed: Packed) -> DeviceAllowances | None:
        """What the rows take of their channels; None: all of them."""

    def run(
        self,
        h_ND: Tensor,
        packed: Packed,
        placing: Placing,
        taken: Taken,
        rotations: dict[str | None, Rotation],
    ) -> Tensor:
        """The residual that all layers leave."""


class Decoding:
    """Runs the layers of one model for rows that each are their request's latest token."""

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop

    def prepare(self) -> None:
        """Do now what else the first step would wait for."""

    def fits(self, packed: Packed) -> bool:
        """Whether this step is one of those."""
        kinds = packed.distinct_kinds
        return (
            packed.count == len(packed.chunks)
            and packed.keeps_sub_layers
            and not packed.leaves_heads_out
            and not packed.leaves_experts_out
            and all(kind.phase is Phase.OUTPUT for kind in kinds)
            and not torch._C._len_torch_dispatch_stack()  # nobody counts operators
            and self._is_able
            and self._takes(packed)
            and max(packed.positions) < self._window
            and all(self._workshop.mending.name(self._last, kind) is None for kind in kinds)
        )

    @property
    def may_run_apart(self) -> bool:
        """Whether rows of prompts may run before or after these, if that is faster."""
        counted = torch._C._len_torch_dispatch_stack()  # somebody counts operators
        return not counted and self._is_able and self._may_run_many

    @property
    def prompts(self) -> Prompts | None:
        """What runs steps that hold prompts, too; None: nothing here does."""
        return None

    @property
    def knows_layers(self) -> bool:
        """Whether some layers of a step can be run by themselves."""
        return self._runs is not None

    @property
    def _is_able(self) -> bool:
        """Whether the kernels know all that the layers hold."""
        return self.knows_layers

    def _takes(self, packed: Packed) -> bool:
        """Whether it is these rows, so many of them, that the kernels take."""
        if isinstance(packed.allowances, DeviceAllowances):
            return False
        return packed.count <= (MOST_ROWS if self._may_run_many else self._few_rows)

    def run(
        self,
        h_ND: Tensor,
        packed: Packed,
        placing: Placing,
        taken: Taken,
        rotations: dict[str | None, Rotation],
    ) -> None:
        """Run all layers over the residual, in place."""
        assert self._runs is not None, "a step that does not fit"
        h = h_ND.numpy()
        grants, cached = _grants(packed), placing.place_in_all_layers()
        for run in self._runs:
            turns = _turns(run, rotations, packed.everything)
            of_run = slice(run.first, run.stop)
            sub_layers.run(h, run.layers, turns, cached.of(of_run), grants.of(of_run))
            for layer in range(run.first, run.stop):
                taken.keys(placing.keys(layer))

    def may_run_late(self, rows: Rows, packed: Packed) -> bool:
        """Whether some rows, which from some layer on run whole, may run by themselves from there.

        They get the bits that they would get beside the others, but for the order in which the
        sum over keys is made.
        """
        counted = torch._C._len_torch_dispatch_stack()  # somebody counts operators
        if counted or self._runs is None or not 0 < rows.count <= MOST_LATE_ROWS:
            return False
        return bool(self._may_run_many or rows.count <= self._few_rows) and (
            max(packed.positions[row] for row in rows.rows_R) < self._window
        )

    def run_late(
        self,
        h_ND: Tensor,
        rows: Rows,
        layers: slice,
        packed: Packed,
        placing: Placing,
        rotations: dict[str | None, Rotation],
    ) -> None:
        """Run some layers over some rows of the residual, in place; all of their channels.

        The keys and values that the other rows leave in these layers are there already.
        """
        assert self._runs is not None, "rows that may not run so"
        h_RD = np.ascontiguousarray(rows.of(h_ND).numpy())
        cached = placing.lone(rows)
        grants = _granted(packed.channels_LTK, packed.kind_N[rows.rows_R])
        for run in self._runs:
            some = slice(max(run.first, layers.start), min(run.stop, layers.stop))
            if some.start >= some.stop:
                continue
            turns = _turns(run, rotations, rows)
            inside = slice(some.start - run.first, some.stop - run.first)
            sub_layers.run(h_RD, run.layers.of(inside), turns, cached.of(some), grants.of(some))
        rows.put(h_ND, torch.from_numpy(h_RD))

    @cached_property
    def _last(self) -> Layer:
        return self._workshop.layout.layers[-1]

    @cached_property
    def _window(self) -> float:
        """From which position on some layer does not see all before it."""
        windows = [layer.window for layer in self._workshop.layout.layers]
        return min((window for window in windows if window is not None), default=float("inf"))

    def work(self, packed: Packed) -> Hashable | None:
        """What a step that fits is like in time; None of few rows: they are faster here."""
        if packed.count <= self._few_rows:
            return None
        linear = sum(kind.plan.total.linear for kind in packed.kinds) / packed.count
        return round(2 * log2(packed.count)), round(4 * log2(max(linear, 1)))

    @cached_property
    def _may_run_many(self) -> bool:
        """Whether many rows may go this way too, if that is faster.

        They get the same bits as where their products go at once; or the base is in a small type,
        in which those of many rows are rounded otherwise than those of few, whichever way they go.
        """
        tools = self._workshop
        has_one_answer = all(tools.at_site(self._last, site).has_one_answer for site in SITES)
        return has_one_answer or tools.dtype != torch.float32

    @cached_property
    def _few_rows(self) -> int:
        """Up to so many, every product goes row by row."""
        tools = self._workshop
        return min(tools.at_site(self._last, site).few.rows(1.0) for site in SITES)

    @cached_property
    def _runs(self) -> list[_Run] | None:
        """None where some layer holds what the kernels do not know."""
        layers = self._workshop.layout.layers
        if not all(self._is_known(layer) for layer in layers):
            return None
        runs = []
        for _, alike in groupby(layers, self._likeness):
            some = list(alike)
            first = some[0].index
            layer_type = some[0].layer_type
            runs.append(_Run(first, first + len(some), layer_type, self._together(some)))
        return runs

    def _is_known(self, layer: Layer) -> bool:
        tools = self._workshop
        before, between = tools.attention_norms[layer.index], tools.mlp_norms[layer.index]
        if not isinstance(before, CompiledNorm) or not isinstance(between, CompiledNorm):
            return False
        if not isinstance(tools.gates[layer.index], CompiledGate):
            return False
        return self._is_plain(layer) and tools.at_site(layer, Site.MLP_IN).has_tiles

    def _is_plain(self, layer: Layer) -> bool:
        """Whether a layer has no more than two norms, attention over all before, and an MLP."""
        own = (layer.query_norm, layer.key_norm, layer.after_attention, layer.after_mlp)
        closes = (layer.attention_close, layer.mlp_close)
        if any(module is not None for module in own + closes) or layer.softcap is not None:
            return False
        return self._workshop.layout.causal

    def _likeness(self, layer: Layer) -> Hashable:
        """Layers of which this is equal run in one call."""
        tools, at = self._workshop, layer.index
        norms, gate = (tools.attention_norms[at], tools.mlp_norms[at]), tools.gates[at]
        assert isinstance(gate, CompiledGate), "a layer that is not known"
        return (
            layer.layer_type,
            self._heads(layer),
            gate.form,
            tuple(norm.epsilon for norm in norms if isinstance(norm, CompiledNorm)),
            tuple(tools.at_site(layer, site).likeness for site in SITES),
        )

    def _together(self, layers: Sequence[Layer]) -> Layers:
        tools = self._workshop
        scales, epsilons = [], []
        for norms in (tools.attention_norms, tools.mlp_norms):
            of_layers = [norms[layer.index] for layer in layers]
            known = [norm for norm in of_layers if isinstance(norm, CompiledNorm)]
            scales.append(np.stack([norm.scale_D for norm in known]))
            epsilons.append(np.float32(known[0].epsilon))
        weights = []
        for place, site in enumerate(SITES):
            products = [tools.at_site(layer, site) for layer in layers]
            norms_LI = np.zeros((len(layers), products[0].inputs), dtype=np.float32)
            if tools.adapter is not None:
                norms_LI = np.stack([tools.layout.column_norms(x, site).numpy() for x in layers])
            weights.append(one_after_another(place, products, norms_LI))
        front, out, gated, down = weights
        gate = tools.gates[layers[0].index]
        assert isinstance(gate, CompiledGate), "a layer that is not known"
        return Layers(
            scales[0], epsilons[0], front, self._heads(layers[0]), out,
            scales[1], epsilons[1], gated, gate.form, down,
        )  # fmt: skip

    @staticmethod
    def _heads(layer: Layer) -> Heads:
        return Heads(layer.shape.heads, layer.shape.kv_heads, np.float32(layer.scale))


def _turns(run: _Run, rotations: dict[str | None, Rotation], rows: Rows) -> Turns:
    """How layers that are alike rotate some rows."""
    rotation = rotations.get(run.layer_type, rotations.get(None))
    if rotation is not None:
        return Turns(*rows.turn(rotation).on_host)
    nothing_RR = np.empty((rows.count, 0), dtype=np.float32)
    return Turns(nothing_RR, nothing_RR)


def _grants(packed: Packed) -> Grants:
    """The channels granted to the rows of a step, a row a request."""
    assert not isinstance(packed.allowances, DeviceAllowances), "a step that does not fit"
    if packed.allowances is not None:
        return packed.allowances.grants
    return _granted(packed.channels_LTK, packed.kind_N)


def _granted(channels_LTK: np.ndarray, kind_N: np.ndarray) -> Grants:
    """Rows that take what they are granted."""
    no_ladder_LTG = np.empty((*channels_LTK.shape[:2], 0), dtype=np.float32)
    no_debts_LTO = np.empty(no_ladder_LTG.shape, dtype=np.int64)
    return Grants(
        no_ladder_LTG, channels_LTK, kind_N, _NO_COUNTS, no_debts_LTO, _NO_COUNTS, _NO_COUNTS
    )
