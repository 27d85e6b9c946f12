"""Attention for rows that leave heads out: those heads are neither projected, nor attended, nor
projected back.

Each head has rows of its own, so this goes head by head. Keys and values are already in place.

Shape letters: N packed tokens   R rows of a group   S rows of one head   D width
    A heads x head size   M heads   H head size   K picked channels
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from elastiformer.attention import Read
from elastiformer.capacity import Site, Unit
from elastiformer.families import Layer
from elastiformer.keeping import Kept
from elastiformer.packed import Packed, Rows
from elastiformer.placing import Placing
from elastiformer.pointwise import Rotation
from elastiformer.products import picked
from elastiformer.readings import Reading, pick
from elastiformer.repair import Repair
from elastiformer.routers import best, part_gate
from elastiformer.sequence import Kind
from elastiformer.workshop import Workshop


class HeadGroup(NamedTuple):
    heads: int
    channels_in: int
    channels_out: int
    repair: str | None


class SparseHeads:
    """Runs one model's attention for rows that keep some of its heads."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop

    def run(
        self,
        layer: Layer,
        x_ND: Tensor,
        rows: Rows,
        kept: Kept,
        h_ND: Tensor,
        packed: Packed,
        placing: Placing,
        rotation: Rotation | None,
    ) -> None:
        """Add the branch of these rows to their residual, in place."""
        for group, of_group in packed.groups(lambda kind: self._group(layer, kind)):
            some = of_group.within(rows)
            if some.count:
                x_RD = some.of(x_ND).to(self.workshop.dtype)
                branch_RD = self._branch(layer, group, x_RD, some, packed, placing, rotation)
                kept.join(h_ND, branch_RD, some, layer.after_attention)

    def _group(self, layer: Layer, kind: Kind) -> HeadGroup:
        counts = kind.plan.counts[layer.index]
        repair = self.workshop.mending.name(layer, kind)
        return HeadGroup(counts.heads, counts.attention_in, counts.attention_out, repair)

    def _branch(
        self,
        layer: Layer,
        group: HeadGroup,
        x_RD: Tensor,
        rows: Rows,
        packed: Packed,
        placing: Placing,
        rotation: Rotation | None,
    ) -> Tensor:
        tools = self.workshop
        reading = tools.picked(layer, Site.ATTENTION_IN, x_RD, packed, rows)
        repair = tools.mending.repair(layer, group.repair)
        repair.read(layer.query, reading.only_RI)
        scores_RM = tools.router(layer, Unit.HEADS)(x_RD)
        keep_R = torch.full((rows.count,), group.heads, device=x_RD.device)
        chosen_RM = best(scores_RM, keep_R)
        gate_RM = part_gate(scores_RM, chosen_RM, tools.part_gate)
        query_RMH = self._queries(layer, reading, chosen_RM, repair)
        if layer.query_norm is not None:
            query_RMH = tools.query_norms[layer.index](query_RMH)
        if rotation is not None:
            rows.turn(rotation).turn(query_RMH)
        out_RMH = self._attend(layer, query_RMH, chosen_RM, rows, packed, placing)
        out_RMH = out_RMH * gate_RM[..., None].to(out_RMH.dtype)
        return self._out(layer, group, out_RMH.flatten(1), chosen_RM, repair)

    def _queries(self, layer: Layer, reading: Reading, chosen_RM: Tensor, repair: Repair) -> Tensor:
        x_RD = reading.x_RI
        index_RK = None if reading.count is None else reading.index_RK()
        out_RA = x_RD.new_zeros(len(x_RD), layer.shape.attention_width)
        bias_A = layer.query.bias_O
        for rows_S, part in _heads(layer, chosen_RM):
            weight_HD = layer.query.weight_OI[part]
            bias_H = None if bias_A is None else bias_A[part]
            if index_RK is None:
                query_SH = F.linear(x_RD[rows_S], weight_HD, bias_H)
            else:
                weight_DH = weight_HD.T.contiguous()
                query_SH = picked(weight_DH, bias_H, x_RD[rows_S], index_RK[rows_S])
            out_RA[rows_S, part] = repair.add(layer.query, query_SH, rows_S, part)
        return out_RA.view(len(x_RD), layer.shape.heads, layer.shape.head_dim)

    def _attend(
        self,
        layer: Layer,
        query_RMH: Tensor,
        chosen_RM: Tensor,
        rows: Rows,
        packed: Packed,
        placing: Placing,
    ) -> Tensor:
        out_RMH = torch.zeros_like(query_RMH)
        position_R = rows.of(packed.position_N)
        group = layer.shape.heads // layer.shape.kv_heads
        for read in placing.reads(layer.index, rows).each:
            for head in range(layer.shape.heads):
                rows_S = read.queries.start + torch.nonzero(chosen_RM[read.queries, head])[:, 0]
                if len(rows_S):
                    # Which keys follow a row is read off the positions, unless it is the only one.
                    alone = replace(
                        read,
                        queries=slice(0, len(rows_S)),
                        sees_all=read.sees_all,
                        held=read.held.head(head // group),
                    )
                    query_S1H = query_RMH[rows_S, head : head + 1]
                    out_RMH[rows_S, head] = self._one_head(
                        layer, query_S1H, position_R[rows_S], alone
                    )
        return out_RMH

    def _one_head(self, layer: Layer, query_S1H: Tensor, position_S: Tensor, read: Read) -> Tensor:
        return self.workshop.portable.one(query_S1H, position_S, read, layer)[:, 0]

    def _out(
        self, layer: Layer, group: HeadGroup, x_RA: Tensor, chosen_RM: Tensor, repair: Repair
    ) -> Tensor:
        """The output projection of the heads that each row kept."""
        tools = self.workshop
        if group.channels_out < group.heads * layer.shape.head_dim:
            norms_A = tools.layout.column_norms(layer, Site.ATTENTION_OUT)
            reading = pick(x_RA, norms_A, group.channels_out)
            repair.read(layer.out, reading.only_RI)
            return repair.add(layer.out, tools.product(layer.out).run(reading))
        repair.read(layer.out, x_RA)
        out_RD = x_RA.new_zeros(len(x_RA), layer.shape.width)
        for rows_S, part in _heads(layer, chosen_RM):
            weight_DH = layer.out.weight_OI[:, part]
            out_RD.index_add_(0, rows_S, F.linear(x_RA[rows_S, part], weight_DH))
        if layer.out.bias_O is not None:
            out_RD = out_RD + layer.out.bias_O
        return repair.add(layer.out, out_RD)


def _heads(layer: Layer, chosen_RM: Tensor) -> list[tuple[Tensor, slice]]:
    """For each head that some row keeps, those rows, and its place among the channels."""
    size = layer.shape.head_dim
    found = []
    for head, chosen_R in enumerate(chosen_RM.T):
        rows_S = torch.nonzero(chosen_R)[:, 0]
        if len(rows_S):
            found.append((rows_S, slice(head * size, (head + 1) * size)))
    return found
