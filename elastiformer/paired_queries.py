"""Attention of single queries over keys and values in bfloat16, two numbers at a time, on a CPU.

As single_queries.py, which calls it where the processor multiplies pairs of bfloat16 (pairs.py):
queries and weights are rounded to that, as where many queries attend; nothing is widened on the
way, and the weights of sixteen keys are found at once.

Shape letters: as in single_queries.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from elastiformer.kernels import compiled
from elastiformer.pairs import _PAIRS, _WORDS, ABLE, _BFloat
from elastiformer.row_kernels import _as_stored
from elastiformer.vectors import (
    FLOATS,
    I32,
    I64,
    INTS,
    LANES,
    constant,
    everywhere,
    lanes_of_each,
    loop,
    multiply_add,
    power_of_two,
    vector_at,
)

_HALF_WORDS = ir.VectorType(ir.IntType(16), LANES)
_SMALL = ir.VectorType(_BFloat(), LANES)
_NOTHING = np.float32(-3e38)  # a score that weighs nothing
_AT_ONCE = 128  # keys whose values stay in the first cache, for all queries and channels


@intrinsic
def _dots_of_pairs(
    typing: Any, keys: Any, first: Any, size: Any, query: Any, at: Any, scores: Any, to: Any
) -> Any:
    """scores[to : to + LANES] = a query times each of LANES keys, both of bfloat16.

    Args:
        keys: the bits, of so large a size, from the number `first` on.
        query: likewise, from `at` on.
    """
    number = types.intp
    signature = types.void(keys, number, number, query, number, scores, number)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not _takes_pairs(signature.args[0].dtype):  # never called
            return context.get_dummy_value()
        key_data, query_data, score_data = (
            context.make_array(signature.args[at])(context, builder, args[at]).data
            for at in (0, 3, 5)
        )
        rows = [
            builder.add(args[1], builder.mul(args[2], ir.Constant(I64, key)))
            for key in range(LANES)
        ]

        def add(vector: Any, running: list[Any]) -> list[Any]:
            along = builder.mul(vector, ir.Constant(I64, 2 * LANES))
            asked = _pairs_at(builder, query_data, builder.add(args[4], along))
            return [
                _add_pairs(builder, sum_, asked, _pairs_at(builder, key_data, at))
                for row, sum_ in zip(rows, running, strict=True)
                for at in (builder.add(row, along),)
            ]

        nothing = ir.Constant(FLOATS, [0.0] * LANES)
        vectors = builder.udiv(args[2], ir.Constant(I64, 2 * LANES))
        sums = loop(builder, ir.Constant(I64, 0), vectors, [nothing] * LANES, add)
        builder.store(
            lanes_of_each(builder, sums), vector_at(builder, score_data, args[6]), align=4
        )
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _add_values_of_pairs(
    typing: Any, values: Any, first: Any, size: Any, steps: Any, weights: Any, at: Any, out: Any,
    to: Any,
) -> Any:  # fmt: skip
    """out[to:] += weights[at:] times the values of so many times four keys; both of bfloat16.

    Of 2 * LANES channels, from the number `first` of the first key on.
    """
    number = types.intp
    signature = types.void(values, number, number, number, weights, number, out, number)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not _takes_pairs(signature.args[0].dtype):  # never called
            return context.get_dummy_value()
        value_data, weight_data, out_data = (
            context.make_array(signature.args[at])(context, builder, args[at]).data
            for at in (0, 4, 6)
        )
        # Word by word from both keys, as the processor does it: in each quarter of a register.
        quarters = [
            [
                lane + both * 2 * LANES
                for quarter in range(0, 2 * LANES, 8)
                for lane in range(quarter + half, quarter + half + 4)
                for both in range(2)
            ]
            for half in (0, 4)
        ]
        masks = [ir.Constant(ir.VectorType(I32, 2 * LANES), mask) for mask in quarters]
        pointers = [vector_at(builder, out_data, args[7], j) for j in range(2)]

        def add(step: Any, running: list[Any]) -> list[Any]:
            key, following = builder.mul(step, ir.Constant(I64, 4)), []
            for place in (0, 2):  # sums of their own: none waits for the other
                row = builder.add(
                    args[1],
                    builder.mul(args[2], builder.add(key, ir.Constant(I64, place))),
                )
                one, other = (
                    builder.load(vector_at(builder, value_data, at, kind=_WORDS), align=2)
                    for at in (row, builder.add(row, args[2]))
                )
                pair = builder.add(builder.add(args[5], key), ir.Constant(I64, place))
                pointer = builder.bitcast(builder.gep(weight_data, [pair]), I32.as_pointer())
                weight = builder.bitcast(
                    everywhere(builder, builder.load(pointer, align=2)), _PAIRS
                )
                for mask, sum_ in zip(masks, running[place : place + 2], strict=True):
                    both = builder.bitcast(builder.shuffle_vector(one, other, mask), _PAIRS)
                    following.append(_add_pairs(builder, sum_, weight, both))
            return following

        nothing = ir.Constant(FLOATS, [0.0] * LANES)
        sums = loop(builder, ir.Constant(I64, 0), args[3], [nothing] * 4, add)
        first, second = (builder.fadd(sums[j], sums[j + 2]) for j in range(2))
        # Back to the channels' order.
        for part, pointer in enumerate(pointers):
            mask = [
                lane + half * LANES
                for quarter in range(8 * part, 8 * part + 8, 4)
                for half in range(2)
                for lane in range(quarter, quarter + 4)
            ]
            own = builder.shuffle_vector(first, second, ir.Constant(INTS, mask))
            builder.store(builder.fadd(builder.load(pointer, align=4), own), pointer, align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _weigh(typing: Any, scores: Any, at: Any, vectors: Any, scale: Any, weights: Any) -> Any:
    """weights[at:] = 2^(scale * (score - largest)) of so many vectors, as bfloat16; their sum."""
    number = types.intp
    signature = types.float32(scores, number, number, types.float32, weights)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not _takes_pairs(signature.args[4].dtype):  # never called
            return ir.Constant(ir.FloatType(), 0.0)
        score_data, weight_data = (
            context.make_array(signature.args[at])(context, builder, args[at]).data for at in (0, 4)
        )
        zero, scale = ir.Constant(I64, 0), everywhere(builder, args[3])

        def place(vector: Any) -> Any:
            return builder.add(args[1], builder.mul(vector, ir.Constant(I64, LANES)))

        def score(vector: Any) -> Any:
            return builder.load(vector_at(builder, score_data, place(vector)), align=4)

        def compare(vector: Any, running: list[Any]) -> list[Any]:
            own = score(vector)
            return [builder.select(builder.fcmp_ordered(">", own, running[0]), own, running[0])]

        def over_lanes(name: str, *given: Any) -> Any:
            kind = ir.FunctionType(ir.FloatType(), [each.type for each in given])
            function = cgutils.get_or_insert_function(
                builder.module, kind, f"llvm.vector.reduce.{name}.v{LANES}f32"
            )
            return builder.call(function, given, fastmath=("reassoc",))

        (most,) = loop(builder, zero, args[2], [constant(-3e38)], compare)
        most = everywhere(builder, over_lanes("fmax", most))
        lowered = builder.fneg(builder.fmul(most, scale))
        kind = ir.FunctionType(_SMALL, [FLOATS])
        rounded = cgutils.get_or_insert_function(
            builder.module, kind, "llvm.x86.avx512bf16.cvtneps2bf16.512"
        )

        def put(vector: Any, running: list[Any]) -> list[Any]:
            exponent = multiply_add(builder, score(vector), scale, lowered)
            weight = power_of_two(builder, exponent)
            small = builder.bitcast(builder.call(rounded, [weight]), _HALF_WORDS)
            pointer = vector_at(builder, weight_data, place(vector), kind=_HALF_WORDS)
            builder.store(small, pointer, align=2)
            return [builder.fadd(running[0], weight)]

        (total,) = loop(builder, zero, args[2], [constant(0.0)], put)
        return over_lanes("fadd", ir.Constant(ir.FloatType(), -0.0), total)

    return signature, generate


def _takes_pairs(stored: Any) -> bool:
    """Whether keys and values, stored so, are multiplied two numbers at a time."""
    return bool(ABLE and stored == types.uint16)


def _pairs_at(builder: Any, data: Any, at: Any) -> Any:
    pointer = vector_at(builder, data, at, kind=_WORDS)
    return builder.bitcast(builder.load(pointer, align=2), _PAIRS)


def _add_pairs(builder: Any, sum_: Any, one: Any, other: Any) -> Any:
    kind = ir.FunctionType(FLOATS, [FLOATS, _PAIRS, _PAIRS])
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [sum_, one, other])


@intrinsic
def goes_by_pairs(typing: Any, rows: Any) -> Any:
    signature = types.boolean(rows)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(ir.IntType(1), _takes_pairs(signature.args[0].dtype))

    return signature, generate


@compiled()
def _copied(rows_NH, first, count, into_):  # type: ignore[no-untyped-def]
    """Some rows of the pool, and zeros where there is more room."""
    size = rows_NH.shape[1]
    into_[:] = 0
    for k in range(count):
        for h in range(size):
            into_[k * size + h] = rows_NH[first + k, h]


@compiled(parallel=True)  # sums in another order would undo how powers of two are found
def attend_in_pairs(  # type: ignore[no-untyped-def]
    rows_NH, query_QAH, query_S, key_S, value_S, room_S, length_S, heads, kv_heads, each, scale,
    out_QAH,
):  # fmt: skip
    size, group = query_QAH.shape[2], heads // kv_heads
    tasks = heads // each
    rows_, scale_2 = rows_NH.reshape(-1), scale * np.float32(1.4426950408889634)
    for task in prange(len(query_S) * tasks):
        single, first_head = task // tasks, task % tasks * each
        query, keys, room = query_S[single], length_S[single], room_S[single]
        first_key = key_S[single] + first_head // group * room
        first_value = value_S[single] + first_head // group * room
        query_, out_ = np.empty(each * size, rows_NH.dtype), np.zeros(each * size, np.float32)
        for head in range(each):
            for h in range(size):
                asked = query_QAH[query, first_head + head, h]
                query_[head * size + h] = _as_stored(asked, query_)
        most = (keys + LANES - 1) // LANES * LANES
        score_ = np.empty(each * most, dtype=np.float32)
        weight_ = np.empty(each * most, dtype=rows_NH.dtype)
        last_ = np.empty(LANES * size, dtype=rows_NH.dtype)
        whole = keys // LANES * LANES
        for k in range(0, whole, LANES):
            for head in range(each):
                at = (first_key + k) * size
                _dots_of_pairs(rows_, at, size, query_, head * size, score_, head * most + k)
        if whole < keys:
            _copied(rows_NH, first_key + whole, keys - whole, last_)
            for head in range(each):
                _dots_of_pairs(last_, 0, size, query_, head * size, score_, head * most + whole)
        total_ = np.empty(each, dtype=np.float32)
        for head in range(each):
            score_[head * most + keys : (head + 1) * most] = _NOTHING
            total_[head] = _weigh(score_, head * most, most // LANES, scale_2, weight_)
        whole = keys // 4 * 4
        for k in range(0, whole, _AT_ONCE):
            steps = min(_AT_ONCE, whole - k) // 4
            for head in range(each):
                for h in range(0, size, 2 * LANES):
                    at = (first_value + k) * size + h
                    _add_values_of_pairs(
                        rows_, at, size, steps, weight_, head * most + k, out_, head * size + h
                    )
        if whole < keys:
            _copied(rows_NH, first_value + whole, keys - whole, last_)
            for head in range(each):
                for h in range(0, size, 2 * LANES):
                    _add_values_of_pairs(
                        last_, h, size, 1, weight_, head * most + whole, out_, head * size + h
                    )
        for head in range(each):
            for h in range(size):
                out_QAH[query, first_head + head, h] = out_[head * size + h] / total_[head]
