"""Attention of many queries of a request over its keys, in tile registers (AMX), in bfloat16.

Sixteen queries of a head go together, one in each lane: so what a softmax needs of all keys, the
largest score and the sum, is found without adding across lanes. First all scores of the sixteen,
keys times queries; then their exponentials, rounded to bfloat16; then values times these. A query
sees the keys up to its own position, and gets the same bits whichever queries go with it.

Shape letters: N rows of the pool   Q queries   A query heads   G key/value heads   H head size
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from elastiformer import amx
from elastiformer.amx import _call, _configure, _register, _release
from elastiformer.kernels import TURN, compiled
from elastiformer.tile_blocks import (
    TILE,
    TILES,
    bytes_at,
    data,
    pack_queries,
    pack_values,
    paired,
    put_out,
    times,
)
from elastiformer.vectors import (
    I32,
    I64,
    INTS,
    LANES,
    aligned,
    constant,
    everywhere,
    loop,
    multiply_add,
    power_of_two,
    vector_at,
)

SIZES = 64  # heads of a multiple of so many channels
_LINE = ir.Constant(I64, 64)  # bytes of a tile's row, where its rows lie side by side


def takes(head_size: int) -> bool:
    """Whether queries of heads so wide can be answered here."""
    return amx.ABLE and head_size % SIZES == 0


def attend(
    query_QAH: np.ndarray,
    rows_NH: np.ndarray,
    place: tuple[int, int, int, int],
    position_Q: np.ndarray,
    kv_heads: int,
    scale: float,
    out_QAH: np.ndarray,
) -> None:
    """Fill in the attention output of queries.

    Args:
        position_Q: ascending.
        query_QAH, rows_NH, out_QAH: the bits of bfloat16 numbers, as uint16.
        place: where keys and values begin among the rows of the pool, head after head; how far
            apart the heads are; and how many keys there are, from position 0 on.
    """
    with TURN:
        _attend(query_QAH, rows_NH, *place, position_Q, kv_heads, np.float32(scale), out_QAH)


@intrinsic
def _score(
    typing: Any, rows: Any, at: Any, size: Any, query: Any, steps: Any, tiles: Any, into: Any
) -> Any:
    """into[tile, key, query] = so many tiles of keys, from `at` on, times sixteen queries."""
    number = types.intp
    signature = types.void(rows, number, number, query, number, number, into)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not amx.KNOWN:  # never called
            return context.get_dummy_value()
        keys, query, into = (data(context, builder, signature, args, at) for at in (0, 3, 6))
        apart = times(builder, args[2], 2)
        sums, of_keys, of_queries = map(_register, range(3))
        zero = ir.Constant(I64, 0)

        def score(tile: Any, _: list[Any]) -> list[Any]:
            line = builder.add(args[1], builder.mul(args[2], times(builder, tile, LANES)))
            _call(builder, "tilezero", sums)

            def add(step: Any, _: list[Any]) -> list[Any]:
                place = builder.add(line, times(builder, step, 2 * LANES))
                _call(builder, "tileloadd64", of_keys, bytes_at(builder, keys, place), apart)
                asked = bytes_at(builder, query, times(builder, step, TILE))
                _call(builder, "tileloadd64", of_queries, asked, _LINE)
                _call(builder, "tdpbf16ps", sums, of_keys, of_queries)
                return []

            loop(builder, zero, args[4], [], add)
            to = bytes_at(builder, into, times(builder, tile, TILE))
            _call(builder, "tilestored64", sums, to, _LINE)
            return []

        loop(builder, zero, args[5], [], score)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _weigh(
    typing: Any, scores: Any, scale: Any, position: Any, seen: Any, pairs: Any, into: Any,
    totals: Any,
) -> Any:  # fmt: skip
    """into[pair of keys, query] = 2^(scale * (score - largest)) of both keys, as bfloat16.

    Args:
        position: of the sixteen queries, in 32 bits.
        seen: so many pairs of keys all queries see; of those up to `pairs`, each the ones up to
            its own position.
        totals: where the sums go.
    """
    number = types.intp
    signature = types.void(scores, types.float32, position, number, number, into, totals)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not amx.KNOWN:  # never called
            return context.get_dummy_value()
        scores, into, totals = (data(context, builder, signature, args, at) for at in (0, 5, 6))
        zero = ir.Constant(I64, 0)
        nothing = constant(0.0)
        positions = data(context, builder, signature, args, 2)
        position = builder.load(vector_at(builder, positions, zero, kind=INTS), align=4)
        scale = everywhere(builder, args[1])

        def both(pair: Any, masked: bool) -> list[tuple[Any, Any]]:
            """The scores of two keys, and which queries see them."""
            found = []
            for odd in range(2):
                key = builder.add(times(builder, pair, 2), ir.Constant(I64, odd))
                place = vector_at(builder, scores, times(builder, key, LANES))
                at = everywhere(builder, builder.trunc(key, I32))
                sees = builder.icmp_signed(">=", position, at) if masked else None
                found.append((builder.load(place, align=64), sees))
            return found

        def largest(masked: bool) -> Any:
            def compare(pair: Any, running: list[Any]) -> list[Any]:
                most = running[0]
                for score, sees in both(pair, masked):
                    larger = builder.fcmp_ordered(">", score, most)
                    if sees is not None:
                        larger = builder.and_(larger, sees)
                    most = builder.select(larger, score, most)
                return [most]

            return compare

        def weigh(masked: bool, most: Any) -> Any:
            def put(pair: Any, running: list[Any]) -> list[Any]:
                weights, total = [], running[0]
                for score, sees in both(pair, masked):
                    weight = power_of_two(builder, multiply_add(builder, score, scale, most))
                    if sees is not None:
                        weight = builder.select(sees, weight, nothing)
                    total = builder.fadd(total, weight)
                    weights.append(weight)
                words = paired(builder, *weights)
                place = vector_at(builder, into, times(builder, pair, LANES), kind=INTS)
                builder.store(words, place, align=64)
                return [total]

            return put

        started = [constant(-3e38)]
        started = loop(builder, zero, args[3], started, largest(masked=False))
        (most,) = loop(builder, args[3], args[4], started, largest(masked=True))
        most = builder.fneg(builder.fmul(most, scale))
        found = loop(builder, zero, args[3], [nothing], weigh(False, most))
        (total,) = loop(builder, args[3], args[4], found, weigh(True, most))
        builder.store(total, vector_at(builder, totals, zero), align=4)
        # A tile of values has room for 32 keys: what is behind the last ones weighs nothing.
        tiles = builder.add(args[4], ir.Constant(I64, LANES - 1))
        end = builder.and_(tiles, ir.Constant(I64, -LANES))

        def clear(pair: Any, _: list[Any]) -> list[Any]:
            place = vector_at(builder, into, times(builder, pair, LANES), kind=INTS)
            builder.store(ir.Constant(INTS, [0] * LANES), place, align=64)
            return []

        loop(builder, args[4], end, [], clear)
        return context.get_dummy_value()

    return signature, generate


def adding(tiles: int) -> Any:
    """`_add_weighed` for so many tiles of channels at a time."""

    @intrinsic
    def _add_weighed(
        typing: Any, values: Any, at: Any, apart: Any, weights: Any, blocks: Any, into: Any
    ) -> Any:
        """into[tile of channels, channel, query] = values times weights, over the blocks of keys.

        Args:
            at: where the blocks of the first tile of channels lie; the other tiles' `apart`.
        """
        number = types.intp
        signature = types.void(values, number, number, weights, number, into)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if not amx.KNOWN:  # never called
                return context.get_dummy_value()
            values, weights, into = (
                data(context, builder, signature, args, at) for at in (0, 3, 5)
            )
            of_weights, of_values = _register(tiles), _register(tiles + 1)
            firsts = [builder.add(args[1], times(builder, args[2], j)) for j in range(tiles)]
            for j in range(tiles):
                _call(builder, "tilezero", _register(j))

            def add(block: Any, _: list[Any]) -> list[Any]:
                along = times(builder, block, TILE)
                _call(builder, "tileloadd64", of_weights, bytes_at(builder, weights, along), _LINE)
                for j, first in enumerate(firsts):
                    place = bytes_at(builder, values, builder.add(first, along))
                    _call(builder, "tileloadd64", of_values, place, _LINE)
                    _call(builder, "tdpbf16ps", _register(j), of_values, of_weights)
                return []

            loop(builder, ir.Constant(I64, 0), args[4], [], add)
            for j in range(tiles):
                to = bytes_at(builder, into, ir.Constant(I64, j * TILE))
                _call(builder, "tilestored64", _register(j), to, _LINE)
            return context.get_dummy_value()

        return signature, generate

    return _add_weighed


_add_weighed = adding(TILES)


@compiled()
def _config():  # type: ignore[no-untyped-def]
    """All tile registers hold sixteen rows of 64 bytes."""
    config = np.zeros(64, dtype=np.uint8)
    config[0] = 1  # the palette
    for register in range(8):
        config[16 + 2 * register] = 64
        config[48 + register] = 16
    return config


@compiled(parallel=True)
def _attend(  # type: ignore[no-untyped-def]
    query_QAH, rows_NH, key, value, room, length, position_Q, kv_heads, scale, out_QAH
):
    queries, heads, size = query_QAH.shape
    blocks, tiles = (length + 31) // 32, size // 16
    value_ = aligned(kv_heads * tiles * blocks * TILE)
    for task in prange(kv_heads * blocks):
        head, block = task // blocks, task % blocks
        at = (value + head * room + 32 * block) * size
        to = (head * tiles * blocks + block) * TILE
        count = min(32, length - 32 * block)
        pack_values(rows_NH, at, size, tiles, count, value_, to, blocks * TILE)
    config = _config()
    parts = (queries + 15) // 16
    scale_2 = scale * np.float32(1.4426950408889634)
    # What comes late sees more keys: each task has a part from the front, and one from the back.
    halves = (parts + 1) // 2
    for task in prange(heads * halves):
        head, half = task % heads, task // heads
        kv_head = head // (heads // kv_heads)
        _configure(config)
        query_ = aligned(size // 32 * TILE)
        totals_, added_ = aligned(16), aligned(TILES * TILE)
        most = (min(length, position_Q[queries - 1] + 1) + 15) // 16
        position_ = np.empty(16, dtype=np.int32)
        score_ = aligned(most * TILE)
        weight_ = aligned((most + 1) // 2 * TILE)
        for turn in range(2):
            part = half if turn == 0 else parts - 1 - half
            if turn == 1 and part == half:
                continue
            begin = 16 * part
            count = min(16, queries - begin)
            at, apart = (begin * heads + head) * size, heads * size
            seen = min(length, position_Q[begin + count - 1] + 1)
            of_keys = (seen + 15) // 16
            key_at = (key + kv_head * room) * size
            pack_queries(query_QAH, at, apart, count - 1, size // 32, query_)
            _score(rows_NH, key_at, size, query_, size // 32, of_keys, score_)
            for lane in range(16):
                position_[lane] = position_Q[begin + min(lane, count - 1)]
            by_all = (position_Q[begin] + 1) // 2
            _weigh(score_, scale_2, position_, by_all, of_keys * 8, weight_, totals_)
            for third in range(0, tiles, TILES):
                value_at = (kv_head * tiles + third) * blocks * TILE
                _add_weighed(value_, value_at, blocks * TILE, weight_, (of_keys + 1) // 2, added_)
                put_out(added_, TILES, totals_, out_QAH, at + third * 16, apart, count)
        _release()
