"""How many channels a token takes of those that its plan grants: as many as reach a threshold.

Tokens differ in how many of their channels matter. So every site has one ladder of thresholds for
all tokens, quantiles of the sizes of held-out text, and a token takes what reaches the rung of its
share, be it more or less than granted. What a request has taken beyond its grants is its debt at
that site, a sixteenth of which moves the rung of the next token, and of what is beyond one token's
grant five times as much: so the mean of a request is what was granted, whatever its text, and no
later token has a say. Debts are whole numbers of channels, so that all forms of the computation
take the same.

Shape letters: N rows of a step   R some of them   S R + 1   K kinds of rows   I inputs
    O owners: requests   L layers   T sites   G rungs of a ladder, of which rung g is what a share
    of g / (G - 1) reaches
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from elastiformer.calibration import Quantiles
from elastiformer.kernels import TURN, compiled

SEARCHED = np.float32(-1)  # in place of a threshold: a row's channels are counted, not compared
_ALONE = 4  # so few rows that take anything are faster in turn
_COUNTED = 5  # rungs around the granted one, beyond which debts seldom lead
PATIENCE = 16  # tokens over which a debt is paid back
# By so much sooner beyond a grant: text unlike any other, a word again and again, stays in debt.
HASTE = 5
# Counts of ones are exact in any order.
_ANY_ORDER: Any = {"fastmath": {"contract", "reassoc", "nsz"}}


@lru_cache(maxsize=16)
def ladders(quantiles: Quantiles) -> np.ndarray | None:
    """The ladders of all layers and sites, float32 [L, T, G]; None where nothing was measured."""
    if not quantiles:
        return None
    ladder_LTG = np.array(quantiles, dtype=np.float32)[:, :, ::-1].copy()
    ladder_LTG[:, :, -1] = 0  # what is least of all in other text, too
    return ladder_LTG


class Grants(NamedTuple):
    """How many channels the rows of a step may take, and what their requests owe.

    Args:
        ladder_LTG: of no rungs, where every row takes what it is granted.
        channels_LTK: granted, by kind.
        owner_N: each row's request; below 0: it takes what it is granted.
        debts_LTO: channels taken beyond what was granted; brought up to date.
        products_N, channels_N: multiply-adds and channels beyond what was granted; added to.
    """

    ladder_LTG: np.ndarray
    channels_LTK: np.ndarray
    kind_N: np.ndarray
    owner_N: np.ndarray
    debts_LTO: np.ndarray
    products_N: np.ndarray
    channels_N: np.ndarray

    def of(self, layers: slice) -> Grants:
        """What some of the layers need of it."""
        return self._replace(
            ladder_LTG=self.ladder_LTG[layers],
            channels_LTK=self.channels_LTK[layers],
            debts_LTO=self.debts_LTO[layers],
        )


def take(
    x_RI: np.ndarray,
    norms_I: np.ndarray,
    grants: Grants,
    layer: int,
    site: int,
    rows_R: np.ndarray,
    outputs: int,
    apart: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Where each row's channels begin, and the last ones end; and the size x norm they all reach.

    Args:
        x_RI: rows of one owner in the order of their positions.
        rows_R: which of the step's rows these are.
        outputs: of the products that read these channels.
        apart: whether no two of the rows are one request's.

    Returns:
        int64 [S], and float32 [R], SEARCHED for a row that takes what it is granted.
    """
    start_S = np.empty(len(x_RI) + 1, dtype=np.int64)
    least_R = np.empty(len(x_RI), dtype=np.float32)
    arguments = (x_RI, norms_I, grants, layer, site, rows_R, outputs, start_S, least_R)
    if np.count_nonzero(grants.owner_N[rows_R] >= 0) <= _ALONE:
        _take(*arguments)
    else:
        with TURN:
            (_take_side_by_side if apart else _take_in_order)(*arguments)
    return start_S, least_R


@compiled(**_ANY_ORDER)
def _count_reaching(x_I, norms_I, least):  # type: ignore[no-untyped-def]
    """How many sizes x norm reach the least; what is no number does."""
    count = np.float32(0)
    for i in range(len(x_I)):
        count += np.float32(0) if abs(x_I[i]) * norms_I[i] < least else np.float32(1)
    return np.int64(count)


@compiled(**_ANY_ORDER)
def _count_five(x_I, norms_I, least_J, counts_J):  # type: ignore[no-untyped-def]
    """The same for five at once, which reads the sizes once."""
    a, b, c, d, e = least_J[0], least_J[1], least_J[2], least_J[3], least_J[4]
    zero, one = np.float32(0), np.float32(1)
    of_a, of_b, of_c, of_d, of_e = zero, zero, zero, zero, zero
    for i in range(len(x_I)):
        size = abs(x_I[i]) * norms_I[i]
        of_a += zero if size < a else one
        of_b += zero if size < b else one
        of_c += zero if size < c else one
        of_d += zero if size < d else one
        of_e += zero if size < e else one
    counts_J[0], counts_J[1], counts_J[2] = np.int64(of_a), np.int64(of_b), np.int64(of_c)
    counts_J[3], counts_J[4] = np.int64(of_d), np.int64(of_e)


