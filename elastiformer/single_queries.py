"""Attention of single queries, each over its own part of the pool, compiled for a CPU.

In decoding every request asks with one token. PyTorch's attention is one call a request, and
starting it costs more than computing it; here all requests and heads of a layer are one call.

Shape letters: N rows of the pool   Q queries   A query heads   G key/value heads   H head size
    S single queries   K keys
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from elastiformer.kernels import TURN, compiled
from elastiformer.pairs import _PAIRS, ABLE, _BFloat
from elastiformer.row_kernels import _as_stored, _exponential, _wide, on_host
from elastiformer.vectors import (
    FLOATS,
    I32,
    I64,
    INTS,
    LANES,
    LINE,
    aligned,
    constant,
    everywhere,
    loop,
    multiply_add,
    power_of_two,
    prefetch,
    vector_at,
)

_WORDS = ir.VectorType(ir.IntType(16), LANES)
_LINE_OF_WORDS = ir.VectorType(ir.IntType(16), 2 * LANES)
_SMALL = ir.VectorType(_BFloat(), LANES)
_NOTHING = np.float32(-3e38)  # a score that weighs nothing
_AT_ONCE = 128  # keys whose values stay in the first cache, for all queries and channels
_SHARED = 2  # tasks of which each has all queries of a key head: for a lone one they are divided


@dataclass(frozen=True, slots=True)
class Singles:
    """Requests that ask with one token each, which sees all keys that there are."""

    rows_NH: Tensor  # of the pool
    kv_heads: int
    query_S: np.ndarray  # which of the packed queries
    last_S: np.ndarray  # its position
    key_S: np.ndarray  # where the keys begin among the rows, head after head
    value_S: np.ndarray
    room_S: np.ndarray  # how far apart the heads are
    length_S: np.ndarray  # how many tokens they hold

    def __len__(self) -> int:
        return len(self.query_S)

    def before(self, position: int) -> Singles:
        """Those whose query stands before a position."""
        kept_S = self.last_S < position
        if kept_S.all():
            return self
        arrays = (self.query_S, self.last_S, self.key_S, self.value_S, self.room_S, self.length_S)
        return Singles(self.rows_NH, self.kv_heads, *(array[kept_S] for array in arrays))


def attend(singles: Singles, query_QAH: np.ndarray, scale: float, out_QAH: np.ndarray) -> None:
    """Fill in the attention output of single queries, each over all keys of its request."""
    with TURN:
        _attend(
            on_host(singles.rows_NH), query_QAH, singles.query_S, singles.key_S, singles.value_S,
            singles.room_S, singles.length_S, query_QAH.shape[1], singles.kv_heads,
            np.float32(scale), out_QAH,
        )  # fmt: skip


@compiled(fastmath={"contract", "reassoc", "nsz"})
def _exponentials(score_K: Any) -> Any:
    """exp(score - largest) in place, and their sum."""
    largest = score_K[0]
    for k in range(len(score_K)):
        largest = max(largest, score_K[k])
    total = np.float32(0)
    for k in range(len(score_K)):
        score_K[k] = _exponential(score_K[k] - largest)
        total += score_K[k]
    return total


def _lanes_of_each(builder: Any, sums: list[Any]) -> Any:
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


@intrinsic
def _dots(typing: Any, keys: Any, query: Any, at: Any, vectors: Any, scores: Any, to: Any) -> Any:
    """scores[to : to + LANES] = a query, of so many vectors from `at` on, times each of LANES keys.

    The products of a key are added up lane by lane, and then the lanes of all keys at once.
    """
    number = types.intp
    signature = types.void(keys, query, number, number, scores, number)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        key_data, query_data, score_data = (
            context.make_array(signature.args[at])(context, builder, args[at]).data
            for at in (0, 1, 4)
        )
        width = builder.mul(args[3], ir.Constant(I64, LANES))
        rows = [builder.mul(width, ir.Constant(I64, key)) for key in range(LANES)]

        def add(vector: Any, running: list[Any]) -> list[Any]:
            along = builder.mul(vector, ir.Constant(I64, LANES))
            asked = builder.load(
                vector_at(builder, query_data, builder.add(args[2], along)), align=4
            )
            found = []
            for row, sum_ in zip(rows, running, strict=True):
                pointer = vector_at(builder, key_data, builder.add(row, along))
                found.append(multiply_add(builder, asked, builder.load(pointer, align=4), sum_))
            return found

        nothing = ir.Constant(FLOATS, [0.0] * LANES)
        sums = loop(builder, ir.Constant(I64, 0), args[3], [nothing] * LANES, add)
        own = _lanes_of_each(builder, sums)
        builder.store(own, vector_at(builder, score_data, args[5]), align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _add_values(
    typing: Any, values: Any, weights: Any, at: Any, vectors: Any, out: Any, to: Any
) -> Any:
    """out[to:] += weights[at : at + LANES] times LANES values of so many vectors each."""
    number = types.intp
    signature = types.void(values, weights, number, number, out, number)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value_data, weight_data, out_data = (
            context.make_array(signature.args[at])(context, builder, args[at]).data
            for at in (0, 1, 4)
        )
        width = builder.mul(args[3], ir.Constant(I64, LANES))
        lines = [ir.Constant(I64, key) for key in range(LANES)]
        weights = [
            everywhere(
                builder, builder.load(builder.gep(weight_data, [builder.add(args[2], line)]))
            )
            for line in lines
        ]

        def add(vector: Any, _: list[Any]) -> list[Any]:
            along = builder.mul(vector, ir.Constant(I64, LANES))
            pointer = vector_at(builder, out_data, builder.add(args[5], along))
            sum_ = builder.load(pointer, align=4)
            for line, weight in zip(lines, weights, strict=True):
                place = builder.add(builder.mul(width, line), along)
                value = builder.load(vector_at(builder, value_data, place), align=4)
                sum_ = multiply_add(builder, weight, value, sum_)
            builder.store(sum_, pointer, align=4)
            return []

        loop(builder, ir.Constant(I64, 0), args[3], [], add)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _widen_vectors(
    typing: Any, rows: Any, first: Any, count: Any, vectors: Any, wide: Any, apart: Any
) -> Any:
    """wide[k * apart :] = so many vectors of the rows from `first` on, as float32."""
    number = types.intp
    signature = types.void(rows, number, number, number, wide, number)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        stored = signature.args[0].dtype
        array = context.make_array(signature.args[0])(context, builder, args[0])
        wide_data = context.make_array(signature.args[4])(context, builder, args[4]).data
        _, size = cgutils.unpack_tuple(builder, array.shape, 2)
        begin = builder.mul(args[1], size)
        ahead = builder.mul(size, ir.Constant(I64, LANES))
        zero, lanes = ir.Constant(I64, 0), ir.Constant(I64, LANES)
        line_bytes = ir.Constant(I64, LINE)
        row_bytes = builder.mul(size, ir.Constant(I64, stored.bitwidth // 8))
        lines = builder.udiv(builder.add(row_bytes, ir.Constant(I64, LINE - 1)), line_bytes)

        def widen_row(key: Any, _: list[Any]) -> list[Any]:
            row = builder.add(begin, builder.mul(key, size))
            out = builder.mul(key, args[5])

            def widen(vector: Any, _: list[Any]) -> list[Any]:
                along = builder.mul(vector, lanes)
                place = builder.add(row, along)
                if stored == types.float32:
                    numbers = builder.load(vector_at(builder, array.data, place), align=4)
                else:
                    pointer = vector_at(builder, array.data, place, kind=_WORDS)
                    bits = builder.zext(builder.load(pointer, align=2), INTS)
                    shifted = builder.shl(bits, ir.Constant(INTS, [16] * LANES))
                    numbers = builder.bitcast(shifted, FLOATS)
                to = vector_at(builder, wide_data, builder.add(out, along))
                builder.store(numbers, to, align=4)
                return []

            later = builder.gep(array.data, [builder.add(row, ahead)])
            later = builder.bitcast(later, ir.IntType(8).as_pointer())

            def fetch(line: Any, _: list[Any]) -> list[Any]:
                prefetch(builder, builder.gep(later, [builder.mul(line, line_bytes)]))
                return []

            loop(builder, zero, lines, [], fetch)
            loop(builder, zero, args[3], [], widen)
            return []

        loop(builder, zero, args[2], [], widen_row)
        return context.get_dummy_value()

    return signature, generate


@compiled()
def _widen(rows_NH, first, count, wide_KP):  # type: ignore[no-untyped-def]
    """Some rows of the pool as float32."""
    size, padded = rows_NH.shape[1], wide_KP.shape[1]
    _widen_vectors(rows_NH, first, count, size // LANES, wide_KP, padded)
    if size < padded:
        for k in range(count):
            for h in range(size // LANES * LANES, size):
                wide_KP[k, h] = _wide(rows_NH[first + k, h])


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
        if not takes_pairs(signature.args[0].dtype):  # never called
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
            _lanes_of_each(builder, sums), vector_at(builder, score_data, args[6]), align=4
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
        if not takes_pairs(signature.args[0].dtype):  # never called
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
                    builder.load(vector_at(builder, value_data, at, kind=_LINE_OF_WORDS), align=2)
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
        if not takes_pairs(signature.args[4].dtype):  # never called
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
            small = builder.bitcast(builder.call(rounded, [weight]), _WORDS)
            pointer = vector_at(builder, weight_data, place(vector), kind=_WORDS)
            builder.store(small, pointer, align=2)
            return [builder.fadd(running[0], weight)]

        (total,) = loop(builder, zero, args[2], [constant(0.0)], put)
        return over_lanes("fadd", ir.Constant(ir.FloatType(), -0.0), total)

    return signature, generate


def takes_pairs(stored: Any) -> bool:
    """Whether keys and values, stored so, are multiplied two numbers at a time."""
    return bool(ABLE and stored == types.uint16)


def _pairs_at(builder: Any, data: Any, at: Any) -> Any:
    pointer = vector_at(builder, data, at, kind=_LINE_OF_WORDS)
    return builder.bitcast(builder.load(pointer, align=2), _PAIRS)


def _add_pairs(builder: Any, sum_: Any, one: Any, other: Any) -> Any:
    kind = ir.FunctionType(FLOATS, [FLOATS, _PAIRS, _PAIRS])
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [sum_, one, other])


@intrinsic
def _goes_by_pairs(typing: Any, rows: Any) -> Any:
    signature = types.boolean(rows)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(ir.IntType(1), takes_pairs(signature.args[0].dtype))

    return signature, generate


@compiled(parallel=True, fastmath={"contract", "reassoc", "nsz"})
def _attend_wide(  # type: ignore[no-untyped-def]
    rows_NH, query_QAH, query_S, key_S, value_S, room_S, length_S, heads, kv_heads, scale, out_QAH
):
    size, group = query_QAH.shape[2], heads // kv_heads
    vectors = (size + LANES - 1) // LANES
    padded = vectors * LANES
    each = group if len(query_S) * kv_heads >= _SHARED else 1  # queries of a task
    tasks = heads // each
    for task in prange(len(query_S) * tasks):
        single, first_head = task // tasks, task % tasks * each
        query, keys, room = query_S[single], length_S[single], room_S[single]
        first_key = key_S[single] + first_head // group * room
        first_value = value_S[single] + first_head // group * room
        wide_ = aligned(LANES * padded)  # of LANES keys, then values
        wide_[:] = 0
        wide_KP = wide_.reshape((LANES, padded))
        query_, out_ = np.zeros(each * padded, np.float32), np.zeros(each * padded, np.float32)
        for head in range(each):
            for h in range(size):
                query_[head * padded + h] = query_QAH[query, first_head + head, h]
        most = (keys + LANES - 1) // LANES * LANES
        score_ = np.empty(each * most, dtype=np.float32)
        for k in range(0, keys, LANES):
            _widen(rows_NH, first_key + k, min(LANES, keys - k), wide_KP)
            for head in range(each):
                _dots(wide_, query_, head * padded, vectors, score_, head * most + k)
        total_ = np.empty(each, dtype=np.float32)
        for head in range(each):
            score_K = score_[head * most : head * most + keys]
            for k in range(keys):
                score_K[k] *= scale
            total_[head] = _exponentials(score_K)
            score_[head * most + keys : (head + 1) * most] = 0
        for k in range(0, keys, LANES):
            _widen(rows_NH, first_value + k, min(LANES, keys - k), wide_KP)
            for head in range(each):
                _add_values(wide_, score_, head * most + k, vectors, out_, head * padded)
        for head in range(each):
            for h in range(size):
                out_QAH[query, first_head + head, h] = out_[head * padded + h] / total_[head]


@compiled()
def _copied(rows_NH, first, count, into_):  # type: ignore[no-untyped-def]
    """Some rows of the pool, and zeros where there is more room."""
    size = rows_NH.shape[1]
    into_[:] = 0
    for k in range(count):
        for h in range(size):
            into_[k * size + h] = rows_NH[first + k, h]


@compiled(parallel=True)  # sums in another order would undo how powers of two are found
def _attend_in_pairs(  # type: ignore[no-untyped-def]
    rows_NH, query_QAH, query_S, key_S, value_S, room_S, length_S, heads, kv_heads, scale, out_QAH
):
    size, group = query_QAH.shape[2], heads // kv_heads
    each = group if len(query_S) * kv_heads >= _SHARED else 1  # queries of a task
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


@compiled()
def _attend(  # type: ignore[no-untyped-def]
    rows_NH, query_QAH, query_S, key_S, value_S, room_S, length_S, heads, kv_heads, scale, out_QAH
):
    if _goes_by_pairs(rows_NH) and query_QAH.shape[2] % (2 * LANES) == 0:
        _attend_in_pairs(
            rows_NH, query_QAH, query_S, key_S, value_S, room_S, length_S, heads, kv_heads, scale,
            out_QAH,
        )  # fmt: skip
    else:
        _attend_wide(
            rows_NH, query_QAH, query_S, key_S, value_S, room_S, length_S, heads, kv_heads, scale,
            out_QAH,
        )  # fmt: skip
