"""The routes of one step, noted layer by layer, and settled into usages at its end.

A row's price is its plan's, less what its token routers left out; only the latter is noted here.

Shape letters: L layers   R rows   K kinds
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from elastiformer.accounting import ModelShape
from elastiformer.capacity import Phase, Unit
from elastiformer.packed import Packed
from elastiformer.priced import Price
from elastiformer.usage import Usage


class Spent(NamedTuple):
    """What one chunk's rows of one kind ran under."""

    kind: int  # its number
    rows: int
    changes: Price  # by its routers
    unattended: tuple[tuple[int, int], ...]  # of so many rows the keys of a layer


class Taken:
    """What the rows of one step were spared."""

    def __init__(self, packed: Packed, shape: ModelShape) -> None:
        self._packed, self._shape = packed, shape
        # Per chunk and kind, by number: what its routers changed, and keys not attended to.
        self._changes: dict[tuple[int, int], Price] = {}
        self._unattended: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._keys_LC: list[np.ndarray] = []

    def keys(self, keys_C: np.ndarray) -> None:
        """The keys that each chunk's rows attend to, in the next layer."""
        self._keys_LC.append(keys_C)

    def skipped(self, layer: int, unit: Unit, rows_R: np.ndarray) -> None:
        """A token router left these rows out."""
        packed = self._packed
        chunk_R = np.searchsorted(packed.starts, rows_R, side="right") - 1
        kinds = len(packed.distinct_kinds)
        pairs, counts = np.unique(chunk_R * kinds + packed.kind_N[rows_R], return_counts=True)
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            key = divmod(pair, kinds)
            plan = packed.distinct_kinds[key[1]].plan
            if unit is Unit.MLP_TOKENS:
                changed = plan.skipped_mlp[layer]
            else:
                changed = plan.skipped_attention[layer]
                self._unattended.setdefault(key, []).append((layer, count))
            self._changes[key] = self._changes.get(key, Price()) + changed * count

    def settle(self, units: Sequence[Unit]) -> None:
        """Add to each sequence what its rows spent."""
        packed, shape = self._packed, self._shape
        dense_linear = shape.dense_token_flops(context=0)
        dense_per_key = shape.dense_token_flops(context=1) - dense_linear
        keys_LC = np.array(self._keys_LC)
        kinds = len(packed.distinct_kinds)
        chunk_N = np.repeat(np.arange(len(packed.chunks)), np.diff(packed.starts))
        rows_CK = np.bincount(
            chunk_N * kinds + packed.kind_N, minlength=len(packed.chunks) * kinds
        ).reshape(-1, kinds)
        known: dict[tuple[object, ...], Usage] = {}  # what was run alike is counted once
        for place, (chunk, outputs) in enumerate(
            zip(packed.chunks, packed.output_counts, strict=True)
        ):
            tokens = len(chunk.ids)
            spent = [
                Spent(
                    number,
                    rows,
                    self._changes.get((place, number), Price()),
                    tuple(self._unattended.get((place, number), ())),
                )
                for number, rows in enumerate(rows_CK[place].tolist())
                if rows
            ]
            keys_L = keys_LC[:, place]
            alike = (*spent, keys_L.tobytes())
            if alike not in known:
                known[alike] = self._sum(spent, keys_L, units)
            usage = replace(known[alike])
            heads = outputs * shape.head_flops
            usage.parameters_used = (usage.parameters_used + heads) // 2
            usage.flops = usage.block_flops + heads
            dense_tokens, keys = chunk.sequence.dense_extent(tokens)
            usage.dense_block_flops = dense_tokens * (dense_linear + keys * dense_per_key)
            usage.dense_flops = usage.dense_block_flops + heads
            usage.dense_parameters = (dense_tokens * dense_linear + heads) // 2
            chunk.sequence.usage += usage

    def _sum(self, spent: Sequence[Spent], keys_L: np.ndarray, units: Sequence[Unit]) -> Usage:
        """What the rows of one chunk ran in the blocks."""
        usage = Usage()
        for number, rows, changes, unattended in spent:
            kind = self._packed.distinct_kinds[number]
            price = kind.plan.total * rows + changes
            attended = rows * int(kind.plan.per_key_L @ keys_L)
            for layer, count in unattended:
                attended -= count * int(kind.plan.per_key_L[layer] * keys_L[layer])
            usage.block_flops += price.linear + attended
            usage.parameters_used += price.linear
            if not kind.is_dense:
                self._decide(usage, kind.phase, rows, price, units)
        return usage

    def _decide(
        self, usage: Usage, phase: Phase, rows: int, price: Price, units: Sequence[Unit]
    ) -> None:
        """What was decided for some rows of one plan; dense rows decide nothing."""
        layers, shape = len(self._shape.layers), self._shape.layers[0]
        attentions, mlps = price.kept_attentions, price.kept_mlps
        usage.decide(Unit.ATTENTION_TOKENS, phase, rows * layers, rows * layers - attentions)
        usage.decide(Unit.MLP_TOKENS, phase, rows * layers, rows * layers - mlps)
        if Unit.HEADS in units:
            usage.decide(Unit.HEADS, phase, attentions * shape.heads, price.heads_left_out)
        if Unit.EXPERTS in units:
            usage.decide(Unit.EXPERTS, phase, mlps * shape.experts, price.experts_left_out)
        if Unit.CHANNELS in units:
            channels = attentions * (shape.width + shape.attention_width)
            channels += mlps * (shape.width + shape.mlp_width)
            usage.decide(Unit.CHANNELS, phase, channels, price.channels_left_out)
