"""The late layers of prompts, which few of a step's rows run: by themselves, in a call or two.

Below capacity 1.0 most tokens of a prompt leave all late layers out but for the keys and values
that others read there; only the first and last tokens run them, whole. What the others leave hangs
on nothing that happens in these layers, so it is made first; then the few go through all of them
at once (decoding.py), where layer by layer each would cost as much as a step of decoding.

The last layer goes its usual way: what of it nobody reads is its own affair.

Shape letters: N packed tokens   D width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from elastiformer.decoding import Decoding
from elastiformer.late_keys import LateKeys
from elastiformer.packed import Packed, Rows
from elastiformer.placing import Placing
from elastiformer.priced import PricedPlan
from elastiformer.rotary import Rotations
from elastiformer.sequence import Chunk
from elastiformer.sparse_attention import SparseAttention
from elastiformer.taken import Taken
from elastiformer.workshop import Workshop

_LEAST_LAYERS = 2  # that make up for starting it
_LONG = 64  # tokens that are worth a pass over all weights


class Late(NamedTuple):
    """Some layers of one step, which some rows run whole and all others leave out."""

    layers: range
    whole: Rows
    left: Rows


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
        from it: apart where both are long."""
        if not self._decoding.knows_layers or self._workshop.kv != "complete":
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
        first = max(min(kind.plan.left_from, kind.plan.whole_from) for kind in kinds)
        if last - first < _LEAST_LAYERS or not placing.complete:
            return None
        whole = packed.rows_where(lambda kind: kind.plan.whole_from <= first)
        left = packed.rows_where(lambda kind: kind.plan.whole_from > first)
        if not left.count or not self._decoding.may_run_late(whole, packed):
            return None
        last_layer = self._workshop.layout.layers[-1]
        for kind in kinds:
            if kind.plan.whole_from <= first and self._workshop.mending.name(last_layer, kind):
                return None  # it lacks something of earlier layers
        return Late(range(first, last), whole, left)

    def run(
        self,
        late: Late,
        h_ND: Tensor,
        packed: Packed,
        placing: Placing,
        taken: Taken,
        rotations: Rotations,
    ) -> None:
        """Run them over the residual, in place."""
        together = range(self._keys.begins(late.layers, late.left, packed), late.layers.stop)
        for layer in self._workshop.layout.layers[late.layers.start : together.start]:
            rotation = rotations.get(layer.layer_type, rotations.get(None))
            self._attention.place_keys(layer, h_ND, late.left, packed, placing, rotation)
        if together:
            self._keys.place(together, h_ND, late.left, packed, placing, rotations)
        for at in late.layers:
            taken.keys(placing.keys(at))
        layers = slice(late.layers.start, late.layers.stop)
        self._decoding.run_late(h_ND, late.whole, layers, packed, placing, rotations)


def _plan(chunk: Chunk) -> PricedPlan:
    """Of the token in a chunk's middle, which is neither a prompt's first nor one of its last."""
    return chunk.sequence.run_at(chunk.sequence.length + len(chunk.ids) // 2)
