"""Keys and values of rows that leave all late layers out: of several layers in one product.

Such a row brings one residual to all of these layers. So it is normed once, without a scale; the
weights of some layers stand side by side, each with its norm's scale and its repair in it; and one
loop turns all keys and writes all to the cache. In bfloat16 on a CPU, where what a weight is
multiplied by beforehand rounds no more than what it is multiplied with.

Shape letters: N packed tokens   R rows   D width   O outputs   L layers   M keys' heads and values'
    heads of a layer   H head size   T rotated part of a head   P rows of the cache
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numba import prange
from torch import Tensor

from elastiformer.costs import SHARES, FewRows
from elastiformer.families import Layer
from elastiformer.kernels import TURN, compiled
from elastiformer.packed import Packed, Rows
from elastiformer.placing import Placing
from elastiformer.pointwise import CompiledNorm
from elastiformer.products import Product
from elastiformer.readings import Reading
from elastiformer.rotary import Rotations
from elastiformer.row_kernels import _turn_row, on_host
from elastiformer.sequence import Kind
from elastiformer.workshop import Workshop

# So many layers of a model stand side by side: a range that begins within them multiplies by some
# weights in vain, and more products would take longer.
_TOGETHER = 4


class _Weights(NamedTuple):
    """Those of a block of layers, and of which state of their repairs they were made."""

    version: int
    product: Product


class Stacked(Product):
    """Keys and values of several layers, of rows that are normed without a scale."""

    def __init__(self, layers: list[Layer], weight_OD: Tensor) -> None:
        super().__init__(tuple(part for each in layers for part in (each.key, each.value)))
        self.few = FewRows((0,) * len(SHARES))  # always at once: no second layout
        self._given_OD: Tensor | None = weight_OD
        self.pack()
        self._given_OD = None  # in memory once, as it is packed

    def _joined(self) -> Tensor:
        assert self._given_OD is not None, "packed already"
        return self._given_OD


class LateKeys:
    """Makes them for one model, whose layers the kernels of whole layers know (decoding.py)."""

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop
        self.is_able = workshop.device.type == "cpu" and workshop.dtype == torch.bfloat16
        self._weights: dict[tuple[range, str | None], _Weights] = {}

    def prepare(self) -> None:
        """Lay out now what repaired rows will read, rather than when a request first needs it."""
        mending = self._workshop.mending
        for name in mending.names if self.is_able else ():
            for block in self._blocks:
                if any(mending.repairs_keys(self._layer(at), name) for at in block):
                    _ = self._product(block, name)

    def begins(self, layers: range, left: Rows, packed: Packed) -> int:
        """From which of these layers on rows that leave them agree on their repair."""
        first = layers.stop
        if not self.is_able or not left.count:
            return first
        kinds = [packed.distinct_kinds[number] for number in np.unique(packed.kind_N[left.rows_R])]
        agreed = self._names(layers[-1], kinds)
        while first > layers.start and self._names(first - 1, kinds) == agreed:
            first -= 1
        return first if len(agreed) == 1 else layers.stop

    def place(
        self,
        layers: range,
        h_ND: Tensor,
        left: Rows,
        packed: Packed,
        placing: Placing,
        rotations: Rotations,
    ) -> None:
        """Leave keys and values of rows that ask nothing in any of these layers."""
        kind = packed.distinct_kinds[packed.kind_N[left.rows_R[0]]]
        name = self._workshop.mending.name(self._layer(layers[-1]), kind)
        h_RD = left.of(h_ND)
        normed: dict[float, Tensor] = {}
        into_PH = on_host(placing.rows_PH)
        for block in self._blocks:
            some = range(max(block.start, layers.start), min(block.stop, layers.stop))
            if not some:
                continue
            norm, layer = self._norm(block[0]), self._layer(block[0])
            if norm.epsilon not in normed:
                plain = CompiledNorm(np.ones_like(norm.scale_D), norm.epsilon)
                normed[norm.epsilon] = plain(h_RD, torch.bfloat16)
            made_RO = self._product(block, name).run(Reading(normed[norm.epsilon]))
            made_RMH = made_RO.view(left.count, -1, layer.shape.head_dim)
            rotation = rotations.get(layer.layer_type, rotations.get(None))
            turns = (_NO_TURN_RT, _NO_TURN_RT)
            if rotation is not None:
                turns = left.turn(rotation).on_host
            index_LRM = placing.places(left, slice(some.start, some.stop))
            skipped = (some.start - block.start) * index_LRM.shape[2]
            with TURN:
                _place(on_host(made_RMH), skipped, layer.shape.kv_heads, *turns, index_LRM, into_PH)

    def _layer(self, at: int) -> Layer:
        return self._workshop.layout.layers[at]

    def _norm(self, at: int) -> CompiledNorm:
        norm = self._workshop.attention_norms[at]
        assert isinstance(norm, CompiledNorm), "a layer that is not known"
        return norm

    def _names(self, at: int, kinds: Sequence[Kind]) -> set[str | None]:
        return {self._workshop.mending.name(self._layer(at), kind) for kind in kinds}

    @cached_property
    def _blocks(self) -> list[range]:
        """Layers side by side that are alike, but for the last one; from the end, as they leave."""
        blocks: list[range] = []
        stop = len(self._workshop.layout.layers) - 1
        while stop:
            first = stop - 1
            while first and stop - first < _TOGETHER and self._alike(first - 1, stop - 1):
                first -= 1
            blocks.append(range(first, stop))
            stop = first
        return blocks[::-1]

    def _alike(self, one: int, other: int) -> bool:
        forms = [
            (layer.layer_type, layer.shape, self._norm(at).epsilon, layer.key.bias_O is None)
            for at in (one, other)
            for layer in (self._layer(at),)
        ]
        return forms[0] == forms[1]

    def _product(self, block: range, name: str | None) -> Product:
        mending, layers = self._workshop.mending, [self._layer(at) for at in block]
        version = sum(mending.version(layer, name) for layer in layers)
        known = self._weights.get((block, name))
        if known is None or known.version != version:
            weights = [
                mending.folded(layer, part, name, torch.float32)
                * torch.from_numpy(self._norm(layer.index).scale_D)
                for layer in layers
                for part in (layer.key, layer.value)
            ]
            product = Stacked(layers, torch.cat(weights).to(self._workshop.dtype))
            known = self._weights[block, name] = _Weights(version, product)
        return known.product


_NO_TURN_RT = np.empty((0, 0), dtype=np.float32)


@compiled(parallel=True)
def _place(  # type: ignore[no-untyped-def]
    made_RMH, skipped, kv_heads, cos_RT, sin_RT, index_LRM, into_PH
):
    """Turn the keys of some layers, and write them and the values to the cache.

    Args:
        skipped: heads of layers that nobody asked for, in front.
    """
    layers, rows, heads = index_LRM.shape
    for row in prange(rows):
        for layer in range(layers):
            first = skipped + layer * heads
            of_layer_MH = made_RMH[row, first : first + heads]
            if cos_RT.shape[1]:
                _turn_row(of_layer_MH, kv_heads, cos_RT[row], sin_RT[row])
            for head in range(heads):
                into_H = into_PH[index_LRM[layer, row, head]]
                for h in range(len(into_H)):
                    into_H[h] = of_layer_MH[head, h]
