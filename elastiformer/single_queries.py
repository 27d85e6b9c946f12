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
from elastiformer.paired_queries import attend_in_pairs, goes_by_pairs
from elastiformer.row_kernels import _exponential, _wide, on_host
from elastiformer.vectors import (
    FLOATS,
    I64,
    INTS,
    LANES,
    LINE,
    aligned,
    everywhere,
    lanes_of_each,
    loop,
    multiply_add,
    prefetch,
    vector_at,
)

_WORDS = ir.VectorType(ir.IntType(16), LANES)
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
        own = lanes_of_each(builder, sums)
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


@compiled(parallel=True, fastmath={"contract", "reassoc", "nsz"})
def _attend_wide(  # type: ignore[no-untyped-def]
    rows_NH, query_QAH, query_S, key_S, value_S, room_S, length_S, heads, kv_heads, each, scale,
    out_QAH,
):  # fmt: skip
    size, group = query_QAH.shape[2], heads // kv_heads
    vectors = (size + LANES - 1) // LANES
    padded = vectors * LANES
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
def _attend(  # type: ignore[no-untyped-def]
    rows_NH, query_QAH, query_S, key_S, value_S, room_S, length_S, heads, kv_heads, scale, out_QAH
):
    group = heads // kv_heads
    each = group if len(query_S) * kv_heads >= _SHARED else 1  # queries of a task
    if goes_by_pairs(rows_NH) and query_QAH.shape[2] % (2 * LANES) == 0:
        attend_in_pairs(
            rows_NH, query_QAH, query_S, key_S, value_S, room_S, length_S, heads, kv_heads, each,
            scale, out_QAH,
        )  # fmt: skip
    else:
        _attend_wide(
            rows_NH, query_QAH, query_S, key_S, value_S, room_S, length_S, heads, kv_heads, each,
            scale, out_QAH,
        )  # fmt: skip
