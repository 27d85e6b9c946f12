"""The product of some rows in bfloat16, two inputs at a time, on a CPU with AVX-512 for it.

Such a processor multiplies pairs of bfloat16 numbers and adds both products to a float32, twice as
much at once as of float32. A stored weight (tiles.py) is read as such pairs: on a grid, as the
whole numbers of its steps, which bfloat16 holds exactly, so that only the values are rounded; the
step and the low of a group are applied to its sum. Every row goes through all inputs, zeros where
it leaves some out, in one order, whatever other rows there are.

Shape letters: R rows   I inputs   O outputs   S slabs   C chunks of a slab   W outputs of a chunk
    T tiles of rows   P pairs of inputs   H rows of a tile   G groups of inputs
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import config, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from elastiformer.kernels import TURN, compiled
from elastiformer.largest import _copy_largest
from elastiformer.stored_tile import GROUP, WIDTH, StoredTile
from elastiformer.vectors import (
    BYTES,
    FLOATS,
    I64,
    INTS,
    LANES,
    LINE,
    aligned,
    everywhere,
    loop,
    vector_at,
)

_NEEDED = ("avx512bf16", "avx512bw")
# Numba can be told to compile for less than the processor at hand.
_TOLD = config.CPU_NAME is not None or config.CPU_FEATURES is not None
ABLE = not _TOLD and all(get_host_cpu_features().get(feature) for feature in _NEEDED)
TILE = 4  # rows whose sums fill the registers
_VECTORS = WIDTH // LANES
_CENTRES = {types.int8: 8, types.uint8: 128}  # codes less this have a small sum


class _BFloat(ir.types.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)
_WORDS = ir.VectorType(ir.IntType(16), 2 * LANES)


def round_picked(
    x_RI: np.ndarray,
    norms_I: np.ndarray,
    start_S: np.ndarray,
    least_R: np.ndarray,
    small_RI: np.ndarray,
) -> None:
    """Fill in the picked of x as bfloat16, and zeros for the rest. Only where ABLE.

    Args:
        start_S: where each row's picks would begin, and the last ones end (largest.py).
        least_R: what they reach, or SEARCHED.
        small_RI: the bits, as uint16.
    """
    with TURN:
        _round_rows(x_RI, norms_I, start_S, least_R, small_RI)


def takes(inputs: int, form: np.dtype[Any]) -> bool:
    """Whether a weight of so many inputs, stored so, can be multiplied here."""
    return ABLE and inputs % 2 == 0 and form in (np.int8, np.uint8, np.uint16)


@intrinsic
def _pair_rows(
    typing: Any, pairs: Any, weight: Any, steps: Any, lows: Any, slab: Any, chunk: Any,
    first: Any, end: Any,
) -> Any:  # fmt: skip
    """pairs[p, w] = weight[slab, first + 2p and the one after it, chunk, w], until `end`."""
    signature = types.void(pairs, weight, steps, lows, *(types.intp,) * 4)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not ABLE:  # never called
            return context.get_dummy_value()
        kinds = signature.args
        tile = StoredTile(context, builder, kinds[1:4], args[1:4], args[4:6])
        into = context.make_array(kinds[0])(context, builder, args[0]).data
        one = ir.Constant(I64, 1)

        def put(pair: Any, _: Any) -> list[Any]:
            row = builder.add(args[6], builder.shl(pair, one))
            at = builder.mul(pair, ir.Constant(I64, WIDTH))
            for ahead in (GROUP, GROUP + 1):
                tile.fetch(builder.add(row, ir.Constant(I64, ahead)))
            for j, numbers in enumerate(_paired(builder, tile, row, builder.add(row, one))):
                builder.store(numbers, vector_at(builder, into, at, j, INTS), align=4)
            return []

        count = builder.lshr(builder.sub(args[7], args[6]), one)
        loop(builder, ir.Constant(I64, 0), count, [], put)
        return context.get_dummy_value()

    return signature, generate


def _paired(builder: Any, tile: StoredTile, first: Any, second: Any) -> list[Any]:
    """Two inputs' weights side by side, vector by vector; on a grid, their centred codes."""
    sixteen = ir.Constant(INTS, [16] * LANES)

    def side_by_side(j: int, kind: Any) -> Any:
        low, high = (tile.raw(row, j, kind) for row in (first, second))
        return builder.or_(low, builder.shl(high, sixteen))

    if tile.element == types.int8:
        table = ir.Constant(_WORDS, [_bits(code % 16 - 8) for code in range(32)])
        look_up = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_WORDS, [_WORDS] * 2),
            "llvm.x86.avx512.permvar.hi.512",
        )
        found = []
        for pair in range(_VECTORS // 2):
            codes = side_by_side(pair, BYTES)
            # Of an index only the last five bits count, and the table is there twice.
            for index in (codes, builder.lshr(codes, ir.Constant(INTS, [4] * LANES))):
                words = builder.call(look_up, [table, builder.bitcast(index, _WORDS)])
                found.append(builder.bitcast(words, INTS))
        return found
    if tile.element == types.uint8:
        found = []
        for j in range(_VECTORS):
            low, high = (_centred(builder, tile.raw(row, j, BYTES)) for row in (first, second))
            upper = ir.Constant(INTS, [0xFFFF0000] * LANES)
            found.append(builder.or_(builder.lshr(low, sixteen), builder.and_(high, upper)))
        return found
    return [side_by_side(j, ir.VectorType(ir.IntType(16), LANES)) for j in range(_VECTORS)]


def _centred(builder: Any, codes: Any) -> Any:
    """Codes less the centre as float32, of which the upper half is all there is."""
    centre = ir.Constant(INTS, [_CENTRES[types.uint8]] * LANES)
    return builder.bitcast(builder.sitofp(builder.sub(codes, centre), FLOATS), INTS)


def _bits(number: float) -> int:
    """Of a number that bfloat16 holds exactly."""
    return int(np.float32(number).view(np.uint32) >> 16)


@intrinsic
def _add_tile(
    typing: Any, sums: Any, at: Any, stride: Any, pairs: Any, x: Any, x_at: Any, count: Any,
    total: Any, total_at: Any, weight: Any, steps: Any, lows: Any, slab: Any, chunk: Any,
    first: Any,
) -> Any:  # fmt: skip
    """sums[at + h * stride:] += what `count` pairs of weights give with those of a tile's rows.

    Args:
        x: of a tile [P, H], from `x_at` on.
        total: the sums of the rows' values over this group, [H], from `total_at` on.
        first: the input of the first pair.
    """
    number = types.intp
    signature = types.void(
        sums, number, number, pairs, x, number, number, total, number, weight, steps, lows,
        number, number, number,
    )  # fmt: skip

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not ABLE:  # never called
            return context.get_dummy_value()
        kinds = signature.args

        def data(place: int) -> Any:
            return context.make_array(kinds[place])(context, builder, args[place]).data

        tile = StoredTile(context, builder, kinds[9:12], args[9:12], args[12:14])
        centre = _CENTRES.get(tile.element)
        rows = [
            builder.add(args[1], builder.mul(args[2], ir.Constant(I64, h))) for h in range(TILE)
        ]
        pointers = [[vector_at(builder, data(0), row, j) for j in range(_VECTORS)] for row in rows]
        nothing = ir.Constant(FLOATS, [0.0] * LANES)
        started = [
            nothing if centre is not None else builder.load(pointer, align=4)
            for of_row in pointers
            for pointer in of_row
        ]
        multiply_add = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(FLOATS, [FLOATS, _PAIRS, _PAIRS]),
            "llvm.x86.avx512bf16.dpbf16ps.512",
        )
        values = builder.gep(data(4), [args[5]])
        weights = data(3)

        def add(pair: Any, running: list[Any]) -> list[Any]:
            line = builder.mul(pair, ir.Constant(I64, WIDTH))
            of_pair = [
                builder.bitcast(
                    builder.load(vector_at(builder, weights, line, j, INTS), align=LINE), _PAIRS
                )
                for j in range(_VECTORS)
            ]
            following = []
            for h in range(TILE):
                place = builder.add(builder.mul(pair, ir.Constant(I64, TILE)), ir.Constant(I64, h))
                value = builder.load(builder.gep(values, [place]))
                both = builder.bitcast(everywhere(builder, value), _PAIRS)
                of_row = running[h * _VECTORS : (h + 1) * _VECTORS]
                following += [
                    builder.call(multiply_add, [sum_, numbers, both])
                    for sum_, numbers in zip(of_row, of_pair, strict=True)
                ]
            return following

        added = loop(builder, ir.Constant(I64, 0), args[6], started, add)
        if centre is not None:
            added = _scaled(builder, tile, args[14], centre, pointers, data(7), args[8], added)
        flat = [pointer for of_row in pointers for pointer in of_row]
        for pointer, sum_ in zip(flat, added, strict=True):
            builder.store(sum_, pointer, align=4)
        return context.get_dummy_value()

    return signature, generate


