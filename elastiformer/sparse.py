"""The sparse form: packed rows, each under its own plan, and what is left out is not computed.

One forward for all families, over the base's own modules and weights. A sub-layer gathers the
rows that stay, computes them group by group, and adds the branch to the residual of those rows
alone. Rows at capacity 1.0 meet no router and no repair.

It knows nothing of the masked form (masked.py), which takes the same decisions in training.

Shape letters: N packed tokens   R rows of a group   D width   A heads x head size
    G key/value heads   H head size   M heads or experts   I inputs   O outputs
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from elastiformer.adapter import Adapter
from elastiformer.attention import attend
from elastiformer.capacity import Phase, Site, Unit
from elastiformer.families import Layer, Layout, Projection
from elastiformer.packed import Kind, Packed, Rows, Taken
from elastiformer.plan_table import PlanTable
from elastiformer.products import ExpertTable, Transposes, largest, only, picked, whole
from elastiformer.routers import best, by_threshold, part_gate, token_gate
from elastiformer.sequence import Chunk


class AttentionGroup(NamedTuple):
    heads: int
    channels_in: int
    channels_out: int
    repair: str | None  # the set of LoRA pairs that these rows use


class MlpGroup(NamedTuple):
    experts: int  # 0: not divided
    channels_in: int
    channels_out: int
    neurons: int
    repair: str | None


class Repair:
    """The low-rank pairs of one group of rows in one layer; nothing at all without a set."""

    def __init__(self, adapter: Adapter | None, layer: Layer, name: str | None) -> None:
        self._pairs = None
        if adapter is not None and adapter.lora is not None and name is not None:
            self._pairs = adapter.lora.set_of(layer.index, name)
        self._inner: dict[str, Tensor] = {}

    @property
    def active(self) -> bool:
        return self._pairs is not None

    def read(self, projection: Projection, x_RI: Tensor) -> None:
        """Take the input of a projection's module; parts fused in one module share it."""
        if self._pairs is not None and projection.path not in self._inner:
            pair = self._pairs.get(projection.path)
            if pair is not None:
                self._inner[projection.path] = F.linear(x_RI, pair.a_RI.to(x_RI.dtype))

    def add(
        self,
        projection: Projection,
        out_RO: Tensor,
        rows: Tensor | None = None,
        outputs: slice | Tensor = slice(None),
    ) -> Tensor:
        """`out`, repaired; `rows` and `outputs` say which part of what was read it is."""
        inner_RK = self._inner.get(projection.path)
        if self._pairs is None or inner_RK is None:
            return out_RO
        pair = self._pairs[projection.path]
        if rows is not None:
            inner_RK = inner_RK[rows]
        b_OK = pair.b_OR[projection.start : projection.stop][outputs].to(inner_RK.dtype)
        return out_RO + pair.scale * F.linear(inner_RK, b_OK)


