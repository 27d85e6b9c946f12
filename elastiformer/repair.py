"""The low-rank addition to the products of some rows in one layer.

Shape letters: R rows   P rows with spare ones   I inputs   O outputs
    K rank, in `Joined` of all pairs
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from elastiformer.costs import SHARES, FewRows
from elastiformer.families import Projection
from elastiformer.lora import LoraPair
from elastiformer.packed import Rows
from elastiformer.products import Product
from elastiformer.readings import Reading
from elastiformer.spare_rows import widened


class Part(NamedTuple):
    """What a pair adds to the outputs of one projection."""

    inner: slice  # of what the pairs of a product read, side by side
    outputs: slice
    b_OK: Tensor


class Joined(NamedTuple):
    """All pairs of a product, which read its input at once; scaled, and in the type at work."""

    a_KI: Tensor
    parts: list[Part]

    @classmethod
    def of(cls, product: Product, pairs: dict[str, LoraPair], dtype: torch.dtype) -> Joined | None:
        """None where nothing of the product is repaired."""
        paths = list(dict.fromkeys(each.path for each in product.projections if each.path in pairs))
        if not paths:
            return None
        parts = []
        for projection, outputs in zip(product.projections, product.parts, strict=True):
            if projection.path in paths:
                pair, place = pairs[projection.path], paths.index(projection.path)
                rank = len(pair.a_RI)
                b_OK = pair.scale * pair.b_OR[projection.start : projection.stop]
                inner = slice(place * rank, (place + 1) * rank)
                parts.append(Part(inner, outputs, b_OK.to(dtype)))
        return cls(torch.cat([pairs[path].a_RI for path in paths]).to(dtype), parts)

    def mend(self, reading: Reading, out_RO: Tensor, rows: Rows) -> None:
        """Repair these rows of a product, in place."""
        inner_PK = F.linear(widened(rows.of(reading.only_RI)), self.a_KI)
        for inner, outputs, b_OK in self.parts:
            branch_PO = F.linear(inner_PK[:, inner], b_OK)
            rows.add(out_RO[:, outputs], branch_PO[: rows.count])

    def mend_some(self, x_RI: Tensor, out_RO: Tensor, uses_R1: Tensor) -> None:
        """Repair a product in place where `uses` is 1, and leave it where it is 0."""
        inner_RK = F.linear(x_RI, self.a_KI) * uses_R1
        for inner, outputs, b_OK in self.parts:
            out_RO[:, outputs].addmm_(inner_RK[:, inner], b_OK.T)


class Folded(Product):
    """A product with all pairs of a repair in its weights: another copy of them, and no more work.

    For rows that all have the repair.
    """

    def __init__(self, product: Product, pairs: Joined) -> None:
        super().__init__(product.projections)
        self._pairs = pairs
        self.few = FewRows((0,) * len(SHARES))  # always at once: no second layout

    def _joined(self) -> Tensor:
        weight_OI = super()._joined()
        folded_OI = weight_OI.float().clone()
        for inner, outputs, b_OK in self._pairs.parts:
            folded_OI[outputs] += b_OK.float() @ self._pairs.a_KI[inner].float()
        return folded_OI.to(weight_OI.dtype)


class Repair:
    """The pairs, by module path, of one group of rows in one layer; perhaps none."""

    def __init__(self, pairs: dict[str, LoraPair]) -> None:
        self._pairs = pairs
        self._inner: dict[str, Tensor] = {}

    @property
    def active(self) -> bool:
        return bool(self._pairs)

    def read(self, projection: Projection, x_RI: Tensor) -> None:
        """Take the input of a projection's module; parts fused in one module share it."""
        pair = self._pairs.get(projection.path)
        if pair is not None and projection.path not in self._inner:
            self._inner[projection.path] = F.linear(x_RI, pair.a_RI.to(x_RI.dtype))

    def add(
        self,
        projection: Projection,
        out_RO: Tensor,
        rows: Tensor | None = None,
        outputs: slice | Tensor = slice(None),
    ) -> Tensor:
        """`out`, repaired; `rows` and `outputs` say which part of what was read it is."""
        inner_RK = self._inner.get(projection.path)
        if inner_RK is None:
            return out_RO
        pair = self._pairs[projection.path]
        if rows is not None:
            inner_RK = inner_RK[rows]
        b_OK = pair.b_OR[projection.start : projection.stop][outputs].to(inner_RK.dtype)
        return out_RO + pair.scale * F.linear(inner_RK, b_OK)
