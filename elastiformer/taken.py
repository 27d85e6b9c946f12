"""The routes of one step, noted layer by layer, and settled into usages at its end.

A row's price is its plan's, less what its token routers left out, which is noted here, and with
what it took beyond the channels it was granted, which is noted where it took them.

Shape letters: L layers   N rows   R some of them   C chunks   K kinds   B chunk x kind   J those of
    which there are rows   S times that rows were left out   P fields of a price   F counts of a
    usage   U units   E routed and skipped
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import NamedTuple

import numpy as np

from elastiformer.accounting import ModelShape
from elastiformer.capacity import Phase, Unit
from elastiformer.packed import Packed
from elastiformer.priced import Price


class _Parts(NamedTuple):
    """What the rows of one kind in one chunk ran, for each pair of which there are some."""

    first_C: np.ndarray  # the parts of a chunk stand side by side
    kind_J: np.ndarray
    rows_J: np.ndarray
    price_JP: np.ndarray
    attended_J: np.ndarray  # FLOPs of attention

    def summed(self, each_J: np.ndarray) -> np.ndarray:
        """The sum over each chunk's parts: [C, …]."""
        sums_C: np.ndarray = np.add.reduceat(each_J, self.first_C)
        return sums_C


_OF_NONE = np.empty(0, dtype=np.int64)


