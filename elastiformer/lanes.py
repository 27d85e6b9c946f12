"""The product over picked inputs, on a CPU: in vector code that Numba would not find by itself.

A weight is stored as [S, I, C, WIDTH]: in S slabs of C x WIDTH outputs, input after input, so that
what belongs to one input lies side by side. While some inputs are added up, the sums of WIDTH
outputs stay in the processor's registers: that is what makes it fast. The element type of the
stored weight says how it is read (tiles.py): float32 as it is, int16 as float16, uint16 as
bfloat16, uint8 as steps on a grid, int8 as two such a byte. All arithmetic is float32, in the order
of the inputs, so many of them in one go (`summed`) as oneDNN's product adds up: so the two can take
turns, and a row gets the same bits whatever other rows there are.

Shape letters: R rows   I inputs   O outputs   S slabs (in start_S: rows + 1)   C chunks of a slab
    W outputs of a chunk   P picks of all rows
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from elastiformer.kernels import TURN, compiled
from elastiformer.stored_tile import GROUP, WIDTH, StoredTile
from elastiformer.vectors import I64, aligned, everywhere, loop, vector_at

NOTHING = np.empty((1, 1, 1, WIDTH), dtype=np.float32)
_MOST_AHEAD = 32  # picks that are added up before it is the next chunk's turn
_AHEAD_BYTES = 24576  # of the weight, in these picks: they stay in the first cache
_BLOCK = 64  # inputs of a chunk that stay in the first cache while rows take turns


def multiply(
    weight_SICW: np.ndarray,
    steps: np.ndarray,
    lows: np.ndarray,
    index_P: np.ndarray,
    value_P: np.ndarray,
    start_S: np.ndarray,
    summed: int,
    out_RO: np.ndarray,
) -> None:
    """out = the picked values times the stored weight (tiles.py).

    Args:
        summed: how many inputs are added up in one go; whole groups.
    """
    with TURN:
        if len(out_RO) == 1:
            ahead = ahead_of(weight_SICW)
            _multiply_one(weight_SICW, steps, lows, index_P, value_P, summed, ahead, out_RO[0])
        else:
            _multiply_some(weight_SICW, steps, lows, index_P, value_P, start_S, summed, out_RO)


def ahead_of(weight_SICW: np.ndarray) -> int:
    """How many picks of a row are added up before it is the next chunk's turn."""
    return min(max(_AHEAD_BYTES // int(weight_SICW[0, 0].nbytes), 4), _MOST_AHEAD)


@intrinsic(prefer_literal=True)
def _add_rows(
    typing: Any, sums: Any, at: Any, weight: Any, steps: Any, lows: Any, slab: Any, chunk: Any,
    base: Any, index: Any, value: Any, first: Any, end: Any, last: Any, ahead: Any,
) -> Any:  # fmt: skip
    """sums[at : at + WIDTH] += value[k] * weight[slab, index[k] - base, chunk], first <= k < end.

    Args:
        weight: [S, I, C, WIDTH], in any of the stored forms; on a grid, all of these inputs must
            be of one group.
        steps, lows: [S, I / GROUP, C, WIDTH], where the weight lies on a grid.
        last: the end of the picks that come next.
        ahead: how many picks ahead memory is fetched; a constant 0: not at all.
    """
    fetches = getattr(ahead, "literal_value", None) != 0
    arguments = (
        sums, at, weight, steps, lows, slab, chunk, base, index, value, first, end, last, ahead
    )  # fmt: skip
    signature = types.void(*(types.intp if isinstance(a, types.Integer) else a for a in arguments))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        tile = StoredTile(context, builder, kinds[2:5], args[2:5], args[5:7])
        indices = context.make_array(kinds[8])(context, builder, args[8]).data
        values = context.make_array(kinds[9])(context, builder, args[9]).data
        sums_data = context.make_array(kinds[0])(context, builder, args[0]).data
        with builder.if_then(builder.icmp_signed("<", args[10], args[11])):
            following = builder.select(
                builder.icmp_signed("<", args[11], args[12]), args[11], args[10]
            )
            tile.fetch_scales(builder.sub(_load(builder, indices, following), args[7]))
            tile.enter_group(builder.sub(_load(builder, indices, args[10]), args[7]))
            for part in tile.parts:
                pointers = [vector_at(builder, sums_data, args[1], j) for j in part]
                started = [builder.load(pointer, align=4) for pointer in pointers]
                scales = tile.scales(part)

                def add(at: Any, running: Any, part: Any = part, scales: Any = scales) -> Any:
                    if part[0] == 0 and fetches:
                        # Rows are skipped: the processor cannot guess which memory comes next.
                        later = builder.add(at, args[13])
                        later = builder.select(builder.icmp_signed("<", later, args[12]), later, at)
                        tile.fetch(builder.sub(_load(builder, indices, later), args[7]))
                    place = _load(builder, indices, at)
                    factor = everywhere(builder, builder.load(builder.gep(values, [at])))
                    weights = tile.read(builder.sub(place, args[7]), part, scales)
                    return [
                        tile.multiply_add(factor, weight, total)
                        for weight, total in zip(weights, running, strict=True)
                    ]

                totals = loop(builder, args[10], args[11], started, add)
                for pointer, total in zip(pointers, totals, strict=True):
                    builder.store(total, pointer, align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _widen_rows(
    typing: Any, out: Any, weight: Any, steps: Any, lows: Any, slab: Any, chunk: Any,
    base: Any, first: Any, end: Any,
) -> Any:  # fmt: skip
    """out[i - base] = weight[slab, i, chunk] in float32, for first <= i < end, of one group."""
    arguments = (out, weight, steps, lows, slab, chunk, base, first, end)
    signature = types.void(*(types.intp if isinstance(a, types.Integer) else a for a in arguments))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        tile = StoredTile(context, builder, kinds[1:4], args[1:4], args[4:6])
        into = context.make_array(kinds[0])(context, builder, args[0]).data
        tile.enter_group(args[7])
        for part in tile.parts:
            scales = tile.scales(part)

            def widen(at: Any, _: Any, part: Any = part, scales: Any = scales) -> Any:
                if part[0] == 0:  # beyond the end nothing is read, and fetching does no harm
                    tile.fetch(builder.add(at, ir.Constant(I64, _BLOCK)))
                row_at = builder.mul(builder.sub(at, args[6]), ir.Constant(I64, WIDTH))
                for j, wide in zip(part, tile.read(at, part, scales), strict=True):
                    builder.store(wide, vector_at(builder, into, row_at, j), align=4)
                return []

            loop(builder, args[7], args[8], [], widen)
        return context.get_dummy_value()

    return signature, generate


def _load(builder: Any, indices: Any, at: Any) -> Any:
    return builder.sext(builder.load(builder.gep(indices, [at])), I64)


@compiled(parallel=True)
def _multiply_one(  # type: ignore[no-untyped-def]
    weight_SICW, steps, lows, index_P, value_P, summed, ahead, out_O
):
    """One row: picks a few at a time, each over a whole slab, as they lie in memory."""
    slabs, _, chunks, _ = weight_SICW.shape
    picks = len(index_P)
    for slab in prange(slabs):
        sums_O = aligned(chunks * WIDTH)
        sums_O[:] = 0
        total_O = np.zeros(chunks * WIDTH, dtype=np.float32)
        first, sum_end = 0, summed
        while first < picks:
            if index_P[first] >= sum_end:
                total_O += sums_O
                sums_O[:] = 0
                while index_P[first] >= sum_end:
                    sum_end += summed
            stop = min(first + ahead, picks)
            group_end = index_P[first] // GROUP * GROUP + GROUP
            while index_P[stop - 1] >= group_end:
                stop -= 1
            for chunk in range(chunks):
                _add_rows(
                    sums_O, chunk * WIDTH, weight_SICW, steps, lows, slab, chunk, 0,
                    index_P, value_P, first, stop, picks, ahead,
                )  # fmt: skip
            first = stop
        total_O += sums_O
        begin = slab * chunks * WIDTH
        for output in range(begin, min(begin + chunks * WIDTH, len(out_O))):
            out_O[output] = total_O[output - begin]


@compiled(parallel=True)
def _multiply_some(  # type: ignore[no-untyped-def]
    weight_SICW, steps, lows, index_P, value_P, start_S, summed, out_RO
):
    """Some rows, in turn over each block of inputs of a chunk."""
    slabs, inputs, chunks, _ = weight_SICW.shape
    rows, outputs = out_RO.shape
    for slab in prange(slabs):
        sums_RO = aligned(rows * chunks * WIDTH).reshape((rows, chunks * WIDTH))
        sums_RO[:] = 0
        total_RO = np.zeros((rows, chunks * WIDTH), dtype=np.float32)
        wide_1I1W = aligned(_BLOCK * WIDTH).reshape((1, _BLOCK, 1, WIDTH))
        begin_R, stop_R = start_S[:-1].copy(), start_S[:-1].copy()
        for first in range(0, inputs, _BLOCK):
            end = min(first + _BLOCK, inputs)
            if first and first % summed == 0:
                total_RO += sums_RO
                sums_RO[:] = 0
            for row in range(rows):
                while stop_R[row] < start_S[row + 1] and index_P[stop_R[row]] < end:
                    stop_R[row] += 1
            for chunk in range(chunks):
                for group in range(first, end, GROUP):
                    _widen_rows(
                        wide_1I1W, weight_SICW, steps, lows, slab, chunk,
                        first, group, min(group + GROUP, end),
                    )  # fmt: skip
                for row in range(rows):
                    _add_rows(
                        sums_RO, (row * chunks + chunk) * WIDTH, wide_1I1W, NOTHING, NOTHING, 0, 0,
                        first, index_P, value_P, begin_R[row], stop_R[row], stop_R[row], 0,
                    )  # fmt: skip
            begin_R[:] = stop_R
        total_RO += sums_RO
        begin = slab * chunks * WIDTH
        for row in range(rows):
            for output in range(begin, min(begin + chunks * WIDTH, outputs)):
                out_RO[row, output] = total_RO[row, output - begin]
