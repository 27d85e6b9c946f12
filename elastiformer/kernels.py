"""Loops of the sparse form on a CPU, compiled by Numba: the search for channels, the fit of a grid.

The product over what was found is in lanes.py. A row gets the same whatever other rows there are.

Shape letters: R rows   I inputs   O outputs   S slabs of a weight (in start_S: rows + 1)
    L groups of inputs of all slabs   P picks of all rows   K picks of one row
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import numba
import numpy as np
import torch
from numba import prange

_FILES = (
    "kernels.py",
    "lanes.py",
    "pairs.py",
    "row_kernels.py",
    "single_queries.py",
    "sub_layers.py",
)
_STAMP = tuple(
    (name, status.st_mtime, status.st_size)
    for name in _FILES
    for status in [Path(__file__).with_name(name).stat()]
)
_COARSE = 16  # bits that a guess does without, so that a sum of many numbers fits
_INTERPOLATED = 12  # passes, after which the search bisects
_ROWS_ALONE = 4  # so few rows are searched faster by one thread

# Numba must find the OpenMP library that PyTorch brought along: two pools of threads would stand
# in each other's way. Its other pool does not stand two callers at once, so they take turns.
TURN = Lock()


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


def keep_largest(x_RI: np.ndarray, norms_I: np.ndarray, start_S: np.ndarray) -> None:
    """Make `x` zero but for what `search` would find, in place."""
    with TURN:
        _keep_largest(x_RI, norms_I, start_S)


def fit_grid(
    full_SIO: np.ndarray, group: int, codes: np.ndarray, steps: np.ndarray, lows: np.ndarray
) -> bool:
    """Fill in the grid on which a weight lies; False where it lies on none that is known.

    Args:
        group: how many inputs share a step and a low.
    """
    with TURN:
        return bool(_fit_grid(full_SIO, group, codes, steps, lows).all())


def use_threads() -> None:
    """Let this thread's calls use as many threads as PyTorch does."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


