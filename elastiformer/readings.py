"""What products read of some rows: all channels, or those that each row picks.

Picked are, per token, the channels of the largest size x column norm. On a CPU they are searched
for when a product asks, in the form it asks for; elsewhere they are marked at once.

Shape letters: R rows   I inputs   K picked channels   S (of start_S) rows + 1
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from elastiformer import pairs
from elastiformer.largest import keep_largest
from elastiformer.packed import Rows
from elastiformer.row_kernels import on_host
from elastiformer.spare_rows import empty
from elastiformer.tiles import Picks, Wanted, all_searched, even_starts, everything, search


class Values:
    """What products read of some rows before any row picks, made in the type that they read.

    Of many rows in bfloat16 a product rounds what it reads: a norm or a gate that gives it so at
    once saves a pass over it.
    """

    def __init__(
        self,
        source_RS: Tensor,
        dtype: torch.dtype,
        make: Callable[[Tensor, torch.dtype], Tensor] = Tensor.to,
        own: bool = True,
    ) -> None:
        """Made row by row of a source.

        Args:
            dtype: what they are made in, unless a product reads something smaller.
            own: whether what is made may be changed.
        """
        self._source_RS, self.dtype, self._make, self.own = source_RS, dtype, make, own

    def whole(self, dtype: torch.dtype) -> Tensor:
        """Of all rows."""
        return self._make(self._source_RS, dtype)

    def of(self, rows: Rows) -> Tensor:
        """Of some of the rows."""
        return self._make(rows.of(self._source_RS), self.dtype)

    def among(self, rows: Rows) -> Values:
        """Only these rows."""
        return Values(rows.of(self._source_RS), self.dtype, self._make, self.own)


class Reading:
    """What products read of some rows."""

    def __init__(
        self,
        x_RI: Tensor,
        count: int | None = None,
        wanted: Wanted | None = None,
        kept_RI: Tensor | None = None,
        is_even: bool = True,
        own: bool = False,
        is_picked: bool = False,
    ) -> None:
        """All of `x`; or of `count` channels over all rows: to be searched for, or marked.

        Args:
            is_even: whether every row keeps as many.
            own: whether `x` may be changed: nobody else reads what is left out of it.
            is_picked: whether `x` is zero already but for the picks.
        """
        self.x_RI, self.count, self._is_picked = x_RI, count, is_picked
        self._wanted, self._kept_RI, self._is_even, self._own = wanted, kept_RI, is_even, own

    @property
    def share(self) -> float:
        return 1.0 if self.count is None else self.count / self.x_RI.numel()

    @property
    def has_picks(self) -> bool:
        """Whether each row's channels can be numbered."""
        return not self._is_picked and (self._kept_RI is None or self._is_even)

    @cached_property
    def only_RI(self) -> Tensor:
        """`x`, zero but for the picked channels."""
        if self.count is None or self._is_picked:
            return self.x_RI
        if self._wanted is not None:
            only_RI = self.on_host_RI if self._own else self.on_host_RI.copy()
            keep_largest(only_RI, *self._wanted)
            return torch.from_numpy(only_RI)
        assert self._kept_RI is not None, "channels that nobody marked"
        return self.x_RI * self._kept_RI

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """`only_RI` in a smaller type."""
        if self.x_RI.dtype == dtype:
            return self.only_RI
        small_RI = empty(tuple(self.x_RI.shape), dtype, self.x_RI.device)
        if self._wanted is None or dtype != torch.bfloat16 or not pairs.ABLE:
            return small_RI.copy_(self.only_RI)
        pairs.round_picked(self.on_host_RI, *self._wanted, on_host(small_RI))
        return small_RI

    @property
    def unsearched(self) -> tuple[np.ndarray, Wanted | None]:
        """`x`, and what is to be picked of it; without that, it is zero but for the picks."""
        if self._wanted is not None:
            return self.on_host_RI, self._wanted
        return self.only_RI.contiguous().numpy(), None

    @cached_property
    def picks(self) -> Picks:
        """The picks, or all channels, on the host."""
        if self.count is None:
            return everything(self.on_host_RI)
        assert self._wanted is not None, "picks of a device"
        return search(self.on_host_RI, self._wanted)

    def index_RK(self) -> Tensor:
        """The picked channels, of rows that all pick as many."""
        if self._wanted is not None:
            index_P = torch.from_numpy(self.picks.index_P.astype(np.int64))
        else:
            assert self._kept_RI is not None, "nothing was picked"
            index_P = torch.nonzero(self._kept_RI)[:, 1]
        return index_P.view(len(self.x_RI), -1)

    @property
    def on_host_RI(self) -> np.ndarray:
        on_host_RI: np.ndarray = self.x_RI.contiguous().numpy()
        return on_host_RI


def pick(x_RI: Tensor, norms_I: Tensor, counts: int | np.ndarray, own: bool = False) -> Reading:
    """Each row's channels of the largest size x column norm.

    Args:
        counts: how many, the same for every row or one for each [R].
        own: whether `x` may be changed.
    """
    rows, inputs = x_RI.shape
    if isinstance(counts, int):
        if counts >= inputs:
            return Reading(x_RI)
        start_S = even_starts(rows, counts)
    else:
        start_S = np.zeros(rows + 1, dtype=np.int64)
        np.cumsum(np.minimum(counts, inputs), out=start_S[1:])
    return reading_of(x_RI, norms_I, start_S, all_searched(rows), own)


def reading_of(
    x_RI: Tensor, norms_I: Tensor, start_S: np.ndarray, least_R: np.ndarray, own: bool
) -> Reading:
    """The same, by where the channels of each row begin.

    Args:
        least_R: what these channels and no others reach; SEARCHED where that is not known.
    """
    rows, inputs = x_RI.shape
    count = int(start_S[-1])
    if count == rows * inputs:
        return Reading(x_RI)
    if x_RI.device.type == "cpu" and x_RI.dtype == torch.float32:
        return Reading(x_RI, count, Wanted(norms_I.numpy(), start_S, least_R), own=own)
    counts_R = np.diff(start_S)
    order_RI = (x_RI.abs().float() * norms_I).argsort(dim=1, descending=True)
    count_R1 = torch.from_numpy(counts_R).to(x_RI.device)[:, None]
    best_RI = torch.arange(inputs, device=x_RI.device) < count_R1
    kept_RI = torch.zeros_like(order_RI, dtype=torch.bool).scatter_(1, order_RI, best_RI)
    is_even = bool((counts_R == counts_R[0]).all())
    return Reading(x_RI, count, kept_RI=kept_RI, is_even=is_even)
