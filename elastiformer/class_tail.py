"""The late layers of items of which only class tokens go on: run by themselves.

The other tokens have left the rest of the layers out, and nobody makes their keys and values
(direct_reading.py): what they bring stays as it is, but for the norms that some families put
on the residual. So a layer is a few products of few rows, and what is read is normed once. On a CPU
that multiplies bfloat16 in tile registers it is one compiled call (tail_kernels.py).

Shape letters: N packed tokens   Q class tokens   D width
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastiformer import tail_kernels
from elastiformer.blocks import MOST_ROWS
from elastiformer.capacity import Site
from elastiformer.class_kernels import AS_IT_IS, NORMED, AffineNorm, affine_of, close
from elastiformer.direct_reading import Brought, DirectReading, reads_plainly
from elastiformer.families import Layer
from elastiformer.packed import Packed, Rows
from elastiformer.pointwise import Norm
from elastiformer.readings import Reading
from elastiformer.tail_kernels import Items
from elastiformer.tail_weights import Names, TailWeights
from elastiformer.taken import Taken
from elastiformer.workshop import Workshop


class ClassTail:
    """Runs them for one model."""

    def __init__(self, workshop: Workshop, direct: DirectReading) -> None:
        self._workshop, self._direct = workshop, direct
        self._weights = TailWeights(workshop, direct)
        self._closes = [_closes(layer) for layer in workshop.layout.layers]

    def first(self, packed: Packed) -> int:
        """The first of them in a step; the number of layers: there are none."""
        return max(kind.tail for kind in packed.distinct_kinds)

    def run(self, h_ND: Tensor, first: int, packed: Packed, taken: Taken) -> Tensor:
        """What the layers from `first` on leave; `h_ND` may be changed."""
        asking, layers = packed.outputs, self._workshop.layout.layers[first:]
        # What was normed once stays so, where each layer's norm differs in scale and shift alone.
        norms = [self._direct.norms[layer.index] for layer in layers]
        epsilons = {NORMED if each is None else each.epsilon for each in norms}
        norm, epsilon = None, epsilons.pop()
        if not epsilons and epsilon != NORMED and not reads_plainly(h_ND):
            norm = partial(F.layer_norm, normalized_shape=h_ND.shape[1:], eps=epsilon)
        once = norm is not None or epsilon == NORMED
        if once and self._may_be_whole(h_ND, first, packed):
            asking.put(h_ND, self._run_whole(h_ND, epsilon, layers, packed, taken))
            return h_ND
        h_QD, x_ND = asking.of(h_ND).clone(), h_ND if norm is None else norm(h_ND)
        for layer in layers:
            taken.keys(np.diff(packed.starts))
            asking.put(x_ND, h_QD if norm is None else norm(h_QD))
            brought = self._direct.brought(layer, x_ND, normed=norm is not None)
            h_QD = self._run_layer(layer, h_QD, brought, packed)
            if layer is not layers[-1]:
                x_ND = self._close(layer, x_ND)
        asking.put(h_ND, h_QD)
        return h_ND

    def _may_be_whole(self, h_ND: Tensor, first: int, packed: Packed) -> bool:
        """Whether each layer may be one compiled call."""
        if reads_plainly(h_ND) or not self._weights.takes(first):
            return False
        asking_C = np.diff(packed.bounds(packed.outputs))
        return bool((asking_C == asking_C[0]).all()) and 0 < asking_C[0] <= MOST_ROWS

    def _run_whole(
        self, h_ND: Tensor, epsilon: float, layers: Sequence[Layer], packed: Packed, taken: Taken
    ) -> Tensor:
        """What they leave of the class tokens' residual: [Q, D].

        Args:
            epsilon: of all their norms over what is read; NORMED: they have none.
        """
        asking = packed.outputs
        h_QD = asking.of(h_ND).float().clone()
        x_ND = tail_kernels.brought(h_ND, epsilon)
        items = Items(asking.rows_R, packed.bounds(asking), packed.starts)
        of_sides = dict[tuple[tuple[str, Rows], ...], tuple[Names, np.ndarray]]()
        for layer in layers:
            taken.keys(np.diff(packed.starts))
            repaired = tuple(self._workshop.mending.of_keys(layer, packed))
            if repaired not in of_sides:
                of_sides[repaired] = _sides(repaired, packed)
            names, side_N = of_sides[repaired]
            weights, is_last = self._weights.of(layer, names), layer is layers[-1]
            threads = torch.get_num_threads()
            tail_kernels.run(h_QD.numpy(), x_ND, side_N, items, weights, threads, is_last)
        return h_QD.to(h_ND.dtype)

    def _run_layer(self, layer: Layer, h_QD: Tensor, brought: Brought, packed: Packed) -> Tensor:
        """The residual of the class tokens after a layer."""
        asking, closes = packed.outputs, self._workshop.closes[layer.index]
        branch_QD = self._direct.branch(layer, h_QD, brought, asking, packed.everything, packed)
        h_QD = _joined(h_QD, branch_QD, layer.after_attention, closes.attention)
        return _joined(h_QD, self._mlp(layer, h_QD), layer.after_mlp, closes.mlp)

    def _mlp(self, layer: Layer, h_QD: Tensor) -> Tensor:
        """What the MLP adds to rows that run whole and are not repaired."""
        tools = self._workshop
        x_QD = tools.mlp_norms[layer.index](h_QD)
        out_QO = tools.at_site(layer, Site.MLP_IN).run(Reading(x_QD))
        gate = tools.gates[layer.index]
        a_QI = layer.activation(out_QO) if gate is None else gate(out_QO)
        return tools.at_site(layer, Site.MLP_OUT).run(Reading(a_QI.to(h_QD.dtype)))

    def _close(self, layer: Layer, x_ND: Tensor) -> Tensor:
        """The residual of the others after it."""
        closes, norms = self._workshop.closes[layer.index], self._closes[layer.index]
        if norms is not None and not reads_plainly(x_ND):
            if any(norm is not AS_IT_IS for norm in norms):
                close(x_ND, *norms)
            return x_ND
        for norm in closes:
            x_ND = x_ND if norm is None else norm(x_ND)
        return x_ND


def _sides(repaired: Sequence[tuple[str, Rows]], packed: Packed) -> tuple[Names, np.ndarray]:
    """The repairs of what is read, and which of them each row has: [N]."""
    side_N = np.zeros(packed.count, dtype=np.uint8)
    for place, (_, rows) in enumerate(repaired, 1):
        side_N[rows.rows_R] = place
    names = (None, *(name for name, _ in repaired))
    if not side_N.all():
        return names, side_N
    return names[1:], side_N - 1


def _joined(h_QD: Tensor, branch_QD: Tensor, after: nn.Module | None, norm: Norm | None) -> Tensor:
    branch_QD = branch_QD.to(h_QD.dtype)
    h_QD = h_QD + (branch_QD if after is None else after(branch_QD))
    return h_QD if norm is None else norm(h_QD)


def _closes(layer: Layer) -> tuple[AffineNorm, AffineNorm] | None:
    first, second = affine_of(layer.attention_close), affine_of(layer.mlp_close)
    return None if first is None or second is None else (first, second)
