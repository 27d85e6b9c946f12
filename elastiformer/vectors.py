"""What compiled loops write vector code with: types, and steps of LLVM's own language."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils

from elastiformer.kernels import compiled

# A processor with AVX-512 has registers twice as wide and twice as many.
WIDE = bool(get_host_cpu_features().get("avx512f"))
LANES = 16 if WIDE else 8
LINE = 64  # bytes
_SECOND_CACHE = 2  # as LLVM names it: in the first, it would push out what is read before it
_SHIFT = 1.5 * 2**23  # a float32 of this size has no room for fractions
_LEAST = -126.0  # of powers of two in float32
# 2^x for -1/2 <= x <= 1/2, to 3e-6: ln(2)^k / k!
_POWERS = (0.0013333558, 0.0096181291, 0.0555041087, 0.2402265070, 0.6931471806, 1.0)
I32, I64 = ir.IntType(32), ir.IntType(64)
FLOATS = ir.VectorType(ir.FloatType(), LANES)
HALVES = ir.VectorType(ir.HalfType(), LANES)
INTS = ir.VectorType(I32, LANES)
BYTES = ir.VectorType(ir.IntType(8), LANES)


def loop(builder: Any, first: Any, end: Any, started: list[Any], step: Any) -> list[Any]:
    """`running = step(at, running)` for first <= at < end; what it comes to."""
    before = builder.block
    head, body, done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    at = builder.phi(I64)
    at.add_incoming(first, before)
    running = [builder.phi(FLOATS) for _ in started]
    for phi, start in zip(running, started, strict=True):
        phi.add_incoming(start, before)
    builder.cbranch(builder.icmp_signed("<", at, end), body, done)
    builder.position_at_end(body)
    following = step(at, running)
    at.add_incoming(builder.add(at, ir.Constant(I64, 1)), builder.block)
    for phi, total in zip(running, following, strict=True):
        phi.add_incoming(total, builder.block)
    builder.branch(head)
    builder.position_at_end(done)
    return running


def prefetch(builder: Any, pointer: Any) -> None:
    """Have a line of memory brought into the cache."""
    place = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [place.type, I32, I32, I32])
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    level = ir.Constant(I32, _SECOND_CACHE)
    builder.call(fetch, [place, ir.Constant(I32, 0), level, ir.Constant(I32, 1)])


def multiply_add(builder: Any, factor: Any, weight: Any, total: Any) -> Any:
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
    return builder.call(function, [factor, weight, total])


def constant(number: float) -> Any:
    """A vector that holds a number in all lanes."""
    return ir.Constant(FLOATS, [float(np.float32(number))] * LANES)


def power_of_two(builder: Any, exponent: Any) -> Any:
    """2^x to 3e-6 of it, of a vector; what is below float32 stays just in it."""
    least, shift = constant(_LEAST), constant(_SHIFT)
    exponent = builder.select(builder.fcmp_ordered(">", exponent, least), exponent, least)
    shifted = builder.fadd(exponent, shift)  # whole numbers are in its last bits
    part = builder.fsub(exponent, builder.fsub(shifted, shift))
    found = constant(_POWERS[0])
    for factor in _POWERS[1:]:
        found = multiply_add(builder, found, part, constant(factor))
    whole = builder.shl(builder.bitcast(shifted, INTS), ir.Constant(INTS, [23] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(found, INTS), whole), FLOATS)


def lanes_of_each(builder: Any, sums: list[Any]) -> Any:
    """Of LANES vectors, what the lanes of each add up to."""
    numbers = range(0, 2 * LANES, 2)
    even, odd = (
        ir.Constant(ir.VectorType(I32, LANES), [at + first for at in numbers]) for first in (0, 1)
    )
    while len(sums) > 1:
        sums = [
            builder.fadd(
                builder.shuffle_vector(one, other, even), builder.shuffle_vector(one, other, odd)
            )
            for one, other in zip(sums[::2], sums[1::2], strict=True)
        ]
    return sums[0]


def vector_at(builder: Any, data: Any, at: Any, j: int = 0, kind: Any = FLOATS) -> Any:
    """A pointer to the j-th vector from the element `at` on."""
    place = builder.add(at, ir.Constant(I64, j * LANES))
    return builder.bitcast(builder.gep(data, [place]), kind.as_pointer())


def everywhere(builder: Any, scalar: Any) -> Any:
    """A vector that holds a number, or 32 bits, in all lanes."""
    empty = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    first = builder.insert_element(empty, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(INTS, [0] * LANES))


@compiled()
def aligned(count):  # type: ignore[no-untyped-def]
    """Room for so many float32, from the start of a cache line on: no vector lies across two."""
    room = np.empty(count + LINE // 4, dtype=np.float32)
    first = -(room.ctypes.data // 4) % (LINE // 4)
    return room[first : first + count]
