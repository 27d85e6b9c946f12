"""Attention of steps with prompts on a GPU, in Triton: some rows of each request over its keys.

Keys and values are read where they lie in the pool, as a decode step does (device_attention.py).
Here a program attends for several queries of a request, and sees of its keys those up to each.

Shape letters: N rows   O outputs   M heads, all of them   A query heads   G key/value heads
    H head size   R rotated part of a head   K keys   P rows of the pool   L layers   C chunks
    B a block   Q queries of a program   W programs a head
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

QUERIES = 64  # of a program
_KEYS = 64  # that it attends to in one go
_HEADS = 8  # that a program rotates and places


class Lying(NamedTuple):
    """Where the keys of a step's chunks lie: int64 [L, C].

    Args:
        first_LC: among the rows of the pool.
        room_LC: how far apart the heads are.
    """

    first_LC: Tensor
    room_LC: Tensor


class Asking(NamedTuple):
    """Some rows of a step, in order."""

    chunk_N: Tensor  # int64, of each; below 0: it is none, and leaves no keys
    position_N: Tensor  # int64: which of the keys of its chunk is its own
    programs_W3: Tensor  # int64: a chunk, and its first row here and the last one's end


def programs(bounds_S: np.ndarray) -> np.ndarray:
    """How the rows of chunks are parted among programs: int64 [W, 3]; the latest rows first.

    They see most, and so take longest.

    Args:
        bounds_S: where the rows of each chunk begin, and the last one's end.
    """
    found = [
        (chunk, first, min(first + QUERIES, stop))
        for chunk, (begin, stop) in enumerate(pairwise(bounds_S.tolist()))
        for first in range(begin, stop, QUERIES)
    ]
    return np.array(found[::-1], dtype=np.int64).reshape(-1, 3)


def place(
    out_NO: Tensor,
    turn_NR: tuple[Tensor, Tensor] | None,
    rows_PH: Tensor,
    lying: Lying,
    asking: Asking,
    layer: int,
    heads: int,
) -> Tensor:
    """Rotate queries and keys, and write keys and values into the pool; the queries [N, A, H].

    Args:
        out_NO: queries (perhaps none), keys and values side by side.
        turn_NR: cosines and sines; None where nothing is rotated.
        heads: of queries.
    """
    rows, outputs = out_NO.shape
    size = rows_PH.shape[1]
    kv_heads = (outputs // size - heads) // 2
    query_NAH = torch.empty(rows, heads, size, dtype=rows_PH.dtype, device=rows_PH.device)
    cos_NR, sin_NR = turn_NR if turn_NR is not None else (out_NO, out_NO)
    _place[(rows, triton.cdiv(outputs // size, _HEADS))](
        out_NO, cos_NR, sin_NR, query_NAH, rows_PH, *lying, asking.chunk_N, asking.position_N,
        layer * lying.first_LC.shape[1], outputs, heads, kv_heads, HEADS=_HEADS, SIZE=size,
        TURNED=0 if turn_NR is None else cos_NR.shape[1], BLOCK=triton.next_power_of_2(size),
        num_warps=1,
    )  # fmt: skip
    return query_NAH


def attend(
    query_NAH: Tensor,
    rows_PH: Tensor,
    lying: Lying,
    asking: Asking,
    layer: int,
    kv_heads: int,
    scale: float,
) -> Tensor:
    """Each query over the keys of its request up to its own: [N, A x H]."""
    rows, heads, size = query_NAH.shape
    # Of what fills up a step nobody attends.
    out_NI = torch.zeros(rows, heads * size, dtype=query_NAH.dtype, device=query_NAH.device)
    _attend[(len(asking.programs_W3), heads)](
        query_NAH, rows_PH, *lying, asking.position_N, asking.programs_W3, out_NI,
        layer * lying.first_LC.shape[1], heads, heads // kv_heads, kv_heads,
        scale * 1.4426950408889634, SIZE=size, QUERIES=QUERIES,
        BLOCK=max(16, triton.next_power_of_2(size)), KEYS=_KEYS,
        PRECISION="ieee" if query_NAH.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    return out_NI


@triton.jit(do_not_specialize=["at"])
def _place(  # type: ignore[no-untyped-def]
    out, cos, sin, query, pool, key, room, chunk, position, at, outputs, heads, kv_heads,
    HEADS: tl.constexpr, SIZE: tl.constexpr, TURNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head_M = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at_B = tl.arange(0, BLOCK)
    inside_MB = (head_M * SIZE < outputs)[:, None] & (at_B < SIZE)[None, :]
    from_M = out + row * outputs + head_M * SIZE
    x_MB = tl.load(from_M[:, None] + at_B[None, :], mask=inside_MB, other=0.0).to(tl.float32)
    if TURNED:
        half = TURNED // 2
        other_B = tl.where(at_B < half, at_B + half, at_B - half)
        turned_B = at_B < TURNED
        turns_MB = inside_MB & (head_M < heads + kv_heads)[:, None] & turned_B[None, :]
        y_MB = tl.load(from_M[:, None] + other_B[None, :], mask=turns_MB, other=0.0)
        cos_B = tl.load(cos + row * TURNED + at_B, mask=turned_B, other=1.0).to(tl.float32)
        sin_B = tl.load(sin + row * TURNED + at_B, mask=turned_B, other=0.0).to(tl.float32)
        sin_B = tl.where(at_B < half, -sin_B, sin_B)
        turned_MB = x_MB * cos_B[None, :] + y_MB.to(tl.float32) * sin_B[None, :]
        x_MB = tl.where(turns_MB, turned_MB, x_MB)
    into_M = query + (row * heads + head_M) * SIZE
    asks_MB = inside_MB & (head_M < heads)[:, None]
    tl.store(into_M[:, None] + at_B[None, :], x_MB.to(query.dtype.element_ty), mask=asks_MB)
    own = tl.load(chunk + row)
    of = at + tl.maximum(own, 0)
    first = tl.load(key + of) + tl.load(position + row)
    to_M = pool + (first + (head_M - heads) * tl.load(room + of)) * SIZE
    kept_MB = inside_MB & (head_M >= heads)[:, None] & (own >= 0)
    tl.store(to_M[:, None] + at_B[None, :], x_MB.to(pool.dtype.element_ty), mask=kept_MB)


@triton.jit
def _over(  # type: ignore[no-untyped-def]
    query_QB, position_Q, sum_QB, most_Q, total_Q, first_key, first_value, at_B, inside_B, begin,
    stop, scale, SIZE: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    HIDES: tl.constexpr,
):  # fmt: skip
    """Go over some keys; those after a query's own are hidden from it, where there are such."""
    for each in range(begin, stop, KEYS):
        at_K = each + tl.arange(0, KEYS)
        there_K = at_K < stop
        key_BK = tl.load(
            first_key + at_K[None, :] * SIZE + at_B[:, None],
            mask=there_K[None, :] & inside_B[:, None],
            other=0.0,
        )
        score_QK = scale * tl.dot(query_QB, key_BK, input_precision=PRECISION)
        if HIDES:
            seen_QK = at_K[None, :] <= position_Q[:, None]
            score_QK = tl.where(seen_QK, score_QK, float("-inf"))
        higher_Q = tl.maximum(most_Q, tl.max(score_QK, 1))
        weight_QK = tl.exp2(score_QK - higher_Q[:, None])
        less_Q = tl.exp2(most_Q - higher_Q)
        value_KB = tl.load(
            first_value + at_K[:, None] * SIZE + at_B[None, :],
            mask=there_K[:, None] & inside_B[None, :],
            other=0.0,
        )
        total_Q = total_Q * less_Q + tl.sum(weight_QK, 1)
        weight_QK = weight_QK.to(value_KB.dtype)
        sum_QB = sum_QB * less_Q[:, None]
        sum_QB += tl.dot(weight_QK, value_KB, input_precision=PRECISION)
        most_Q = higher_Q
    return sum_QB, most_Q, total_Q


