"""The product over picked inputs, on a CPU: in vector code that Numba would not find by itself.

A weight is stored as [S, I, C, WIDTH]: in S slabs of C x WIDTH outputs, input after input, so that
what belongs to one input lies side by side. While some inputs are added up, the sums of WIDTH
outputs stay in the processor's registers: that is what makes it fast. The element type of the
stored weight says how it is read (tiles.py): float32 as it is, int16 as float16, uint16 as
bfloat16, uint8 as steps on a grid. All arithmetic is float32, in the order of the inputs, SUMMED of
them in one go, as oneDNN's product does: so the two can take turns, and a row gets the same bits
whatever other rows there are.

Shape letters: R rows   I inputs   O outputs   S slabs (in start_S: rows + 1)   C chunks of a slab
    W outputs of a chunk   P picks of all rows
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from elastiformer.kernels import TURN, compiled

LANES = 8
WIDTH = 96  # with LANES = 8: 12 sums, the most that leave AVX2's 16 registers room to work
GROUP = 32  # inputs that share a grid
SUMMED = 1024
NOTHING = np.empty((1, 1, 1, WIDTH), dtype=np.float32)
_AHEAD = 8  # picks that are added up before it is the next chunk's turn, and fetched before that
_BLOCK = 64  # inputs of a chunk that stay in the first cache while rows take turns
_LINE = 64  # bytes

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(_I32, LANES)


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


@intrinsic
def _add_rows(
    typing: Any, sums: Any, at: Any, weight: Any, steps: Any, lows: Any, slab: Any, chunk: Any,
    base: Any, index: Any, value: Any, first: Any, end: Any, last: Any,
) -> Any:  # fmt: skip
    """sums[at : at + WIDTH] += value[k] * weight[slab, index[k] - base, chunk], first <= k < end.

    Args:
        weight: [S, I, C, WIDTH], in any of the stored forms.
        steps, lows: [S, I / GROUP, C, WIDTH], where the weight lies on a grid.
        last: the end of the picks that come next; some of them are fetched ahead.
    """
    arguments = (
        sums, at, weight, steps, lows, slab, chunk, base, index, value, first, end, last
    )  # fmt: skip
    signature = types.void(*(types.intp if isinstance(a, types.Integer) else a for a in arguments))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        row_of = _row_reader(context, builder, kinds[2:5], args[2:5], args[5:7])
        indices = context.make_array(kinds[8])(context, builder, args[8]).data
        values = context.make_array(kinds[9])(context, builder, args[9]).data
        sums_at = [
            _vector(
                builder, context.make_array(kinds[0])(context, builder, args[0]).data, args[1], j
            )
            for j in range(WIDTH // LANES)
        ]
        started = [builder.load(pointer, align=4) for pointer in sums_at]
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), f"llvm.fmuladd.v{LANES}f32"
        )
        before = builder.block
        head, body, done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
        builder.branch(head)
        builder.position_at_end(head)
        at = builder.phi(_I64)
        at.add_incoming(args[10], before)
        running = [builder.phi(_FLOATS) for _ in started]
        for phi, start in zip(running, started, strict=True):
            phi.add_incoming(start, before)
        builder.cbranch(builder.icmp_signed("<", at, args[11]), body, done)
        builder.position_at_end(body)
        place = builder.sext(builder.load(builder.gep(indices, [at])), _I64)
        # Rows are skipped, so the processor cannot guess which line of memory comes next.
        later = builder.add(at, ir.Constant(_I64, _AHEAD))
        later = builder.select(builder.icmp_signed("<", later, args[12]), later, at)
        coming = builder.sext(builder.load(builder.gep(indices, [later])), _I64)
        _fetch(context, builder, kinds[2], args[2], args[5:7], builder.sub(coming, args[7]))
        factor = _everywhere(builder, builder.load(builder.gep(values, [at])))
        lanes_of = row_of(builder.sub(place, args[7]))
        added = [
            builder.call(fma, [factor, lanes_of(j, fma), phi]) for j, phi in enumerate(running)
        ]
        at.add_incoming(builder.add(at, ir.Constant(_I64, 1)), builder.block)
        for phi, total in zip(running, added, strict=True):
            phi.add_incoming(total, builder.block)
        builder.branch(head)
        builder.position_at_end(done)
        for pointer, total in zip(sums_at, running, strict=True):
            builder.store(total, pointer, align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _widen_rows(
    typing: Any, out: Any, weight: Any, steps: Any, lows: Any, slab: Any, chunk: Any,
    first: Any, end: Any,
) -> Any:  # fmt: skip
    """out[i - first] = weight[slab, i, chunk] in float32, for first <= i < end."""
    arguments = (out, weight, steps, lows, slab, chunk, first, end)
    signature = types.void(*(types.intp if isinstance(a, types.Integer) else a for a in arguments))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        row_of = _row_reader(context, builder, kinds[1:4], args[1:4], args[4:6])
        into = context.make_array(kinds[0])(context, builder, args[0]).data
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), f"llvm.fmuladd.v{LANES}f32"
        )
        with cgutils.for_range(builder, builder.sub(args[7], args[6])) as loop:
            lanes_of = row_of(builder.add(args[6], loop.index))
            row_at = builder.mul(loop.index, ir.Constant(_I64, WIDTH))
            for j in range(WIDTH // LANES):
                builder.store(lanes_of(j, fma), _vector(builder, into, row_at, j), align=4)
        return context.get_dummy_value()

    return signature, generate


def _row_reader(context: Any, builder: Any, kinds: Any, arrays: Any, tile: Any) -> Any:
    """How to read one input's row of a tile (slab, chunk): by the input, by the vector's number."""
    weight, steps, lows = (
        context.make_array(kind)(context, builder, array)
        for kind, array in zip(kinds, arrays, strict=True)
    )
    element = kinds[0].dtype

    def row_of(row: Any) -> Any:
        row_at = _start(builder, weight, tile, row)
        group_at = None
        if element == types.uint8:
            group = builder.sdiv(row, ir.Constant(_I64, GROUP))
            group_at = _start(builder, steps, tile, group)

        def lanes_of(j: int, fma: Any) -> Any:
            raw = ir.VectorType(context.get_data_type(element), LANES)
            if element == types.int16:
                raw = ir.VectorType(ir.HalfType(), LANES)
            size = element.bitwidth // 8
            stored = builder.load(_vector(builder, weight.data, row_at, j, raw), align=size)
            if element == types.float32:
                return stored
            if element == types.int16:
                return builder.fpext(stored, _FLOATS)
            if element == types.uint16:
                shift = ir.Constant(_INTS, [16] * LANES)
                return builder.bitcast(builder.shl(builder.zext(stored, _INTS), shift), _FLOATS)
            step = builder.load(_vector(builder, steps.data, group_at, j), align=4)
            low = builder.load(_vector(builder, lows.data, group_at, j), align=4)
            return builder.call(
                fma, [step, builder.uitofp(builder.zext(stored, _INTS), _FLOATS), low]
            )

        return lanes_of

    return row_of


def _start(builder: Any, array: Any, tile: Any, row: Any) -> Any:
    """Where [slab, row, chunk] begins."""
    _, rows, chunks, _ = cgutils.unpack_tuple(builder, array.shape, 4)
    line = builder.add(builder.mul(tile[0], rows), row)
    return builder.mul(builder.add(builder.mul(line, chunks), tile[1]), ir.Constant(_I64, WIDTH))


def _fetch(context: Any, builder: Any, kind: Any, array: Any, tile: Any, row: Any) -> Any:
    """Have one input's row of a tile brought into the cache."""
    weight = context.make_array(kind)(context, builder, array)
    at = _start(builder, weight, tile, row)
    start = builder.bitcast(builder.gep(weight.data, [at]), ir.IntType(8).as_pointer())
    fetch = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(ir.VoidType(), [start.type, _I32, _I32, _I32]),
        "llvm.prefetch.p0",
    )
    for line in range(0, WIDTH * kind.dtype.bitwidth // 8, _LINE):
        place = builder.gep(start, [ir.Constant(_I64, line)])
        builder.call(
            fetch, [place, ir.Constant(_I32, 0), ir.Constant(_I32, 3), ir.Constant(_I32, 1)]
        )


def _vector(builder: Any, data: Any, at: Any, j: int, kind: Any = _FLOATS) -> Any:
    """A pointer to the j-th vector from the element `at` on."""
    place = builder.add(at, ir.Constant(_I64, j * LANES))
    return builder.bitcast(builder.gep(data, [place]), kind.as_pointer())


def _everywhere(builder: Any, scalar: Any) -> Any:
    empty = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(empty, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(_INTS, [0] * LANES))


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
            stop = min(first + _AHEAD, picks)
            if index_P[first] >= summed:
                total_O += sums_O
                sums_O[:] = 0
                while index_P[first] >= summed:
                    summed += SUMMED
            while index_P[stop - 1] >= summed:
                stop -= 1
            for chunk in range(chunks):
                _add_rows(
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
            _widen_rows(wide_1I1W, weight_SICW, steps, lows, slab, chunk, first, end)
            for row in range(rows):
                begin, stop = at_R[row], start_S[row + 1]
                if end < inputs:
                    stop = begin
                    while stop < start_S[row + 1] and index_P[stop] < end:
                        stop += 1
                at_R[row] = stop
                _add_rows(
                    sums_RW, row * WIDTH, wide_1I1W, NOTHING, NOTHING, 0, 0, first,
                    index_P, value_P, begin, stop, stop,
                )  # fmt: skip
        total_RW += sums_RW
        begin, stop = tile * WIDTH, min(tile * WIDTH + WIDTH, outputs)
        for row in range(rows):
            for output in range(begin, stop):
                out_RO[row, output] = total_RW[row, output - begin]