class SparseForm:
    """Runs steps of packed rows for one model. One thread owns it."""

    def __init__(self, layout: Layout, adapter: Adapter | None, table: PlanTable) -> None:
        self.layout, self.adapter, self.table = layout, adapter, table
        self._transposes = Transposes()
        self._experts: dict[int, ExpertTable] = {}

    @torch.inference_mode()
    def step(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Run the chunks; float32 logits [output rows, vocabulary] of each."""
        packed = Packed(chunks, self.layout.head.weight.device)  # type: ignore[arg-type]
        taken = Taken(packed, self.table)
        h_ND = self._embed(packed)
        rotations = self._rotations(packed, h_ND)
        for layer in self.layout.layers:
            h_ND = self._attention(layer, h_ND, packed, taken, rotations)
            h_ND = self._mlp(layer, h_ND, packed, taken)
        outputs = packed.output_rows()
        logits = self._logits(h_ND, outputs)
        taken.settle(outputs, self.adapter.units if self.adapter is not None else ())
        for chunk in chunks:
            chunk.sequence.length += len(chunk.ids)
        return logits

    def _embed(self, packed: Packed) -> Tensor:
        h_ND: Tensor = self.layout.embedding(packed.ids_N)
        if self.layout.positions is not None:
            h_ND = h_ND + self.layout.positions(packed.position_N)
        return h_ND

    def _rotations(self, packed: Packed, h_ND: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        """Cosines and sines [N, rotated], by the type of layer that has frequencies of its own."""
        rotary = self.layout.rotary
        if rotary is None:
            return {}
        # Where frequencies depend on a sequence's length, batch-mates must not change them.
        spans = packed.spans if self.layout.rotary_by_length else [slice(None)]
        kinds = {layer.layer_type if self.layout.rotary_by_layer_type else None: None for layer in
                 self.layout.layers}
        rotations = {}
        for kind in kinds:
            extra = () if kind is None else (kind,)
            parts = [rotary(h_ND, packed.position_N[span][None], *extra) for span in spans]
            cos_N, sin_N = (torch.cat([part[at][0] for part in parts]) for at in (0, 1))
            rotations[kind] = (cos_N, sin_N)
        return rotations

    def _logits(self, h_ND: Tensor, outputs: list[list[int]]) -> list[Tensor]:
        wanted = [row for rows in outputs for row in rows]
        if len(wanted) < len(h_ND):
            h_ND = h_ND[wanted]
        logits_RV = self.layout.head(self.layout.final_norm(h_ND))
        if self.layout.logit_softcap is not None:
            logits_RV = logits_RV / self.layout.logit_softcap
            logits_RV = torch.tanh(logits_RV) * self.layout.logit_softcap
        return list(logits_RV.float().split([len(rows) for rows in outputs]))

    # Attention.

    def _attention(
        self,
        layer: Layer,
        h_ND: Tensor,
        packed: Packed,
        taken: Taken,
        rotations: dict[str | None, tuple[Tensor, Tensor]],
    ) -> Tensor:
        x_ND = layer.attention_norm(h_ND)
        kept_N, gate_N = self._keep_tokens(layer, Unit.ATTENTION_TOKENS, x_ND, packed)
        cached_N = None if self.table.shape.kv == "complete" else kept_N
        shape = layer.shape
        query_NA = x_ND.new_zeros(packed.count, shape.attention_width)
        key_NE = x_ND.new_zeros(packed.count, shape.kv_width)
        value_NE = x_ND.new_zeros(packed.count, shape.kv_width)
        groups = list(packed.groups(lambda kind: self._attention_group(layer, kind)))
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
            kind = layer.layer_type if self.layout.rotary_by_layer_type else None
            query_NMH, key_NGH = layer.rotate(query_NMH, key_NGH, *rotations[kind])

        out_NA, keys = self._attend(
            layer, query_NMH, key_NGH, value_NGH, packed, cached_N, kept_N, heads_NM
        )
        taken.attention(kept_N, keys)
        for group, rows in groups:
            rows = rows.where(kept_N)
            if rows.count:
                branch_RD = self._out(layer, group, rows, out_NA, heads_NM)
                if layer.attention_end is not layer.attention:
                    branch_RD = layer.attention_end(branch_RD)
                if gate_N is not None:
                    branch_RD = branch_RD * rows.of(gate_N)[:, None].to(branch_RD.dtype)
                h_ND = rows.add(h_ND, branch_RD)
        return h_ND

    def _attention_group(self, layer: Layer, kind: Kind) -> AttentionGroup:
        counts = self.table.counts(kind.plan, layer.index)
        return AttentionGroup(
            counts.heads, counts.attention_in, counts.attention_out, self._repair_of(kind)
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
        channels = self._channels(layer, Site.ATTENTION_IN, x_RD, group.channels_in)
        repair = Repair(self.adapter, layer, group.repair)
        if repair.active:
            seen_RD = x_RD if channels is None else only(x_RD, channels)
            repair.read(layer.key, seen_RD)
            repair.read(layer.value, seen_RD)
        for projection, into_NE in ((layer.key, key_NE), (layer.value, value_NE)):
            out_RE = self._product(projection, x_RD, channels)
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
            out_RA = self._product(layer.query, x_RD, channels)
            kept.put(query_NA, repair.add(layer.query, out_RA, among))
            return
        assert heads_NM is not None and self.adapter is not None
        router = self.adapter.router(layer.index, Unit.HEADS)
        assert router is not None, "a plan that routes heads without their routers"
        scores_RM = router(x_RD)
        chosen_RM = best(scores_RM, torch.full((len(x_RD),), group.heads, device=x_RD.device))
        kept.put(heads_NM, part_gate(scores_RM, chosen_RM, self.adapter.spec.part_gate))
        out_RA = x_RD.new_zeros(len(x_RD), layer.shape.attention_width)
        for rows_S, part in self._heads(layer, chosen_RM):
            if len(rows_S):
                picks = None if channels is None else channels[rows_S]
                of_head_SH = self._product(layer.query, x_RD[rows_S], picks, part)
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
        for chunk, span in zip(packed.chunks, packed.spans, strict=True):
            cache = chunk.sequence.caches[layer.index]
            rows = Rows(torch.arange(span.start, span.stop, device=packed.device), len(chunk.ids))
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
            norms_A = self.layout.column_norms(layer, Site.ATTENTION_OUT)
            channels = largest(x_RA, norms_A, group.channels_out)
        repair = Repair(self.adapter, layer, group.repair)
        if repair.active:
            repair.read(layer.out, x_RA if channels is None else only(x_RA, channels))
        if channels is not None or not partial:
            out_RD = self._product(layer.out, x_RA, channels)
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

    # MLP.

    def _mlp(self, layer: Layer, h_ND: Tensor, packed: Packed, taken: Taken) -> Tensor:
        groups = list(packed.groups(lambda kind: self._mlp_group(layer, kind)))
        x_ND = layer.mlp_norm(h_ND)
        kept_N, gate_N = self._keep_tokens(layer, Unit.MLP_TOKENS, x_ND, packed)
        taken.mlp(kept_N)
        for group, rows in groups:
            rows = rows.where(kept_N)
            if rows.count:
                x_RD = rows.of(x_ND)
                branch_RD = (
                    self._experts_of_rows(layer, group, x_RD)
                    if group.experts
                    else self._undivided(layer, group, x_RD)
                )
                if layer.mlp_end is not layer.mlp:
                    branch_RD = layer.mlp_end(branch_RD)
                if gate_N is not None:
                    branch_RD = branch_RD * rows.of(gate_N)[:, None].to(branch_RD.dtype)
                h_ND = rows.add(h_ND, branch_RD)
        return h_ND

    def _mlp_group(self, layer: Layer, kind: Kind) -> MlpGroup:
        counts = self.table.counts(kind.plan, layer.index)
        # All experts kept is the undivided MLP, in the base's own order of neurons.
        experts = counts.experts if counts.neurons < layer.shape.mlp_width else 0
        return MlpGroup(
            experts, counts.mlp_in, counts.mlp_out, counts.neurons, self._repair_of(kind)
        )

    def _undivided(self, layer: Layer, group: MlpGroup, x_RD: Tensor) -> Tensor:
        channels = self._channels(layer, Site.MLP_IN, x_RD, group.channels_in)
        repair = Repair(self.adapter, layer, group.repair)
        if repair.active:
            seen_RD = x_RD if channels is None else only(x_RD, channels)
            for projection in layer.at_site(Site.MLP_IN):
                repair.read(projection, seen_RD)
        a_RI = repair.add(layer.up, self._product(layer.up, x_RD, channels))
        if layer.gate is None:
            a_RI = layer.activation(a_RI)
        else:
            gate_RI = repair.add(layer.gate, self._product(layer.gate, x_RD, channels))
            a_RI = layer.activation(gate_RI) * a_RI
        channels = self._channels(layer, Site.MLP_OUT, a_RI, group.channels_out)
        if repair.active:
            repair.read(layer.down, a_RI if channels is None else only(a_RI, channels))
        return repair.add(layer.down, self._product(layer.down, a_RI, channels))

    def _experts_of_rows(self, layer: Layer, group: MlpGroup, x_RD: Tensor) -> Tensor:
        """Only the experts that each row keeps; its neurons are then in the experts' order."""
        assert self.adapter is not None
        if layer.index not in self._experts:
            self._experts[layer.index] = ExpertTable.of(layer, self.adapter)
        experts = self._experts[layer.index]
        router = self.adapter.router(layer.index, Unit.EXPERTS)
        assert router is not None, "a plan that routes experts without their routers"
        scores_RM = router(x_RD)
        chosen_RM = best(scores_RM, torch.full((len(x_RD),), group.experts, device=x_RD.device))
        gate_RM = part_gate(scores_RM, chosen_RM, self.adapter.spec.part_gate).to(x_RD.dtype)
        channels = self._channels(layer, Site.MLP_IN, x_RD, group.channels_in)
        repair = Repair(self.adapter, layer, group.repair)
        if repair.active:
            seen_RD = x_RD if channels is None else only(x_RD, channels)
            for projection in layer.at_site(Site.MLP_IN):
                repair.read(projection, seen_RD)
        picking = group.channels_out < group.neurons
        a_RI = x_RD.new_zeros(len(x_RD), layer.shape.mlp_width)
        out_RD = x_RD.new_zeros(len(x_RD), layer.shape.width)
        size = layer.shape.mlp_width // len(experts.up_MSI)
        for expert, chosen_R in enumerate(chosen_RM.T):
            (rows_T,) = torch.nonzero(chosen_R, as_tuple=True)
            if len(rows_T) == 0:
                continue
            x_TD = x_RD[rows_T]
            picks = None if channels is None else channels[rows_T]
            part = slice(expert * size, (expert + 1) * size)
            neurons_S = experts.order_I[part]

            def front(
                projection: Projection,
                weight_SD: Tensor,
                bias_S: Tensor | None,
                x_TD: Tensor = x_TD,
                picks: Tensor | None = picks,
                rows_T: Tensor = rows_T,
                neurons_S: Tensor = neurons_S,
            ) -> Tensor:
                out_TS = (
                    F.linear(x_TD, weight_SD, bias_S)
                    if picks is None
                    else picked(weight_SD.T.contiguous(), bias_S, x_TD, picks)
                )
                return repair.add(projection, out_TS, rows_T, neurons_S)

            up_bias, gate_bias = experts.up_bias_MS, experts.gate_bias_MS
            a_TS = front(
                layer.up, experts.up_MSI[expert], None if up_bias is None else up_bias[expert]
            )
            if layer.gate is None or experts.gate_MSI is None:
                a_TS = layer.activation(a_TS)
            else:
                bias_S = None if gate_bias is None else gate_bias[expert]
                a_TS = layer.activation(front(layer.gate, experts.gate_MSI[expert], bias_S)) * a_TS
            a_TS = a_TS * gate_RM[rows_T, expert, None]
            if picking or repair.active:
                a_RI[rows_T, part] = a_TS
            if not picking:
                out_RD.index_add_(0, rows_T, F.linear(a_TS, experts.down_MOS[expert]))
        bias_D = layer.down.bias_O
        if picking:
            norms_I = self.layout.column_norms(layer, Site.MLP_OUT)[experts.order_I]
            index_RK = largest(a_RI, norms_I, group.channels_out)
            out_RD = picked(experts.down_IO, None, a_RI, index_RK)
            a_RI = only(a_RI, index_RK) if repair.active else a_RI
        if bias_D is not None:
            out_RD = out_RD + bias_D
        if repair.active:
            base_order_RI = torch.zeros_like(a_RI)
            base_order_RI[:, experts.order_I] = a_RI
            repair.read(layer.down, base_order_RI)
        return repair.add(layer.down, out_RD)

    # What both share.

    def _repair_of(self, kind: Kind) -> str | None:
        if kind.is_dense or self.adapter is None or self.adapter.lora is None:
            return None
        return self.adapter.lora.set_name(kind.phase)

    def _channels(self, layer: Layer, site: Site, x_RI: Tensor, count: int) -> Tensor | None:
        """The channels to read, [R, count]; None for all of them."""
        if count >= x_RI.shape[1]:
            return None
        return largest(x_RI, self.layout.column_norms(layer, site), count)

    def _product(
        self,
        projection: Projection,
        x_RI: Tensor,
        channels: Tensor | None,
        outputs: slice = slice(None),
    ) -> Tensor:
        bias_O = projection.bias_O
        if bias_O is not None:
            bias_O = bias_O[outputs]
        if channels is None:
            if outputs == slice(None):
                return whole(projection, x_RI)
            return F.linear(x_RI, projection.weight_OI[outputs], bias_O)
        return picked(self._transposes.of(projection, outputs), bias_O, x_RI, channels)

    def _keep_tokens(
        self, layer: Layer, unit: Unit, x_ND: Tensor, packed: Packed
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which rows keep this sub-layer, and the gate of their branch; None where all do."""
        shares = {
            kind: getattr(self.table.layer(kind.plan, layer.index), unit.value)
            for kind in packed.distinct_kinds
        }
        if all(share == 1 for share in shares.values()):
            return None, None
        kept = [shares[kind] > 0 for kind in packed.kinds]
        routed = [
            row
            for row, kind in enumerate(packed.kinds)
            if 0 < shares[kind] < 1 and packed.positions[row] > 0
        ]
        for row in packed.firsts:
            kept[row] = True
        gate_N = None
        if routed:
            router = self.adapter.router(layer.index, unit) if self.adapter is not None else None
            scores_R = None if router is None else router(x_ND[routed]).squeeze(-1)
            self._route(layer, unit, scores_R, routed, shares, packed, kept)
            if scores_R is not None and self.adapter is not None:
                form = self.adapter.spec.token_gate
                if form != "hard":
                    kept_R = torch.tensor([kept[row] for row in routed], device=x_ND.device)
                    gate_N = torch.ones(packed.count, device=x_ND.device)
                    gate_N[routed] = token_gate(scores_R, kept_R, form)
        return torch.tensor(kept, device=x_ND.device), gate_N

    def _route(
        self,
        layer: Layer,
        unit: Unit,
        scores_R: Tensor | None,
        routed: list[int],
        shares: dict[Kind, float],
        packed: Packed,
        kept: list[bool],
    ) -> None:
        """Decide the routed rows, request by request and phase by phase, in order."""
        scores = None if scores_R is None else scores_R.tolist()
        for chunk, span in zip(packed.chunks, packed.spans, strict=True):
            for phase in Phase:
                places = [
                    place
                    for place, row in enumerate(routed)
                    if span.start <= row < span.stop and packed.kinds[row].phase is phase
                ]
                asked = [shares[packed.kinds[routed[place]]] for place in places]
                thresholds = [
                    0.0
                    if self.adapter is None
                    else self.adapter.threshold(unit, layer.index, phase, share)
                    for share in asked
                ]
                decided = by_threshold(
                    None if scores is None else [scores[place] for place in places],
                    asked,
                    thresholds,
                    chunk.sequence.debt(layer.index, unit, phase),
                )
                for place, keep in zip(places, decided, strict=True):
                    kept[routed[place]] = keep