@triton.jit(do_not_specialize=["at"])
def _attend(  # type: ignore[no-untyped-def]
    query, pool, key, room, position, programs, out, at, heads, group, kv_heads, scale,
    SIZE: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    one, head = tl.program_id(0), tl.program_id(1)
    of = at + tl.load(programs + 3 * one)
    row_Q = tl.load(programs + 3 * one + 1) + tl.arange(0, QUERIES)
    asks_Q = row_Q < tl.load(programs + 3 * one + 2)
    at_B = tl.arange(0, BLOCK)
    inside_B = at_B < SIZE
    inside_QB = asks_Q[:, None] & inside_B[None, :]
    from_QB = ((row_Q * heads + head) * SIZE)[:, None] + at_B[None, :]
    query_QB = tl.load(query + from_QB, mask=inside_QB, other=0.0)
    position_Q = tl.load(position + row_Q, mask=asks_Q, other=-1)
    last = tl.max(position_Q, 0) + 1
    clear = tl.min(tl.where(asks_Q, position_Q, last), 0) + 1
    clear = tl.minimum(clear, last) // KEYS * KEYS  # up to there all of them see all
    apart = tl.load(room + of)
    first = tl.load(key + of) + (head // group) * apart
    first_key, first_value = pool + first * SIZE, pool + (first + kv_heads * apart) * SIZE
    most_Q = tl.full((QUERIES,), -1e30, dtype=tl.float32)
    total_Q = tl.zeros((QUERIES,), dtype=tl.float32)
    sum_QB = tl.zeros((QUERIES, BLOCK), dtype=tl.float32)
    sum_QB, most_Q, total_Q = _over(
        query_QB, position_Q, sum_QB, most_Q, total_Q, first_key, first_value, at_B, inside_B,
        0, clear, scale, SIZE, KEYS, PRECISION, False,
    )  # fmt: skip
    sum_QB, most_Q, total_Q = _over(
        query_QB, position_Q, sum_QB, most_Q, total_Q, first_key, first_value, at_B, inside_B,
        clear, last, scale, SIZE, KEYS, PRECISION, True,
    )  # fmt: skip
    sum_QB = sum_QB / tl.maximum(total_Q, 1e-30)[:, None]
    tl.store(out + from_QB, sum_QB.to(out.dtype.element_ty), mask=inside_QB)
