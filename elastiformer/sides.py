"""Keys, values and queries of whole requests side by side, as an encoder's attention takes them.

Shape letters: R rows with keys and values   Q queries of a request   K keys   M keys' heads and
    values' heads   B requests of one call   C all requests
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Group(NamedTuple):
    """Requests of like length as one call takes them: each padded to the longest."""

    query_R: Tensor  # the rows of the queries,
    queries: int  # so many of each request
    real_R: Tensor  # which of them are no padding,
    asked_R: Tensor  # and their rows
    key_R: Tensor
    keys: int
    held_B11K: Tensor  # which keys are no padding


class Bounds:
    """Where the rows of each request begin among some rows, and the last ones end: [C + 1]."""

    def __init__(self, starts: np.ndarray) -> None:
        self.starts, self.counts_C = starts, np.diff(starts)
        first = int(self.counts_C[0])
        self.each = first if bool((self.counts_C == first).all()) else None  # as many of everyone
        self._groups: dict[Bounds, list[Group]] = {}

    def groups(self, keys: Bounds, device: torch.device) -> list[Group]:
        """These queries with their keys, in calls; made once, as every layer asks."""
        if keys not in self._groups:
            # In a call the longest has less than twice the keys of the shortest.
            octave_C = np.where(self.counts_C > 0, np.frexp(keys.counts_C)[1], -1)
            self._groups[keys] = [
                self._group(keys, octave_C == octave, device)
                for octave in np.unique(octave_C[octave_C >= 0])
            ]
        return self._groups[keys]

    def _group(self, keys: Bounds, among_C: np.ndarray, device: torch.device) -> Group:
        def on_device(each: np.ndarray) -> Tensor:
            return torch.from_numpy(each).to(device)

        query_BQ, real_BQ = self._side_by_side(among_C)
        key_BK, held_BK = keys._side_by_side(among_C)
        real_R = np.flatnonzero(real_BQ)
        return Group(
            on_device(query_BQ.ravel()),
            query_BQ.shape[1],
            on_device(real_R),
            on_device(query_BQ.ravel()[real_R]),
            on_device(key_BK.ravel()),
            key_BK.shape[1],
            on_device(held_BK[:, None, None]),
        )

    def _side_by_side(self, among_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of some requests, padded with their first ones, and which are no padding."""
        count_B1 = self.counts_C[among_C, None]
        place_T = np.arange(count_B1.max())
        real_BT = place_T < count_B1
        return self.starts[:-1][among_C, None] + np.where(real_BT, place_T, 0), real_BT


class Sides(NamedTuple):
    """The keys and values of whole requests side by side."""

    keys_values_RMH: Tensor  # of each row first its keys' heads, then its values'
    keys: Bounds
    queries: Bounds
