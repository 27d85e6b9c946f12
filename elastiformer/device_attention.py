"""Attention of a decode step on a GPU, in Triton: each row's query over the keys of its request.

Keys and values are read where they lie in the pool. The keys of a row are parted among programs,
or a long text would be one program's.

Shape letters: N rows   I inputs   O outputs   S parts of a sum   M heads, all of them   A query
    heads   G key/value heads   H head size   R rotated part of a head   K keys   P rows of the
    pool   L layers   B a block   Q queries of a key head
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastiformer.device_kernels import MOST_PARTS, PROGRAMS, At, give, span, sum_of

_KEYS = 64  # that a program attends to in one go
_TOGETHER = 256  # channels of which a program adds up the parts


def place(
    out_SNO: Tensor,
    turn_NR: tuple[Tensor, Tensor] | None,
    rows_PH: Tensor,
    lies: tuple[Tensor, Tensor, Tensor],
    layer: int,
    heads: int,
) -> Tensor:
    """Rotate queries and keys, and write keys and values into the pool; the queries [N, A, H].

    Args:
        out_SNO: queries, keys and values side by side, in parts whose sum they are.
        turn_NR: cosines and sines; None where nothing is rotated.
        lies: int64 [L, N]: where a request's keys begin among the pool's rows (below 0: it is
            none), how far apart heads are, and how many tokens a head holds with this one.
    """
    parts, rows, outputs = out_SNO.shape
    size = rows_PH.shape[1]
    kv_heads = (outputs // size - heads) // 2
    query_NAH = torch.empty(rows, heads, size, dtype=rows_PH.dtype, device=rows_PH.device)
    cos_NR, sin_NR = turn_NR if turn_NR is not None else (query_NAH, query_NAH)
    _place[(rows, outputs // size)](
        out_SNO, cos_NR, sin_NR, query_NAH, rows_PH, *lies, layer * rows, rows, outputs,
        heads, kv_heads, SIZE=size, TURNED=0 if turn_NR is None else cos_NR.shape[1],
        PARTS=parts, BLOCK=max(16, triton.next_power_of_2(size)), num_warps=1,
    )  # fmt: skip
    return query_NAH


def attend(
    query_NAH: Tensor,
    rows_PH: Tensor,
    lies: tuple[Tensor, Tensor, Tensor],
    layer: int,
    kv_heads: int,
    scale: float,
    at: At,
) -> Tensor:
    """Each query over all keys of its request; zero but for what each row takes: [N, A x H]."""
    rows, heads, size = query_NAH.shape
    parts = max(1, min(PROGRAMS // (rows * kv_heads), MOST_PARTS))
    parts = 1 << (parts.bit_length() - 1)
    device = query_NAH.device
    out_SNAH = torch.empty(parts, rows, heads, size, dtype=torch.float32, device=device)
    most_SNA = torch.empty(parts, rows, heads, dtype=torch.float32, device=device)
    total_SNA = torch.empty_like(most_SNA)
    group = heads // kv_heads
    _attend[(rows, kv_heads, parts)](
        query_NAH, rows_PH, *lies, layer * rows, out_SNAH, most_SNA, total_SNA, rows, heads, group,
        kv_heads, scale, SIZE=size, PARTS=parts, QUERIES=max(16, triton.next_power_of_2(group)),
        BLOCK=max(16, triton.next_power_of_2(size)), KEYS=_KEYS,
        PRECISION="ieee" if query_NAH.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    width = heads * size
    out_NI = torch.empty(rows, width, dtype=query_NAH.dtype, device=device)
    block = min(span(width), _TOGETHER)
    _together[(rows, triton.cdiv(width, block))](
        out_SNAH, most_SNA, total_SNA, out_NI, width, rows, heads, SIZE=size, PARTS=parts,
        BLOCK=block, num_warps=4, **at.arguments(query_NAH),
    )  # fmt: skip
    return out_NI


@triton.jit(do_not_specialize=["at"])
def _place(  # type: ignore[no-untyped-def]
    out, cos, sin, query, pool, key, room, length, at, rows, outputs, heads, kv_heads,
    SIZE: tl.constexpr, TURNED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    at_B = tl.arange(0, BLOCK)
    inside_B = at_B < SIZE
    x_B = sum_of(out, row, head * SIZE + at_B, inside_B, rows, outputs, PARTS)
    if TURNED:
        half = TURNED // 2
        other_B = tl.where(at_B < half, at_B + half, at_B - half)
        turns_B = at_B < tl.where(head < heads + kv_heads, TURNED, 0)
        y_B = sum_of(out, row, head * SIZE + other_B, turns_B, rows, outputs, PARTS)
        cos_B = tl.load(cos + row * TURNED + at_B, mask=turns_B, other=1.0).to(tl.float32)
        sin_B = tl.load(sin + row * TURNED + at_B, mask=turns_B, other=0.0).to(tl.float32)
        x_B = x_B * cos_B + tl.where(at_B < half, -y_B, y_B) * sin_B
    if head < heads:
        into_B = query + (row * heads + head) * SIZE + at_B
        tl.store(into_B, x_B.to(query.dtype.element_ty), mask=inside_B)
    else:
        first = tl.load(key + at + row)
        to = first + (head - heads) * tl.load(room + at + row) + tl.load(length + at + row) - 1
        if first >= 0:
            tl.store(pool + to * SIZE + at_B, x_B.to(pool.dtype.element_ty), mask=inside_B)


@triton.jit(do_not_specialize=["at"])
def _attend(  # type: ignore[no-untyped-def]
    query, pool, key, room, length, at, out, most, total, rows, heads, group, kv_heads, scale,
    SIZE: tl.constexpr, PARTS: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, of_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at_B, place_Q = tl.arange(0, BLOCK), tl.arange(0, QUERIES)
    inside_B, asks_Q = at_B < SIZE, place_Q < group
    head_Q = row * heads + of_head * group + place_Q
    query_QB = tl.load(
        query + head_Q[:, None] * SIZE + at_B[None, :],
        mask=asks_Q[:, None] & inside_B[None, :],
        other=0.0,
    )
    keys, apart = tl.load(length + at + row), tl.load(room + at + row)
    first_key = tl.load(key + at + row) + of_head * apart
    first_value = first_key + kv_heads * apart
    each = tl.cdiv(tl.cdiv(keys, PARTS), KEYS) * KEYS
    stop = tl.minimum((part + 1) * each, keys)
    most_Q = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total_Q = tl.zeros((QUERIES,), dtype=tl.float32)
    sum_QB = tl.zeros((QUERIES, BLOCK), dtype=tl.float32)
    for begin in range(part * each, stop, KEYS):
        at_K = begin + tl.arange(0, KEYS)
        there_K = at_K < stop
        key_BK = tl.load(
            pool + (first_key + at_K)[None, :] * SIZE + at_B[:, None],
            mask=there_K[None, :] & inside_B[:, None],
            other=0.0,
        )
        score_QK = scale * tl.dot(query_QB, key_BK, input_precision=PRECISION)
        score_QK = tl.where(there_K[None, :], score_QK, float("-inf"))
        higher_Q = tl.maximum(most_Q, tl.max(score_QK, 1))
        weight_QK = tl.exp(score_QK - higher_Q[:, None])
        less_Q = tl.exp(most_Q - higher_Q)
        value_KB = tl.load(
            pool + (first_value + at_K)[:, None] * SIZE + at_B[None, :],
            mask=there_K[:, None] & inside_B[None, :],
            other=0.0,
        )
        weighed_QB = tl.dot(
            weight_QK.to(pool.dtype.element_ty), value_KB, input_precision=PRECISION
        )
        sum_QB = sum_QB * less_Q[:, None] + weighed_QB
        total_Q = total_Q * less_Q + tl.sum(weight_QK, 1)
        most_Q = higher_Q
    into_Q = part * rows * heads + head_Q
    tl.store(most + into_Q, most_Q, mask=asks_Q)
    tl.store(total + into_Q, total_Q, mask=asks_Q)
    into_QB = out + into_Q[:, None] * SIZE + at_B[None, :]
    tl.store(into_QB, sum_QB, mask=asks_Q[:, None] & inside_B[None, :])


@triton.jit(do_not_specialize=["place", "ladder_place"])
def _together(  # type: ignore[no-untyped-def]
    parts, most, total, out, width, rows, heads, norms, takes, granted, debts, owed, ladder, place,
    ladder_place, rungs, SIZE: tl.constexpr, PARTS: tl.constexpr, PICKS: tl.constexpr,
    PATIENCE: tl.constexpr, HASTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_B = at_B < width
    head_B = at_B // SIZE
    part_P = tl.arange(0, PARTS)
    from_PB = ((part_P * rows + row) * heads)[:, None] + head_B[None, :]
    inside_PB = (part_P < PARTS)[:, None] & inside_B[None, :]
    most_PB = tl.load(most + from_PB, mask=inside_PB, other=-1e30)
    highest_B = tl.maximum(tl.max(most_PB, 0), -1e30)  # of a row without keys, too
    less_PB = tl.exp(most_PB - highest_B[None, :])
    of_PB = ((part_P * rows + row) * width)[:, None] + at_B[None, :]
    sum_B = tl.sum(less_PB * tl.load(parts + of_PB, mask=inside_PB, other=0.0), 0)
    weight_B = tl.sum(less_PB * tl.load(total + from_PB, mask=inside_PB, other=1.0), 0)
    x_B = sum_B / tl.maximum(weight_B, 1e-30)
    give(
        x_B, at_B, inside_B, out, norms, takes, granted, debts, owed, ladder, place, ladder_place,
        rungs, row, width, PICKS, PATIENCE, HASTE,
    )  # fmt: skip
