"""The late layers of items of which only class tokens go on: run by themselves.

The other tokens have left the rest of the layers out, and nobody makes their keys and values
(direct_reading.py): what they bring stays as it is, but for the norms that some families put
on the residual. So a layer is a few products of few rows, and what is read is normed once. On a CPU
that multiplies bfloat16 in tile registers it is one compiled call (tail_calls.py), and items enter
one after the other; elsewhere all that a step holds, once the last one may.

Shape letters: N packed tokens   Q class tokens   D width
"""

from __future__ import annotations

from functools import partial

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from elastiformer.blocks import MOST_ROWS
from elastiformer.capacity import Site
from elastiformer.class_kernels import AS_IT_IS, NORMED, AffineNorm, affine_of, close
from elastiformer.direct_reading import Brought, DirectReading, reads_plainly
from elastiformer.families import Layer
from elastiformer.packed import Packed
from elastiformer.pointwise import Norm
from elastiformer.readings import Reading
from elastiformer.tail_calls import TailCalls
from elastiformer.tail_weights import TailWeights
from elastiformer.taken import Taken
from elastiformer.workshop import Workshop


class ClassTail:
    """Runs them for one model."""

    def __init__(self, workshop: Workshop, direct: DirectReading) -> None:
        self._workshop, self._direct = workshop, direct
        self._weights = TailWeights(workshop, direct)
        self._closes = [_closes(layer) for layer in workshop.layout.layers]

    def run(self, h_ND: Tensor, first: int, packed: Packed, taken: Taken) -> Tensor:
        """What the layers from `first` on leave; `h_ND` may be changed."""
        asking, layers = packed.outputs, self._workshop.layout.layers[first:]
        norm, epsilon = None, self._normed_once(first)
        if epsilon is not None and epsilon != NORMED and not reads_plainly(h_ND):
            norm = partial(F.layer_norm, normalized_shape=h_ND.shape[1:], eps=epsilon)
        h_QD, x_ND = asking.of(h_ND).clone(), h_ND if norm is None else norm(h_ND)
        for layer in layers:
            taken.keys()
            asking.put(x_ND, h_QD if norm is None else norm(h_QD))
            brought = self._direct.brought(layer, x_ND, normed=norm is not None)
            h_QD = self._run_layer(layer, h_QD, brought, packed)
            if layer is not layers[-1]:
                x_ND = self._close(layer, x_ND)
        asking.put(h_ND, h_QD)
        return h_ND

    def calls(self, h_ND: Tensor, first: int, packed: Packed) -> TailCalls | None:
        """What runs the layers from `first` on, each in one compiled call; None: it cannot."""
        epsilon = self._normed_once(first)
        if epsilon is None or reads_plainly(h_ND) or not self._weights.takes(first):
            return None
        asking_C = np.diff(packed.bounds(packed.outputs))
        if (asking_C != asking_C[0]).any() or not 0 < asking_C[0] <= MOST_ROWS:
            return None
        return TailCalls(self._workshop, self._weights, epsilon, h_ND, packed)

    def _normed_once(self, first: int) -> float | None:
        """What all norms from a layer on have in common, so that what was normed once stays so.

        NORMED: there are none, over what is read; None: they differ in more than scale and shift.
        """
        norms = self._direct.norms[first:]
        epsilons = {NORMED if each is None else each.epsilon for each in norms}
        return epsilons.pop() if len(epsilons) == 1 else None

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


def _joined(h_QD: Tensor, branch_QD: Tensor, after: nn.Module | None, norm: Norm | None) -> Tensor:
    branch_QD = branch_QD.to(h_QD.dtype)
    h_QD = h_QD + (branch_QD if after is None else after(branch_QD))
    return h_QD if norm is None else norm(h_QD)


def _closes(layer: Layer) -> tuple[AffineNorm, AffineNorm] | None:
    first, second = affine_of(layer.attention_close), affine_of(layer.mlp_close)
    return None if first is None or second is None else (first, second)
