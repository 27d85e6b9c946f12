"""Loops of the sparse form on a CPU, compiled by Numba: the search for channels, and the product.

Each gives the same bits for a row whatever other rows there are, and adds in the order of the
inputs, SUMMED of them in one go, as oneDNN's float32 product does: so the two can take turns.

Shape letters: R rows   I inputs   O outputs   S slabs of a weight   C chunks of a slab
    W outputs of a chunk   G groups of inputs   P picks of all rows   K picks of one row; in
    start_S: S rows + 1
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

import numba
import numpy as np
import torch
from numba import prange

from elastiformer.lanes import AHEAD, GROUP, WIDTH, add_rows, widen_rows

SUMMED = 1024
NOTHING = np.empty((1, 1, 1, WIDTH), dtype=np.float32)
_BLOCK = 64  # inputs of a tile that stay in the first cache while rows take turns
_ROWS_ALONE = 4  # so few rows are searched faster by one thread

# Numba must find the OpenMP library that PyTorch brought along: two pools of threads would stand
# in each other's way. Its other pool does not stand two callers at once, so they take turns.
TURN = Lock()


def multiply(
    weight_SICW: np.ndarray,
    steps: np.ndarray,
    lows: np.ndarray,
    index_P: np.ndarray,
    value_P: np.ndarray,
    start_S: np.ndarray,
    out_RO: np.ndarray,
) -> None:
    """out = the picked values times the stored weight (tiles.py)."""
    with TURN:
        if len(out_RO) == 1:
            _multiply_one(weight_SICW, steps, lows, index_P, value_P, out_RO[0])
        else:
            _multiply_some(weight_SICW, steps, lows, index_P, value_P, start_S, out_RO)


def search(
    x_RI: np.ndarray,
    norms_I: np.ndarray,
    index_P: np.ndarray,
    value_P: np.ndarray,
    start_S: np.ndarray,
) -> None:
    """Fill in each row's channels of the largest size x norm, ascending; of equal ones the first.

    Args:
        start_S: where the picks of each row begin, and the last ones end.
    """
    if len(x_RI) <= _ROWS_ALONE:
        _search_in_turn(x_RI, norms_I, index_P, value_P, start_S)
        return
    with TURN:
        _search_side_by_side(x_RI, norms_I, index_P, value_P, start_S)


def keep_largest(
    x_RI: np.ndarray, norms_I: np.ndarray, counts_R: np.ndarray, only_RI: np.ndarray
) -> None:
    """Fill in `x`, zero but for what `search` would find."""
    with TURN:
        _keep_largest(x_RI, norms_I, counts_R, only_RI)


def fit_grid(full_SIO: np.ndarray, codes: np.ndarray, steps: np.ndarray, lows: np.ndarray) -> bool:
    """Fill in the grid on which a weight lies; False where it lies on none that is known."""
    with TURN:
        return bool(_fit_grid(full_SIO, codes, steps, lows).all())


def use_threads() -> None:
    """Let this thread's calls use as many threads as PyTorch does."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile at the first call; kept on disk where there is a place to."""
    options = {"fastmath": {"contract"}, "nogil": True, **options}

    def compile_later(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder that can be written
            return numba.njit(**options)(function)

    return compile_later


@compiled()
def _weigh(x_I, norms_I):  # type: ignore[no-untyped-def]
    """Size x norm, as bits: numbers that are not negative sort as their bits do."""
    weighed_I = np.empty(len(x_I), dtype=np.float32)
    for i in range(len(x_I)):
        weighed_I[i] = abs(x_I[i]) * norms_I[i]
    return weighed_I.view(np.int32)


@compiled()
def _least_kept(bits_I, wanted):  # type: ignore[no-untyped-def]
    """The least of the `wanted` largest, and how many that equal it are among them.

    Bisected, in passes that only count, which processors do eight at a time.
    """
    least, over = np.int32(0), np.int32(2**31 - 1)
    as_large = np.int32(len(bits_I))
    while over - least > 1 and as_large != wanted:
        middle = least + (over - least) // np.int32(2)
        count = np.int32(0)
        for i in range(len(bits_I)):
            count += np.int32(bits_I[i] >= middle)
        if count >= wanted:
            least, as_large = middle, count
        else:
            over = middle
    equal = np.int32(0)
    for i in range(len(bits_I)):
        equal += np.int32(bits_I[i] == least)
    return least, np.int32(equal - (as_large - wanted)), as_large == wanted


@compiled()
def _search_row(x_RI, norms_I, index_P, value_P, start_S, row):  # type: ignore[no-untyped-def]
    inputs = x_RI.shape[1]
    begin = start_S[row]
    wanted = start_S[row + 1] - begin
    if wanted == inputs:
        for i in range(inputs):
            index_P[begin + i] = i
            value_P[begin + i] = x_RI[row, i]
        return
    bits_I = _weigh(x_RI[row], norms_I)
    least, missing, _ = _least_kept(bits_I, wanted)
    index_K = np.empty(inputs, dtype=np.int32)
    kept = np.int32(0)
    for i in range(inputs):  # without a branch, which would be guessed wrong half the time
        index_K[kept] = i
        ties = np.int32(bits_I[i] == least)
        keeps = np.int32(bits_I[i] > least) | (ties & np.int32(missing > 0))
        missing -= ties
        kept += keeps
    for k in range(wanted):
        index_P[begin + k] = index_K[k]
        value_P[begin + k] = x_RI[row, index_K[k]]


@compiled(parallel=True)
def _keep_largest(x_RI, norms_I, counts_R, only_RI):  # type: ignore[no-untyped-def]
    for row in prange(len(x_RI)):
        x_I, only_I = x_RI[row], only_RI[row]
        if counts_R[row] == len(x_I):
            only_I[:] = x_I
            continue
        bits_I = _weigh(x_I, norms_I)
        least, missing, all_equal = _least_kept(bits_I, counts_R[row])
        if all_equal:  # of those that equal the least
            for i in range(len(x_I)):
                only_I[i] = x_I[i] if bits_I[i] >= least else np.float32(0)
            continue
        for i in range(len(x_I)):
            ties = bits_I[i] == least
            keeps = bits_I[i] > least or (ties and missing > 0)
            missing -= np.int32(ties)
            only_I[i] = x_I[i] if keeps else np.float32(0)


@compiled()
def _search_in_turn(x_RI, norms_I, index_P, value_P, start_S):  # type: ignore[no-untyped-def]
    for row in range(len(x_RI)):
        _search_row(x_RI, norms_I, index_P, value_P, start_S, row)


@compiled(parallel=True)
def _search_side_by_side(x_RI, norms_I, index_P, value_P, start_S):  # type: ignore[no-untyped-def]
    for row in prange(len(x_RI)):
        _search_row(x_RI, norms_I, index_P, value_P, start_S, row)


@compiled(parallel=True)
def _multiply_one(weight_SICW, steps, lows, index_P, value_P, out_O):  # type: ignore[no-untyped-def]
    """One row: picks a few at a time, each over a whole slab, as they lie in memory."""
    slabs, _, chunks, _ = weight_SICW.shape
    picks = len(index_P)
    for slab in prange(slabs):
        sums_O = np.zeros(chunks * WIDTH, dtype=np.float32)
        total_O = np.zeros(chunks * WIDTH, dtype=np.float32)
        first, summed = 0, SUMMED
        while first < picks:
            stop = min(first + AHEAD, picks)
            if index_P[first] >= summed:
                total_O += sums_O
                sums_O[:] = 0
                while index_P[first] >= summed:
                    summed += SUMMED
            while index_P[stop - 1] >= summed:
                stop -= 1
            for chunk in range(chunks):
                add_rows(
                    sums_O, chunk * WIDTH, weight_SICW, steps, lows, slab, chunk, 0,
                    index_P, value_P, first, stop, picks,
                )  # fmt: skip
            first = stop
        total_O += sums_O
        begin = slab * chunks * WIDTH
        for output in range(begin, min(begin + chunks * WIDTH, len(out_O))):
            out_O[output] = total_O[output - begin]


@compiled(parallel=True)
def _multiply_some(weight_SICW, steps, lows, index_P, value_P, start_S, out_RO):  # type: ignore[no-untyped-def]
    """Some rows, in turn over each block of inputs of a tile."""
    slabs, inputs, chunks, _ = weight_SICW.shape
    rows, outputs = out_RO.shape
    for tile in prange(slabs * chunks):
        slab, chunk = tile // chunks, tile % chunks
        sums_RW = np.zeros((rows, WIDTH), dtype=np.float32)
        total_RW = np.zeros((rows, WIDTH), dtype=np.float32)
        wide_1I1W = np.empty((1, _BLOCK, 1, WIDTH), dtype=np.float32)
        at_R = start_S[:-1].copy()
        for first in range(0, inputs, _BLOCK):
            end = min(first + _BLOCK, inputs)
            if first and first % SUMMED == 0:
                total_RW += sums_RW
                sums_RW[:] = 0
            widen_rows(wide_1I1W, weight_SICW, steps, lows, slab, chunk, first, end)
            for row in range(rows):
                begin, stop = at_R[row], start_S[row + 1]
                if end < inputs:
                    stop = begin
                    while stop < start_S[row + 1] and index_P[stop] < end:
                        stop += 1
                at_R[row] = stop
                add_rows(
                    sums_RW, row * WIDTH, wide_1I1W, NOTHING, NOTHING, 0, 0, first,
                    index_P, value_P, begin, stop, stop,
                )  # fmt: skip
        total_RW += sums_RW
        begin, stop = tile * WIDTH, min(tile * WIDTH + WIDTH, outputs)
        for row in range(rows):
            for output in range(begin, stop):
                out_RO[row, output] = total_RW[row, output - begin]


@compiled()
def _eleven_bits(number):  # type: ignore[no-untyped-def]
    """The nearest number with a mantissa of 11 bits, as float16 has."""
    bits = np.float32(number)
    rounded = np.empty(1, dtype=np.float32)
    rounded[0] = bits
    raw = rounded.view(np.uint32)
    raw[0] = (raw[0] + np.uint32(0xFFF) + ((raw[0] >> np.uint32(13)) & np.uint32(1))) & np.uint32(
        0xFFFFE000
    )
    return rounded[0]


@compiled(parallel=True)
def _fit_grid(full_SIO, codes, steps, lows):  # type: ignore[no-untyped-def]
    slabs, inputs, outputs = full_SIO.shape
    groups = steps.shape[1]
    fits_L = np.ones(slabs * groups, dtype=np.bool_)
    for line in prange(slabs * groups):
        slab, group = line // groups, line % groups
        first, end = group * GROUP, min(group * GROUP + GROUP, inputs)
        for output in range(outputs):
            fits, step, low = _fit_group(
                full_SIO[slab, first:end, output], codes[slab, first:end, output]
            )
            steps[slab, group, output], lows[slab, group, output] = step, low
            if not fits:
                fits_L[line] = False
                break
    return fits_L


@compiled()
def _fit_group(full_I, codes_I):  # type: ignore[no-untyped-def]
    """Codes, step and low of numbers on one grid: as Q4_1, Q4_0 or Q8_0 would have made it."""
    low = high = full_I[0]
    for number in full_I:
        low, high = min(low, number), max(high, number)
    size = max(abs(low), abs(high))
    step, base = np.float32(0), low
    for form in range(3):
        if form == 0:  # from the least to the largest
            step, base = _eleven_bits((high - low) / np.float32(15)), low
        elif form == 1:  # around zero; what is largest in size is code 0
            step = _eleven_bits(size / np.float32(8))
            if high > -low:
                step = -step
            base = np.float32(-8) * step
        else:
            step = _eleven_bits(size / np.float32(127))
            base = np.float32(-128) * step
        fits = True
        for i in range(len(full_I)):
            code = np.float32(0)
            if step != 0:
                code = np.float32(np.round((full_I[i] - base) / step))
            if code < 0 or code > 255 or code * step + base != full_I[i]:
                fits = False
                break
            codes_I[i] = np.uint8(code)
        if fits:
            return True, step, base
    return False, step, base