@compiled(inline="always")
def _rung(rungs, inputs, granted, debt):  # type: ignore[no-untyped-def]
    """The one nearest to what is granted less the part of the debt that is due."""
    beyond = debt - min(max(debt, -granted), granted)
    wanted = PATIENCE * granted - debt - (HASTE - 1) * beyond
    rung = (2 * rungs * wanted + PATIENCE * inputs) // (2 * PATIENCE * inputs)
    return min(max(rung, 1), rungs)


@compiled()
def _take_rows(  # type: ignore[no-untyped-def]
    x_RI, norms_I, grants, layer, site, rows_R, outputs, first_R, counts_RJ, start_S, least_R
):
    """Row by row, as each moves its request's debt.

    Args:
        first_R, counts_RJ: how many reach the rungs from the first on; of no rows: not counted.
    """
    ladder_G, channels_K = grants.ladder_LTG[layer, site], grants.channels_LTK[layer, site]
    debts_O, inputs = grants.debts_LTO[layer, site], x_RI.shape[1]
    # Within the loop each look into a tuple, or call, would cost as much as the rest.
    owner_N, kind_N, over_N, products_N = (
        grants.owner_N, grants.kind_N, grants.channels_N, grants.products_N
    )  # fmt: skip
    start_S[0] = 0
    for place in range(len(x_RI)):
        row = rows_R[place]
        owner, granted = owner_N[row] if len(owner_N) else -1, min(channels_K[kind_N[row]], inputs)
        taken, least = granted, SEARCHED
        if owner >= 0 and granted < inputs:
            rung = _rung(len(ladder_G) - 1, inputs, granted, debts_O[owner])
            known, least = rung - first_R[place] if len(first_R) else -1, ladder_G[rung]
            if 0 <= known < counts_RJ.shape[1]:
                taken = counts_RJ[place, known]
            else:
                taken = _count_reaching(x_RI[place], norms_I, least)
            debts_O[owner] += taken - granted
            over_N[row] += taken - granted
            products_N[row] += (taken - granted) * outputs
        start_S[place + 1], least_R[place] = start_S[place] + taken, least


@compiled()
def _take(x_RI, norms_I, grants, layer, site, rows_R, outputs, start_S, least_R):  # type: ignore[no-untyped-def]
    first_0, counts_0J = np.empty(0, dtype=np.int64), np.empty((0, _COUNTED), dtype=np.int64)
    _take_rows(
        x_RI, norms_I, grants, layer, site, rows_R, outputs, first_0, counts_0J, start_S, least_R
    )


@compiled(parallel=True)
def _take_in_order(x_RI, norms_I, grants, layer, site, rows_R, outputs, start_S, least_R):  # type: ignore[no-untyped-def]
    """The same of many rows of a request: counted at the likely rungs before debts are known."""
    rows, inputs = x_RI.shape
    ladder_G, channels_K = grants.ladder_LTG[layer, site], grants.channels_LTK[layer, site]
    owner_N, kind_N, last = grants.owner_N, grants.kind_N, len(ladder_G) - _COUNTED
    first_R = np.empty(rows if last >= 0 else 0, dtype=np.int64)
    counts_RJ = np.empty((rows, _COUNTED), dtype=np.int64)
    for place in prange(len(first_R)):
        row = rows_R[place]
        granted = min(channels_K[kind_N[row]], inputs)
        if owner_N[row] >= 0 and granted < inputs:
            middle = _rung(len(ladder_G) - 1, inputs, granted, 0)
            first = max(min(middle - _COUNTED // 2, last), 0)
            first_R[place] = first
            _count_five(x_RI[place], norms_I, ladder_G[first : first + _COUNTED], counts_RJ[place])
    _take_rows(
        x_RI, norms_I, grants, layer, site, rows_R, outputs, first_R, counts_RJ, start_S, least_R
    )


@compiled(parallel=True)
def _take_side_by_side(x_RI, norms_I, grants, layer, site, rows_R, outputs, start_S, least_R):  # type: ignore[no-untyped-def]
    """The same of rows that are each a request's, whose debts are known."""
    rows, inputs = x_RI.shape
    ladder_G, channels_K = grants.ladder_LTG[layer, site], grants.channels_LTK[layer, site]
    owner_N, kind_N, debts_O = grants.owner_N, grants.kind_N, grants.debts_LTO[layer, site]
    first_R = np.empty(rows if len(owner_N) else 0, dtype=np.int64)
    counts_R1 = np.empty((rows, 1), dtype=np.int64)
    for place in prange(len(first_R)):
        row = rows_R[place]
        owner, granted = owner_N[row], min(channels_K[kind_N[row]], inputs)
        if owner >= 0 and granted < inputs:
            rung = _rung(len(ladder_G) - 1, inputs, granted, debts_O[owner])
            first_R[place] = rung
            counts_R1[place, 0] = _count_reaching(x_RI[place], norms_I, ladder_G[rung])
    _take_rows(
        x_RI, norms_I, grants, layer, site, rows_R, outputs, first_R, counts_R1, start_S, least_R
    )
