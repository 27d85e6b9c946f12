"""The attention sub-layer on packed rows: queries of kept rows, keys and values of cached ones.

Each request attends over its own cache; heads that a row leaves out are neither projected nor
attended nor projected back.

Shape letters: N packed tokens   R rows of a group   S rows of one head   D width
    A heads x head size   E key/value heads x head size   M heads   G key/value heads   H head size
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from elastiformer.attention import attend
from elastiformer.capacity import Site, Unit
from elastiformer.families import Layer
from elastiformer.keeping import Keeping, joined
from elastiformer.packed import Kind, Packed, Rows, Taken
from elastiformer.products import Products, largest, only
from elastiformer.routers import best, part_gate

Rotations = dict[str | None, tuple[Tensor, Tensor]]  # cosines and sines [N, rotated], by layer type


class AttentionGroup(NamedTuple):
    heads: int
    channels_in: int
    channels_out: int
    repair: str | None  # the set of LoRA pairs that these rows use


class SparseAttention:
    """Runs the attention of one model's layers."""

    def __init__(self, products: Products, keeping: Keeping) -> None:
        self.products, self.keeping = products, keeping

    def run(
        self,
        layer: Layer,
        h_ND: Tensor,
        packed: Packed,
        taken: Taken,
        rotations: Rotations,
    ) -> Tensor:
        x_ND = layer.attention_norm(h_ND)
        kept_N, gate_N = self.keeping.of_rows(layer, Unit.ATTENTION_TOKENS, x_ND, packed)
        cached_N = None if self.products.kv == "complete" else kept_N
        shape = layer.shape
        query_NA = x_ND.new_zeros(packed.count, shape.attention_width)
        key_NE = x_ND.new_zeros(packed.count, shape.kv_width)
        value_NE = x_ND.new_zeros(packed.count, shape.kv_width)
        groups = list(packed.groups(lambda kind: self._group(layer, kind)))
        heads_NM: Tensor | None = None
        if any(group.heads < shape.heads for group, _ in groups):
            heads_NM = torch.ones(packed.count, shape.heads, device=packed.device)
        for group, rows in groups:
            self._project(
                layer,
                group,
                x_ND,
                rows.where(cached_N),
                rows.where(kept_N),
                (query_NA, key_NE, value_NE),
                heads_NM,
            )

        query_NMH = query_NA.view(packed.count, shape.heads, shape.head_dim)
        key_NGH = key_NE.view(packed.count, shape.kv_heads, shape.head_dim)
        value_NGH = value_NE.view(packed.count, shape.kv_heads, shape.head_dim)
        if layer.query_norm is not None and layer.key_norm is not None:
            query_NMH, key_NGH = layer.query_norm(query_NMH), layer.key_norm(key_NGH)
        if layer.rotate is not None:
            kind = layer.layer_type if layer.layer_type in rotations else None
            query_NMH, key_NGH = layer.rotate(query_NMH, key_NGH, *rotations[kind])

        out_NA, keys = self._attend(
            layer, query_NMH, key_NGH, value_NGH, packed, cached_N, kept_N, heads_NM
        )
        taken.attention(kept_N, keys)
        for group, rows in groups:
            rows = rows.where(kept_N)
            if rows.count:
                branch_RD = self._out(layer, group, rows, out_NA, heads_NM)
                h_ND = joined(h_ND, branch_RD, rows, gate_N, layer.after_attention)
        return h_ND

    def _group(self, layer: Layer, kind: Kind) -> AttentionGroup:
        counts = kind.plan.counts[layer.index]
        return AttentionGroup(
            counts.heads, counts.attention_in, counts.attention_out, self.products.repair_name(kind)
        )

    def _project(
        self,
        layer: Layer,
        group: AttentionGroup,
        x_ND: Tensor,
        cached: Rows,
        kept: Rows,
        into: tuple[Tensor, Tensor, Tensor],
        heads_NM: Tensor | None,
    ) -> None:
        """Queries of the kept rows, keys and values of the cached ones."""
        if cached.count == 0:
            return
        query_NA, key_NE, value_NE = into
        x_RD = cached.of(x_ND)
        channels = self.products.channels(layer, Site.ATTENTION_IN, x_RD, group.channels_in)
        repair = self.products.repair(layer, group.repair)
        if repair.active:
            seen_RD = x_RD if channels is None else only(x_RD, channels)
            repair.read(layer.key, seen_RD)
            repair.read(layer.value, seen_RD)
        if kept.count == cached.count and group.heads == layer.shape.heads:
            if repair.active:
                repair.read(layer.query, seen_RD)
            outs = self.products.at_site(layer, Site.ATTENTION_IN, x_RD, channels)
            for projection, out_RO, into_NO in zip(
                layer.at_site(Site.ATTENTION_IN), outs, into, strict=True
            ):
                cached.put(into_NO, repair.add(projection, out_RO))
            return
        for projection, into_NE in ((layer.key, key_NE), (layer.value, value_NE)):
            out_RE = self.products.of(projection, x_RD, channels)
            cached.put(into_NE, repair.add(projection, out_RE))

        if kept.count == 0:
            return
        # The kept rows among the cached ones: all of them, unless a skipped token is cached too.
        among: Tensor | None = None
        if kept.count < cached.count:
            here_N = torch.zeros(len(x_ND), dtype=torch.bool, device=x_ND.device)
            here_N[kept.index_R] = True
            (among,) = torch.nonzero(cached.of(here_N), as_tuple=True)
            x_RD = x_RD[among]
            channels = None if channels is None else channels[among]
        if repair.active and layer.query.path != layer.key.path:
            repair.read(layer.query, x_RD if channels is None else only(x_RD, channels))
            among = None
        if group.heads == layer.shape.heads:
            out_RA = self.products.of(layer.query, x_RD, channels)
            kept.put(query_NA, repair.add(layer.query, out_RA, among))
            return
        assert heads_NM is not None
        scores_RM = self.products.router(layer, Unit.HEADS)(x_RD)
        chosen_RM = best(scores_RM, torch.full((len(x_RD),), group.heads, device=x_RD.device))
        kept.put(heads_NM, part_gate(scores_RM, chosen_RM, self.products.part_gate))
        out_RA = x_RD.new_zeros(len(x_RD), layer.shape.attention_width)
        for rows_S, part in self._heads(layer, chosen_RM):
            if len(rows_S):
                picks = None if channels is None else channels[rows_S]
                of_head_SH = self.products.of(layer.query, x_RD[rows_S], picks, part)
                inner = rows_S if among is None else among[rows_S]
                out_RA[rows_S, part] = repair.add(layer.query, of_head_SH, inner, part)
        kept.put(query_NA, out_RA)

    def _attend(
        self,
        layer: Layer,
        query_NMH: Tensor,
        key_NGH: Tensor,
        value_NGH: Tensor,
        packed: Packed,
        cached_N: Tensor | None,
        kept_N: Tensor | None,
        heads_NM: Tensor | None,
    ) -> tuple[Tensor, list[int]]:
        """Attention request by request: each over its own cache, which grows by its rows here."""
        out_NMH = torch.zeros_like(query_NMH)
        keys_of_chunk = []
        rotated_GNH, values_GNH = key_NGH.transpose(0, 1), value_NGH.transpose(0, 1)
        for chunk, rows in zip(packed.chunks, packed.rows_of_chunk, strict=True):
            cache = chunk.sequence.caches[layer.index]
            cached = rows.where(cached_N).index_R
            kept = rows.where(kept_N).index_R
            assert cached is not None and kept is not None
            positions_N = packed.position_N
            cache.append(rotated_GNH[:, cached], values_GNH[:, cached], positions_N[cached])
            keys_of_chunk.append(cache.length)
            if len(kept) == 0:
                continue
            fresh = cache.length == len(kept)
            if heads_NM is None:
                out_NMH[kept] = attend(
                    query_NMH[kept],
                    positions_N[kept],
                    cache,
                    layer.scale,
                    layer.window,
                    layer.softcap,
                    fresh=fresh,
                )
                continue
            group = layer.shape.heads // layer.shape.kv_heads
            for head in range(layer.shape.heads):
                rows_S = kept[heads_NM[kept, head] != 0]
                if len(rows_S):
                    key_head = head // group
                    out_NMH[rows_S, head] = attend(
                        query_NMH[rows_S, head : head + 1],
                        positions_N[rows_S],
                        cache,
                        layer.scale,
                        layer.window,
                        layer.softcap,
                        slice(key_head, key_head + 1),
                        fresh and len(rows_S) == len(kept),
                    )[:, 0]
        return out_NMH.reshape(packed.count, -1), keys_of_chunk

    def _out(
        self,
        layer: Layer,
        group: AttentionGroup,
        rows: Rows,
        out_NA: Tensor,
        heads_NM: Tensor | None,
    ) -> Tensor:
        """The output projection of the heads that each row kept."""
        x_RA = rows.of(out_NA)
        partial = group.heads < layer.shape.heads
        if partial:
            assert heads_NM is not None
            gate_RM = rows.of(heads_NM)
            gate_RA = gate_RM.repeat_interleave(layer.shape.head_dim, 1)
            x_RA = x_RA * gate_RA.to(x_RA.dtype)
        channels = None
        if group.channels_out < group.heads * layer.shape.head_dim:
            norms_A = self.products.layout.column_norms(layer, Site.ATTENTION_OUT)
            channels = largest(x_RA, norms_A, group.channels_out)
        repair = self.products.repair(layer, group.repair)
        if repair.active:
            repair.read(layer.out, x_RA if channels is None else only(x_RA, channels))
        if channels is not None or not partial:
            out_RD = self.products.of(layer.out, x_RA, channels)
        else:
            out_RD = x_RA.new_zeros(len(x_RA), layer.shape.width)
            for rows_S, part in self._heads(layer, gate_RM != 0):
                if len(rows_S):
                    weight_DH = layer.out.weight_OI[:, part]
                    out_RD.index_add_(0, rows_S, F.linear(x_RA[rows_S, part], weight_DH))
            if layer.out.bias_O is not None:
                out_RD = out_RD + layer.out.bias_O
        return repair.add(layer.out, out_RD)

    def _heads(self, layer: Layer, chosen_RM: Tensor) -> list[tuple[Tensor, slice]]:
        """For each head, the rows that keep it, and its place among the channels."""
        size = layer.shape.head_dim
        return [
            (torch.nonzero(chosen_R, as_tuple=True)[0], slice(head * size, (head + 1) * size))
            for head, chosen_R in enumerate(chosen_RM.T)
        ]
