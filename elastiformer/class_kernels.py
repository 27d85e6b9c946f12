"""What a CPU does for class tokens that ask alone, compiled: rows are summed up as queries weigh
them, and the residual of tokens that are left out is normed. So are rows of encoders elsewhere.

Shape letters: N rows of items   Q queries   A query heads   D width   S sides (direct_reading.py)
    C items, and one more   K rows of a block
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic
from torch import Tensor, nn

from elastiformer.kernels import TURN, compiled
from elastiformer.row_kernels import _as_stored, _exponential, _wide, on_host
from elastiformer.vectors import (
    FLOATS,
    I32,
    I64,
    LANES,
    aligned,
    everywhere,
    loop,
    multiply_add,
    vector_at,
)

BESIDE = 8  # rows that are read at once
_ROWS = 16  # that a thread norms at a time
# A check for divisions by zero would keep loops from vector code.
_FREE: Any = {"fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy"}
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


def normed(x_ND: Tensor, norm: AffineNorm, out_ND: Tensor) -> None:
    """Fill in the norm of each row, of float32 or bfloat16 and as either."""
    with TURN:
        _norm_each(
            on_host(x_ND), np.float32(norm.epsilon), norm.scale_D, norm.shift_D, on_host(out_ND)
        )


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
    padded = _padded(width)
    for item in prange(len(ask_C) - 1):
        begin, end = read_C[item], read_C[item + 1]
        parts = sides * heads * padded
        block_, own_, sum_ = aligned(BESIDE * padded), aligned(parts), aligned(parts)
        block_[:], own_[:] = 0, 0
        block_KD = block_.reshape((BESIDE, padded))
        weight_AN = np.empty((heads, end - begin + BESIDE), dtype=np.float32)
        own_SAD = own_.reshape((sides, heads, padded))
        sum_SAD, weight_ = sum_.reshape((sides, heads, padded)), weight_AN.reshape(-1)
        for query in range(ask_C[item], ask_C[item + 1]):
            sum_[:] = 0
            for side in range(sides):
                for head in range(heads):
                    for d in range(width):
                        own_SAD[side, head, d] = _wide(own_SAQD[side, head, query, d])
            row = begin
            while row < end:
                side = side_N[row]
                count = _bring(x_ND, side_N, row, end, scale_D, shift_D, epsilon, block_KD)
                for head in range(heads):
                    at = head * weight_AN.shape[1] + row - begin
                    own_at = (side * heads + head) * padded
                    _dot_rows(own_, own_at, block_, 0, padded, count, weight_, at)
                row += count
            for head in range(heads):
                _weigh(weight_AN[head, : end - begin], scale)
            row = begin
            while row < end:
                side = side_N[row]
                count = _bring(x_ND, side_N, row, end, scale_D, shift_D, epsilon, block_KD)
                for head in range(heads):
                    at = head * weight_AN.shape[1] + row - begin
                    sum_at = (side * heads + head) * padded
                    _add_rows(weight_, at, block_, 0, padded, count, sum_, sum_at)
                row += count
            for side in range(sides):
                for head in range(heads):
                    for d in range(width):
                        sums_SAQD[side, head, query, d] = _as_stored(
                            sum_SAD[side, head, d], sums_SAQD
                        )


@compiled(**_FREE)
def _bring(x_ND, side_N, first, end, scale_D, shift_D, epsilon, block_KD):  # type: ignore[no-untyped-def]
    """What the next rows of one side bring to the layer, themselves or their norms; how many."""
    width, count = x_ND.shape[1], 0
    while count < BESIDE and first + count < end and side_N[first + count] == side_N[first]:
        x_D, row_D = x_ND[first + count], block_KD[count, :width]
        count += 1
        for d in range(width):
            row_D[d] = _wide(x_D[d])
        _norm(row_D, epsilon, scale_D, shift_D)
    return count


@compiled(**_FREE)
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


@compiled(**_FREE)
def _norm_row(x_D, epsilon, scale_D, shift_D, out_D):  # type: ignore[no-untyped-def]
    """The same from one place to another, without a row between them in float32."""
    mean, square, width = np.float32(0), np.float32(0), len(x_D)
    for d in range(width):
        mean += _wide(x_D[d])
    mean /= np.float32(width)
    for d in range(width):
        apart = _wide(x_D[d]) - mean
        square += apart * apart
    narrow = np.float32(1) / np.sqrt(square / np.float32(width) + epsilon)
    for d in range(width):
        out_D[d] = _as_stored((_wide(x_D[d]) - mean) * narrow * scale_D[d] + shift_D[d], out_D)


@compiled(parallel=True)
def _norm_each(x_ND, epsilon, scale_D, shift_D, out_ND):  # type: ignore[no-untyped-def]
    for row in prange(len(x_ND)):
        _norm_row(x_ND[row], epsilon, scale_D, shift_D, out_ND[row])


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


@compiled(**_FREE)
def _weigh(weight_N, scale):  # type: ignore[no-untyped-def]
    """Scores become weights, which add up to one."""
    most, total = np.float32(-np.inf), np.float32(0)
    for row in range(len(weight_N)):
        most = max(most, weight_N[row])
    for row in range(len(weight_N)):
        weight_N[row] = _exponential((weight_N[row] - most) * scale)
    for row in range(len(weight_N)):
        total += weight_N[row]
    share = np.float32(1) / total
    for row in range(len(weight_N)):
        weight_N[row] *= share


@compiled()
def _padded(width):  # type: ignore[no-untyped-def]
    """Numbers of a row that is read in whole vectors."""
    return (width + LANES - 1) // LANES * LANES


def _places(builder: Any, first: Any, apart: Any, count: Any) -> list[Any]:
    """Where rows begin; behind the last of `count` there is none: it stands for them."""
    last, places = builder.sub(count, ir.Constant(I64, 1)), []
    for row in range(BESIDE):
        own = ir.Constant(I64, row)
        own = builder.select(builder.icmp_signed(">", own, last), last, own)
        places.append(builder.add(first, builder.mul(own, apart)))
    return places


def _across(builder: Any, lines: list[Any]) -> Any:
    """Of each of BESIDE vectors what its numbers add up to, side by side."""
    size = LANES  # numbers that are yet to be added to each other
    while size > 1:
        size //= 2
        # Each line's numbers are halved, and two vectors joined to one as long as there are two.
        both, step = (lines, 2) if len(lines) > 1 else (lines * 2, 1)
        parts = LANES * min(len(lines), 2) // (2 * size) if len(lines) > 1 else BESIDE
        masks = [[2 * size * part + place for part in range(parts)] for place in (0, size)]
        lanes = [[at + lane for at in mask for lane in range(size)] for mask in masks]
        first, second = (ir.Constant(ir.VectorType(I32, len(mask)), mask) for mask in lanes)
        lines = [
            builder.fadd(
                builder.shuffle_vector(both[at], both[at + 1], first),
                builder.shuffle_vector(both[at], both[at + 1], second),
            )
            for at in range(0, len(lines), step)
        ]
    return lines[0]


@intrinsic
def _dot_rows(
    typing: Any, own: Any, own_at: Any, x: Any, at: Any, apart: Any, count: Any, sums: Any,
    sums_at: Any,
) -> Any:  # fmt: skip
    """sums[row] = x[row] . own, of BESIDE rows, of which `count` are; what comes behind is anyhow.

    Args:
        apart: the width of the rows, whole vectors; what is behind them is zero.
    """
    number = types.intp
    signature = types.void(own, number, x, number, number, number, sums, number)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        own, x, sums = (
            context.make_array(signature.args[place])(context, builder, args[place]).data
            for place in (0, 2, 6)
        )
        places = _places(builder, args[3], args[4], args[5])

        def add(step: Any, running: list[Any]) -> list[Any]:
            along = builder.mul(step, ir.Constant(I64, LANES))
            by = builder.load(vector_at(builder, own, builder.add(args[1], along)), align=4)
            rows = (vector_at(builder, x, builder.add(place, along)) for place in places)
            return [
                multiply_add(builder, by, builder.load(row, align=4), total)
                for row, total in zip(rows, running, strict=True)
            ]

        nothing = ir.Constant(FLOATS, [0.0] * LANES)
        steps = builder.udiv(args[4], ir.Constant(I64, LANES))
        lines = loop(builder, ir.Constant(I64, 0), steps, [nothing] * BESIDE, add)
        total = _across(builder, lines)
        into = builder.bitcast(builder.gep(sums, [args[7]]), total.type.as_pointer())
        builder.store(total, into, align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _add_rows(
    typing: Any, weights: Any, weights_at: Any, x: Any, at: Any, apart: Any, count: Any, sums: Any,
    sums_at: Any,
) -> Any:  # fmt: skip
    """sums += weights[row] * x[row], of BESIDE rows, of which `count` are; `apart` as above."""
    number = types.intp
    signature = types.void(weights, number, x, number, number, number, sums, number)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        weights, x, sums = (
            context.make_array(signature.args[place])(context, builder, args[place]).data
            for place in (0, 2, 6)
        )
        places = _places(builder, args[3], args[4], args[5])
        factors = []
        for row, at in enumerate(_places(builder, args[1], ir.Constant(I64, 1), args[5])):
            here = builder.icmp_signed("<", ir.Constant(I64, row), args[5])
            weight = builder.load(builder.gep(weights, [at]))
            weight = builder.select(here, weight, ir.Constant(ir.FloatType(), 0.0))
            factors.append(everywhere(builder, weight))

        def add(step: Any, _: list[Any]) -> list[Any]:
            along = builder.mul(step, ir.Constant(I64, LANES))
            into = vector_at(builder, sums, builder.add(args[7], along))
            total = builder.load(into, align=4)
            for factor, place in zip(factors, places, strict=True):
                row = builder.load(vector_at(builder, x, builder.add(place, along)), align=4)
                total = multiply_add(builder, factor, row, total)
            builder.store(total, into, align=4)
            return []

        steps = builder.udiv(args[4], ir.Constant(I64, LANES))
        loop(builder, ir.Constant(I64, 0), steps, [], add)
        return context.get_dummy_value()

    return signature, generate
