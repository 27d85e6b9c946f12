"""Whole sub-layers of few rows, each in one compiled call: norm, search, product, and what follows.

In decoding, what a sub-layer's parts cost to call one by one is as much as they cost to run. The
parts are the very same, so a row gets the same bits here as where they are called one by one.

Shape letters: N rows   D width   O outputs of a product   M heads, all of them   A query heads
    G key/value heads   H head size   I neurons   R rotated part of a head   P rows of the pool
    S slabs of a weight (in start_S: rows + 1)   C chunks of a slab   W outputs of a chunk
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from elastiformer.kernels import TURN, _search_row, _search_side_by_side, compiled
from elastiformer.lanes import _multiply_one, _multiply_some
from elastiformer.row_kernels import (
    _gate_row,
    _gate_side_by_side,
    _normalise_row,
    _normalise_side_by_side,
    _turn_row,
    _turn_side_by_side,
)
from elastiformer.single_queries import _attend

_ALONE = 4  # so few rows are searched, normalised and gated faster by one thread


class Weight(NamedTuple):
    """A product as the kernels take it."""

    weight_SICW: np.ndarray
    steps: np.ndarray
    lows: np.ndarray
    bias_O: np.ndarray  # empty where there is none
    outputs: int
    summed: int
    ahead: int
    norms_I: np.ndarray  # by which channels are picked


class Norm(NamedTuple):
    """The norm that a sub-layer begins with."""

    scale_D: np.ndarray
    epsilon: np.float32


class Heads(NamedTuple):
    """How a layer's attention is cut into heads."""

    queries: int
    kv: int
    scale: np.float32


class Cached(NamedTuple):
    """Where the rows' keys and values go and lie, as in single_queries.py."""

    rows_PH: np.ndarray
    index_NG: np.ndarray  # for this step's: [N, 2G]
    query_S: np.ndarray
    key_S: np.ndarray
    value_S: np.ndarray
    room_S: np.ndarray
    length_S: np.ndarray


class Turns(NamedTuple):
    """Cosines and sines of the rows; of no columns where nothing is rotated."""

    cos_NR: np.ndarray
    sin_NR: np.ndarray


def attention(
    h_ND: np.ndarray,
    norm: Norm,
    front: Weight,
    heads: Heads,
    turns: Turns,
    cached: Cached,
    out: Weight,
    starts: tuple[np.ndarray, np.ndarray],
) -> None:
    """Add the attention's branch to the residual of rows that are each a request's latest token.

    Args:
        starts: where each row's picks begin, and the last ones end, before both products.
    """
    with TURN:
        _attention(h_ND, norm, front, heads, turns, cached, out, starts, _side(h_ND))


def mlp(
    h_ND: np.ndarray,
    norm: Norm,
    front: Weight,
    form: int,
    out: Weight,
    starts: tuple[np.ndarray, np.ndarray],
) -> None:
    """Add the MLP's branch to the residual of some rows.

    Args:
        form: of the gate (row_kernels.py).
        starts: as for `attention`.
    """
    with TURN:
        _mlp(h_ND, norm, front, form, out, starts, _side(h_ND))


def _side(h_ND: np.ndarray) -> int | None:
    """None: rows in turn; else side by side. By its type Numba compiles the one or the other."""
    return None if len(h_ND) <= _ALONE else 1


@intrinsic
def _as_stored(typing: Any, number: Any, like: Any) -> Any:
    """A float32 as an array stores it: in one of type uint16 as the nearest bfloat16."""
    stored = like.dtype

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if stored == types.float32:
            return args[0]
        word = ir.IntType(32)
        bits = builder.bitcast(args[0], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.add(builder.add(bits, word(0x7FFF)), odd)
        return builder.trunc(builder.lshr(rounded, word(16)), ir.IntType(16))

    return stored(types.float32, like), generate


@compiled()
def _product(x_NI, weight, start_S, side):  # type: ignore[no-untyped-def]
    rows = len(x_NI)
    index_P = np.empty(start_S[rows], dtype=np.int32)
    value_P = np.empty(start_S[rows], dtype=np.float32)
    if side is None:
        for row in range(rows):
            _search_row(x_NI, weight.norms_I, index_P, value_P, start_S, row)
    else:
        _search_side_by_side(x_NI, weight.norms_I, index_P, value_P, start_S)
    out_NO = np.empty((rows, weight.outputs), dtype=np.float32)
    if rows == 1:
        _multiply_one(
            weight.weight_SICW, weight.steps, weight.lows, index_P, value_P,
            weight.summed, weight.ahead, out_NO[0],
        )  # fmt: skip
    else:
        _multiply_some(
            weight.weight_SICW, weight.steps, weight.lows, index_P, value_P, start_S,
            weight.summed, out_NO,
        )  # fmt: skip
    if len(weight.bias_O):
        for row in range(rows):
            for output in range(weight.outputs):
                out_NO[row, output] += weight.bias_O[output]
    return out_NO


@compiled()
def _normalised(h_ND, norm, side):  # type: ignore[no-untyped-def]
    x_ND = np.empty_like(h_ND)
    if side is None:
        for row in range(len(h_ND)):
            _normalise_row(h_ND[row], norm.scale_D, norm.epsilon, x_ND[row])
    else:
        _normalise_side_by_side(h_ND, norm.scale_D, norm.epsilon, x_ND)
    return x_ND


@compiled()
def _add(h_ND, branch_ND):  # type: ignore[no-untyped-def]
    for row in range(len(h_ND)):
        for d in range(h_ND.shape[1]):
            h_ND[row, d] += branch_ND[row, d]


@compiled()
def _attention(h_ND, norm, front, heads, turns, cached, out, starts, side):  # type: ignore[no-untyped-def]
    out_NO = _product(_normalised(h_ND, norm, side), front, starts[0], side)
    rows, size = len(h_ND), cached.rows_PH.shape[1]
    out_NMH = out_NO.reshape(rows, out_NO.shape[1] // size, size)
    turned = heads.queries + heads.kv
    if turns.cos_NR.shape[1]:
        if side is None:
            for row in range(rows):
                _turn_row(out_NMH[row], turned, turns.cos_NR[row], turns.sin_NR[row])
        else:
            _turn_side_by_side(out_NMH, turned, turns.cos_NR, turns.sin_NR)
    for row in range(rows):
        for part in range(2 * heads.kv):
            for h in range(size):
                cached.rows_PH[cached.index_NG[row, part], h] = _as_stored(
                    out_NMH[row, heads.queries + part, h], cached.rows_PH
                )
    out_NAH = np.empty((rows, heads.queries, size), dtype=np.float32)
    _attend(
        cached.rows_PH, out_NMH, cached.query_S, cached.key_S, cached.value_S, cached.room_S,
        cached.length_S, heads.queries, heads.kv, heads.scale, out_NAH,
    )  # fmt: skip
    _add(h_ND, _product(out_NAH.reshape(rows, heads.queries * size), out, starts[1], side))


@compiled()
def _mlp(h_ND, norm, front, form, out, starts, side):  # type: ignore[no-untyped-def]
    out_N2I = _product(_normalised(h_ND, norm, side), front, starts[0], side)
    a_NI = np.empty((len(h_ND), out_N2I.shape[1] // 2), dtype=np.float32)
    if side is None:
        for row in range(len(h_ND)):
            _gate_row(form, out_N2I[row], a_NI[row])
    else:
        _gate_side_by_side(form, out_N2I, a_NI)
    _add(h_ND, _product(a_NI, out, starts[1], side))
