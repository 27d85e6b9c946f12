"""Vector code for the inner loops of kernels.py: what Numba cannot be made to vectorise itself.

A weight is stored in tiles of WIDTH outputs. While some inputs are added up, the sums of one tile
stay in the processor's registers, WIDTH / LANES of them: that is what makes it fast. The element
type of the stored weight says how it is read (tiles.py): float32 as it is, int16 as float16, uint16
as bfloat16, uint8 as steps on a grid. All arithmetic is float32, in the order of the inputs.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
WIDTH = 96  # with LANES = 8: 12 sums, the most that leave AVX2's 16 registers room to work
GROUP = 32  # inputs that share a grid
_AHEAD = 16  # picks
_LINE = 64  # bytes

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(_I32, LANES)


@intrinsic
def add_rows(
    typing: Any, sums: Any, at: Any, weight: Any, steps: Any, lows: Any, tile: Any, base: Any,
    index: Any, value: Any, first: Any, end: Any,
) -> Any:  # fmt: skip
    """sums[at : at + WIDTH] += value[k] * weight[tile, index[k] - base], for first <= k < end.

    Args:
        weight: [T, I, WIDTH], in any of the stored forms.
        steps, lows: [T, I / GROUP, WIDTH], where the weight lies on a grid.
    """
    arguments = (sums, at, weight, steps, lows, tile, base, index, value, first, end)
    signature = types.void(*(types.intp if isinstance(a, types.Integer) else a for a in arguments))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        row_of = _row_reader(context, builder, kinds[2:5], args[2:5], args[5])
        indices = context.make_array(kinds[7])(context, builder, args[7]).data
        values = context.make_array(kinds[8])(context, builder, args[8]).data
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
        at.add_incoming(args[9], before)
        running = [builder.phi(_FLOATS) for _ in started]
        for phi, start in zip(running, started, strict=True):
            phi.add_incoming(start, before)
        builder.cbranch(builder.icmp_signed("<", at, args[10]), body, done)
        builder.position_at_end(body)
        place = builder.sext(builder.load(builder.gep(indices, [at])), _I64)
        # Rows are skipped, so the processor cannot guess which line of memory comes next.
        later = builder.add(at, ir.Constant(_I64, _AHEAD))
        later = builder.select(builder.icmp_signed("<", later, args[10]), later, at)
        coming = builder.sext(builder.load(builder.gep(indices, [later])), _I64)
        _fetch(context, builder, kinds[2], args[2], args[5], builder.sub(coming, args[6]))
        factor = _everywhere(builder, builder.load(builder.gep(values, [at])))
        lanes_of = row_of(builder.sub(place, args[6]))
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
def widen_rows(
    typing: Any, out: Any, weight: Any, steps: Any, lows: Any, tile: Any, first: Any, end: Any
) -> Any:
    """out[i - first] = weight[tile, i] in float32, for first <= i < end."""
    arguments = (out, weight, steps, lows, tile, first, end)
    signature = types.void(*(types.intp if isinstance(a, types.Integer) else a for a in arguments))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        row_of = _row_reader(context, builder, kinds[1:4], args[1:4], args[4])
        into = context.make_array(kinds[0])(context, builder, args[0]).data
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), f"llvm.fmuladd.v{LANES}f32"
        )
        with cgutils.for_range(builder, builder.sub(args[6], args[5])) as loop:
            lanes_of = row_of(builder.add(args[5], loop.index))
            row_at = builder.mul(loop.index, ir.Constant(_I64, WIDTH))
            for j in range(WIDTH // LANES):
                builder.store(lanes_of(j, fma), _vector(builder, into, row_at, j), align=4)
        return context.get_dummy_value()

    return signature, generate


def _row_reader(context: Any, builder: Any, kinds: Any, arrays: Any, tile: Any) -> Any:
    """How to read one input's row of a tile: a function of the input, of the vector's number."""
    weight, steps, lows = (
        context.make_array(kind)(context, builder, array)
        for kind, array in zip(kinds, arrays, strict=True)
    )
    element = kinds[0].dtype

    def start(array: Any, row: Any) -> Any:
        rows = cgutils.unpack_tuple(builder, array.shape, 3)[1]
        return builder.mul(builder.add(builder.mul(tile, rows), row), ir.Constant(_I64, WIDTH))

    def row_of(row: Any) -> Any:
        row_at = start(weight, row)
        group_at = None
        if element == types.uint8:
            group = builder.sdiv(row, ir.Constant(_I64, GROUP))
            group_at = start(steps, group)

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


def _fetch(context: Any, builder: Any, kind: Any, array: Any, tile: Any, row: Any) -> Any:
    """Have one input's row of a tile brought into the cache."""
    weight = context.make_array(kind)(context, builder, array)
    rows = cgutils.unpack_tuple(builder, weight.shape, 3)[1]
    at = builder.mul(builder.add(builder.mul(tile, rows), row), ir.Constant(_I64, WIDTH))
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
