"""Steps of rows that each ask with one token: two compiled calls a layer, on a CPU.

It stands in for SparseAttention and SparseMlp where nothing is left out but channels and nothing
is repaired, and gives their bits (sub_layers.py). Whatever else a step holds is theirs.

Shape letters: N rows   D width   S (in start_S) rows + 1
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from math import log2

import numpy as np
import torch
from torch import Tensor

from elastiformer import sub_layers
from elastiformer.capacity import Phase, Site
from elastiformer.families import Layer
from elastiformer.packed import Packed
from elastiformer.placing import Placing
from elastiformer.pointwise import CompiledGate, CompiledNorm, Rotation
from elastiformer.single_queries import on_host
from elastiformer.sub_layers import Cached, Heads, Norm, Turns, Weight
from elastiformer.taken import Taken
from elastiformer.tiles import even_starts
from elastiformer.workshop import SITES, Workshop

_MOST_ROWS = 128  # that are worth a trial


@dataclass(frozen=True, slots=True)
class _Parts:
    """One layer as the kernels take it."""

    layer: Layer
    attention_norm: Norm
    mlp_norm: Norm
    weights: dict[Site, Weight]
    heads: Heads
    form: int  # of the gate


class Decoding:
    """Runs the layers of one model for rows that each are their request's latest token."""

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop

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
            and self._layers is not None
            and packed.count <= (_MOST_ROWS if self._gives_same_bits else self._few_rows)
            and max(packed.positions) < self._window
            and all(self._workshop.repair_name(self._last, kind) is None for kind in kinds)
        )

    def run(
        self,
        h_ND: Tensor,
        packed: Packed,
        placing: Placing,
        taken: Taken,
        rotations: dict[str | None, Rotation],
    ) -> None:
        """Run all layers over the residual, in place."""
        assert self._layers is not None, "a step that does not fit"
        h = h_ND.numpy()
        nothing_NR = np.empty((packed.count, 0), dtype=np.float32)
        for parts in self._layers:
            layer = parts.layer
            start_S = [self._starts(packed, layer.index, site) for site in range(len(SITES))]
            rotation = rotations.get(layer.layer_type, rotations.get(None))
            turns = Turns(nothing_NR, nothing_NR) if rotation is None else Turns(*rotation.on_host)
            singles = placing.reads(layer.index, packed.everything).singles
            cached = Cached(
                on_host(singles.rows_NH),
                placing.places(layer.index),
                singles.query_S,
                singles.key_S,
                singles.value_S,
                singles.room_S,
                singles.length_S,
            )
            weights = parts.weights
            sub_layers.attention(
                h,
                parts.attention_norm,
                weights[Site.ATTENTION_IN],
                parts.heads,
                turns,
                cached,
                weights[Site.ATTENTION_OUT],
                (start_S[0], start_S[1]),
            )
            taken.keys(placing.keys(layer.index))
            sub_layers.mlp(
                h,
                parts.mlp_norm,
                weights[Site.MLP_IN],
                parts.form,
                weights[Site.MLP_OUT],
                (start_S[2], start_S[3]),
            )

    def _starts(self, packed: Packed, layer: int, site: int) -> np.ndarray:
        """Where each row's channels at a site begin, and the last ones end."""
        counts = packed.channels(layer, site, packed.everything)
        if isinstance(counts, int):
            return even_starts(packed.count, counts)
        start_S = np.zeros(packed.count + 1, dtype=np.int64)
        np.cumsum(counts, out=start_S[1:])
        return start_S

    @cached_property
    def _last(self) -> Layer:
        return self._workshop.layout.layers[-1]

    @cached_property
    def _window(self) -> float:
        """From which position on some layer does not see all before it."""
        windows = [layer.window for layer in self._workshop.layout.layers]
        return min((window for window in windows if window is not None), default=float("inf"))

    def work(self, packed: Packed) -> Hashable | None:
        """What a step that fits is like in time; None where it is few rows, and faster here."""
        if packed.count <= self._few_rows:
            return None
        linear = sum(kind.plan.total.linear for kind in packed.kinds) / packed.count
        return round(2 * log2(packed.count)), round(4 * log2(max(linear, 1)))

    @cached_property
    def _gives_same_bits(self) -> bool:
        """Whether many rows get the same bits here as where their products go at once."""
        tools = self._workshop
        return all(tools.at_site(self._last, site).has_one_answer for site in SITES)

    @cached_property
    def _few_rows(self) -> int:
        """Up to so many, every product goes row by row."""
        tools = self._workshop
        return min(tools.at_site(self._last, site).few.rows(1.0) for site in SITES)

    @cached_property
    def _layers(self) -> list[_Parts] | None:
        """None where some layer holds what the kernels do not know."""
        found = [self._parts(layer) for layer in self._workshop.layout.layers]
        known = [parts for parts in found if parts is not None]
        return known if len(known) == len(found) else None

    def _parts(self, layer: Layer) -> _Parts | None:
        tools = self._workshop
        before, between = tools.attention_norms[layer.index], tools.mlp_norms[layer.index]
        gate = tools.gates[layer.index]
        if not isinstance(before, CompiledNorm) or not isinstance(between, CompiledNorm):
            return None
        if not isinstance(gate, CompiledGate):
            return None
        own = (layer.query_norm, layer.key_norm, layer.after_attention, layer.after_mlp)
        closes = (layer.attention_close, layer.mlp_close)
        if any(module is not None for module in own + closes) or layer.softcap is not None:
            return None
        if not tools.at_site(layer, Site.MLP_IN).has_tiles or tools.kv != "complete":
            return None
        if not tools.layout.causal:
            return None
        weights = {}
        for site in SITES:
            product = tools.at_site(layer, site)
            norms_I = np.zeros(product.inputs, dtype=np.float32)
            if tools.adapter is not None:
                norms_I = tools.layout.column_norms(layer, site).numpy()
            weights[site] = product.on_host(norms_I)
        shape = layer.shape
        heads = Heads(shape.heads, shape.kv_heads, np.float32(layer.scale))
        attention_norm, mlp_norm = (
            Norm(norm.scale_D, np.float32(norm.epsilon)) for norm in (before, between)
        )
        return _Parts(layer, attention_norm, mlp_norm, weights, heads, gate.form)
