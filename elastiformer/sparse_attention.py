"""The attention sub-layer on packed rows: queries of kept rows, keys and values of cached ones.

Each request attends over its own cache, which first grows by its rows here. Rows that leave heads
out are the business of sparse_heads.py.

Shape letters: N packed tokens   R rows   Q queries   D width   A heads   G key/value heads
    H head size   E key/value heads x head size   O outputs
"""

from __future__ import annotations

from functools import partial

import numpy as np
from torch import Tensor

from elastiformer.capacity import Site, Unit
from elastiformer.direct_reading import DirectReading
from elastiformer.families import Layer, Projection
from elastiformer.keeping import Keeping, Kept
from elastiformer.packed import Packed, Rows
from elastiformer.placing import Placing
from elastiformer.pointwise import Rotation, in_type, makes_anew
from elastiformer.readings import Values
from elastiformer.sparse_heads import SparseHeads
from elastiformer.taken import Taken
from elastiformer.workshop import Workshop


class SparseAttention:
    """Runs the attention of one model's layers."""

    def __init__(self, workshop: Workshop, keeping: Keeping) -> None:
        self.workshop, self.keeping = workshop, keeping
        self._heads = SparseHeads(workshop)
        self.direct = DirectReading(workshop)
        self._last = len(workshop.layout.layers) - 1

    def run(
        self,
        layer: Layer,
        h_ND: Tensor,
        packed: Packed,
        placing: Placing,
        taken: Taken,
        rotation: Rotation | None,
    ) -> None:
        """Add the attention's branch to the residual of the rows that keep it, in place."""
        norm = self.workshop.attention_norms[layer.index]
        routed = self.keeping.routes(layer, Unit.ATTENTION_TOKENS, packed)
        x_ND = norm(h_ND) if routed or packed.leaves_heads_out else None
        kept = self.keeping.of_rows(layer, Unit.ATTENTION_TOKENS, x_ND, packed, taken)
        cached = placing.due(layer.index) if self.workshop.kv == "complete" else kept.rows
        # What a prompt token leaves the last layer with, nobody reads.
        asking = kept.rows.within(packed.outputs) if layer.index == self._last else kept.rows
        direct = packed.direct(layer.index)
        reading = packed.nothing
        if direct.count:
            keyed = packed.keyed(layer.index)
            cached, reading = cached.within(keyed), asking.within(direct)
            asking = asking.within(keyed)
        by_head = packed.nothing
        if packed.leaves_heads_out:
            by_head = packed.rows_where(
                lambda kind: kind.plan.counts[layer.index].heads < layer.shape.heads
            ).within(asking)
        whole = asking if not by_head.count else asking.without(by_head)
        # The routers of heads, and they alone, read this after us.
        own = not packed.leaves_heads_out and makes_anew(norm)
        values = Values(h_ND, h_ND.dtype, partial(in_type, norm), own)
        if x_ND is not None:
            values = Values(x_ND, x_ND.dtype, own=own)
        query_QAH = self._project(layer, values, packed, placing, (cached, whole), rotation)
        keys_C = placing.keys(layer.index)
        if direct.count:
            keys_C = keys_C + np.diff(packed.bounds(direct))
        taken.keys(keys_C)
        if query_QAH is not None:
            self._attend(layer, query_QAH, whole, kept, h_ND, packed, placing)
        if reading.count:
            self.direct.run(layer, reading, kept, h_ND, packed)
        if by_head.count:
            assert x_ND is not None, "routers decide here"
            self._heads.run(layer, x_ND, by_head, kept, h_ND, packed, placing, rotation)

    def place_keys(
        self,
        layer: Layer,
        h_ND: Tensor,
        rows: Rows,
        packed: Packed,
        placing: Placing,
        rotation: Rotation | None,
    ) -> None:
        """Leave keys and values of rows that ask nothing."""
        norm = self.workshop.attention_norms[layer.index]
        values = Values(h_ND, h_ND.dtype, partial(in_type, norm), makes_anew(norm))
        self._project(layer, values, packed, placing, (rows, packed.nothing), rotation)

    def _project(
        self,
        layer: Layer,
        values: Values,
        packed: Packed,
        placing: Placing,
        rows: tuple[Rows, Rows],
        rotation: Rotation | None,
    ) -> Tensor | None:
        """Place keys and values of the cached rows; the queries [Q, A, H] of the asking ones."""
        cached, asking = rows
        shape, tools = layer.shape, self.workshop
        if not cached.count:
            placing.place(layer.index, cached, None)
            return None
        parts: tuple[Projection, ...] = (layer.key, layer.value)
        together = asking.count == cached.count
        if together and not tools.mending.folds_keys(layer, tools.product(*parts), packed):
            parts = (layer.query, *parts)
        else:
            together = False
        of_cached = values.among(cached)
        reading = tools.read(layer, Site.ATTENTION_IN, of_cached, packed, cached, *parts)
        out_RO = tools.mending.run(layer, tools.product(*parts), reading, packed, cached)
        if layer.key_norm is not None or packed.has_lone_rows:
            out_RO = out_RO.to(values.dtype)  # lone rows are not rounded when they run alone
        own = shape.attention_width if together else 0
        heads_RMH = out_RO.view(cached.count, -1, shape.head_dim)
        key_place = own // shape.head_dim
        query_RAH = heads_RMH[:, :key_place]
        key_RGH = heads_RMH[:, key_place : key_place + shape.kv_heads]
        turn = None if rotation is None else cached.turn(rotation)
        if layer.key_norm is not None and layer.query_norm is not None:
            key_RGH.copy_(tools.key_norms[layer.index](key_RGH))
            if together:
                query_RAH.copy_(tools.query_norms[layer.index](query_RAH))
        if turn is not None:
            turn.turn(heads_RMH, key_place + shape.kv_heads)
        placing.place(layer.index, cached, heads_RMH[:, key_place:])
        if together:
            return query_RAH
        if not asking.count:
            return None
        of_asking = values.among(asking)
        reading = tools.read(layer, Site.ATTENTION_IN, of_asking, packed, asking, layer.query)
        out_QO = tools.mending.run(layer, tools.product(layer.query), reading, packed, asking)
        out_QO = out_QO.to(out_RO.dtype)
        query_QAH = out_QO.view(asking.count, shape.heads, shape.head_dim)
        if layer.query_norm is not None:
            query_QAH = tools.query_norms[layer.index](query_QAH)
        if rotation is not None:
            asking.turn(rotation).turn(query_QAH)
        return query_QAH

    def _attend(
        self,
        layer: Layer,
        query_QAH: Tensor,
        rows: Rows,
        kept: Kept,
        h_ND: Tensor,
        packed: Packed,
        placing: Placing,
    ) -> None:
        tools = self.workshop
        reads = placing.reads(layer.index, rows)
        out_QAH = tools.backend.attend(query_QAH, rows.of(packed.position_N), reads, layer)
        out_QO = out_QAH.reshape(rows.count, -1)
        values = Values(out_QO, h_ND.dtype)
        reading = tools.read(layer, Site.ATTENTION_OUT, values, packed, rows)
        product = tools.at_site(layer, Site.ATTENTION_OUT)
        branch_QD = tools.mending.run(layer, product, reading, packed, rows)
        kept.join(h_ND, branch_QD, rows, layer.after_attention)
