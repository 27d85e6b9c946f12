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
from llvmlite.binding import get_host_cpu_features
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from elastiformer.kernels import TURN, compiled

# A processor with AVX-512 has registers twice as wide and twice as many.
_WIDE = bool(get_host_cpu_features().get("avx512f"))
LANES = 16 if _WIDE else 8
WIDTH = 96
GROUP = 32  # inputs that share a grid
NOTHING = np.empty((1, 1, 1, WIDTH), dtype=np.float32)
_VECTORS = WIDTH // LANES
# Vectors of sums that are worked on together: with a step and a low each, they fill the registers.
_TOGETHER = {True: 6 if _WIDE else 4, False: _VECTORS}
_MOST_AHEAD = 32  # picks that are added up before it is the next chunk's turn
_AHEAD_BYTES = 24576  # of the weight, in these picks: they stay in the first cache
_BLOCK = 64  # inputs of a chunk that stay in the first cache while rows take turns
_LINE = 64  # bytes
_SECOND_CACHE = 2  # as LLVM names it: in the first, it would push out what is read before it

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_HALVES = ir.VectorType(ir.HalfType(), LANES)
_INTS = ir.VectorType(_I32, LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)


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
        tile = _Tile(context, builder, kinds[2:5], args[2:5], args[5:7])
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
                pointers = [_vector(builder, sums_data, args[1], j) for j in part]
                started = [builder.load(pointer, align=4) for pointer in pointers]
                scales = tile.scales(part)

                def add(at: Any, running: Any, part: Any = part, scales: Any = scales) -> Any:
                    if part[0] == 0 and fetches:
                        # Rows are skipped: the processor cannot guess which memory comes next.
                        later = builder.add(at, args[13])
                        later = builder.select(builder.icmp_signed("<", later, args[12]), later, at)
                        tile.fetch(builder.sub(_load(builder, indices, later), args[7]))
                    place = _load(builder, indices, at)
                    factor = _everywhere(builder, builder.load(builder.gep(values, [at])))
                    weights = tile.read(builder.sub(place, args[7]), part, scales)
                    return [
                        tile.multiply_add(factor, weight, total)
                        for weight, total in zip(weights, running, strict=True)
                    ]

                totals = _loop(builder, args[10], args[11], started, add)
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
        tile = _Tile(context, builder, kinds[1:4], args[1:4], args[4:6])
        into = context.make_array(kinds[0])(context, builder, args[0]).data
        tile.enter_group(args[7])
        for part in tile.parts:
            scales = tile.scales(part)

            def widen(at: Any, _: Any, part: Any = part, scales: Any = scales) -> Any:
                if part[0] == 0:  # beyond the end nothing is read, and fetching does no harm
                    tile.fetch(builder.add(at, ir.Constant(_I64, _BLOCK)))
                row_at = builder.mul(builder.sub(at, args[6]), ir.Constant(_I64, WIDTH))
                for j, wide in zip(part, tile.read(at, part, scales), strict=True):
                    builder.store(wide, _vector(builder, into, row_at, j), align=4)
                return []

            _loop(builder, args[7], args[8], [], widen)
        return context.get_dummy_value()

    return signature, generate


