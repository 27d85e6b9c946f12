"""What compiled loops share: how they are compiled, whose threads they run on, whose turn it is.

And the loop that is needed once a weight: the fit of a grid.

Shape letters: I inputs   O outputs   S slabs of a weight   L groups of inputs of all slabs
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import numba
import numpy as np
import torch
from filelock import FileLock
from numba import prange
from numba.core.compiler_lock import global_compiler_lock

_FILES = (  # all that hold compiled loops
    "amx.py",
    "blocks.py",
    "class_kernels.py",
    "kernels.py",
    "lanes.py",
    "largest.py",
    "late_keys.py",
    "many_queries.py",
    "paired_queries.py",
    "pairs.py",
    "row_kernels.py",
    "single_queries.py",
    "stored_tile.py",
    "sub_layers.py",
    "tail_kernels.py",
    "thresholds.py",
    "tile_blocks.py",
    "vectors.py",
    "whole_requests.py",
)
_STAMP = tuple(
    (name, status.st_mtime, status.st_size)
    for name in _FILES
    for status in [Path(__file__).with_name(name).stat()]
)

# Numba must find the OpenMP library that PyTorch brought along: two pools of threads would stand
# in each other's way. Its other pool does not stand two callers at once, so they take turns.
TURN = Lock()


def fit_grid(
    full_SIO: np.ndarray, group: int, codes: np.ndarray, steps: np.ndarray, lows: np.ndarray
) -> bool:
    """Fill in the grid on which a weight lies; False where it lies on none that is known.

    Args:
        group: how many inputs share a step and a low.
    """
    use_threads()
    with TURN:
        return bool(_fit_grid(full_SIO, group, codes, steps, lows).all())


def use_threads() -> None:
    """Let this thread's calls use as many threads as PyTorch does."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    # Numba's first call of all tells OpenMP, and so PyTorch, to use all processors.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


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
        _one_process_at_a_time(kept)
        return kept

    return compile_later


def _one_process_at_a_time(kept: Any) -> None:
    """Two processes would both compile; and each might call its own file what the other's is."""
    compile_first, index = kept.compile, Path(kept._cache._cache_file._index_path)
    lock = FileLock(index.with_suffix(".lock"))

    def compile_or_load(signature: Any) -> Any:
        # In this order: who holds Numba's lock asks for those of the loops called from within.
        with global_compiler_lock, lock:
            return compile_first(signature)

    kept.compile = compile_or_load


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
