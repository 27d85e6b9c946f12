"""What a CPU does for class tokens that ask alone, compiled: rows are summed up as queries weigh
them, and the residual of tokens that are left out is normed.

Shape letters: N rows of items   Q queries   A query heads   D width   S sides (direct_reading.py)
    C items, and one more   K rows of a block
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import prange
from torch import Tensor, nn

from elastiformer.kernels import TURN, compiled
from elastiformer.row_kernels import _as_stored, _wide, on_host

_BLOCK = 8  # rows that are brought at once
_ROWS = 16  # that a thread norms at a time
_FAST = {"contract", "reassoc", "nsz"}
_NOTHING = np.empty(0, dtype=np.float32)
NORMED = -1.0  # in place of an epsilon: nothing is left to be normed, but perhaps to be scaled


class AffineNorm(NamedTuple):
    """A norm over rows, with a scale and a shift; empty: neither."""

    epsilon: float
    scale_D: np.ndarray
    shift_D: np.ndarray


AS_IT_IS = AffineNorm(NORMED, _NOTHING, _NOTHING)


def affine_of(norm: nn.Module | None) -> AffineNorm | None:
    """A module's norm as loops do it; None: they cannot."""
    if norm is None or isinstance(norm, nn.Identity):
        return AS_IT_IS
    if not isinstance(norm, nn.LayerNorm) or norm.bias is None:
        return None
    scale_D, shift_D = (each.detach().float().cpu().numpy() for each in (norm.weight, norm.bias))
    return AffineNorm(norm.eps, scale_D, shift_D)


def sums(
    own_SAQD: Tensor,
    x_ND: Tensor,
    side_N: np.ndarray,
    ask_C: np.ndarray,
    read_C: np.ndarray,
    norm: AffineNorm,
    scale: float,
) -> Tensor:
    """The rows of each item, normed, summed as each of its queries weighs them: [S, A, Q, D].

    Args:
        own_SAQD, x_ND: float32 or bfloat16, their numbers side by side.
        side_N: of each row.
        ask_C, read_C: where each item's queries and rows begin, and the last one's end.
    """
    sums_SAQD = torch.empty_like(own_SAQD)
    with TURN:
        _sum_up(
            on_host(own_SAQD), on_host(x_ND), side_N, ask_C, read_C, norm.scale_D, norm.shift_D,
            np.float32(norm.epsilon), np.float32(scale), on_host(sums_SAQD),
        )  # fmt: skip
    return sums_SAQD


def close(x_ND: Tensor, first: AffineNorm, second: AffineNorm) -> None:
    """Norm the residual of tokens to which a layer's two sub-layers add nothing, in place."""
    with TURN:
        _close(
            on_host(x_ND), np.float32(first.epsilon), first.scale_D, first.shift_D,
            np.float32(second.epsilon), second.scale_D, second.shift_D,
        )  # fmt: skip


@compiled(parallel=True)
def _sum_up(  # type: ignore[no-untyped-def]
    own_SAQD, x_ND, side_N, ask_C, read_C, scale_D, shift_D, epsilon, scale, sums_SAQD
):
    sides, heads, _, width = own_SAQD.shape
    scale_2 = scale * np.float32(1.4426950408889634)
    for item in prange(len(ask_C) - 1):
        begin, end = read_C[item], read_C[item + 1]
        block_KD = np.empty((_BLOCK, width), dtype=np.float32)
        weight_AN = np.empty((heads, end - begin), dtype=np.float32)
        own_SAD = np.empty((sides, heads, width), dtype=np.float32)
        sum_SAD = np.empty((sides, heads, width), dtype=np.float32)
        for query in range(ask_C[item], ask_C[item + 1]):
            sum_SAD[:], weight_AN[:] = 0, 0
            for side in range(sides):
                for head in range(heads):
                    for d in range(width):
                        own_SAD[side, head, d] = _wide(own_SAQD[side, head, query, d])
            row = begin
            while row < end:
                side = side_N[row]
                count = _bring(x_ND, side_N, row, end, scale_D, shift_D, epsilon, block_KD)
                for head in range(heads):
                    weight_K = weight_AN[head, row - begin : row - begin + count]
                    _add_dots(own_SAD[side, head], block_KD[:count], weight_K)
                row += count
            for head in range(heads):
                _weigh(weight_AN[head], scale_2)
            row = begin
            while row < end:
                side = side_N[row]
                count = _bring(x_ND, side_N, row, end, scale_D, shift_D, epsilon, block_KD)
                for head in range(heads):
                    weight_K = weight_AN[head, row - begin : row - begin + count]
                    _add_rows(weight_K, block_KD[:count], sum_SAD[side, head])
                row += count
            for side in range(sides):
                for head in range(heads):
                    for d in range(width):
                        sums_SAQD[side, head, query, d] = _as_stored(
                            sum_SAD[side, head, d], sums_SAQD
                        )


