"""The late layers of prompts, which few of a step's rows run: by themselves, in a call or two.

Below capacity 1.0 most tokens of a prompt leave all late layers out but for the keys and values
that others read there; only the first and last tokens run them, whole. What the others leave hangs
on nothing that happens in these layers, so it is made as they leave, whatever the rows of other
requests still run; then, if nobody else is left, the few go through all of them at once
(decoding.py), where layer by layer each would cost as much as a step of decoding.

The last layer goes its usual way: what of it nobody reads is its own affair.

Shape letters: N packed tokens   D width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from elastiformer.decoding import Decoding
from elastiformer.late_keys import LateKeys
from elastiformer.packed import Packed, Rows
from elastiformer.placing import Placing
from elastiformer.priced import PricedPlan
from elastiformer.rotary import Rotations
from elastiformer.sequence import Chunk, Kind
from elastiformer.sparse_attention import SparseAttention
from elastiformer.taken import Taken
from elastiformer.workshop import Workshop

_LEAST_LAYERS = 2  # that make up for starting it
_LONG = 64  # tokens that are worth a pass over all weights


class Late(NamedTuple):
    """Layers of one step that some rows leave out for good: all of them but the last one."""

    leaving: dict[int, Rows]  # by the first of them
    layers: range  # those that all other rows run whole, if they run by themselves
    whole: Rows  # these


class LateLayers:
    """Runs them for one model."""

    def __init__(self, workshop: Workshop, attention: SparseAttention, decoding: Decoding) -> None:
        self._workshop, self._attention, self._decoding = workshop, attention, decoding
        self._keys = LateKeys(workshop)

    def prepare(self) -> None:
        """Lay out what the first step with late layers would wait for."""
        if self._decoding.knows_layers:
            self._keys.prepare()

    def would_wait(self, lone: Sequence[Chunk], longer: Sequence[Chunk]) -> bool:
        """Whether rows that are each a request's latest keep the others of a step from this."""
        last = len(self._workshop.layout.layers) - 1
        if all(_plan(chunk).whole_from == 0 for chunk in lone):
            return False
        return any(last - _plan(chunk).left_from >= _LEAST_LAYERS for chunk in longer)

    def parted(self, longer: Sequence[Chunk]) -> list[list[Chunk]]:
        """Pieces of prompts whose late layers few rows run, and the others, which would keep them
        from it: apart where both are long, and keys are made layer by layer."""
        knows = self._decoding.knows_layers and self._workshop.kv == "complete"
        if not knows or self._keys.is_able:
            return [list(longer)]
        parts: tuple[list[Chunk], list[Chunk]] = ([], [])
        last = len(self._workshop.layout.layers) - 1
        for chunk in longer:
            parts[last - _plan(chunk).left_from >= _LEAST_LAYERS].append(chunk)
        if min(sum(len(chunk.ids) for chunk in part) for part in parts) < _LONG:
            return [list(longer)]
        return list(parts)

    def of(self, packed: Packed, placing: Placing) -> Late | None:
        """Those of a step; None where it has none that are worth it."""
        kinds, last = packed.distinct_kinds, len(self._workshop.layout.layers) - 1
        counted = torch._C._len_torch_dispatch_stack()  # somebody counts operators
        if counted or not placing.complete or not self._decoding.knows_layers:
            return None
        first = max(min(kind.plan.left_from, kind.plan.whole_from) for kind in kinds)
        layers, whole = range(first, last), packed.rows_where(lambda x: x.plan.whole_from <= first)
        if not self._run_apart(layers, whole, packed):
            layers = range(last, last)
        from_ = {kind: _leaves_from(kind, last) for kind in kinds}
        if not self._keys.is_able:
            from_ = {kind: layers.start for kind in kinds if from_[kind] <= layers.start < last}
        leaving = {
            begin: rows
            for begin, rows in packed.groups(lambda kind: from_.get(kind, last))
            if last - begin >= _LEAST_LAYERS
        }
        return Late(leaving, layers, whole) if leaving else None

    def _run_apart(self, layers: range, whole: Rows, packed: Packed) -> bool:
        """Whether the rows that run some layers whole, which all others leave out, do so alone."""
        if len(layers) < _LEAST_LAYERS or whole.all:
            return False
        if not self._decoding.may_run_late(whole, packed):
            return False
        last_layer = self._workshop.layout.layers[-1]
        return all(
            kind.plan.whole_from > layers.start
            or not self._workshop.mending.name(last_layer, kind)  # it lacks nothing of earlier ones
            for kind in packed.distinct_kinds
        )

    def leave(
        self,
        begin: int,
        late: Late,
        h_ND: Tensor,
        packed: Packed,
        placing: Placing,
        rotations: Rotations,
    ) -> None:
        """Make all keys and values that rows owe which leave from the layer `begin` on."""
        rows, stop = late.leaving[begin], len(self._workshop.layout.layers) - 1
        together = range(self._keys.begins(range(begin, stop), rows, packed), stop)
        for layer in self._workshop.layout.layers[begin : together.start]:
            rotation = rotations.get(layer.layer_type, rotations.get(None))
            self._attention.place_keys(layer, h_ND, rows, packed, placing, rotation)
        if together:
            self._keys.place(together, h_ND, rows, packed, placing, rotations)
        placing.made_ahead(rows, begin)

    def run(
        self,
        late: Late,
        h_ND: Tensor,
        packed: Packed,
        placing: Placing,
        taken: Taken,
        rotations: Rotations,
    ) -> None:
        """Run the layers that all others have left over the residual, in place."""
        for at in late.layers:
            taken.keys(placing.keys(at))
        layers = slice(late.layers.start, late.layers.stop)
        self._decoding.run_late(h_ND, late.whole, layers, packed, placing, rotations)


def _leaves_from(kind: Kind, last: int) -> int:
    """From which layer on rows of this kind leave all out but the last; that one: they do not."""
    plan = kind.plan
    return plan.left_from if plan.left_from < plan.whole_from else last


def _plan(chunk: Chunk) -> PricedPlan:
    """Of the token in a chunk's middle, which is neither a prompt's first nor one of its last."""
    return chunk.sequence.run_at(chunk.sequence.length + len(chunk.ids) // 2)
