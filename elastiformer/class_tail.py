"""The late layers of items of which only class tokens go on: run by themselves.

The other tokens have left the rest of the layers out, and nobody makes their keys and values
(direct_reading.py): what they bring stays as it is, but for the norms that some families put
on the residual. So a layer is a few products of few rows, and what is read is normed once.

Shape letters: N packed tokens   Q class tokens   D width
"""

from __future__ import annotations

from functools import partial

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from elastiformer.capacity import Phase
from elastiformer.direct_reading import DirectReading, reads_plainly
from elastiformer.families import Layer
from elastiformer.packed import Packed
from elastiformer.pointwise import in_type
from elastiformer.readings import Values
from elastiformer.sequence import Kind
from elastiformer.sparse_mlp import SparseMlp
from elastiformer.taken import Taken
from elastiformer.workshop import Workshop


def leaves_at(kind: Kind) -> int:
    """The layer from which on, of this kind's tokens, class tokens run whole and others nothing."""
    last = len(kind.plan.plan) - 1
    first = last + 1
    while first and first - 1 in kind.plan.direct:
        first -= 1
    if first > last or kind.phase is Phase.OUTPUT:
        return first
    return max(first, kind.plan.left_from)


class ClassTail:
    """Runs them for one model."""

    def __init__(self, workshop: Workshop, mlp: SparseMlp, direct: DirectReading) -> None:
        self._workshop, self._mlp, self._direct = workshop, mlp, direct

    def first(self, packed: Packed) -> int:
        """The first of them in a step; the number of layers: there are none."""
        return max(map(leaves_at, packed.distinct_kinds))

    def run(self, h_ND: Tensor, first: int, packed: Packed, taken: Taken) -> Tensor:
        """What the layers from `first` on leave; `h_ND` may be changed."""
        tools, asking = self._workshop, packed.outputs
        layers = tools.layout.layers[first:]
        # What was normed once stays so, where each layer's norm differs in scale and shift alone.
        epsilons = {_epsilon(layer.attention_norm) for layer in layers}
        norm, epsilon = None, epsilons.pop()
        if not epsilons and epsilon is not None and not reads_plainly(h_ND):
            norm = partial(F.layer_norm, normalized_shape=h_ND.shape[1:], eps=epsilon)
        h_QD, x_ND = asking.of(h_ND).clone(), h_ND if norm is None else norm(h_ND)
        for layer, closes in zip(layers, tools.closes[first:], strict=True):
            taken.keys(np.diff(packed.starts))
            asking.put(x_ND, h_QD if norm is None else norm(h_QD))
            brought = self._direct.brought(layer, x_ND, normed=norm is not None)
            branch_QD = self._direct.branch(layer, h_QD, brought, asking, packed)
            after = layer.after_attention
            h_QD = h_QD + (branch_QD if after is None else after(branch_QD.to(h_QD.dtype)))
            if closes.attention is not None:
                h_QD, x_ND = closes.attention(h_QD), closes.attention(x_ND)
            branch_QD = self._mlp.branch(layer, self._values(layer, h_QD), packed, asking)
            after = layer.after_mlp
            h_QD = h_QD + (branch_QD if after is None else after(branch_QD.to(h_QD.dtype)))
            if closes.mlp is not None:
                h_QD, x_ND = closes.mlp(h_QD), closes.mlp(x_ND)
        asking.put(h_ND, h_QD)
        return h_ND

    def _values(self, layer: Layer, h_QD: Tensor) -> Values:
        norm = self._workshop.mlp_norms[layer.index]
        return Values(h_QD, h_QD.dtype, partial(in_type, norm), own=False)


def _epsilon(norm: nn.Module) -> float | None:
    return norm.eps if isinstance(norm, nn.LayerNorm) and norm.bias is not None else None