def thread_pool() -> str:
    """Whose threads the kernels of this process run on, once one has run: "omp" is PyTorch's."""
    layer: str = numba.threading_layer()
    return layer


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile at the first call; kept on disk where there is a place to."""
    options = {"fastmath": {"contract"}, "nogil": True, **options}

    def compile_later(function: Callable[..., Any]) -> Any:
        try:
            kept = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder that can be written
            return numba.njit(**options)(function)
        # Numba would go by the date of the function's own file alone, and not see that another
        # has changed, from which it inlines.
        kept._cache._cache_file._source_stamp = _STAMP
        return kept

    return compile_later


@compiled()
def _weigh(x_I, norms_I):  # type: ignore[no-untyped-def]
    """Size x norm, as bits: numbers that are not negative sort as their bits do."""
    weighed_I = np.empty(len(x_I), dtype=np.float32)
    for i in range(len(x_I)):
        weighed_I[i] = abs(x_I[i]) * norms_I[i]
    return weighed_I.view(np.int32)


@compiled()
def _count_from(bits_I, least):  # type: ignore[no-untyped-def]
    count = np.int32(0)
    for i in range(len(bits_I)):
        count += np.int32(bits_I[i] >= least)
    return count


@compiled()
def _first_guess(bits_I, wanted):  # type: ignore[no-untyped-def]
    """Where the least of the `wanted` largest would be among numbers of a normal distribution."""
    total = np.uint32(0)
    for i in range(len(bits_I)):
        total += np.uint32(bits_I[i]) >> np.uint32(_COARSE)
    # The mean of numbers' bits is about the bits of their geometric mean.
    mean = np.empty(1, dtype=np.int32)
    mean[0] = np.int32(np.int64(total) // len(bits_I)) << np.int32(_COARSE)
    left_out = np.float32(len(bits_I) - wanted) / np.float32(len(bits_I))
    return mean.view(np.float32)[0] * np.float32(2.6) * left_out


@compiled()
def _least_kept(bits_I, wanted):  # type: ignore[no-untyped-def]
    """The least of the `wanted` largest, and how many that equal it are among them.

    Found in passes that only count, which processors do many at a time: a third as many as of
    bisection, since each guess interpolates between the counts that are known (regula falsi in
    the Illinois form). Bisected where that does not get there. What is found is the same.
    """
    inputs = np.int32(len(bits_I))
    least, over = np.int32(0), np.int32(2**31 - 1)
    as_large = inputs
    point = np.empty(1, dtype=np.float32)
    bits = point.view(np.int32)
    point[0] = _first_guess(bits_I, wanted)
    low, above_low = np.float32(0), np.float32(inputs - wanted) + np.float32(0.5)
    high, below_high = np.float32(0), np.float32(0)
    passes, side = 0, 0
    while over - least > 1 and as_large != wanted:
        passes += 1
        if passes > _INTERPOLATED or not least < bits[0] < over:
            bits[0] = least + (over - least) // np.int32(2)
        count = _count_from(bits_I, bits[0])
        excess = np.float32(count - wanted) + np.float32(0.5)
        if count >= wanted:
            least, as_large = bits[0], count
            low, above_low = point[0], excess
            below_high *= np.float32(0.5 if side > 0 else 1)
            side = 1
        else:
            over = bits[0]
            high, below_high = point[0], -excess
            above_low *= np.float32(0.5 if side < 0 else 1)
            side = -1
        if below_high > 0:
            point[0] = low + (high - low) * above_low / (above_low + below_high)
        else:  # beyond what is wanted, along the line from zero
            point[0] *= np.float32(1) + np.float32(1.5) * excess / np.float32(
                max(inputs - count, np.int32(1))
            )
    if as_large == wanted:
        return least, np.int32(0), True
    return least, np.int32(wanted - _count_from(bits_I, least + np.int32(1))), False


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
    least, missing, has_all = _least_kept(bits_I, wanted)
    index_K = np.empty(inputs, dtype=np.int32)
    kept = np.int32(0)
    # Without branches, which would be guessed wrong half the time.
    if has_all:
        for i in range(inputs):
            index_K[kept] = i
            kept += np.int32(bits_I[i] >= least)
    else:
        for i in range(inputs):
            index_K[kept] = i
            ties = np.int32(bits_I[i] == least)
            keeps = np.int32(bits_I[i] > least) | (ties & np.int32(missing > 0))
            missing -= ties
            kept += keeps
    for k in range(wanted):
        index_P[begin + k] = index_K[k]
        value_P[begin + k] = x_RI[row, index_K[k]]


@compiled(parallel=True)
def _keep_largest(x_RI, norms_I, start_S):  # type: ignore[no-untyped-def]
    for row in prange(len(x_RI)):
        x_I = x_RI[row]
        wanted = start_S[row + 1] - start_S[row]
        if wanted == len(x_I):
            continue
        bits_I = _weigh(x_I, norms_I)
        least, missing, has_all = _least_kept(bits_I, wanted)
        if has_all:
            for i in range(len(x_I)):
                x_I[i] = x_I[i] if bits_I[i] >= least else np.float32(0)
            continue
        for i in range(len(x_I)):
            ties = bits_I[i] == least
            keeps = bits_I[i] > least or (ties and missing > 0)
            missing -= np.int32(ties)
            x_I[i] = x_I[i] if keeps else np.float32(0)


@compiled()
def _search_in_turn(x_RI, norms_I, index_P, value_P, start_S):  # type: ignore[no-untyped-def]
    for row in range(len(x_RI)):
        _search_row(x_RI, norms_I, index_P, value_P, start_S, row)


@compiled(parallel=True)
def _search_side_by_side(x_RI, norms_I, index_P, value_P, start_S):  # type: ignore[no-untyped-def]
    for row in prange(len(x_RI)):
        _search_row(x_RI, norms_I, index_P, value_P, start_S, row)


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
def _fit_grid(full_SIO, group, codes, steps, lows):  # type: ignore[no-untyped-def]
    slabs, inputs, outputs = full_SIO.shape
    groups = steps.shape[1]
    fits_L = np.ones(slabs * groups, dtype=np.bool_)
    for line in prange(slabs * groups):
        slab, place = line // groups, line % groups
        first, end = place * group, min(place * group + group, inputs)
        for output in range(outputs):
            fits, step, low = _fit_group(
                full_SIO[slab, first:end, output], codes[slab, first:end, output]
            )
            steps[slab, place, output], lows[slab, place, output] = step, low
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
