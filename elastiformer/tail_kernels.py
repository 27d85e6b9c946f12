"""One late layer of class tokens (class_tail.py) in one compiled call, on a CPU with AMX.

Such a layer is some twenty operators of few rows each, and to call them one by one takes longer
than they run. Items have nothing to do with each other here, so each thread takes some of them
through the whole layer and waits for nobody: what their class tokens ask, what they read, and the
MLP. Products round what they read to bfloat16, all between them is float32.

Shape letters: N rows of items   Q class tokens   R those of a block of items   D width   A heads
    H head size   S sides (direct_reading.py)   I inputs   O outputs   X heads x sides x D, or a
    row's place in it   C items, and one more   T rows of an item   G groups of inputs
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import prange
from torch import Tensor

from elastiformer.amx import ROWS, _configure, _release
from elastiformer.blocks import MOST_ROWS, OUTPUTS, Blocks, product, room, shape, small_room
from elastiformer.class_kernels import (
    BESIDE,
    AffineNorm,
    _add_rows,
    _dot_rows,
    _norm,
    _padded,
    _weigh,
)
from elastiformer.kernels import TURN, compiled
from elastiformer.row_kernels import _as_stored, _exponential, _wide, on_host
from elastiformer.vectors import aligned

GELU, GELU_TANH, QUICK_GELU, RELU = range(4)
_STRICT: Any = {"fastmath": {"contract"}, "error_model": "numpy"}


class TailLayer(NamedTuple):
    """What the kernel needs of a layer. Epsilons are float32."""

    attention_norm: AffineNorm
    query: Blocks
    keys: Blocks  # [S x D, H] of each head
    values: Blocks  # [H, S x D] of each head; their bias is that of all heads
    out: Blocks
    attention_close: AffineNorm
    mlp_norm: AffineNorm
    up: Blocks
    down: Blocks
    mlp_close: AffineNorm
    form: int  # of the activation
    width: int
    heads: int
    head_size: int
    sides: int
    scale: np.float32


class Items(NamedTuple):
    """Which rows are whose."""

    row_Q: np.ndarray  # where class tokens stand among all rows
    ask_C: np.ndarray  # where each item's class tokens begin, and the last one's end
    read_C: np.ndarray  # the same of its rows


def run(
    h_QD: np.ndarray,
    x_ND: np.ndarray,
    side_N: np.ndarray,
    items: Items,
    layer: TailLayer,
    threads: int,
    is_last: bool,
) -> None:
    """Run a layer over the residual of class tokens, in place.

    Args:
        x_ND: what all tokens bring but for the layer's scale and shift; float32. What class tokens
            bring is put there; of a layer that is not the last it is left as the next one reads it.
        side_N: of each row.
    """
    with TURN:
        _run(h_QD, x_ND, side_N, *items, threads, is_last, *layer)


def room_for(h_ND: Tensor) -> np.ndarray:
    """Room for what rows of the residual bring, in float32 and up to whole vectors."""
    rows, width = h_ND.shape
    return torch.empty(rows, _padded(width)).numpy()  # from the start of a cache line on


def bring(h_ND: Tensor, epsilon: float, x_ND: np.ndarray) -> None:
    """Put what rows bring to all these layers but for scales and shifts; zeros behind it.

    Args:
        h_ND: their residual, float32 or bfloat16.
        epsilon: of the norm; NORMED: there is none.
        x_ND: of `room_for`.
    """
    with TURN:
        _bring(on_host(h_ND), np.float32(epsilon), x_ND)


@compiled(**_STRICT)
def _store(x_D, small_D):  # type: ignore[no-untyped-def]
    for d in range(len(x_D)):
        small_D[d] = _as_stored(x_D[d], small_D)


@compiled(**_STRICT)
def _store_biased(x_O, bias_O, small_O):  # type: ignore[no-untyped-def]
    if len(bias_O):
        for o in range(len(bias_O)):
            small_O[o] = _as_stored(x_O[o] + bias_O[o], small_O)
    else:
        _store(x_O, small_O)


@compiled(**_STRICT)
def _add_biased(h_D, x_D, bias_D):  # type: ignore[no-untyped-def]
    for d in range(len(h_D)):
        h_D[d] += x_D[d]
    for d in range(len(bias_D)):
        h_D[d] += bias_D[d]


@compiled(**_STRICT)
def _scale(x_D, scale_D, shift_D):  # type: ignore[no-untyped-def]
    if len(scale_D):
        for d in range(len(x_D)):
            x_D[d] = x_D[d] * scale_D[d] + shift_D[d]


@compiled(**_STRICT)
def _activate(form, x_I, bias_I, small_I):  # type: ignore[no-untyped-def]
    """What the activation makes of a product with its bias."""
    for i in range(len(bias_I)):
        x_I[i] += bias_I[i]
    one, half = np.float32(1), np.float32(0.5)
    if form == GELU:
        for i in range(len(x_I)):
            # x * (1 + erf(x / sqrt(2))) / 2, with erf by Abramowitz and Stegun, 7.1.26
            x = x_I[i]
            z = abs(x) * np.float32(0.7071067811865476)
            t = one / (one + np.float32(0.3275911) * z)
            p = np.float32(1.061405429) * t - np.float32(1.453152027)
            p = p * t + np.float32(1.421413741)
            p = p * t - np.float32(0.284496736)
            p = p * t + np.float32(0.254829592)
            tail = half * p * t * _exponential(-z * z)  # of the side beyond |x|
            share = one - tail if x > 0 else tail
            small_I[i] = _as_stored(x * share, small_I)
    elif form == GELU_TANH:
        for i in range(len(x_I)):
            x = x_I[i]
            z = np.float32(1.5957691216057308) * (x + np.float32(0.044715) * x * x * x)
            small_I[i] = _as_stored(x / (one + _exponential(-z)), small_I)
    elif form == QUICK_GELU:
        for i in range(len(x_I)):
            x = x_I[i]
            small_I[i] = _as_stored(x / (one + _exponential(np.float32(-1.702) * x)), small_I)
    else:
        for i in range(len(x_I)):
            small_I[i] = _as_stored(max(x_I[i], np.float32(0)), small_I)


@compiled(**_STRICT)
def _read(own_X, x_, first, side_N, layer, small_X):  # type: ignore[no-untyped-def]
    """The rows of an item, summed as one of its queries weighs them, by heads and sides.

    Args:
        x_: of all items, row after row: as views, the rows would be counted at every turn.
        first: of the item's rows.
    """
    rows, heads, sides, norm = len(side_N), layer.heads, layer.sides, layer.attention_norm
    width, apart = layer.width, rows + BESIDE
    padded, parts = _padded(width), heads * sides
    weight_ = np.empty(heads * apart, dtype=np.float32)
    sum_, total_X = aligned(parts * padded), np.zeros(parts, dtype=np.float32)
    sum_[:] = 0
    if len(norm.scale_D):  # of rows: by the query it is less work; a shift moves all scores alike
        for x in range(parts):
            _times(own_X[x * width : (x + 1) * width], norm.scale_D)
    begin = 0
    while begin < rows:
        end, at = _end_of_some(side_N, begin), (first + begin) * padded
        for head in range(heads):
            own_at = (head * sides + side_N[begin]) * width
            to = head * apart + begin
            _dot_rows(own_X, own_at, x_, at, padded, end - begin, weight_, to)
        begin = end
    for head in range(heads):
        _weigh(weight_[head * apart : head * apart + rows], layer.scale)
    begin = 0
    while begin < rows:
        end, at = _end_of_some(side_N, begin), (first + begin) * padded
        for head in range(heads):
            x, own_at = head * sides + side_N[begin], head * apart + begin
            _add_rows(weight_, own_at, x_, at, padded, end - begin, sum_, x * padded)
            for row in range(end - begin):
                total_X[x] += weight_[own_at + row]
        begin = end
    for x in range(parts):
        sum_D, small_D = sum_[x * padded :][:width], small_X[x * width : (x + 1) * width]
        if len(norm.scale_D):
            for d in range(width):
                sum_D[d] = sum_D[d] * norm.scale_D[d] + total_X[x] * norm.shift_D[d]
        _store(sum_D, small_D)


@compiled(**_STRICT)
def _times(x_D, scale_D):  # type: ignore[no-untyped-def]
    for d in range(len(x_D)):
        x_D[d] *= scale_D[d]


@compiled()
def _end_of_some(side_N, begin):  # type: ignore[no-untyped-def]
    """Rows of one side, so few that they stay in the first cache while heads take turns."""
    end, most = begin + 1, min(begin + BESIDE, len(side_N))
    while end < most and side_N[end] == side_N[begin]:
        end += 1
    return end


@compiled()
def _run_block(h_RD, row_R, x_ND, side_N, ask_C, read_C, layer, is_last):  # type: ignore[no-untyped-def]
    """A layer of some items."""
    rows, width = h_RD.shape
    tiles = (rows + ROWS - 1) // ROWS
    high = (rows + tiles - 1) // tiles
    held = tiles * high
    attended, spread = layer.heads * layer.head_size, layer.heads * layer.sides * width
    norm, nothing = layer.attention_norm, layer.attention_norm.scale_D[:0]
    x_D = np.empty(width, dtype=np.float32)
    small_RD, out_RD = small_room(held, width), room(held, width)
    small_RO, out_RO = small_room(held, attended), room(held, attended)
    small_RX, own_RX = small_room(held, spread), room(held, spread)
    own_RX[:, spread:] = 0  # it is read in whole vectors
    _configure(shape(high))
    for row in range(rows):
        x_D[:] = h_RD[row]
        _norm(x_D, norm.epsilon, nothing, nothing)
        x_ND[row_R[row], :width] = x_D
        _scale(x_D, norm.scale_D, norm.shift_D)
        _store(x_D, small_RD[row, :width])
    product(small_RD, 0, high, layer.query, 0, out_RO, 0)
    for row in range(rows):
        _store_biased(out_RO[row, :attended], layer.query.bias_O, small_RO[row, :attended])
    for head in range(layer.heads):
        to = head * layer.sides * width
        product(small_RO, head * layer.head_size, high, layer.keys, head, own_RX, to)
    x_ = x_ND.reshape(-1)
    for item in range(len(ask_C) - 1):
        side_T = side_N[read_C[item] : read_C[item + 1]]
        for row in range(ask_C[item] - ask_C[0], ask_C[item + 1] - ask_C[0]):
            _read(own_RX[row], x_, read_C[item], side_T, layer, small_RX[row])
    for head in range(layer.heads):
        at = head * layer.sides * width
        product(small_RX, at, high, layer.values, head, out_RO, head * layer.head_size)
    for row in range(rows):
        _store_biased(out_RO[row, :attended], layer.values.bias_O, small_RO[row, :attended])
    product(small_RO, 0, high, layer.out, 0, out_RD, 0)
    close, norm = layer.attention_close, layer.mlp_norm
    for row in range(rows):
        _add_biased(h_RD[row], out_RD[row], layer.out.bias_O)
        _norm(h_RD[row], close.epsilon, close.scale_D, close.shift_D)
        x_D[:] = h_RD[row]
        _norm(x_D, norm.epsilon, norm.scale_D, norm.shift_D)
        _store(x_D, small_RD[row, :width])
    neurons = layer.up.blocks * OUTPUTS
    small_RI, out_RI = small_room(held, neurons), room(held, neurons)
    product(small_RD, 0, high, layer.up, 0, out_RI, 0)
    for row in range(rows):
        _activate(layer.form, out_RI[row, :neurons], layer.up.bias_O, small_RI[row, :neurons])
    product(small_RI, 0, high, layer.down, 0, out_RD, 0)
    _release()
    close = layer.mlp_close
    for row in range(rows):
        _add_biased(h_RD[row], out_RD[row], layer.down.bias_O)
        _norm(h_RD[row], close.epsilon, close.scale_D, close.shift_D)
    if not is_last and (layer.attention_close.epsilon >= 0 or close.epsilon >= 0):
        first = layer.attention_close
        for row in range(read_C[0], read_C[-1]):
            _norm(x_ND[row, :width], first.epsilon, first.scale_D, first.shift_D)
            _norm(x_ND[row, :width], close.epsilon, close.scale_D, close.shift_D)


@compiled(parallel=True)
def _bring(h_ND, epsilon, x_ND):  # type: ignore[no-untyped-def]
    nothing, width = np.empty(0, dtype=np.float32), h_ND.shape[1]
    for part in prange((len(h_ND) + MOST_ROWS - 1) // MOST_ROWS):
        for row in range(part * MOST_ROWS, min(len(h_ND), (part + 1) * MOST_ROWS)):
            x_D = x_ND[row, :width]
            for d in range(width):
                x_D[d] = _wide(h_ND[row, d])
            _norm(x_D, epsilon, nothing, nothing)
            x_ND[row, width:] = 0


@compiled(parallel=True)
def _run(  # type: ignore[no-untyped-def]
    h_QD, x_ND, side_N, row_Q, ask_C, read_C, threads, is_last, attention_norm, query, keys, values,
    out, attention_close, mlp_norm, up, down, mlp_close, form, width, heads, head_size, sides,
    scale,
):  # fmt: skip
    # The layer comes in parts, as a parallel loop takes no tuples within tuples.
    count = len(ask_C) - 1
    each = len(h_QD) // count  # class tokens of an item
    parts = (count * each + MOST_ROWS - 1) // MOST_ROWS
    parts = (parts + threads - 1) // threads * threads
    share = min((count + parts - 1) // parts, MOST_ROWS // each)
    for part in prange((count + share - 1) // share):
        first = part * share
        end = min(count, first + share)
        rows = slice(ask_C[first], ask_C[end])
        layer = TailLayer(
            attention_norm, query, keys, values, out, attention_close, mlp_norm, up, down,
            mlp_close, form, width, heads, head_size, sides, scale,
        )  # fmt: skip
        _run_block(
            h_QD[rows], row_Q[rows], x_ND, side_N, ask_C[first : end + 1], read_C[first : end + 1],
            layer, is_last,
        )  # fmt: skip