@compiled(fastmath=_FAST)
def _bring(x_ND, side_N, first, end, scale_D, shift_D, epsilon, block_KD):  # type: ignore[no-untyped-def]
    """What the next rows of one side bring to the layer, themselves or their norms; how many."""
    width, count = block_KD.shape[1], 0
    while count < _BLOCK and first + count < end and side_N[first + count] == side_N[first]:
        x_D, row_D = x_ND[first + count], block_KD[count]
        count += 1
        for d in range(width):
            row_D[d] = _wide(x_D[d])
        _norm(row_D, epsilon, scale_D, shift_D)
    return count


@compiled(fastmath=_FAST)
def _norm(x_D, epsilon, scale_D, shift_D):  # type: ignore[no-untyped-def]
    """Norm a row in place, then scale and shift it; less where there is nothing to do it with."""
    width = len(x_D)
    if epsilon >= 0:
        mean, square = np.float32(0), np.float32(0)
        for d in range(width):
            mean += x_D[d]
        mean /= np.float32(width)
        for d in range(width):
            square += (x_D[d] - mean) * (x_D[d] - mean)
        narrow = np.float32(1) / np.sqrt(square / np.float32(width) + epsilon)
        for d in range(width):
            x_D[d] = (x_D[d] - mean) * narrow
    if len(scale_D):
        for d in range(width):
            x_D[d] = x_D[d] * scale_D[d] + shift_D[d]


@compiled(parallel=True)
def _close(x_ND, epsilon, scale_D, shift_D, epsilon_2, scale_2_D, shift_2_D):  # type: ignore[no-untyped-def]
    rows, width = x_ND.shape
    for part in prange((rows + _ROWS - 1) // _ROWS):
        row_D = np.empty(width, dtype=np.float32)
        for row in range(part * _ROWS, min(rows, (part + 1) * _ROWS)):
            for d in range(width):
                row_D[d] = _wide(x_ND[row, d])
            _norm(row_D, epsilon, scale_D, shift_D)
            _norm(row_D, epsilon_2, scale_2_D, shift_2_D)
            for d in range(width):
                x_ND[row, d] = _as_stored(row_D[d], x_ND)


@compiled(fastmath=_FAST)
def _weigh(weight_N, scale_2):  # type: ignore[no-untyped-def]
    """Scores become weights, which add up to one."""
    most, total = np.float32(-np.inf), np.float32(0)
    for row in range(len(weight_N)):
        most = max(most, weight_N[row])
    for row in range(len(weight_N)):
        weight_N[row] = np.exp2((weight_N[row] - most) * scale_2)
        total += weight_N[row]
    for row in range(len(weight_N)):
        weight_N[row] /= total


@compiled(fastmath=_FAST)
def _add_rows(times_R, x_RD, sum_D):  # type: ignore[no-untyped-def]
    """Add some rows, each so many times; four at a time, so that sums stay at hand."""
    rows, width = x_RD.shape
    for row in range(0, rows - rows % 4, 4):
        a_D, b_D, c_D, e_D = x_RD[row], x_RD[row + 1], x_RD[row + 2], x_RD[row + 3]
        a, b = times_R[row], times_R[row + 1]
        c, e = times_R[row + 2], times_R[row + 3]
        for d in range(width):
            both = a * a_D[d] + b * b_D[d]
            sum_D[d] += both + c * c_D[d] + e * e_D[d]
    for row in range(rows - rows % 4, rows):
        a, a_D = times_R[row], x_RD[row]
        for d in range(width):
            sum_D[d] += a * a_D[d]


@compiled(fastmath=_FAST)
def _add_dots(by_D, x_RD, sum_R):  # type: ignore[no-untyped-def]
    """Add the inner product of each row with a vector; four rows at a time."""
    rows, width = x_RD.shape
    for row in range(0, rows - rows % 4, 4):
        a, b, c, e = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        a_D, b_D, c_D, e_D = x_RD[row], x_RD[row + 1], x_RD[row + 2], x_RD[row + 3]
        for d in range(width):
            a += by_D[d] * a_D[d]
            b += by_D[d] * b_D[d]
            c += by_D[d] * c_D[d]
            e += by_D[d] * e_D[d]
        sum_R[row] += a
        sum_R[row + 1] += b
        sum_R[row + 2] += c
        sum_R[row + 3] += e
    for row in range(rows - rows % 4, rows):
        a, a_D = np.float32(0), x_RD[row]
        for d in range(width):
            a += by_D[d] * a_D[d]
        sum_R[row] += a
