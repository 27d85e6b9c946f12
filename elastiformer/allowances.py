"""What the rows of one step take of the channels granted to them, and what their requests then owe.

Rows of phase output whose plans leave out nothing but channels take by thresholds (thresholds.py),
where calibration has found some. Others take what they are granted; so does position 0, to which
every token attends and whose sizes are like no other's.

Shape letters: L layers   T sites   G rungs   N packed tokens   R rows   C chunks   I inputs
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from elastiformer.capacity import Phase
from elastiformer.packed import Packed, Rows
from elastiformer.thresholds import take


class Beyond(NamedTuple):
    """What each row took beyond its grants, or below them: counts, [N]."""

    products_N: np.ndarray  # multiply-adds
    channels_N: np.ndarray


class Allowances:
    """Of one step."""

    def __init__(
        self, packed: Packed, ladder_LTG: np.ndarray, outputs_LT: np.ndarray, owner_N: np.ndarray
    ) -> None:
        """
        Args:
            outputs_LT: of the products at each site, side by side.
            owner_N: each row's chunk; below 0: it takes what it is granted.
        """
        self._packed, self.ladder_LTG, self._outputs_LT = packed, ladder_LTG, outputs_LT
        self.owner_N = owner_N
        nothing_LT = np.zeros(ladder_LTG.shape[:2], dtype=np.int64)
        debts = [chunk.sequence.channel_debts for chunk in packed.chunks]
        self.debts_LTC = np.stack([nothing_LT if each is None else each for each in debts], axis=2)
        nothing_N = np.zeros(packed.count, dtype=np.int64)
        self.beyond = Beyond(nothing_N, nothing_N.copy())
        self._at = (-1, -1)
        self._taken_N = np.empty(packed.count, dtype=np.int64)
        self._least_N = np.empty(packed.count, dtype=np.float32)

    @classmethod
    def of(
        cls, packed: Packed, ladder_LTG: np.ndarray | None, outputs_LT: np.ndarray
    ) -> Allowances | None:
        """None where every row takes what it is granted."""
        if ladder_LTG is None or not packed.picks:
            return None
        takes_K = np.array(
            [kind.phase is Phase.OUTPUT and kind.plan.only_picks for kind in packed.distinct_kinds]
        )
        chunk_N = np.repeat(np.arange(len(packed.chunks)), np.diff(packed.starts))
        takes_N = takes_K[packed.kind_N] & (np.array(packed.positions) > 0)
        if not takes_N.any():
            return None
        return cls(packed, ladder_LTG, outputs_LT, np.where(takes_N, chunk_N, -1))

    def take(
        self,
        layer: int,
        site: int,
        rows: Rows,
        x_RI: np.ndarray,
        norms_I: np.ndarray,
        granted: int | np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many channels the rows take, and what those reach (or SEARCHED): int64, float32 [R].

        What reads the same site again, some of its rows, is told the same.
        """
        at_R = rows.rows_R
        if self._at == (layer, site):
            return self._taken_N[at_R], self._least_N[at_R]
        granted_R = np.broadcast_to(np.asarray(granted, dtype=np.int64), len(at_R))
        owner_R, debts_C = self.owner_N[at_R], self.debts_LTC[layer, site]
        taken_R, least_R = take(
            x_RI, norms_I, self.ladder_LTG[layer, site], granted_R.copy(), owner_R, debts_C
        )
        self._at = (layer, site)
        self._taken_N[at_R], self._least_N[at_R] = taken_R, least_R
        self.beyond.channels_N[at_R] += taken_R - granted_R
        self.beyond.products_N[at_R] += (taken_R - granted_R) * self._outputs_LT[layer, site]
        return taken_R, least_R

    def settle(self) -> None:
        """Leave each request with what it owes now."""
        debts_CLT = np.ascontiguousarray(self.debts_LTC.transpose(2, 0, 1))
        for chunk, debts_LT in zip(self._packed.chunks, debts_CLT, strict=True):
            chunk.sequence.channel_debts = debts_LT
