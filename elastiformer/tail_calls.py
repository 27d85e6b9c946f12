"""The late layers of one step's class tokens, each in one compiled call, whoever else still runs.

Items of different capacities reach the layer from which only their class tokens go on
(class_tail.py) at different depths. A step has those in front that reach it last: what runs
whole stands together, and behind it is what these calls run, more of it from stage to stage.

Shape letters: N packed tokens   Q class tokens   D width   C items, and one more
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from elastiformer import tail_kernels
from elastiformer.families import Layer
from elastiformer.packed import Packed, Rows
from elastiformer.tail_kernels import Items
from elastiformer.tail_weights import Names, TailWeights
from elastiformer.workshop import Workshop


class TailCalls:
    """What runs them in one step."""

    def __init__(
        self, workshop: Workshop, weights: TailWeights, epsilon: float, h_ND: Tensor, packed: Packed
    ) -> None:
        """
        Args:
            epsilon: of all their norms over what is read; NORMED: they have none.
        """
        self._workshop, self._weights, self._epsilon = workshop, weights, epsilon
        self._packed, self._asking = packed, packed.outputs
        self._ask_C = packed.bounds(self._asking)
        self._x_ND = tail_kernels.room_for(h_ND)
        self._h_QD = torch.empty(self._asking.count, h_ND.shape[1])
        self._first = len(packed.chunks)  # of the items that they run
        self._sides: dict[tuple[tuple[str, Rows], ...], tuple[Names, np.ndarray]] = {}

    def take(self, h_ND: Tensor, first: int) -> None:
        """From now on run the items from `first` on, too.

        Args:
            h_ND: the residual of all that were not run here before.
        """
        begin, end = self._packed.starts[[first, self._first]].tolist()
        asking = slice(*self._ask_C[[first, self._first]].tolist())
        tail_kernels.bring(h_ND[begin:end], self._epsilon, self._x_ND[begin:end])
        self._h_QD[asking] = h_ND[self._asking.index_R[asking]].float()
        self._first = first
        self._sides.clear()

    def run(self, layer: Layer, is_last: bool) -> None:
        """Run a layer of what was taken so far."""
        repaired = tuple(self._workshop.mending.of_keys(layer, self._packed))
        if repaired not in self._sides:
            begin = int(self._packed.starts[self._first])
            self._sides[repaired] = _sides(repaired, self._packed.count, begin)
        names, side_N = self._sides[repaired]
        first, ask = self._first, int(self._ask_C[self._first])
        items = Items(
            self._asking.rows_R[ask:], self._ask_C[first:] - ask, self._packed.starts[first:]
        )
        tail_kernels.run(
            self._h_QD[ask:].numpy(),
            self._x_ND,
            side_N,
            items,
            self._weights.of(layer, names),
            torch.get_num_threads(),
            is_last,
        )

    def put(self, h_ND: Tensor) -> None:
        """Leave the residual of their class tokens in that of all rows."""
        ask = int(self._ask_C[self._first])
        h_ND[self._asking.index_R[ask:]] = self._h_QD[ask:].to(h_ND.dtype)


def _sides(
    repaired: Sequence[tuple[str, Rows]], count: int, begin: int
) -> tuple[Names, np.ndarray]:
    """The repairs of the rows from `begin` on, and which of them each row has: [N]."""
    side_N = np.zeros(count, dtype=np.uint8)
    names = list[str | None]([None])
    for name, rows in repaired:
        some_R = rows.rows_R[np.searchsorted(rows.rows_R, begin) :]
        if len(some_R):
            side_N[some_R] = len(names)
            names.append(name)
    if not side_N[begin:].all():
        return tuple(names), side_N
    side_N[begin:] -= 1
    return tuple(names[1:]), side_N
