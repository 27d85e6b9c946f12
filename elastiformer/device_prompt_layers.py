"""The kernels of all layers of a step with prompts on a GPU, over sets of its rows.

What lies between two products is one kernel, the queries of all requests attend in one, and rows
leave and join again only where the rows that keep a sub-layer change: late layers, which few rows
of a prompt keep, are as many launches over few rows, and the keys and values of the others.

Nothing here asks the device for a number, and nothing depends on more of a step than its sizes:
so it can be captured, and replayed for other steps.

Shape letters: N rows, filled up, and one more   R rows of a set   D width
      I inputs   O outputs   K rank, of all pairs of a product
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from elastiformer import device_kernels as kernels
from elastiformer import device_prompt_attention as attention
from elastiformer.capacity import Site
from elastiformer.device_kernels import At
from elastiformer.device_prompt_attention import Asking, Lying
from elastiformer.device_taking import Takers, Taking
from elastiformer.families import Layer, Projection
from elastiformer.pointwise import RootMeanSquare
from elastiformer.workshop import SITES, Workshop

ALL, NONE = 0, -1  # numbers of sets


class Repaired(NamedTuple):
    """A set of low-rank pairs, and the number of the set of rows that use it."""

    name: str
    rows: int


class LayerRows(NamedTuple):
    """Which rows keep what of a layer, by the numbers of their sets."""

    asking: int  # those that keep its attention
    left: int  # the others, of which it has keys and values
    mlp: int
    repaired: tuple[Repaired, ...]


class Group(NamedTuple):
    """A set of rows, filled up.

    Args:
        rows_R: int64, which of all rows they are; what fills up is the row after the last.
        turn_RR: cosines and sines; None where nothing is rotated.
    """

    rows_R: Tensor
    asking: Asking
    turn_RR: tuple[Tensor, Tensor] | None
    takers: Takers


class PromptLayers:
    """The layers of one model."""

    def __init__(self, workshop: Workshop, forms: Sequence[int]) -> None:
        """
        Args:
            forms: of each layer's gate.
        """
        self._workshop, self._forms = workshop, forms

    def run(
        self,
        h_ND: Tensor,
        layers: Sequence[LayerRows],
        groups: Sequence[Group],
        rows_PH: Tensor,
        lying: Lying,
        taking: Taking | None,
    ) -> None:
        """Run all layers over the residual, float32, in place.

        Args:
            layers: which rows keep what of each.
            groups: the sets that they name; the first is of all rows.
            rows_PH: of the pool.
            taking: what rows take of their channels; None: all take all.
        """
        on_way = _OnWay(self._workshop, h_ND, groups, rows_PH, lying, taking)
        of_layers = zip(self._workshop.layout.layers, layers, self._forms, strict=True)
        for layer, rows, form in of_layers:
            on_way.attention(layer, rows)
            if rows.mlp != NONE:
                on_way.mlp(layer, rows, form)
        on_way.leave()


class _OnWay:
    """A step between its layers: the residual, and which rows of it are at hand."""

    def __init__(
        self,
        workshop: Workshop,
        h_ND: Tensor,
        groups: Sequence[Group],
        rows_PH: Tensor,
        lying: Lying,
        taking: Taking | None,
    ) -> None:
        self._tools, self._groups, self._taking = workshop, groups, taking
        self._pool_PH, self._lying = rows_PH, lying
        # The residual of all rows, and of those at hand, to which a branch has yet to be added.
        self._h_ND = h_ND
        self._at, self._h_RD = ALL, h_ND[:-1]
        self._branch_1RD: Tensor | None = None
        self._left_behind: tuple[int, Tensor] | None = None
        self._uses: dict[tuple[int, int], Tensor] = {}

    def attention(self, layer: Layer, rows: LayerRows) -> None:
        """Place keys and values of all rows, and run attention over those that keep it."""
        norm = self._tools.attention_norms[layer.index]
        if rows.asking == NONE:
            self.leave()
        else:
            self._turn_to(rows.asking)
        if rows.left != NONE:
            x_RD = self._normalised(norm, self._behind(rows.left), None)
            out_RO = self._product(layer, x_RD, rows.left, rows, layer.key, layer.value)
            self._place(layer, out_RO, rows.left, 0)
        if rows.asking == NONE:
            return
        x_RD = self._next(norm)
        self._take(x_RD, layer, Site.ATTENTION_IN)
        projections = layer.at_site(Site.ATTENTION_IN)
        out_RO = self._product(layer, x_RD, rows.asking, rows, *projections)
        query_RAH = self._place(layer, out_RO, rows.asking, layer.shape.heads)
        x_RI = attention.attend(
            query_RAH, self._pool_PH, self._lying, self._groups[rows.asking].asking, layer.index,
            layer.shape.kv_heads, layer.scale,
        )  # fmt: skip
        self._take(x_RI, layer, Site.ATTENTION_OUT)
        self._branch_1RD = self._product(layer, x_RI, rows.asking, rows, layer.out)[None]

    def mlp(self, layer: Layer, rows: LayerRows, form: int) -> None:
        """Run the MLP over the rows that keep it."""
        self._turn_to(rows.mlp)
        x_RD = self._next(self._tools.mlp_norms[layer.index])
        self._take(x_RD, layer, Site.MLP_IN)
        both_RO = self._product(layer, x_RD, rows.mlp, rows, *layer.at_site(Site.MLP_IN))
        x_RI = kernels.gate(form, both_RO[None], At(both_RO, None), self._tools.dtype)
        self._take(x_RI, layer, Site.MLP_OUT)
        branch_RD = self._product(layer, x_RI, rows.mlp, rows, *layer.at_site(Site.MLP_OUT))
        self._branch_1RD = branch_RD[None]

    def leave(self) -> None:
        """Bring the rows at hand back among the others."""
        if self._branch_1RD is not None:
            self._h_RD += self._branch_1RD[0]
            self._branch_1RD = None
        if self._at != ALL:
            self._h_ND.index_copy_(0, self._groups[self._at].rows_R, self._h_RD)

    def _turn_to(self, at: int) -> None:
        """Have other rows at hand."""
        if at == self._at:
            return
        self.leave()
        self._at, self._left_behind = at, None
        self._h_RD = self._h_ND[:-1] if at == ALL else self._of(at)

    def _behind(self, at: int) -> Tensor:
        """The residual of rows that are not at hand, which nobody changes meanwhile."""
        if self._left_behind is None or self._left_behind[0] != at:
            self._left_behind = at, self._h_ND[:-1] if at == ALL else self._of(at)
        return self._left_behind[1]

    def _of(self, at: int) -> Tensor:
        return self._h_ND.index_select(0, self._groups[at].rows_R)

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

    def _place(self, layer: Layer, out_RO: Tensor, at: int, heads: int) -> Tensor:
        group = self._groups[at]
        return attention.place(
            out_RO, group.turn_RR, self._pool_PH, self._lying, group.asking, layer.index, heads
        )

    def _take(self, x_RI: Tensor, layer: Layer, site: Site) -> None:
        """Leave of the rows that pick what they take."""
        if self._taking is not None:
            norms_I = self._tools.layout.column_norms(layer, site)
            takers, place = self._groups[self._at].takers, SITES.index(site)
            self._taking.take(x_RI, takers, norms_I, layer.index, place)

    def _product(
        self, layer: Layer, x_RI: Tensor, at: int, rows: LayerRows, *parts: Projection
    ) -> Tensor:
        product = self._tools.product(*parts)
        out_RO = product.whole(x_RI)
        for name, users in rows.repaired:
            joined = self._tools.mending.joined(layer, name, product)
            if joined is not None:
                joined.mend_some(x_RI, out_RO, self._used(users, at))
        return out_RO

    def _used(self, users: int, at: int) -> Tensor:
        """Which rows of a set are among others: 1 or 0, [R, 1]."""
        if (users, at) not in self._uses:
            is_used_N = self._h_ND.new_zeros(len(self._h_ND), 1, dtype=self._tools.dtype)
            # What fills up is marked as well, and read by nobody.
            is_used_N.index_fill_(0, self._groups[users].rows_R, 1)
            self._uses[users, at] = is_used_N.index_select(0, self._groups[at].rows_R)
        return self._uses[users, at]
