"""The MLP sub-layer on packed rows: whole, or over picked channels.

Rows that leave experts out are the business of sparse_experts.py.

Shape letters: N packed tokens   R rows   D width   I neurons
"""

from __future__ import annotations

from torch import Tensor

from elastiformer.capacity import Site, Unit
from elastiformer.families import Layer
from elastiformer.keeping import Keeping
from elastiformer.packed import Packed, Rows
from elastiformer.pointwise import makes_anew
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
        front = tools.at_site(layer, Site.MLP_IN)
        out_RO = tools.mended(layer, front, reading, packed, rows)
        gate = tools.gates[layer.index]
        a_RI = layer.activation(out_RO) if gate is None else gate(out_RO)
        reading = tools.read(layer, Site.MLP_OUT, a_RI, packed, rows, own=True)
        return tools.mended(layer, tools.at_site(layer, Site.MLP_OUT), reading, packed, rows)
