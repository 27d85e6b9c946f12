"""The MLP sub-layer on packed rows: whole, or over picked channels.

Rows that leave experts out are the business of sparse_experts.py.

Shape letters: N packed tokens   R rows   D width   I neurons
"""

from __future__ import annotations

import torch
from torch import Tensor

from elastiformer.capacity import Site, Unit
from elastiformer.families import Layer
from elastiformer.keeping import Keeping
from elastiformer.packed import Packed, Rows
from elastiformer.pointwise import CompiledGate, makes_anew
from elastiformer.readings import Reading
from elastiformer.sparse_experts import SparseExperts
from elastiformer.taken import Taken
from elastiformer.workshop import Workshop


class SparseMlp:
    """Runs the MLPs of one model's layers."""

    def __init__(self, workshop: Workshop, keeping: Keeping) -> None:
        self.workshop, self.keeping = workshop, keeping
        self._experts = SparseExperts(workshop)

    def run(self, layer: Layer, h_ND: Tensor, packed: Packed, taken: Taken) -> None:
        """Add the MLP's branch to the residual of the rows that keep it, in place."""
        norm = self.workshop.mlp_norms[layer.index]
        routed = self.keeping.routes(layer, Unit.MLP_TOKENS, packed)
        x_ND = norm(h_ND) if routed else None
        kept = self.keeping.of_rows(layer, Unit.MLP_TOKENS, x_ND, packed, taken)
        if not kept.rows.count:
            return
        by_expert = packed.nothing
        if packed.leaves_experts_out:
            by_expert = packed.rows_where(
                lambda kind: kind.plan.counts[layer.index].neurons < layer.shape.mlp_width
            ).within(kept.rows)
        whole = kept.rows if not by_expert.count else kept.rows.without(by_expert)
        for rows, branch in ((whole, self._branch), (by_expert, self._experts.branch)):
            if rows.count:
                x_RD = norm(rows.of(h_ND)) if x_ND is None else rows.of(x_ND)
                branch_RD = branch(layer, x_RD, packed, rows)
                kept.join(h_ND, branch_RD, rows, layer.after_mlp)

    def _branch(self, layer: Layer, x_RD: Tensor, packed: Packed, rows: Rows) -> Tensor:
        tools = self.workshop
        own = makes_anew(tools.mlp_norms[layer.index])
        reading = tools.read(layer, Site.MLP_IN, x_RD, packed, rows, own)
        front, down = tools.at_site(layer, Site.MLP_IN), tools.at_site(layer, Site.MLP_OUT)
        gate = tools.gates[layer.index]
        if isinstance(gate, CompiledGate):
            a_RI = self._gated(gate, layer, reading, packed, rows)
        else:
            out_RO = tools.mended(layer, front, reading, packed, rows)
            a_RI = layer.activation(out_RO) if gate is None else gate(out_RO)
        reading = tools.read(layer, Site.MLP_OUT, a_RI, packed, rows, own=True)
        return tools.mended(layer, down, reading, packed, rows).to(x_RD.dtype)

    def _gated(
        self, gate: CompiledGate, layer: Layer, reading: Reading, packed: Packed, rows: Rows
    ) -> Tensor:
        """What the second product reads; of many rows in bfloat16, which it would round to."""
        tools = self.workshop
        front, down = tools.at_site(layer, Site.MLP_IN), tools.at_site(layer, Site.MLP_OUT)
        rounded_RO = tools.rounded(layer, front, reading, packed)
        if rounded_RO is None:
            return gate(tools.mended(layer, front, reading, packed, rows))
        as_whole = not packed.picks and not tools.is_repaired(layer, down, packed)
        small = as_whole and down.takes_rounded(rows.count)
        return gate(rounded_RO, torch.bfloat16 if small else torch.float32)
