"""Which rows of a packed batch keep a sub-layer, and how its branch joins their residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elastiformer.capacity import Phase, Unit
from elastiformer.families import Layer
from elastiformer.packed import Kind, Packed, Rows
from elastiformer.products import Products
from elastiformer.routers import by_threshold, token_gate


def joined(
    h_ND: Tensor, branch_RD: Tensor, rows: Rows, gate_N: Tensor | None, after: nn.Module | None
) -> Tensor:
    """The residual with a sub-layer's branch added to its rows alone.

    Args:
        after: the norm that some families put on the branch. The gate multiplies what it gives:
            a norm would undo a gate that came before it.
    """
    if after is not None:
        branch_RD = after(branch_RD)
    if gate_N is not None:
        branch_RD = branch_RD * rows.of(gate_N)[:, None].to(branch_RD.dtype)
    return rows.add(h_ND, branch_RD)


class Keeping:
    """Takes the token units' decisions for one model."""

    def __init__(self, products: Products) -> None:
        self.adapter = products.adapter

    def of_rows(
        self, layer: Layer, unit: Unit, x_ND: Tensor, packed: Packed
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which rows keep this sub-layer, and the gate of their branch; None where all do."""
        shares = {
            kind: getattr(kind.plan.plan[layer.index], unit.value) for kind in packed.distinct_kinds
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
