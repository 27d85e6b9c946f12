"""What the rows of one step take of the channels granted to them, and what their requests then owe.

Rows of phase output whose plans leave out nothing but channels take by thresholds (thresholds.py),
where calibration has found some. Others take what they are granted; so does position 0, to which
every token attends and whose sizes are like no other's.

Shape letters: L layers   T sites   G rungs   N packed tokens   R rows   C requests   I inputs
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from elastiformer.sequence import Sequence as Owner
from elastiformer.thresholds import take


class Beyond(NamedTuple):
    """What each row took beyond its grants, or below them: counts, [N]."""

    products_N: np.ndarray  # multiply-adds
    channels_N: np.ndarray


class Allowances:
    """Of one step, in which some rows take by thresholds.

    Args:
        owners: the requests, each with its rows side by side.
        owner_N: each row's request; below 0: it takes what it is granted.
        outputs_LT: of the products at each site, side by side.
    """

    def __init__(
        self,
        owners: Sequence[Owner],
        owner_N: np.ndarray,
        ladder_LTG: np.ndarray,
        outputs_LT: np.ndarray,
    ) -> None:
        self._owners, self.owner_N = owners, owner_N
        self.ladder_LTG, self._outputs_LT = ladder_LTG, outputs_LT
        nothing_LT = np.zeros(ladder_LTG.shape[:2], dtype=np.int64)
        debts = [owner.channel_debts for owner in owners]
        self.debts_LTC = np.stack([nothing_LT if each is None else each for each in debts], axis=2)
        rows = len(owner_N)
        self.beyond = Beyond(np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64))
        self._at = (-1, -1)
        self._taken_N, self._least_N = np.empty(rows, dtype=np.int64), np.empty(rows, np.float32)

    def take(
        self,
        layer: int,
        site: int,
        rows_R: np.ndarray,
        x_RI: np.ndarray,
        norms_I: np.ndarray,
        granted: int | np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many channels the rows take, and what those reach (or SEARCHED): int64, float32 [R].

        What reads the same site again, some of its rows, is told the same.
        """
        if self._at == (layer, site):
            return self._taken_N[rows_R], self._least_N[rows_R]
        granted_R = np.full(len(rows_R), granted, dtype=np.int64)
        taken_R, least_R = take(
            x_RI,
            norms_I,
            self.ladder_LTG[layer, site],
            granted_R,
            self.owner_N[rows_R],
            self.debts_LTC[layer, site],
        )
        self._at = (layer, site)
        self._taken_N[rows_R], self._least_N[rows_R] = taken_R, least_R
        self.beyond.channels_N[rows_R] += taken_R - granted_R
        self.beyond.products_N[rows_R] += (taken_R - granted_R) * self._outputs_LT[layer, site]
        return taken_R, least_R

    def settle(self) -> None:
        """Leave each request with what it owes now."""
        debts_CLT = np.ascontiguousarray(self.debts_LTC.transpose(2, 0, 1))
        for owner, debts_LT in zip(self._owners, debts_CLT, strict=True):
            owner.channel_debts = debts_LT
