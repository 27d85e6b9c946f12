"""The routes of one step, noted layer by layer, and settled into usages at its end.

A row's price is its plan's, less what its token routers left out, which is noted here, and with
what it took beyond the channels it was granted, which is noted where it took them.

Shape letters: L layers   N rows   R some of them   C chunks   K kinds   S times that rows were left
    out   P fields of a price
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, fields
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
    unattended: int  # FLOPs of attention that its routers left out


class Taken:
    """What the rows of one step were spared."""

    def __init__(self, packed: Packed, shape: ModelShape) -> None:
        self._packed, self._shape = packed, shape
        self._skipped: list[tuple[int, Unit, np.ndarray]] = []
        self._keys_LC: list[np.ndarray] = []

    def keys(self, keys_C: np.ndarray) -> None:
        """The keys that each chunk's rows attend to, in the next layer."""
        self._keys_LC.append(keys_C)

    def skipped(self, layer: int, unit: Unit, rows_R: np.ndarray) -> None:
        """A token router left these rows out."""
        self._skipped.append((layer, unit, rows_R))

    def settle(self, units: Sequence[Unit]) -> None:
        """Add to each sequence what its rows spent."""
        packed, shape = self._packed, self._shape
        dense_linear = shape.dense_token_flops(context=0)
        dense_per_key = shape.dense_token_flops(context=1) - dense_linear
        keys_LC = np.array(self._keys_LC)
        kinds = len(packed.distinct_kinds)
        pair_N = packed.chunk_N * kinds + packed.kind_N
        rows_CK = np.bincount(pair_N, minlength=len(packed.chunks) * kinds).reshape(-1, kinds)
        changes_CK, unattended_CK = self._changes(pair_N, keys_LC)
        products_C, channels_C = self._beyond()
        known: dict[tuple[object, ...], Usage] = {}  # what was run alike is counted once
        for place, (chunk, outputs) in enumerate(
            zip(packed.chunks, packed.output_counts, strict=True)
        ):
            tokens = len(chunk.ids)
            spent = [
                Spent(number, rows, changes_CK[place][number], unattended_CK[place][number])
                for number, rows in enumerate(rows_CK[place].tolist())
                if rows
            ]
            keys_L, extent = keys_LC[:, place], chunk.sequence.dense_extent(tokens)
            alike = (*spent, keys_L.tobytes(), products_C[place], outputs, extent)
            if alike not in known:
                usage = self._sum(spent, keys_L, units)
                usage.block_flops += 2 * products_C[place]
                usage.parameters_used += 2 * products_C[place]
                heads = outputs * shape.head_flops
                usage.parameters_used = (usage.parameters_used + heads) // 2
                usage.flops = usage.block_flops + heads
                dense_tokens, keys = extent
                usage.dense_block_flops = dense_tokens * (dense_linear + keys * dense_per_key)
                usage.dense_flops = usage.dense_block_flops + heads
                usage.dense_parameters = (dense_tokens * dense_linear + heads) // 2
                known[alike] = usage
            chunk.sequence.usage += known[alike]
            if channels_C[place] and Unit.CHANNELS in units:
                chunk.sequence.usage.decide(Unit.CHANNELS, Phase.OUTPUT, 0, -channels_C[place])

    def _beyond(self) -> tuple[list[int], list[int]]:
        """What each chunk's rows took beyond the channels granted: products, channels."""
        packed = self._packed
        if packed.allowances is None:
            return [0] * len(packed.chunks), [0] * len(packed.chunks)
        products_C, channels_C = (
            np.add.reduceat(each_N, packed.starts[:-1]) for each_N in packed.allowances.beyond
        )
        return products_C.tolist(), channels_C.tolist()

    def _changes(
        self, pair_N: np.ndarray, keys_LC: np.ndarray
    ) -> tuple[list[list[Price]], list[list[int]]]:
        """What routers changed in price, and the FLOPs of attention they left out: [C, K].

        Args:
            pair_N: each row's chunk x number of kinds + kind.
        """
        chunks, kinds = len(self._packed.chunks), self._packed.distinct_kinds
        if not self._skipped:
            return [[Price()] * len(kinds)] * chunks, [[0] * len(kinds)] * chunks
        counts_SCK = np.array(
            [
                np.bincount(pair_N[rows_R], minlength=chunks * len(kinds))
                for _, _, rows_R in self._skipped
            ]
        ).reshape(-1, chunks, len(kinds))
        changed_SKP = np.zeros((len(self._skipped), len(kinds), len(fields(Price))), dtype=np.int64)
        per_key_SK = np.zeros((len(self._skipped), len(kinds)), dtype=np.int64)
        for place, (layer, unit, _) in enumerate(self._skipped):
            of_mlp = unit is Unit.MLP_TOKENS
            for number, kind in enumerate(kinds):
                plan = kind.plan
                changed = (plan.skipped_mlp if of_mlp else plan.skipped_attention).get(layer)
                if changed is not None:
                    changed_SKP[place, number] = astuple(changed)
                    per_key_SK[place, number] = 0 if of_mlp else plan.per_key_L[layer]
        changes_CKP = np.einsum("sck,skp->ckp", counts_SCK, changed_SKP)
        keys_SC = keys_LC[[layer for layer, _, _ in self._skipped]]
        unattended_CK = np.einsum("sck,sk,sc->ck", counts_SCK, per_key_SK, keys_SC)
        changes = [[Price(*each) for each in of_chunk] for of_chunk in changes_CKP.tolist()]
        return changes, unattended_CK.tolist()

    def _sum(self, spent: Sequence[Spent], keys_L: np.ndarray, units: Sequence[Unit]) -> Usage:
        """What the rows of one chunk ran in the blocks."""
        usage = Usage()
        for number, rows, changes, unattended in spent:
            kind = self._packed.distinct_kinds[number]
            price = kind.plan.total * rows + changes
            attended = rows * int(kind.plan.per_key_L @ keys_L) - unattended
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
