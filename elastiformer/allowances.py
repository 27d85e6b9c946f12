"""What the rows of one step take of the channels granted to them, and what their requests then owe.

Rows of phase output whose plans leave out nothing but channels take by thresholds (thresholds.py),
where calibration has found some. Others take what they are granted; so does position 0, to which
every token attends and whose sizes are like no other's.

Shape letters: L layers   T sites   G rungs   N packed tokens   R rows   S R + 1   I inputs
    K kinds of rows   O requests   X request x layer
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elastiformer.sequence import Sequence as Owner
from elastiformer.thresholds import SEARCHED, Grants, take


def owed(owners: Sequence[Owner], layers: int, sites: int) -> np.ndarray:
    """What the requests owe now: int64 [L, T, O], nobody else's to write to."""
    nothing_LT = np.zeros((layers, sites), dtype=np.int64)
    debts = [owner.channel_debts for owner in owners]
    # One after another they are joined without a look at each.
    debts_XT = np.concatenate([nothing_LT if each is None else each for each in debts])
    return np.ascontiguousarray(debts_XT.reshape(-1, layers, sites).transpose(1, 2, 0))


def leave(owners: Sequence[Owner], debts_LTO: np.ndarray) -> None:
    """Leave each request with what it owes now."""
    debts_OLT = np.ascontiguousarray(debts_LTO.transpose(2, 0, 1))
    for owner, debts_LT in zip(owners, debts_OLT, strict=True):
        owner.channel_debts = debts_LT


class Allowances:
    """Of one step, in which some rows take by thresholds.

    Args:
        owners: the requests, each with its rows side by side.
        owner_N: each row's request; below 0: it takes what it is granted.
        channels_LTK: granted, by kind.
        outputs_LT: of the products at each site, side by side.
    """

    def __init__(
        self,
        owners: Sequence[Owner],
        owner_N: np.ndarray,
        channels_LTK: np.ndarray,
        kind_N: np.ndarray,
        ladder_LTG: np.ndarray,
        outputs_LT: np.ndarray,
    ) -> None:
        self._owners, self._outputs_LT = owners, outputs_LT
        debts_LTO = owed(owners, *ladder_LTG.shape[:2])
        beyond_N = [np.zeros(len(owner_N), dtype=np.int64) for _ in range(2)]
        self.grants = Grants(ladder_LTG, channels_LTK, kind_N, owner_N, debts_LTO, *beyond_N)
        self._apart = len(owners) == len(owner_N)
        self._at, self._rows_R = (-1, -1), np.empty(0, dtype=np.int64)
        self._start_S, self._least_R = np.zeros(1, np.int64), np.empty(0, np.float32)

    def take(
        self, layer: int, site: int, rows_R: np.ndarray, x_RI: np.ndarray, norms_I: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows' channels begin, and what they reach, as `thresholds.take` says.

        What reads the same site again is told the same of the same rows; of others, which pick
        nothing, that they take all.
        """
        if self._at != (layer, site):
            outputs = int(self._outputs_LT[layer, site])
            self._at, self._rows_R = (layer, site), rows_R
            self._start_S, self._least_R = take(
                x_RI, norms_I, self.grants, layer, site, rows_R, outputs, self._apart
            )
            return self._start_S, self._least_R
        at_R = np.minimum(np.searchsorted(self._rows_R, rows_R), len(self._rows_R) - 1)
        told_R = self._rows_R[at_R] == rows_R
        start_S = np.zeros(len(rows_R) + 1, dtype=np.int64)
        taken_R = np.where(told_R, np.diff(self._start_S)[at_R], x_RI.shape[1])
        np.cumsum(taken_R, out=start_S[1:])
        return start_S, np.where(told_R, self._least_R[at_R], SEARCHED)

    @property
    def beyond(self) -> tuple[np.ndarray, np.ndarray]:
        """What each row took beyond its grants: multiply-adds and channels, [N]."""
        return self.grants.products_N, self.grants.channels_N

    def settle(self) -> None:
        """Leave each request with what it owes now."""
        leave(self._owners, self.grants.debts_LTO)