class Taken:
    """What the rows of one step were spared."""

    def __init__(self, packed: Packed, shape: ModelShape) -> None:
        self._packed, self._shape = packed, shape
        self._skipped: list[tuple[int, Unit, np.ndarray]] = []
        self._keys_LC: list[np.ndarray] = []

    def keys(self, keys_C: np.ndarray = _OF_NONE) -> None:
        """The keys that each chunk's rows attend to, in the next layer.

        Args:
            keys_C: of the first chunks; the others are items whose class tokens alone attend, to
                all of their rows.
        """
        if len(keys_C) < len(self._packed.chunks):
            keys_C = np.concatenate([keys_C, np.diff(self._packed.starts)[len(keys_C) :]])
        self._keys_LC.append(keys_C)

    def skipped(self, layer: int, unit: Unit, rows_R: np.ndarray) -> None:
        """A token router left these rows out."""
        self._skipped.append((layer, unit, rows_R))

    def settle(self, units: Sequence[Unit]) -> None:
        """Add to each sequence what its rows spent."""
        packed, shape = self._packed, self._shape
        parts = self._parts()
        linear_C, attended_C = parts.summed(parts.price_JP)[:, 0], parts.summed(parts.attended_J)
        heads_C = np.array(packed.output_counts) * shape.head_flops
        dense_linear = shape.dense_token_flops(context=0)
        dense_per_key = shape.dense_token_flops(context=1) - dense_linear
        tokens_C, keys_C = np.array(
            [chunk.sequence.dense_extent(len(chunk.ids)) for chunk in packed.chunks]
        ).T
        dense_block_C = tokens_C * (dense_linear + keys_C * dense_per_key)
        products_C, channels_C = self._beyond()  # last: a device may still be at work
        linear_C = linear_C + 2 * products_C
        block_C = linear_C + attended_C
        counts_CF = np.stack(
            [
                block_C + heads_C,
                dense_block_C + heads_C,
                block_C,
                dense_block_C,
                (linear_C + heads_C) // 2,
                (tokens_C * dense_linear + heads_C) // 2,
            ],
            axis=1,
        )
        for chunk, counts in zip(packed.chunks, counts_CF.tolist(), strict=True):
            chunk.sequence.usage.spend(*counts)
        for phase in Phase:
            self._decide(phase, parts, channels_C, units)

    def _decide(
        self, phase: Phase, parts: _Parts, channels_C: np.ndarray, units: Sequence[Unit]
    ) -> None:
        """Add what was decided for the rows of a phase; dense rows decide nothing."""
        routed_K = np.array(
            [each.phase is phase and not each.is_dense for each in self._packed.distinct_kinds]
        )
        if not routed_K.any():
            return
        routed_J = routed_K[parts.kind_J]
        rows_C = parts.summed(parts.rows_J * routed_J)
        price_CP = parts.summed(parts.price_JP * routed_J[:, None])
        _, attentions_C, mlps_C, heads_C, experts_C, left_out_C = price_CP.T
        if phase is Phase.OUTPUT:  # the rows that take channels by thresholds
            left_out_C = left_out_C - channels_C
        shape, all_C = self._shape.layers[0], rows_C * len(self._shape.layers)
        channels = shape.width + shape.attention_width, shape.width + shape.mlp_width
        decided = {
            Unit.ATTENTION_TOKENS: (all_C, all_C - attentions_C),
            Unit.MLP_TOKENS: (all_C, all_C - mlps_C),
            Unit.HEADS: (attentions_C * shape.heads, heads_C),
            Unit.EXPERTS: (mlps_C * shape.experts, experts_C),
            Unit.CHANNELS: (attentions_C * channels[0] + mlps_C * channels[1], left_out_C),
        }
        always = (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS)
        asked = [unit for unit in decided if unit in always or unit in units]
        counts_CUE = np.array([decided[unit] for unit in asked]).transpose(2, 0, 1)
        keys = [(unit, phase) for unit in asked]
        deciding = np.flatnonzero(rows_C)
        for chunk, counts in zip(deciding.tolist(), counts_CUE[deciding].tolist(), strict=True):
            self._packed.chunks[chunk].sequence.usage.decide_each(keys, counts)

    def _beyond(self) -> tuple[np.ndarray, np.ndarray]:
        """What each chunk's rows took beyond the channels granted, [C]: products, channels."""
        packed = self._packed
        if packed.allowances is None:
            nothing_C = np.zeros(len(packed.chunks), dtype=np.int64)
            return nothing_C, nothing_C
        products_N, channels_N = packed.allowances.beyond
        firsts = packed.starts[:-1]
        return np.add.reduceat(products_N, firsts), np.add.reduceat(channels_N, firsts)

    def _parts(self) -> _Parts:
        """What the rows of each kind ran in each chunk: their plan's price, and what changed it."""
        packed, keys_LC = self._packed, np.array(self._keys_LC)
        plans = [kind.plan for kind in packed.distinct_kinds]
        pair_N = packed.chunk_N * len(plans) + packed.kind_N
        rows_B = np.bincount(pair_N, minlength=len(packed.chunks) * len(plans))
        pair_J = np.flatnonzero(rows_B)
        rows_J, (chunk_J, kind_J) = rows_B[pair_J], np.divmod(pair_J, len(plans))
        total_KP = np.array([plan.total.counts for plan in plans])
        per_key_KL = np.stack([plan.per_key_L for plan in plans])
        price_JP = rows_J[:, None] * total_KP[kind_J]
        keys_LJ = keys_LC[:, chunk_J]
        attended_J = rows_J * (per_key_KL[kind_J] * keys_LJ.T).sum(1)
        if self._skipped:
            among_J = np.zeros(len(rows_B), dtype=np.int64)
            among_J[pair_J] = np.arange(len(pair_J))
            changes_JP, unattended_J = self._changes(among_J[pair_N], kind_J, keys_LJ)
            price_JP += changes_JP
            attended_J -= unattended_J
        return _Parts(
            np.searchsorted(chunk_J, np.arange(len(packed.chunks))),
            kind_J,
            rows_J,
            price_JP,
            attended_J,
        )

    def _changes(
        self, part_N: np.ndarray, kind_J: np.ndarray, keys_LJ: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What routers changed in price, and the FLOPs of attention they left out: [J, P], [J].

        Args:
            part_N: each row's.
        """
        plans = [kind.plan for kind in self._packed.distinct_kinds]
        counts_SJ = np.array(
            [np.bincount(part_N[rows_R], minlength=len(kind_J)) for _, _, rows_R in self._skipped]
        )
        changed_SKP = np.zeros((len(self._skipped), len(plans), len(fields(Price))), dtype=np.int64)
        per_key_SK = np.zeros((len(self._skipped), len(plans)), dtype=np.int64)
        for place, (layer, unit, _) in enumerate(self._skipped):
            of_mlp = unit is Unit.MLP_TOKENS
            for number, plan in enumerate(plans):
                changed = (plan.skipped_mlp if of_mlp else plan.skipped_attention).get(layer)
                if changed is not None:
                    changed_SKP[place, number] = changed.counts
                    per_key_SK[place, number] = 0 if of_mlp else plan.per_key_L[layer]
        changes_JP = np.einsum("sj,sjp->jp", counts_SJ, changed_SKP[:, kind_J])
        keys_SJ = keys_LJ[[layer for layer, _, _ in self._skipped]]
        return changes_JP, np.einsum("sj,sj,sj->j", counts_SJ, per_key_SK[:, kind_J], keys_SJ)