def _scaled(
    builder: Any, tile: StoredTile, first: Any, centre: int, pointers: Any, totals: Any,
    total_at: Any, added: list[Any],
) -> list[Any]:  # fmt: skip
    """The sums after a group: + step * (sum of values * centred codes) + middle * (of values)."""
    tile.enter_group(first)
    scales = tile.scales(list(range(_VECTORS)))
    middle = ir.Constant(FLOATS, [float(centre)] * LANES)
    result = []
    for h in range(TILE):
        place = builder.add(total_at, ir.Constant(I64, h))
        total = everywhere(builder, builder.load(builder.gep(totals, [place])))
        for j, (step, low) in enumerate(scales):
            sum_ = builder.load(pointers[h][j], align=4)
            sum_ = tile.multiply_add(tile.multiply_add(step, middle, low), total, sum_)
            result.append(tile.multiply_add(step, added[h * _VECTORS + j], sum_))
    return result


@intrinsic
def _round_groups(
    typing: Any, x: Any, norms: Any, least: Any, small: Any, totals: Any, count: Any
) -> Any:
    """The values of so many whole groups as bfloat16, and what those of each add up to.

    Args:
        norms: of inputs; values of which size x norm is below the least become 0. None: none do.
    """
    signature = types.void(x, norms, least, small, totals, types.intp)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def data(place: int) -> Any:
            return context.make_array(signature.args[place])(context, builder, args[place]).data

        from_, to, sums = data(0), data(3), data(4)
        picks = signature.args[1] != types.none
        least = everywhere(builder, args[2])
        halves = ir.VectorType(ir.IntType(16), LANES)
        one, most = (ir.Constant(INTS, [number] * LANES) for number in (1, 0x7FFF))
        sixteen, positive = (ir.Constant(INTS, [bits] * LANES) for bits in (16, 0x7FFFFFFF))
        add_up = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.FloatType(), [ir.FloatType(), FLOATS]),
            f"llvm.vector.reduce.fadd.v{LANES}f32",
        )

        def round_group(group: Any, _: list[Any]) -> list[Any]:
            at, total = builder.mul(group, ir.Constant(I64, GROUP)), None
            for j in range(GROUP // LANES):
                bits = builder.load(vector_at(builder, from_, at, j, INTS), align=4)
                if picks:
                    size = builder.bitcast(builder.and_(bits, positive), FLOATS)
                    norm = builder.load(vector_at(builder, data(1), at, j), align=4)
                    # What is no number stays, as it does where channels are counted.
                    stays = builder.fcmp_unordered(">=", builder.fmul(size, norm), least)
                    bits = builder.select(stays, bits, ir.Constant(INTS, [0] * LANES))
                odd = builder.and_(builder.lshr(bits, sixteen), one)
                upper = builder.lshr(builder.add(builder.add(bits, most), odd), sixteen)
                builder.store(
                    builder.trunc(upper, halves), vector_at(builder, to, at, j, halves), align=2
                )
                rounded = builder.bitcast(builder.shl(upper, sixteen), FLOATS)
                total = rounded if total is None else builder.fadd(total, rounded)
            nothing = ir.Constant(ir.FloatType(), -0.0)
            sum_ = builder.call(add_up, [nothing, total], fastmath=("reassoc",))
            builder.store(sum_, builder.gep(sums, [group]))
            return []

        loop(builder, ir.Constant(I64, 0), args[5], [], round_group)
        return context.get_dummy_value()

    return signature, generate


@compiled()
def _round_row(x_I, small_I, total_G):  # type: ignore[no-untyped-def]
    """A row's values as bfloat16, zeros behind them, and their sums over each group."""
    inputs, whole = len(x_I), len(x_I) // GROUP
    _round_groups(x_I, None, np.float32(0), small_I, total_G, whole)
    if whole < len(total_G):
        last_I, small_last_I = np.zeros(GROUP, dtype=np.float32), np.empty(GROUP, dtype=np.uint16)
        last_I[: inputs - whole * GROUP] = x_I[whole * GROUP :]
        _round_groups(last_I, None, np.float32(0), small_last_I, total_G[whole:], 1)
        small_I[whole * GROUP :] = small_last_I[: len(small_I) - whole * GROUP]


@compiled()
def _round_largest(x_I, norms_I, wanted, least, small_I, total_G):  # type: ignore[no-untyped-def]
    """The same of a row that is zero but for its `wanted` largest."""
    if wanted == len(x_I):
        _round_row(x_I, small_I, total_G)
    elif least >= 0 and len(x_I) % GROUP == 0:
        _round_groups(x_I, norms_I, least, small_I, total_G, len(total_G))
    else:
        only_I = np.empty(len(x_I), dtype=np.float32)
        _copy_largest(x_I, norms_I, wanted, least, only_I)
        _round_row(only_I, small_I, total_G)


@compiled(parallel=True)
def _round_rows(x_RI, norms_I, start_S, least_R, small_RI):  # type: ignore[no-untyped-def]
    groups = (x_RI.shape[1] + GROUP - 1) // GROUP
    for row in prange(len(x_RI)):
        wanted, total_G = start_S[row + 1] - start_S[row], np.empty(groups, dtype=np.float32)
        _round_largest(x_RI[row], norms_I, wanted, least_R[row], small_RI[row], total_G)


@compiled()
def _pair_largest(x_I, norms_I, wanted, least, h, pairs_PH, total_GH):  # type: ignore[no-untyped-def]
    """The same, two values side by side, as one row of a tile's."""
    small_I = np.empty(len(x_I), dtype=np.uint16)
    total_G = np.empty(len(total_GH), dtype=np.float32)
    _round_largest(x_I, norms_I, wanted, least, small_I, total_G)
    total_GH[:, h] = total_G
    both_P = small_I.view(np.uint32)
    for pair in range(len(both_P)):
        pairs_PH[pair, h] = both_P[pair]


@compiled(parallel=True)
def _multiply_pairs(weight_SICW, steps, lows, x_RI, norms_I, start_S, least_R, out_RO):  # type: ignore[no-untyped-def]
    slabs, inputs, chunks, _ = weight_SICW.shape
    rows, outputs = out_RO.shape
    tiles = (rows + TILE - 1) // TILE
    groups = (inputs + GROUP - 1) // GROUP
    pairs_TPH = np.empty((tiles, inputs // 2, TILE), dtype=np.uint32)
    total_TGH = np.empty((tiles, groups, TILE), dtype=np.float32)
    for row in prange(tiles * TILE):
        tile, h = row // TILE, row % TILE
        if row >= rows:
            pairs_TPH[tile, :, h] = 0
            total_TGH[tile, :, h] = 0
            continue
        wanted = start_S[row + 1] - start_S[row]
        _pair_largest(x_RI[row], norms_I, wanted, least_R[row], h, pairs_TPH[tile], total_TGH[tile])
    pairs_, total_ = pairs_TPH.reshape(-1), total_TGH.reshape(-1)
    for slab in prange(slabs):
        width = chunks * WIDTH
        sums_ = aligned(tiles * TILE * width)
        sums_[:] = 0
        wide_PW = aligned(GROUP // 2 * WIDTH)
        for group in range(groups):
            first = group * GROUP
            end = min(first + GROUP, inputs)
            for chunk in range(chunks):
                _pair_rows(wide_PW, weight_SICW, steps, lows, slab, chunk, first, end)
                for tile in range(tiles):
                    _add_tile(
                        sums_, tile * TILE * width + chunk * WIDTH, width, wide_PW,
                        pairs_, (tile * (inputs // 2) + first // 2) * TILE, (end - first) // 2,
                        total_, (tile * groups + group) * TILE,
                        weight_SICW, steps, lows, slab, chunk, first,
                    )  # fmt: skip
        begin = slab * width
        for row in range(rows):
            for output in range(begin, min(begin + width, outputs)):
                out_RO[row, output] = sums_[row * width + output - begin]
