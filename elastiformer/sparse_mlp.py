"""The MLP sub-layer on packed rows: whole, over picked channels, or by the experts each row keeps.

Shape letters: N packed tokens   R rows of a group   T rows of one expert   D width   I neurons
    S neurons of one expert   M experts   K picked channels
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from elastiformer.capacity import Site, Unit
from elastiformer.families import Layer
from elastiformer.keeping import Keeping, joined
from elastiformer.packed import Kind, Packed, Taken
from elastiformer.products import ExpertTable, Products, Repair, largest, only, picked
from elastiformer.routers import best, part_gate


class MlpGroup(NamedTuple):
    experts: int  # 0: not divided
    channels_in: int
    channels_out: int
    neurons: int
    repair: str | None


class SparseMlp:
    """Runs the MLPs of one model's layers."""

    def __init__(self, products: Products, keeping: Keeping) -> None:
        self.products, self.keeping = products, keeping

    def run(self, layer: Layer, h_ND: Tensor, packed: Packed, taken: Taken) -> Tensor:
        groups = list(packed.groups(lambda kind: self._group(layer, kind)))
        x_ND = layer.mlp_norm(h_ND)
        kept_N, gate_N = self.keeping.of_rows(layer, Unit.MLP_TOKENS, x_ND, packed)
        taken.mlp(kept_N)
        for group, rows in groups:
            rows = rows.where(kept_N)
            if rows.count:
                x_RD = rows.of(x_ND)
                branch_RD = (
                    self._by_expert(layer, group, x_RD)
                    if group.experts
                    else self._undivided(layer, group, x_RD)
                )
                h_ND = joined(h_ND, branch_RD, rows, gate_N, layer.after_mlp)
        return h_ND

    def _group(self, layer: Layer, kind: Kind) -> MlpGroup:
        counts = kind.plan.counts[layer.index]
        # All experts kept is the undivided MLP, in the base's own order of neurons.
        experts = counts.experts if counts.neurons < layer.shape.mlp_width else 0
        return MlpGroup(
            experts, counts.mlp_in, counts.mlp_out, counts.neurons, self.products.repair_name(kind)
        )

    def _inputs(self, layer: Layer, group: MlpGroup, x_RD: Tensor) -> tuple[Tensor | None, Repair]:
        """The channels that the front projections read, and their repair, which has read them."""
        channels = self.products.channels(layer, Site.MLP_IN, x_RD, group.channels_in)
        repair = self.products.repair(layer, group.repair)
        if repair.active:
            seen_RD = x_RD if channels is None else only(x_RD, channels)
            for projection in layer.at_site(Site.MLP_IN):
                repair.read(projection, seen_RD)
        return channels, repair

    def _undivided(self, layer: Layer, group: MlpGroup, x_RD: Tensor) -> Tensor:
        channels, repair = self._inputs(layer, group, x_RD)
        *gates_RI, a_RI = self.products.at_site(layer, Site.MLP_IN, x_RD, channels)
        a_RI = repair.add(layer.up, a_RI)
        if layer.gate is None:
            a_RI = layer.activation(a_RI)
        else:
            a_RI = layer.activation(repair.add(layer.gate, gates_RI[0])) * a_RI
        channels = self.products.channels(layer, Site.MLP_OUT, a_RI, group.channels_out)
        if repair.active:
            repair.read(layer.down, a_RI if channels is None else only(a_RI, channels))
        return repair.add(layer.down, self.products.of(layer.down, a_RI, channels))

    def _by_expert(self, layer: Layer, group: MlpGroup, x_RD: Tensor) -> Tensor:
        """Only the experts that each row keeps."""
        experts = self.products.experts(layer)
        scores_RM = self.products.router(layer, Unit.EXPERTS)(x_RD)
        chosen_RM = best(scores_RM, torch.full((len(x_RD),), group.experts, device=x_RD.device))
        gate_RM = part_gate(scores_RM, chosen_RM, self.products.part_gate).to(x_RD.dtype)
        channels, repair = self._inputs(layer, group, x_RD)
        picking = group.channels_out < group.neurons
        a_RI = x_RD.new_zeros(len(x_RD), layer.shape.mlp_width)  # in the experts' order
        out_RD = x_RD.new_zeros(len(x_RD), layer.shape.width)
        for expert, chosen_R in enumerate(chosen_RM.T):
            (rows_T,) = torch.nonzero(chosen_R, as_tuple=True)
            if len(rows_T) == 0:
                continue
            picks = None if channels is None else channels[rows_T]
            a_TS = self._neurons(layer, experts, expert, x_RD[rows_T], picks, rows_T, repair)
            a_TS = a_TS * gate_RM[rows_T, expert, None]
            if picking or repair.active:
                a_RI[rows_T, experts.neurons(expert)] = a_TS
            if not picking:
                out_RD.index_add_(0, rows_T, F.linear(a_TS, experts.down_MOS[expert]))
        if picking:
            norms_I = self.products.layout.column_norms(layer, Site.MLP_OUT)[experts.order_I]
            index_RK = largest(a_RI, norms_I, group.channels_out)
            out_RD = picked(experts.down_IO, None, a_RI, index_RK)
            a_RI = only(a_RI, index_RK)
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
        channels: Tensor | None,
        rows_T: Tensor,
        repair: Repair,
    ) -> Tensor:
        """One expert's activations for its rows; `rows_T` is where `repair` has read them."""
        neurons_S = experts.order_I[experts.neurons(expert)]
        a_TS = experts.up.run(expert, x_TD, channels)
        a_TS = repair.add(layer.up, a_TS, rows_T, neurons_S)
        if layer.gate is None or experts.gate is None:
            activated: Tensor = layer.activation(a_TS)
            return activated
        gate_TS = experts.gate.run(expert, x_TD, channels)
        return layer.activation(repair.add(layer.gate, gate_TS, rows_T, neurons_S)) * a_TS
