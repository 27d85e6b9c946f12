"""The MLP for rows that leave experts out: only the experts that each row keeps.

Each expert has rows of its own, so this goes expert by expert.

Shape letters: R rows of a group   T rows of one expert   D width   I neurons
    S neurons of one expert   M experts   K picked channels
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from elastiformer.capacity import Site, Unit
from elastiformer.expert_table import ExpertTable
from elastiformer.families import Layer
from elastiformer.packed import Packed, Rows
from elastiformer.products import picked
from elastiformer.readings import pick
from elastiformer.repair import Repair
from elastiformer.routers import best, part_gate
from elastiformer.sequence import Kind
from elastiformer.workshop import Workshop


class ExpertGroup(NamedTuple):
    experts: int
    neurons: int
    channels_in: int
    channels_out: int
    repair: str | None


class SparseExperts:
    """Runs one model's MLPs for rows that keep some of their experts."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop

    def branch(self, layer: Layer, x_RD: Tensor, packed: Packed, rows: Rows) -> Tensor:
        """The branch of these rows."""
        x_RD = x_RD.to(self.workshop.dtype)
        out_RD = torch.empty_like(x_RD)
        for group, of_group in packed.groups(lambda kind: self._group(layer, kind)):
            some = of_group.within(rows)
            if some.count:
                among = some.among(rows)
                among.put(out_RD, self._of_group(layer, group, among.of(x_RD), packed, some))
        return out_RD

    def _group(self, layer: Layer, kind: Kind) -> ExpertGroup:
        counts = kind.plan.counts[layer.index]
        return ExpertGroup(
            counts.experts,
            counts.neurons,
            counts.mlp_in,
            counts.mlp_out,
            self.workshop.mending.name(layer, kind),
        )

    def _of_group(
        self, layer: Layer, group: ExpertGroup, x_RD: Tensor, packed: Packed, rows: Rows
    ) -> Tensor:
        tools, experts = self.workshop, self.workshop.experts(layer)
        scores_RM = tools.router(layer, Unit.EXPERTS)(x_RD)
        keep_R = torch.full((len(x_RD),), group.experts, device=x_RD.device)
        chosen_RM = best(scores_RM, keep_R)
        gate_RM = part_gate(scores_RM, chosen_RM, tools.part_gate).to(x_RD.dtype)
        reading = tools.picked(layer, Site.MLP_IN, x_RD, packed, rows)
        repair = tools.mending.repair(layer, group.repair)
        for projection in layer.at_site(Site.MLP_IN):
            repair.read(projection, reading.only_RI)
        index_RK = None if reading.count is None else reading.index_RK()

        picking = group.channels_out < group.neurons
        a_RI = x_RD.new_zeros(len(x_RD), layer.shape.mlp_width)  # in the experts' order
        out_RD = x_RD.new_zeros(len(x_RD), layer.shape.width)
        for expert, chosen_R in enumerate(chosen_RM.T):
            (rows_T,) = torch.nonzero(chosen_R, as_tuple=True)
            if len(rows_T) == 0:
                continue
            picks = None if index_RK is None else index_RK[rows_T]
            a_TS = self._neurons(layer, experts, expert, x_RD[rows_T], picks, rows_T, repair)
            a_TS = a_TS * gate_RM[rows_T, expert, None]
            if picking or repair.active:
                a_RI[rows_T, experts.neurons(expert)] = a_TS
            if not picking:
                out_RD.index_add_(0, rows_T, F.linear(a_TS, experts.down_MOS[expert]))
        if picking:
            norms_I = tools.layout.column_norms(layer, Site.MLP_OUT)[experts.order_I]
            kept = pick(a_RI, norms_I, group.channels_out)
            out_RD = picked(experts.down_IO, None, a_RI, kept.index_RK())
            a_RI = kept.only_RI
        if layer.down.bias_O is not None:
            out_RD = out_RD + layer.down.bias_O
        if repair.active:
            base_order_RI = torch.zeros_like(a_RI)
            base_order_RI[:, experts.order_I] = a_RI
            repair.read(layer.down, base_order_RI)
        return repair.add(layer.down, out_RD)

    def _neurons(
        self,
        layer: Layer,
        experts: ExpertTable,
        expert: int,
        x_TD: Tensor,
        channels_TK: Tensor | None,
        rows_T: Tensor,
        repair: Repair,
    ) -> Tensor:
        """One expert's activations for its rows; `rows_T` is where `repair` has read them."""
        neurons_S = experts.order_I[experts.neurons(expert)]
        a_TS = experts.up.run(expert, x_TD, channels_TK)
        a_TS = repair.add(layer.up, a_TS, rows_T, neurons_S)
        if layer.gate is None or experts.gate is None:
            activated: Tensor = layer.activation(a_TS)
            return activated
        gate_TS = experts.gate.run(expert, x_TD, channels_TK)
        return layer.activation(repair.add(layer.gate, gate_TS, rows_T, neurons_S)) * a_TS
