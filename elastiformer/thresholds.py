"""How many channels a token takes of those that its plan grants: as many as reach a threshold.

Tokens differ in how many of their channels matter. So every site has one ladder of thresholds for
all tokens, quantiles of the sizes of held-out text, and a token takes what reaches the rung of its
share, be it more or less than granted. What a request has taken beyond its grants is its debt at
that site, a sixteenth of which moves the rung of the next token: so the mean of a request is what
was granted, whatever its text, and no later token has a say. Debts are whole numbers of channels,
so that all forms of the computation take the same.

Shape letters: R rows   I inputs   O owners: requests   L layers   T sites   G rungs of a ladder,
    of which rung g is what a share of g / (G - 1) reaches
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from elastiformer.calibration import Quantiles
from elastiformer.kernels import compiled

SEARCHED = np.float32(-1)  # in place of a threshold: a row's channels are counted, not compared
_PATIENCE = 16  # tokens over which a debt is paid back
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


def take(
    x_RI: np.ndarray,
    norms_I: np.ndarray,
    ladder_G: np.ndarray,
    granted_R: np.ndarray,
    owner_R: np.ndarray,
    debts_O: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """How many channels each row takes, and the size x norm that all of them reach: int64, float32.

    Args:
        x_RI: rows of one owner in the order of their positions.
        granted_R: all inputs: the row is whole, and owes nothing.
        owner_R: below 0: the row takes what it is granted, and its channels are searched for.
        debts_O: channels taken beyond what was granted; brought up to date, in place.
    """
    taken_R = np.empty(len(x_RI), dtype=np.int64)
    least_R = np.empty(len(x_RI), dtype=np.float32)
    _take(x_RI, norms_I, ladder_G, granted_R, owner_R, debts_O, taken_R, least_R)
    return taken_R, least_R


@compiled(**_ANY_ORDER)
def _count_reaching(x_I, norms_I, least):  # type: ignore[no-untyped-def]
    """How many sizes x norm reach the least; what is no number does."""
    count = np.float32(0)
    for i in range(len(x_I)):
        count += np.float32(0) if abs(x_I[i]) * norms_I[i] < least else np.float32(1)
    return np.int64(count)


@compiled()
def _threshold(ladder_G, inputs, granted, debt):  # type: ignore[no-untyped-def]
    """The rung nearest to what is granted less the part of the debt that is due."""
    rungs = len(ladder_G) - 1
    wanted = _PATIENCE * granted - debt
    rung = (2 * rungs * wanted + _PATIENCE * inputs) // (2 * _PATIENCE * inputs)
    return ladder_G[min(max(rung, 1), rungs)]


@compiled()
def _take(x_RI, norms_I, ladder_G, granted_R, owner_R, debts_O, taken_R, least_R):  # type: ignore[no-untyped-def]
    inputs = x_RI.shape[1]
    for row in range(len(x_RI)):
        owner, granted = owner_R[row], granted_R[row]
        taken_R[row], least_R[row] = granted, SEARCHED
        if owner >= 0 and granted < inputs:
            least = _threshold(ladder_G, inputs, granted, debts_O[owner])
            taken = _count_reaching(x_RI[row], norms_I, least)
            debts_O[owner] += taken - granted
            taken_R[row], least_R[row] = taken, least
