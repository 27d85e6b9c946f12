"""The search for a row's channels of the largest size x norm, on a CPU.

Numbers that are not negative are larger where their bits are, so what is found is exact, whatever
the search begins with. A row whose channels are those that reach a known threshold (thresholds.py)
is not searched. A row gets the same whatever other rows there are.

Shape letters: R rows   I inputs   S rows + 1   P picks of all rows   K picks of one row
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from elastiformer.kernels import TURN, compiled
from elastiformer.row_kernels import _as_bits, _as_float
from elastiformer.vectors import FLOATS, I32, I64, INTS, LANES, WIDE, everywhere, vector_at

_INTERPOLATED = 12  # passes, after which the search bisects
_ROWS_ALONE = 4  # so few rows are searched faster by one thread
_INFINITE = np.float32(np.inf)
# Sums may be taken in any order: of ones they are exact, and of sizes they only guess.
_ANY_ORDER: Any = {"fastmath": {"contract", "reassoc", "nsz"}}


def search(
    x_RI: np.ndarray,
    norms_I: np.ndarray,
    index_P: np.ndarray,
    value_P: np.ndarray,
    start_S: np.ndarray,
    least_R: np.ndarray,
) -> None:
    """Fill in each row's channels of the largest size x norm, ascending; of equal ones the first.

    Args:
        start_S: where the picks of each row begin, and the last ones end.
        least_R: what just these reach, or SEARCHED.
    """
    if len(x_RI) <= _ROWS_ALONE:
        _search_in_turn(x_RI, norms_I, index_P, value_P, start_S, least_R)
        return
    with TURN:
        _search_side_by_side(x_RI, norms_I, index_P, value_P, start_S, least_R)


def keep_largest(
    x_RI: np.ndarray, norms_I: np.ndarray, start_S: np.ndarray, least_R: np.ndarray
) -> None:
    """Make `x` zero but for what `search` would find, in place."""
    if np.count_nonzero(np.diff(start_S) < x_RI.shape[1]) <= _ROWS_ALONE:
        _keep_in_turn(x_RI, norms_I, start_S, least_R)
        return
    with TURN:
        _keep_side_by_side(x_RI, norms_I, start_S, least_R)


@compiled(**_ANY_ORDER)
def _weigh(x_I, norms_I, weighed_I):  # type: ignore[no-untyped-def]
    """Fill in size x norm, infinite where that is no number; their sum."""
    total = np.float32(0)
    for i in range(len(x_I)):
        weighed = abs(x_I[i]) * norms_I[i]
        weighed = weighed if weighed < _INFINITE else _INFINITE
        weighed_I[i] = weighed
        total += weighed
    return total


@compiled(**_ANY_ORDER)
def _count_from(weighed_I, least):  # type: ignore[no-untyped-def]
    # Whole numbers would be counted in 64 bits, half as many at once.
    count = np.float32(0)
    for i in range(len(weighed_I)):
        count += np.float32(1) if weighed_I[i] >= least else np.float32(0)
    return np.int32(count)


@compiled()
def _least_kept(weighed_I, total, wanted):  # type: ignore[no-untyped-def]
    """A number that just the `wanted` largest reach, and whether there is one.

    If there is none, since some are equal, the least of the `wanted` largest.

    Found in passes that only count, which processors do many at a time: a third as many as of
    bisection, since each guess interpolates between the counts that are known (regula falsi in
    the Illinois form). Bisected where that does not get there. What is found is the same.
    """
    inputs = np.int32(len(weighed_I))
    least, over = np.int32(0), np.int32(2**31 - 1)  # as bits
    as_large = inputs
    # Sizes lie about so if the numbers are of a normal distribution.
    left_out = np.float32(inputs - wanted) / np.float32(inputs)
    point = total / np.float32(inputs) * np.float32(1.4) * left_out
    low, above_low = np.float32(0), np.float32(inputs - wanted) + np.float32(0.5)
    high, below_high = np.float32(0), np.float32(0)
    passes, side = 0, 0
    while over - least > 1 and as_large != wanted:
        passes += 1
        bits = _as_bits(point)
        if passes > _INTERPOLATED or not least < bits < over:
            bits = np.int32(least + (over - least) // np.int32(2))
            point = _as_float(bits)
        count = _count_from(weighed_I, point)
        excess = np.float32(count - wanted) + np.float32(0.5)
        if count >= wanted:
            least, as_large = bits, count
            low, above_low = point, excess
            below_high *= np.float32(0.5 if side > 0 else 1)
            side = 1
        else:
            over = bits
            high, below_high = point, -excess
            above_low *= np.float32(0.5 if side < 0 else 1)
            side = -1
        if below_high > 0:
            point = low + (high - low) * above_low / (above_low + below_high)
        else:  # beyond what is wanted, along the line from zero
            point *= np.float32(1) + np.float32(1.5) * excess / np.float32(
                max(inputs - count, np.int32(1))
            )
    return _as_float(least), as_large == wanted


@compiled()
def _least_of(weighed_I, total, wanted, least):  # type: ignore[no-untyped-def]
    """What `_least_kept` gives, without a search where that is known."""
    if least >= 0:
        return np.float32(least), True
    return _least_kept(weighed_I, total, wanted)


@compiled()
def _missing(weighed_I, least, wanted):  # type: ignore[no-untyped-def]
    """How many of those that equal the least are among the `wanted` largest."""
    return np.int32(wanted - _count_from(weighed_I, _as_float(np.int32(_as_bits(least) + 1))))


@intrinsic
def _put_kept(
    typing: Any, x: Any, weighed: Any, at: Any, least: Any, index: Any, value: Any, kept: Any
) -> Any:
    """Of LANES inputs from `at` on those that reach the least, put side by side; how many.

    Whatever lies behind them, LANES in all, is overwritten.
    """
    signature = types.intp(x, weighed, types.intp, least, index, value, types.intp)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not WIDE:  # never called
            return ir.Constant(I64, 0)

        def data(place: int) -> Any:
            kind = signature.args[place]
            return context.make_array(kind)(context, builder, args[place]).data

        def put(numbers: Any, kind: Any, form: str, place: int) -> None:
            squeeze = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(kind, [kind, kind, keeps.type]),
                f"llvm.x86.avx512.mask.compress.{form}",
            )
            squeezed = builder.call(squeeze, [numbers, numbers, keeps])
            builder.store(squeezed, vector_at(builder, data(place), args[6], 0, kind), align=4)

        sizes = builder.load(vector_at(builder, data(1), args[2], 0), align=4)
        keeps = builder.fcmp_ordered(">=", sizes, everywhere(builder, args[3]))
        first = everywhere(builder, builder.trunc(args[2], I32))
        put(builder.add(first, ir.Constant(INTS, list(range(LANES)))), INTS, f"v{LANES}i32", 4)
        values = builder.load(vector_at(builder, data(0), args[2], 0), align=4)
        put(values, FLOATS, f"v{LANES}f32", 5)
        bits = builder.bitcast(keeps, ir.IntType(LANES))
        return builder.zext(builder.ctpop(bits), I64)

    return signature, generate


@compiled()
def _search_row(x_RI, norms_I, index_P, value_P, start_S, least_R, row):  # type: ignore[no-untyped-def]
    x_I = x_RI[row]
    inputs = len(x_I)
    begin = start_S[row]
    wanted = start_S[row + 1] - begin
    if wanted == inputs:
        for i in range(inputs):
            index_P[begin + i] = i
            value_P[begin + i] = x_I[i]
        return
    weighed_I = np.empty(inputs, dtype=np.float32)
    total = _weigh(x_I, norms_I, weighed_I)
    least, has_all = _least_of(weighed_I, total, wanted, least_R[row])
    index_K = np.empty(inputs + LANES, dtype=np.int32)
    value_K = np.empty(inputs + LANES, dtype=np.float32)
    first, kept, missing = 0, np.int32(0), np.int32(0)
    if has_all:
        if WIDE:
            first = inputs // LANES * LANES
            for i in range(0, first, LANES):
                kept += _put_kept(x_I, weighed_I, i, least, index_K, value_K, kept)
    else:
        missing = _missing(weighed_I, least, wanted)
    # Without branches, which would be guessed wrong half the time.
    for i in range(first, inputs):
        index_K[kept] = i
        value_K[kept] = x_I[i]
        ties = np.int32(weighed_I[i] == least)
        keeps = np.int32(weighed_I[i] > least) | (ties & np.int32(has_all | (missing > 0)))
        missing -= ties
        kept += keeps
    for k in range(wanted):
        index_P[begin + k] = index_K[k]
        value_P[begin + k] = value_K[k]


@compiled()
def _copy_largest(x_I, norms_I, wanted, least, only_I):  # type: ignore[no-untyped-def]
    """`only` = `x`, zero but for its `wanted` largest."""
    inputs = len(x_I)
    weighed_I = np.empty(inputs, dtype=np.float32)
    total = _weigh(x_I, norms_I, weighed_I)
    least, has_all = _least_of(weighed_I, total, wanted, least)
    if has_all:
        for i in range(inputs):
            only_I[i] = x_I[i] if weighed_I[i] >= least else np.float32(0)
        return
    missing = _missing(weighed_I, least, wanted)
    for i in range(inputs):
        ties = weighed_I[i] == least
        keeps = weighed_I[i] > least or (ties and missing > 0)
        missing -= np.int32(ties)
        only_I[i] = x_I[i] if keeps else np.float32(0)


@compiled()
def _keep_largest_of_row(x_I, norms_I, wanted, least):  # type: ignore[no-untyped-def]
    # Neither in place nor within a parallel loop would it be vector code.
    only_I = np.empty(len(x_I), dtype=np.float32)
    _copy_largest(x_I, norms_I, wanted, least, only_I)
    for i in range(len(x_I)):
        x_I[i] = only_I[i]


@compiled()
def _keep_in_turn(x_RI, norms_I, start_S, least_R):  # type: ignore[no-untyped-def]
    for row in range(len(x_RI)):
        wanted = start_S[row + 1] - start_S[row]
        if wanted < x_RI.shape[1]:
            _keep_largest_of_row(x_RI[row], norms_I, wanted, least_R[row])


@compiled(parallel=True)
def _keep_side_by_side(x_RI, norms_I, start_S, least_R):  # type: ignore[no-untyped-def]
    for row in prange(len(x_RI)):
        wanted = start_S[row + 1] - start_S[row]
        if wanted < x_RI.shape[1]:
            _keep_largest_of_row(x_RI[row], norms_I, wanted, least_R[row])


@compiled()
def _search_in_turn(x_RI, norms_I, index_P, value_P, start_S, least_R):  # type: ignore[no-untyped-def]
    for row in range(len(x_RI)):
        _search_row(x_RI, norms_I, index_P, value_P, start_S, least_R, row)


@compiled(parallel=True)
def _search_side_by_side(x_RI, norms_I, index_P, value_P, start_S, least_R):  # type: ignore[no-untyped-def]
    for row in prange(len(x_RI)):
        _search_row(x_RI, norms_I, index_P, value_P, start_S, least_R, row)
