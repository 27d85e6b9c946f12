"""What rows of a step with prompts take of their channels, on a GPU: told to kernels, and done.

Of a request that decodes, or whose prompt ends, one row takes: how many reach its threshold is
what it owes (`kernels.take`). Of a text that is scored many do, each of which owes what those
before it took: so their channels are counted at all rungs at once, the rungs then follow from one
row to the next, and every row is left with what reaches its own. Where a text begins a row takes
what it is granted, the largest.

Shape letters: R rows of a set   J rows that take by thresholds   Q requests that they belong to
    Z rows that take what they are granted   L layers   T sites   I inputs
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from elastiformer import device_kernels as kernels
from elastiformer.device_allowances import AmongOthers
from elastiformer.device_kernels import At, Takes
from elastiformer.packed import Packed
from elastiformer.workshop import SITES


class TakingSizes(NamedTuple):
    """How many rows take, filled up."""

    takers: int
    owners: int  # 0: each taker is another request's
    roots: int


class Takers(NamedTuple):
    """Where rows that take stand in a set: int64; of takers, below 0: not there."""

    takers_J: Tensor
    roots_Z: Tensor


class Taking:
    """What the rows of one step take, by names of what the kernels are told."""

    def __init__(self, sizes: TakingSizes, named: dict[str, Tensor], ladder_LTG: Tensor) -> None:
        self._sizes, self._named, self._ladder_LTG = sizes, named, ladder_LTG
        self.owed = torch.zeros_like(named["debts"])

    def begin(self) -> None:
        self.owed.copy_(self._named["debts"])

    def take(self, x_RI: Tensor, takers: Takers, norms_I: Tensor, layer: int, site: int) -> None:
        """Leave of the rows of a set what they take, in place."""
        named = self._named
        if self._sizes.roots:
            _leave_largest(x_RI, takers.roots_Z, norms_I, named["granted of roots"][layer, site])
        if not self._sizes.takers:
            return
        takes = Takes(named["takes"], named["granted"], named["debts"], self.owed, self._ladder_LTG)
        at = At(norms_I, takes.at(layer, site))
        if self._sizes.owners:
            place = (layer * len(SITES) + site) * self._sizes.owners
            kernels.take_in_order(x_RI, takers.takers_J, named["bounds"], at, place)
        else:
            kernels.take(x_RI, takers.takers_J, at)


def takers_of(packed: Packed) -> np.ndarray:
    """The rows that take by thresholds."""
    rows_P = packed.picking.rows_R
    taking: np.ndarray = rows_P[packed.takes_N[rows_P]]
    return taking


def roots_of(packed: Packed) -> np.ndarray:
    """The rows that take what they are granted."""
    rows_P = packed.picking.rows_R
    granted: np.ndarray = rows_P[~packed.takes_N[rows_P]]
    return granted


def shapes(sizes: TakingSizes, layers: int) -> dict[str, tuple[int, ...]]:
    """What is told of a step."""
    of_sites = (layers, len(SITES))
    return {
        "takes": (sizes.takers,),
        "granted": (*of_sites, sizes.takers),
        "debts": (*of_sites, sizes.owners or sizes.takers),
        "bounds": (sizes.owners + 1,),
        "granted of roots": (*of_sites, sizes.roots),
    }


def tell(
    told: dict[str, np.ndarray],
    packed: Packed,
    sizes: TakingSizes,
    taking: tuple[np.ndarray, np.ndarray],
) -> None:
    """Fill that in; `taking` as below."""
    rows_J, rows_Z = taking
    if sizes.roots:
        told["granted of roots"][:] = _filled(packed, rows_Z, sizes.roots)
    if not sizes.takers:
        return
    assert isinstance(packed.allowances, AmongOthers), "a step of another kind"
    _, _, debts_LTQ, _ = packed.allowances.asked
    told["takes"][:], told["takes"][: len(rows_J)] = 0, 1
    told["granted"][:, :, : len(rows_J)] = packed.channels_LTK[:, :, packed.kind_N[rows_J]]
    told["debts"][:, :, : debts_LTQ.shape[2]] = debts_LTQ
    if sizes.owners:
        chunk_J = packed.chunk_N[rows_J]
        firsts = np.flatnonzero(np.diff(chunk_J, prepend=-1))
        told["bounds"][:], told["bounds"][: len(firsts)] = len(rows_J), firsts


def tell_places(
    told: dict[str, np.ndarray],
    name: str,
    rows_R: np.ndarray,
    taking: tuple[np.ndarray, np.ndarray],
) -> None:
    """Fill in where rows that take stand among those of a set.

    Args:
        taking: `takers_of` the step, and `roots_of` it.
    """
    for kind, rows in zip((f"takers {name}", f"roots {name}"), taking, strict=True):
        told[kind][:] = -1
        if len(rows) and len(rows_R):
            place = np.minimum(np.searchsorted(rows_R, rows), len(rows_R) - 1)
            told[kind][: len(rows)] = np.where(rows_R[place] == rows, place, -1)
    roots_Z = told[f"roots {name}"]
    if len(roots_Z):
        roots_Z[roots_Z < 0] = max(int(roots_Z[0]), 0)  # the same again


def _filled(packed: Packed, rows_Z: np.ndarray, count: int) -> np.ndarray:
    """What rows are granted, the first again for what fills up: [L, T, Z]."""
    rows_Z = np.concatenate([rows_Z, np.repeat(rows_Z[:1], count - len(rows_Z))])
    granted_LTZ: np.ndarray = packed.channels_LTK[:, :, packed.kind_N[rows_Z]]
    return granted_LTZ


def _leave_largest(x_RI: Tensor, rows_Z: Tensor, norms_I: Tensor, granted_Z: Tensor) -> None:
    x_ZI = x_RI.index_select(0, rows_Z)
    order_ZI = (x_ZI.abs().float() * norms_I).argsort(dim=1, descending=True)
    best_ZI = torch.arange(x_RI.shape[1], device=x_RI.device) < granted_Z[:, None]
    kept_ZI = torch.zeros_like(best_ZI).scatter_(1, order_ZI, best_ZI)
    x_RI.index_copy_(0, rows_Z, x_ZI * kept_ZI)
