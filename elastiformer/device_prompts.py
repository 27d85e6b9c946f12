"""Steps with prompts on a GPU: a few kernels a layer, over the rows that keep it and no others.

Layer by layer in operators (SparseAttention, SparseMlp) a step of some hundred tokens waits for
launches, not for products. Here what lies between two products is one kernel, the queries of all
requests attend in one, and rows leave and join again only where the rows that keep a sub-layer
change: late layers, which few rows of a prompt keep, are as many launches over few rows, and the
keys and values of the others.

It takes steps in which plans alone decide what is kept, and in which a request has at most one row
that picks channels: its latest. Whatever else a step holds is the operators'.

Shape letters: N rows   R some of them   J rows that take channels by thresholds   D width
    I inputs   O outputs   L layers   C chunks
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from elastiformer import device_kernels as kernels
from elastiformer import device_prompt_attention as attention
from elastiformer.capacity import Phase, Site
from elastiformer.device_allowances import AmongOthers
from elastiformer.device_kernels import At, Takes
from elastiformer.device_prompt_attention import Asking, Lying
from elastiformer.families import Layer, Projection
from elastiformer.packed import Packed, Rows
from elastiformer.placing import Placing
from elastiformer.pointwise import RootMeanSquare, Rotation
from elastiformer.readings import Reading
from elastiformer.sequence import Kind
from elastiformer.taken import Taken
from elastiformer.workshop import SITES, Workshop


class DevicePrompts:
    """Runs the layers of one model over steps that hold more than decode rows."""

    def __init__(self, workshop: Workshop, forms: Sequence[int]) -> None:
        """
        Args:
            forms: of each layer's gate.
        """
        self._workshop, self._forms = workshop, forms

    def takes(self, packed: Packed) -> bool:
        """Whether a step is one of those."""
        plans = [kind.plan for kind in packed.distinct_kinds]
        if packed.leaves_heads_out or packed.leaves_experts_out:
            return False
        if self._workshop.kv != "complete" or not all(plan.keeps_by_plan for plan in plans):
            return False
        if not packed.picks:
            return True
        takes_N, rows_J = packed.takes_N, packed.picking.rows_R
        if self._workshop.ladder_LTG is None or not takes_N[rows_J].all():
            return False
        return len(np.unique(packed.chunk_N[rows_J])) == len(rows_J)

    def allowances(self, packed: Packed) -> AmongOthers | None:
        """What the rows that pick take; None: none does."""
        return self._workshop.allowances_among(packed) if packed.picks else None

    def run(
        self,
        h_ND: Tensor,
        packed: Packed,
        placing: Placing,
        taken: Taken,
        rotation: Rotation | None,
    ) -> Tensor:
        """The residual that the layers leave, float32."""
        step = _Step(self._workshop, h_ND, packed, placing, rotation)
        for layer, form in zip(self._workshop.layout.layers, self._forms, strict=True):
            step.attention(layer)
            taken.keys(placing.keys(layer.index))
            step.mlp(layer, form)
        return step.end()


class _Some:
    """Rows of a step, and what kernels are told of them."""

    def __init__(self, rows: Rows, step: _Step) -> None:
        self._rows, self._step = rows, step

    @cached_property
    def asking(self) -> Asking:
        rows, step = self._rows, self._step
        bounds_S = np.searchsorted(rows.rows_R, step.packed.starts)
        programs_W3 = torch.from_numpy(attention.programs(bounds_S)).to(step.device)
        return Asking(rows.of(step.chunk_N), rows.of(step.packed.position_N), programs_W3)

    @cached_property
    def turn_RR(self) -> tuple[Tensor, Tensor] | None:
        if self._step.rotation is None:
            return None
        rotation = self._rows.turn(self._step.rotation)
        return rotation.cos_NR, rotation.sin_NR

    @cached_property
    def takers_J(self) -> Tensor:
        """Where those that take stand among these rows."""
        return self._step.packed.picking.among(self._rows).index_R


class _Step:
    """One step on its way through the layers: the residual, and which rows of it are at hand."""

    def __init__(
        self,
        workshop: Workshop,
        h_ND: Tensor,
        packed: Packed,
        placing: Placing,
        rotation: Rotation | None,
    ) -> None:
        self._tools, self.packed, self.rotation = workshop, packed, rotation
        self.device = packed.device
        self.chunk_N = torch.from_numpy(packed.chunk_N).to(self.device)
        lies_2LC = np.stack([placing.first_LC, placing.room_LC])
        self._lying = Lying(*torch.from_numpy(lies_2LC).to(self.device))
        self._pool_PH = placing.rows_PH
        self._some: dict[Rows, _Some] = {}
        self._left: dict[Rows, Rows] = {}
        # The residual of all rows, and of those at hand, to which a branch has yet to be added.
        self._h_ND = h_ND.float()
        self._rows, self._h_RD = packed.everything, self._h_ND
        self._branch_1RD: Tensor | None = None
        self._left_behind: tuple[Rows, Tensor] | None = None
        self._takes = self._taking()

    def attention(self, layer: Layer) -> None:
        """Place keys and values of all rows, and run attention over those that keep it."""
        packed, last = self.packed, layer.index == len(self._tools.layout.layers) - 1
        rows = packed.rows_where(
            lambda kind: (
                bool(kind.plan.plan[layer.index].attention_tokens)
                and not (last and kind.phase is Phase.PROMPT)
            )  # nobody reads what it is left with
        )
        self._turn_to(rows)
        left = self._others(rows)
        norm = self._tools.attention_norms[layer.index]
        if left.count:
            x_RD = self._normalised(norm, self._behind(left), None)
            out_RO = self._product(layer, x_RD, left, *layer.at_site(Site.ATTENTION_IN)[1:])
            some = self._of(left)
            attention.place(
                out_RO, some.turn_RR, self._pool_PH, self._lying, some.asking, layer.index, 0
            )
        if not rows.count:
            return
        some, shape = self._of(rows), layer.shape
        x_RD = self._next(norm)
        self._take(x_RD, layer, Site.ATTENTION_IN)
        out_RO = self._product(layer, x_RD, rows, *layer.at_site(Site.ATTENTION_IN))
        where = (self._pool_PH, self._lying, some.asking, layer.index)
        query_RAH = attention.place(out_RO, some.turn_RR, *where, shape.heads)
        x_RI = attention.attend(query_RAH, *where, shape.kv_heads, layer.scale)
        self._take(x_RI, layer, Site.ATTENTION_OUT)
        self._branch_1RD = self._product(layer, x_RI, rows, layer.out)[None]

    def mlp(self, layer: Layer, form: int) -> None:
        """Run the MLP over the rows that keep it."""
        last = layer.index == len(self._tools.layout.layers) - 1

        def keeps(kind: Kind) -> bool:
            unread = last and kind.phase is Phase.PROMPT
            return bool(kind.plan.plan[layer.index].mlp_tokens) and not unread

        rows = self.packed.rows_where(keeps)
        if not rows.count:
            return
        self._turn_to(rows)
        x_RD = self._next(self._tools.mlp_norms[layer.index])
        self._take(x_RD, layer, Site.MLP_IN)
        both_RO = self._product(layer, x_RD, rows, *layer.at_site(Site.MLP_IN))
        x_RI = kernels.gate(form, both_RO[None], At(both_RO, None), self._tools.dtype)
        self._take(x_RI, layer, Site.MLP_OUT)
        self._branch_1RD = self._product(layer, x_RI, rows, *layer.at_site(Site.MLP_OUT))[None]

    def end(self) -> Tensor:
        """What the layers leave."""
        self._leave()
        if isinstance(self.packed.allowances, AmongOthers) and self._takes is not None:
            self.packed.allowances.owe(self._takes.owed_LTN)
        return self._h_ND

    def _turn_to(self, rows: Rows) -> None:
        """Have other rows at hand."""
        if rows is not self._rows and not (rows.all and self._rows.all):
            self._leave()
            self._rows, self._h_RD, self._left_behind = rows, rows.of(self._h_ND), None

    def _leave(self) -> None:
        """Bring the rows at hand back among the others."""
        if self._branch_1RD is not None:
            self._h_RD += self._branch_1RD[0]
            self._branch_1RD = None
        if not self._rows.all:
            self._rows.put(self._h_ND, self._h_RD)

    def _behind(self, rows: Rows) -> Tensor:
        """The residual of rows that are not at hand, which nobody changes meanwhile."""
        if self._left_behind is None or self._left_behind[0] is not rows:
            self._left_behind = rows, rows.of(self._h_ND)
        return self._left_behind[1]

    def _others(self, rows: Rows) -> Rows:
        if rows not in self._left:
            self._left[rows] = self.packed.everything.without(rows)
        return self._left[rows]

    def _of(self, rows: Rows) -> _Some:
        if rows not in self._some:
            self._some[rows] = _Some(rows, self)
        return self._some[rows]

    def _next(self, norm: object) -> Tensor:
        """The norm of the residual at hand, once the latest branch has joined it."""
        x_RD = self._normalised(norm, self._h_RD, self._branch_1RD)
        self._branch_1RD = None
        return x_RD

    def _normalised(self, norm: object, h_RD: Tensor, branch_1RD: Tensor | None) -> Tensor:
        assert isinstance(norm, RootMeanSquare), "a layer that is not known"
        every = At(norm.scale_D, None)
        return kernels.normalise(
            h_RD, branch_1RD, norm.scale_D, norm.epsilon, every, self._tools.dtype
        )

    def _taking(self) -> Takes | None:
        if self.packed.allowances is None:
            return None
        assert isinstance(self.packed.allowances, AmongOthers), "a step of another kind"
        takes_J, granted_LTJ, debts_LTJ, ladder_LTG = self.packed.allowances.asked
        takes, granted, debts = (
            torch.from_numpy(np.ascontiguousarray(each, dtype=np.int64)).to(self.device)
            for each in (takes_J, granted_LTJ, debts_LTJ)
        )
        return Takes(takes, granted, debts, debts.clone(), ladder_LTG)

    def _take(self, x_RI: Tensor, layer: Layer, site: Site) -> None:
        """Leave of the rows that pick what they take."""
        if self._takes is None:
            return
        norms_I = self._tools.layout.column_norms(layer, site)
        at = At(norms_I, self._takes.at(layer.index, SITES.index(site)))
        kernels.take(x_RI, self._of(self._rows).takers_J, at)

    def _product(self, layer: Layer, x_RI: Tensor, rows: Rows, *parts: Projection) -> Tensor:
        tools = self._tools
        product = tools.product(*parts)
        if tools.mending.is_repaired(layer, product, self.packed):
            return tools.mending.run(layer, product, Reading(x_RI), self.packed, rows)
        return product.whole(x_RI)
