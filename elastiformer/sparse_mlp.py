"""The MLP sub-layer on packed rows: whole, or over picked channels.

Rows that leave experts out are the business of sparse_experts.py.

Shape letters: N packed tokens   R rows   D width   I neurons
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from elastiformer.capacity import Site, Unit
from elastiformer.families import Layer
from elastiformer.keeping import Keeping
from elastiformer.packed import Packed, Rows
from elastiformer.pointwise import CompiledGate, in_type, makes_anew
from elastiformer.readings import Values
from elastiformer.spare_rows import with_room
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
        if whole.count:
            own, make = makes_anew(norm), partial(in_type, norm)
            values = Values(whole.of(h_ND), h_ND.dtype, make, own)
            if x_ND is not None:
                values = Values(whole.of(x_ND), x_ND.dtype, own=own)
            kept.join(h_ND, self._branch(layer, values, packed, whole), whole, layer.after_mlp)
        if by_expert.count:
            x_RD = norm(by_expert.of(h_ND)) if x_ND is None else by_expert.of(x_ND)
            branch_RD = self._experts.branch(layer, x_RD, packed, by_expert)
            kept.join(h_ND, branch_RD, by_expert, layer.after_mlp)

    def _branch(self, layer: Layer, values: Values, packed: Packed, rows: Rows) -> Tensor:
        tools = self.workshop
        front, down = tools.at_site(layer, Site.MLP_IN), tools.at_site(layer, Site.MLP_OUT)
        reading = tools.read(layer, Site.MLP_IN, values, packed, rows)
        gate = tools.gates[layer.index]
        out_RO = None
        if isinstance(gate, CompiledGate):
            out_RO = tools.mending.rounded(layer, front, reading, packed)
        if out_RO is None:
            out_RO = tools.mending.run(layer, front, reading, packed, rows)
        if not isinstance(gate, CompiledGate):
            active = layer.activation if gate is None else gate
            out_RO = with_room(active, out_RO.to(values.dtype))
        made = Values(out_RO, values.dtype, gate if isinstance(gate, CompiledGate) else Tensor.to)
        reading = tools.read(layer, Site.MLP_OUT, made, packed, rows)
        return tools.mending.run(layer, down, reading, packed, rows)
