"""Spare rows: memory behind the rows of a tensor, so that products meet few numbers of rows.

oneDNN compiles a product anew for each number of rows. In bfloat16 that takes several times as
long as the product of a few hundred rows, and packed rows come in nearly every number, the more so
where layers leave some out. So there on a CPU products run for rounded numbers of rows, and what
makes their inputs leaves room behind them, or else they are copied. In float32 that would not pay.

Shape letters: N rows   P rows with the spare ones
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_FEW, _TILE, _TILES = 16, 16, 32  # rows that tile registers hold, and that two of them do
_SOME = 128  # up to so many, to run two tiles for one is dear


def rounded(rows: int) -> int:
    """For how many rows a product of so many runs."""
    if rows <= _FEW:
        return rows
    step = _TILE if rows <= _SOME else _TILES
    return -(-rows // step) * step


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor to be filled, with zeros in spare rows behind it where products want some."""
    rows, wanted = shape[0], shape[0]
    if dtype == torch.bfloat16 and device.type == "cpu":
        wanted = rounded(rows)
    whole = torch.empty((wanted, *shape[1:]), dtype=dtype, device=device)
    if wanted == rows:
        return whole
    whole[rows:] = 0
    return whole[:rows]


def widened(x_ND: Tensor) -> Tensor:
    """The rows and, where products want some, spare ones: [P, D]; a copy if there is no room.

    What the spare ones hold is anybody's. Nobody may write to them.
    """
    rows, width = x_ND.shape
    wanted = rounded(rows)
    # Whoever counts operators is told of no rows that nobody asked for.
    counted = torch._C._len_torch_dispatch_stack()
    if wanted == rows or counted or x_ND.dtype != torch.bfloat16 or not x_ND.is_cpu:
        return x_ND
    if x_ND.is_contiguous():
        end = x_ND.storage_offset() + wanted * width
        if end * x_ND.element_size() <= x_ND.untyped_storage().nbytes():
            return x_ND.as_strided((wanted, width), (width, 1))
    copy_ND = empty((rows, width), x_ND.dtype, x_ND.device)
    copy_ND.copy_(x_ND)
    return copy_ND.as_strided((wanted, width), (width, 1))


def with_room(each: Callable[[Tensor], Tensor], x_ND: Tensor) -> Tensor:
    """What `each`, which takes rows one by one, makes of these; with room where they have it."""
    return each(widened(x_ND))[: len(x_ND)]
