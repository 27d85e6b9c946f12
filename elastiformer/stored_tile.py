"""How a stored weight is read: one chunk of one slab of it, as vectors of float32.

A weight is stored as [S, I, C, WIDTH] (lanes.py), in one of the forms of tiles.py.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from elastiformer.vectors import (
    BYTES,
    FLOATS,
    HALVES,
    I64,
    INTS,
    LANES,
    LINE,
    WIDE,
    multiply_add,
    prefetch,
    vector_at,
)

WIDTH = 96
GROUP = 32  # inputs that share a grid
_VECTORS = WIDTH // LANES
# Vectors of sums that are worked on together: with a step and a low each, they fill the registers.
_TOGETHER = {True: 6 if WIDE else 4, False: _VECTORS}


class StoredTile:
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
        return multiply_add(self._builder, factor, weight, total)

    def enter_group(self, row: Any) -> None:
        """Be ready for the inputs of the group that this one is of."""
        if self._grid:
            group = self._builder.lshr(row, ir.Constant(I64, GROUP.bit_length() - 1))
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
                builder.zext(self._stored(at, j, BYTES), INTS) for j in part
            ]  # fmt: skip
            return [
                self.multiply_add(step, builder.sitofp(code, FLOATS), low)
                for code, (step, low) in zip(codes, scales, strict=True)
            ]
        if self.element == types.float32:
            return [self._stored(at, j, FLOATS) for j in part]
        if self.element == types.int16:
            return [builder.fpext(self._stored(at, j, HALVES), FLOATS) for j in part]
        shift, kind = ir.Constant(INTS, [16] * LANES), ir.VectorType(ir.IntType(16), LANES)
        return [
            builder.bitcast(
                builder.shl(builder.zext(self._stored(at, j, kind), INTS), shift), FLOATS
            )
            for j in part
        ]

    def raw(self, row: Any, j: int, kind: Any) -> Any:
        """What is stored of one input in vector `j`, as whole numbers of 32 bits."""
        return self._builder.zext(self._stored(self._start(self._weight, row), j, kind), INTS)

    def fetch(self, row: Any) -> None:
        """Have one input's weights brought into the cache."""
        numbers = WIDTH // 2 if self.element == types.int8 else WIDTH
        size = numbers * self.element.bitwidth // 8
        self._fetch(self._weight, self._start(self._weight, row), size)

    def fetch_scales(self, row: Any) -> None:
        """Have the scales of an input's group brought into the cache."""
        if self._grid:
            group = self._builder.lshr(row, ir.Constant(I64, GROUP.bit_length() - 1))
            for scales in (self._steps, self._lows):
                size = WIDTH * self._scale.bitwidth // 8
                self._fetch(scales, self._start(scales, group), size)

    def _fetch(self, array: Any, at: Any, size: int) -> None:
        builder = self._builder
        start = builder.bitcast(builder.gep(array.data, [at]), ir.IntType(8).as_pointer())
        for line in range(0, size, LINE):
            prefetch(builder, builder.gep(start, [ir.Constant(I64, line)]))

    def _nibbles(self, at: Any, part: list[int]) -> list[Any]:
        """Two vectors of codes lie in the halves of one vector of bytes."""
        builder, codes = self._builder, []
        low, four = ir.Constant(INTS, [15] * LANES), ir.Constant(INTS, [4] * LANES)
        for pair in range(part[0] // 2, part[-1] // 2 + 1):
            both = builder.zext(self._stored(at, pair, BYTES), INTS)
            codes += [builder.and_(both, low), builder.lshr(both, four)]
        return codes

    def _stored(self, at: Any, j: int, kind: Any) -> Any:
        pointer = vector_at(self._builder, self._weight.data, at, j, kind)
        return self._builder.load(pointer, align=self.element.bitwidth // 8)

    def _scale_of(self, scales: Any, j: int) -> Any:
        if self._scale == types.float32:
            return self._builder.load(
                vector_at(self._builder, scales.data, self._group_at, j), align=4
            )
        pointer = vector_at(self._builder, scales.data, self._group_at, j, HALVES)
        return self._builder.fpext(self._builder.load(pointer, align=2), FLOATS)

    def _start(self, array: Any, row: Any) -> Any:
        """Where [slab, row, chunk] begins."""
        builder = self._builder
        _, rows, chunks, width = cgutils.unpack_tuple(builder, array.shape, 4)
        line = builder.add(builder.mul(self._at[0], rows), row)
        return builder.mul(builder.add(builder.mul(line, chunks), self._at[1]), width)
