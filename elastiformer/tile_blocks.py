"""What tile registers (AMX) read and give, laid out anew: blocks of sixteen by sixteen words.

Shape letters: as in many_queries.py
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from elastiformer import amx
from elastiformer.pairs import _PAIRS, _WORDS, _BFloat
from elastiformer.vectors import FLOATS, I32, I64, INTS, LANES, constant, loop, vector_at

TILE = 16 * 16  # words of a tile register
TILES = 4  # of sums that values are added to at a time
_SMALL = ir.VectorType(_BFloat(), LANES)


def data(context: Any, builder: Any, signature: Any, args: Any, place: int) -> Any:
    return context.make_array(signature.args[place])(context, builder, args[place]).data


def bytes_at(builder: Any, data: Any, at: Any) -> Any:
    return builder.bitcast(builder.gep(data, [at]), ir.IntType(8).as_pointer())


def times(builder: Any, at: Any, number: int) -> Any:
    return builder.mul(at, ir.Constant(I64, number))


def _turned(builder: Any, lines: list[Any]) -> list[Any]:
    """Sixteen vectors of sixteen as the rows of a matrix: its columns."""
    lines = list(lines)
    step = LANES // 2
    while step:
        first = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
        second = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
        for line in (line for line in range(LANES) if not line & step):
            above, below = lines[line], lines[line + step]
            lines[line], lines[line + step] = (
                builder.shuffle_vector(above, below, ir.Constant(INTS, mask))
                for mask in (first, second)
            )
        step //= 2
    return lines


@intrinsic
def pack_queries(
    typing: Any, query: Any, at: Any, apart: Any, last: Any, steps: Any, into: Any
) -> Any:
    """into[step, pair of channels, query] = both channels of sixteen queries, as a tile's rows.

    Args:
        at: of the first query's head; the queries lie `apart`, and behind the last one there is
            none: it stands for them.
    """
    number = types.intp
    signature = types.void(query, number, number, number, number, into)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        from_, to = (data(context, builder, signature, args, place) for place in (0, 5))
        rows = []
        for lane in range(LANES):
            own = ir.Constant(I64, lane)
            behind = builder.icmp_signed(">", own, args[3])
            rows.append(builder.mul(builder.select(behind, args[3], own), args[2]))

        def pack(step: Any, _: list[Any]) -> list[Any]:
            along = builder.add(args[1], times(builder, step, 2 * LANES))
            lines = []
            for row in rows:
                pointer = vector_at(builder, from_, builder.add(along, row), kind=INTS)
                lines.append(builder.load(pointer, align=2))
            start = times(builder, step, TILE)
            for pair, line in enumerate(_turned(builder, lines)):
                builder.store(line, vector_at(builder, to, start, pair, INTS), align=64)
            return []

        loop(builder, ir.Constant(I64, 0), args[4], [], pack)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def pack_values(
    typing: Any, rows: Any, at: Any, between: Any, tiles: Any, count: Any, into: Any, to: Any,
    apart: Any,
) -> Any:  # fmt: skip
    """into[tile of channels, channel, pair of keys] = the values of 32 keys, of which `count` are.

    Args:
        at: of the first key's value, of so many tiles of channels; the keys lie so far `between`.
        to: where the first tile goes; the others `apart`.
    """
    number = types.intp
    signature = types.void(rows, number, number, number, number, into, number, number)
    halves = ir.VectorType(ir.IntType(16), LANES)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        from_, into = (data(context, builder, signature, args, place) for place in (0, 5))
        zero, nothing = ir.Constant(I64, 0), ir.Constant(INTS, [0] * LANES)
        sixteen = ir.Constant(INTS, [16] * LANES)
        places, held = [], []
        for key in range(2 * LANES):
            own = ir.Constant(I64, key)
            held.append(builder.icmp_signed("<", own, args[4]))
            places.append(builder.mul(builder.select(held[-1], own, zero), args[2]))

        def pack(tile: Any, _: list[Any]) -> list[Any]:
            along = builder.add(args[1], times(builder, tile, LANES))
            wide = []
            for place, is_held in zip(places, held, strict=True):
                pointer = vector_at(builder, from_, builder.add(along, place), kind=halves)
                bits = builder.zext(builder.load(pointer, align=2), INTS)
                wide.append(builder.select(is_held, bits, nothing))
            lines = [
                builder.or_(low, builder.shl(high, sixteen))
                for low, high in zip(wide[::2], wide[1::2], strict=True)
            ]
            start = builder.add(args[6], builder.mul(args[7], tile))
            for channel, line in enumerate(_turned(builder, lines)):
                builder.store(line, vector_at(builder, into, start, channel, INTS), align=64)
            return []

        loop(builder, zero, args[3], [], pack)
        return context.get_dummy_value()

    return signature, generate


def paired(builder: Any, first: Any, second: Any) -> Any:
    """Of each lane both numbers, as bfloat16, in one word."""
    kind = ir.FunctionType(_PAIRS, [FLOATS, FLOATS])
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    both = builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [second, first])
    mask = [lane // 2 + LANES * (lane % 2) for lane in range(2 * LANES)]
    words = builder.bitcast(both, _WORDS)
    mixed = ir.Constant(ir.VectorType(I32, 2 * LANES), mask)
    return builder.bitcast(builder.shuffle_vector(words, words, mixed), INTS)


@intrinsic
def put_out(
    typing: Any, added: Any, tiles: Any, totals: Any, out: Any, at: Any, apart: Any, count: Any
) -> Any:
    """out[query, channel] = added[channel, query] / total[query] as bfloat16, of `count` queries.

    Args:
        added: so many tiles of channels.
        at: of the first query's channels; the queries lie `apart`.
    """
    number = types.intp
    signature = types.void(added, number, totals, out, number, number, number)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not amx.KNOWN:  # never called
            return context.get_dummy_value()
        added, totals, out = (data(context, builder, signature, args, at) for at in (0, 2, 3))
        zero = ir.Constant(I64, 0)
        total = builder.load(vector_at(builder, totals, zero), align=4)
        share = builder.fdiv(constant(1.0), total)
        kind = ir.FunctionType(_SMALL, [FLOATS])
        rounded = cgutils.get_or_insert_function(
            builder.module, kind, "llvm.x86.avx512bf16.cvtneps2bf16.512"
        )
        halves = ir.VectorType(ir.IntType(16), LANES)

        def put(tile: Any, _: list[Any]) -> list[Any]:
            lines, start = [], times(builder, tile, TILE)
            for channel in range(LANES):
                line = builder.load(vector_at(builder, added, start, channel), align=64)
                lines.append(builder.fmul(line, share))
            first = builder.add(args[4], times(builder, tile, LANES))
            for query, line in enumerate(_turned(builder, lines)):
                own = ir.Constant(I64, query)
                with builder.if_then(builder.icmp_signed("<", own, args[6])):
                    place = builder.add(first, builder.mul(args[5], own))
                    small = builder.bitcast(builder.call(rounded, [line]), halves)
                    builder.store(small, vector_at(builder, out, place, kind=halves), align=2)
            return []

        loop(builder, zero, args[1], [], put)
        return context.get_dummy_value()

    return signature, generate
