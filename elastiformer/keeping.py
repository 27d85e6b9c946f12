"""Which rows of a packed batch keep a sub-layer, and how its branch joins their residual.

Where a plan keeps all rows of a kind or none, the plan alone decides. Where it keeps a share of
them, the router's scores do, request by request: in order for a causal model, the best of the
whole request for an encoder.

Shape letters: N packed tokens   R rows   D width
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from elastiformer.capacity import Phase, Unit
from elastiformer.families import Layer
from elastiformer.packed import Packed, Rows
from elastiformer.routers import by_rank, keeps, token_gate
from elastiformer.sequence import Kind
from elastiformer.taken import Taken
from elastiformer.workshop import Workshop

_REMEMBERED = 4096  # kinds and units


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """The rows that keep a sub-layer, and what their branch is multiplied by (None: by 1)."""

    rows: Rows
    gate_N: Tensor | None = None

    def join(self, h_ND: Tensor, branch_RD: Tensor, rows: Rows, after: nn.Module | None) -> None:
        """Add the branch of some of the rows to their residual, in place.

        Args:
            after: the norm that some families put on the branch. The gate multiplies what it
                gives: a norm would undo a gate that came before it.
        """
        if after is not None:
            branch_RD = after(branch_RD.to(h_ND.dtype))
        if self.gate_N is not None:
            branch_RD = branch_RD * rows.of(self.gate_N)[:, None].to(h_ND.dtype)
        rows.add(h_ND, branch_RD)


class Keeping:
    """Takes the token units' decisions for one model."""

    def __init__(self, workshop: Workshop) -> None:
        self.adapter = workshop.adapter
        self._causal = workshop.layout.causal
        self._last = len(workshop.layout.layers) - 1
        # Steps of many kinds ask for each layer twice, and always for the same plans.
        self._shares_of = lru_cache(maxsize=_REMEMBERED)(self._find_shares)

    def routes(self, layer: Layer, unit: Unit, packed: Packed) -> bool:
        """Whether a router decides for any row."""
        return not packed.keeps_sub_layers and any(
            0 < share < 1 for share in self._shares(layer, unit, packed)
        )

    def of_rows(
        self, layer: Layer, unit: Unit, x_ND: Tensor | None, packed: Packed, taken: Taken
    ) -> Kept:
        """The rows that keep this sub-layer.

        Args:
            x_ND: what routers read, the sub-layer's normed input; needed only where they decide.
        """
        if packed.keeps_sub_layers and (unit is Unit.ATTENTION_TOKENS or layer.index < self._last):
            return Kept(packed.everything)
        each = self._shares(layer, unit, packed)
        if all(share == 1 for share in each):
            return Kept(packed.everything)
        shares = dict(zip(packed.distinct_kinds, each, strict=True))
        whole = packed.rows_where(lambda kind: shares[kind] == 1)
        routed = packed.rows_where(lambda kind: 0 < shares[kind] < 1)
        if not routed.count:
            return Kept(whole)
        router = self.adapter.router(layer.index, unit) if self.adapter is not None else None
        assert x_ND is not None, "routers decide here"
        scores_R = None if router is None else router(routed.of(x_ND)).squeeze(-1)
        kept_R = self._decide(layer, unit, scores_R, routed, shares, packed)
        taken.skipped(layer.index, unit, routed.rows_R[~kept_R])
        kept_N = np.zeros(packed.count, dtype=bool)
        kept_N[whole.rows_R] = True
        kept_N[routed.rows_R] = kept_R
        gate_N = None
        if scores_R is not None and self.adapter is not None:
            form = self.adapter.spec.token_gate
            if form != "hard":
                gate_N = torch.ones(packed.count, device=x_ND.device)
                was_kept_R = torch.from_numpy(kept_R).to(x_ND.device)
                routed.put(gate_N, token_gate(scores_R, was_kept_R, form))
        return Kept(packed.rows(np.flatnonzero(kept_N)), gate_N)

    def _shares(self, layer: Layer, unit: Unit, packed: Packed) -> list[float]:
        """Of each kind's rows, how many keep this sub-layer."""
        return [self._shares_of(kind, unit)[layer.index] for kind in packed.distinct_kinds]

    def _find_shares(self, kind: Kind, unit: Unit) -> list[float]:
        """The same of one kind, by layer."""
        shares: list[float] = [getattr(layer, unit.value) for layer in kind.plan.plan]
        if kind.phase is Phase.PROMPT and unit is Unit.MLP_TOKENS:
            shares[self._last] = 0.0  # nobody reads it
        if kind.phase is Phase.PROMPT and unit is Unit.ATTENTION_TOKENS:
            for layer in kind.plan.direct:
                shares[layer] = 0.0  # it does not ask
        return shares

    def _decide(
        self,
        layer: Layer,
        unit: Unit,
        scores_R: Tensor | None,
        routed: Rows,
        shares: dict[Kind, float],
        packed: Packed,
    ) -> np.ndarray:
        """Which of the routed rows are kept: request by request, in order."""
        if scores_R is not None and not self._causal:
            return self._best(scores_R, routed, shares, packed)
        scores = [None] * routed.count if scores_R is None else scores_R.tolist()
        thresholds = {
            kind: 0.0
            if self.adapter is None
            else self.adapter.threshold(unit, layer.index, kind.phase, share)
            for kind, share in shares.items()
            if 0 < share < 1
        }
        kept_R = np.zeros(routed.count, dtype=bool)
        for place, row in enumerate(routed.rows_R.tolist()):
            kind = packed.kinds[row]
            debt = packed.sequences[row].debt(layer.index, unit, kind.phase)
            kept_R[place] = keeps(scores[place], shares[kind], thresholds[kind], debt)
        return kept_R

    def _best(
        self, scores_R: Tensor, routed: Rows, shares: dict[Kind, float], packed: Packed
    ) -> np.ndarray:
        """The best-scoring rows of each request and phase, exactly as many as their shares make."""
        share_K = np.array([shares[kind] for kind in packed.distinct_kinds])
        output_K = np.array([kind.phase is Phase.OUTPUT for kind in packed.distinct_kinds])
        kind_R = packed.kind_N[routed.rows_R]
        # Requests side by side, padded: ranking each by itself would take longer than it saves.
        start_C = np.searchsorted(routed.rows_R, packed.starts)
        count_C = np.diff(start_C)
        chunk_R = np.repeat(np.arange(len(count_C)), count_C)
        place_R = np.arange(routed.count) - start_C[chunk_R]
        scores_CT = torch.zeros(len(count_C), int(count_C.max()))
        scores_CT[chunk_R, place_R] = scores_R.float().cpu()
        share_CT = np.zeros(scores_CT.shape)
        share_CT[chunk_R, place_R] = share_K[kind_R]
        kept_R = np.zeros(routed.count, dtype=bool)
        for is_output in np.unique(output_K[kind_R]):
            among_CT = np.zeros(scores_CT.shape, dtype=bool)
            among_CT[chunk_R, place_R] = output_K[kind_R] == is_output
            kept_CT = by_rank(scores_CT, torch.from_numpy(share_CT), torch.from_numpy(among_CT))
            kept_R |= kept_CT.numpy()[chunk_R, place_R]
        return kept_R