class _Tile:
    """One chunk of one slab of a stored weight, as code that reads it: vectors of float32."""

    def __init__(self, context: Any, builder: Any, kinds: Any, arrays: Any, tile: Any) -> None:
        self._context, self._builder, self._at = context, builder, tile
        self._weight, self._steps, self._lows = (
            context.make_array(kind)(context, builder, array)
            for kind, array in zip(kinds, arrays, strict=True)
        )
        self.element, self._scale = kinds[0].dtype, kinds[1].dtype
        self._grid = self.element in (types.uint8, types.int8)
        self._group_at: Any = None

    @property
    def parts(self) -> list[list[int]]:
        """The numbers of the vectors that are worked on together."""
        size = _TOGETHER[self._grid]
        return [list(range(at, at + size)) for at in range(0, _VECTORS, size)]

    def multiply_add(self, factor: Any, weight: Any, total: Any) -> Any:
        return _multiply_add(self._builder, factor, weight, total)

    def enter_group(self, row: Any) -> None:
        """Be ready for the inputs of the group that this one is of."""
        if self._grid:
            group = self._builder.lshr(row, ir.Constant(_I64, GROUP.bit_length() - 1))
            self._group_at = self._start(self._steps, group)

    def scales(self, part: list[int]) -> list[tuple[Any, Any]]:
        """Step and low of each vector, in the group that was entered."""
        if not self._grid:
            return []
        return [(self._scale_of(self._steps, j), self._scale_of(self._lows, j)) for j in part]

    def read(self, row: Any, part: list[int], scales: list[tuple[Any, Any]]) -> list[Any]:
        """One input's weights, of some vectors."""
        builder = self._builder
        at = self._start(self._weight, row)
        if self._grid:
            codes = self._nibbles(at, part) if self.element == types.int8 else [
                builder.zext(self._stored(at, j, _BYTES), _INTS) for j in part
            ]  # fmt: skip
            return [
                self.multiply_add(step, builder.sitofp(code, _FLOATS), low)
                for code, (step, low) in zip(codes, scales, strict=True)
            ]
        if self.element == types.float32:
            return [self._stored(at, j, _FLOATS) for j in part]
        if self.element == types.int16:
            return [builder.fpext(self._stored(at, j, _HALVES), _FLOATS) for j in part]
        shift, kind = ir.Constant(_INTS, [16] * LANES), ir.VectorType(ir.IntType(16), LANES)
        return [
            builder.bitcast(
                builder.shl(builder.zext(self._stored(at, j, kind), _INTS), shift), _FLOATS
            )
            for j in part
        ]

    def raw(self, row: Any, j: int, kind: Any) -> Any:
        """What is stored of one input in vector `j`, as whole numbers of 32 bits."""
        return self._builder.zext(self._stored(self._start(self._weight, row), j, kind), _INTS)

    def fetch(self, row: Any) -> None:
        """Have one input's weights brought into the cache."""
        numbers = WIDTH // 2 if self.element == types.int8 else WIDTH
        size = numbers * self.element.bitwidth // 8
        self._fetch(self._weight, self._start(self._weight, row), size)

    def fetch_scales(self, row: Any) -> None:
        """Have the scales of an input's group brought into the cache."""
        if self._grid:
            group = self._builder.lshr(row, ir.Constant(_I64, GROUP.bit_length() - 1))
            for scales in (self._steps, self._lows):
                size = WIDTH * self._scale.bitwidth // 8
                self._fetch(scales, self._start(scales, group), size)

    def _fetch(self, array: Any, at: Any, size: int) -> None:
        builder = self._builder
        start = builder.bitcast(builder.gep(array.data, [at]), ir.IntType(8).as_pointer())
        for line in range(0, size, _LINE):
            _fetch(builder, builder.gep(start, [ir.Constant(_I64, line)]))

    def _nibbles(self, at: Any, part: list[int]) -> list[Any]:
        """Two vectors of codes lie in the halves of one vector of bytes."""
        builder, codes = self._builder, []
        low, four = ir.Constant(_INTS, [15] * LANES), ir.Constant(_INTS, [4] * LANES)
        for pair in range(part[0] // 2, part[-1] // 2 + 1):
            both = builder.zext(self._stored(at, pair, _BYTES), _INTS)
            codes += [builder.and_(both, low), builder.lshr(both, four)]
        return codes

    def _stored(self, at: Any, j: int, kind: Any) -> Any:
        pointer = _vector(self._builder, self._weight.data, at, j, kind)
        return self._builder.load(pointer, align=self.element.bitwidth // 8)

    def _scale_of(self, scales: Any, j: int) -> Any:
        if self._scale == types.float32:
            return self._builder.load(
                _vector(self._builder, scales.data, self._group_at, j), align=4
            )
        pointer = _vector(self._builder, scales.data, self._group_at, j, _HALVES)
        return self._builder.fpext(self._builder.load(pointer, align=2), _FLOATS)

    def _start(self, array: Any, row: Any) -> Any:
        """Where [slab, row, chunk] begins."""
        builder = self._builder
        _, rows, chunks, width = cgutils.unpack_tuple(builder, array.shape, 4)
        line = builder.add(builder.mul(self._at[0], rows), row)
        return builder.mul(builder.add(builder.mul(line, chunks), self._at[1]), width)


def _loop(builder: Any, first: Any, end: Any, started: list[Any], step: Any) -> list[Any]:
    """`running = step(at, running)` for first <= at < end; what it comes to."""
    before = builder.block
    head, body, done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    at = builder.phi(_I64)
    at.add_incoming(first, before)
    running = [builder.phi(_FLOATS) for _ in started]
    for phi, start in zip(running, started, strict=True):
        phi.add_incoming(start, before)
    builder.cbranch(builder.icmp_signed("<", at, end), body, done)
    builder.position_at_end(body)
    following = step(at, running)
    at.add_incoming(builder.add(at, ir.Constant(_I64, 1)), builder.block)
    for phi, total in zip(running, following, strict=True):
        phi.add_incoming(total, builder.block)
    builder.branch(head)
    builder.position_at_end(done)
    return running


def _fetch(builder: Any, pointer: Any) -> None:
    """Have a line of memory brought into the cache."""
    place = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [place.type, _I32, _I32, _I32])
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    level = ir.Constant(_I32, _SECOND_CACHE)
    builder.call(fetch, [place, ir.Constant(_I32, 0), level, ir.Constant(_I32, 1)])


def _multiply_add(builder: Any, factor: Any, weight: Any, total: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
    return builder.call(function, [factor, weight, total])


def _load(builder: Any, indices: Any, at: Any) -> Any:
    return builder.sext(builder.load(builder.gep(indices, [at])), _I64)


def _vector(builder: Any, data: Any, at: Any, j: int = 0, kind: Any = _FLOATS) -> Any:
    """A pointer to the j-th vector from the element `at` on."""
    place = builder.add(at, ir.Constant(_I64, j * LANES))
    return builder.bitcast(builder.gep(data, [place]), kind.as_pointer())


def _everywhere(builder: Any, scalar: Any) -> Any:
    """A vector that holds a number, or 32 bits, in all lanes."""
    empty = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    first = builder.insert_element(empty, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(_INTS, [0] * LANES))


@compiled()
def _aligned(count):  # type: ignore[no-untyped-def]
    """Room for so many float32, from the start of a cache line on: no vector lies across two."""
    room = np.empty(count + _LINE // 4, dtype=np.float32)
    first = -(room.ctypes.data // 4) % (_LINE // 4)
    return room[first : first + count]


@compiled(parallel=True)
def _multiply_one(  # type: ignore[no-untyped-def]
    weight_SICW, steps, lows, index_P, value_P, summed, ahead, out_O
):
    """One row: picks a few at a time, each over a whole slab, as they lie in memory."""
    slabs, _, chunks, _ = weight_SICW.shape
    picks = len(index_P)
    for slab in prange(slabs):
        sums_O = _aligned(chunks * WIDTH)
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
        sums_RO = _aligned(rows * chunks * WIDTH).reshape((rows, chunks * WIDTH))
        sums_RO[:] = 0
        total_RO = np.zeros((rows, chunks * WIDTH), dtype=np.float32)
        wide_1I1W = _aligned(_BLOCK * WIDTH).reshape((1, _BLOCK, 1, WIDTH))
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
