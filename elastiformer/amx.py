"""The product of some rows in bfloat16 in tile registers, on a CPU that has them (AMX).

One instruction multiplies up to 16 rows of 32 inputs with 32 inputs of 16 outputs; vectors
(pairs.py) need many for it. Weights, rounding and rules are as there: a weight on a grid is read as
its codes, whose sums over a group get the group's step and low; every row goes through all inputs
in one order, whatever other rows there are.

Shape letters: R rows   I inputs, whole groups   O outputs   S slabs   C chunks of a slab
    W outputs of a chunk   G groups of inputs   P pairs of inputs
"""

from __future__ import annotations

import ctypes
import platform
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from elastiformer.kernels import TURN, compiled
from elastiformer.pairs import _CENTRES, _multiply_pairs, _pair_rows, _round_largest
from elastiformer.pairs import ABLE as _HAS_PAIRS
from elastiformer.stored_tile import GROUP, WIDTH, StoredTile
from elastiformer.vectors import FLOATS, I64, LANES, aligned, everywhere, loop, vector_at

_NEEDED = ("amx-tile", "amx-bf16")
KNOWN = _HAS_PAIRS and all(get_host_cpu_features().get(feature) for feature in _NEEDED)
_ARCH_PRCTL, _ASK, _TILE_DATA = 158, 0x1023, 18  # of Linux on x86-64 (asm/prctl.h)
ROWS = 16  # of a tile
_MOST_GROUPS = 4  # that are worked on together
_VECTORS = WIDTH // LANES
_WEIGHT = _VECTORS + 1  # tile registers: first sums, then values, last weights
_LINE = 64  # bytes of a tile's row

_BYTE, _POINTER, _VOID = ir.IntType(8), ir.IntType(8).as_pointer(), ir.VoidType()


def _granted() -> bool:
    """Whether this process may use tile registers: Linux wants to be asked."""
    if not KNOWN or platform.system() != "Linux":
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ASK, _TILE_DATA) == 0)


ABLE = _granted()  # else such a processor multiplies no rows in bfloat16 here


def multiply(
    weight_SICW: np.ndarray,
    steps: np.ndarray,
    lows: np.ndarray,
    x_RI: np.ndarray,
    norms_I: np.ndarray,
    start_S: np.ndarray,
    least_R: np.ndarray,
    out_RO: np.ndarray,
) -> None:
    """out = the picked of x, rounded to bfloat16, times the stored weight: of a grid, or bfloat16.

    Args:
        start_S: where each row's picks would begin, and the last ones end (largest.py).
        least_R: what they reach, or SEARCHED.
    """
    with TURN:
        multiply_small(weight_SICW, steps, lows, x_RI, norms_I, start_S, least_R, out_RO)


def _call(builder: Any, name: str, *args: Any) -> None:
    kind = ir.FunctionType(_VOID, [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), args)


def _register(number: int) -> Any:
    return ir.Constant(_BYTE, number)


_ROWS_IN, _WEIGHTS_IN = _register(_VECTORS), _register(_WEIGHT)


@intrinsic
def _configure(typing: Any, config: Any) -> Any:
    """Set this thread's tile registers up, as 64 bytes say."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if KNOWN:
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            _call(builder, "ldtilecfg", builder.bitcast(data, _POINTER))
        return context.get_dummy_value()

    return types.void(config), generate


@intrinsic
def _release(typing: Any) -> Any:
    """Leave this thread's tile registers as they were found: unused."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if KNOWN:
            _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _at_once(typing: Any, weight: Any) -> Any:
    """How many groups are worked on together: of codes one, whose sums are to be scaled."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        groups = 1 if signature.args[0].dtype in _CENTRES else _MOST_GROUPS
        return ir.Constant(I64, groups)

    return types.intp(weight), generate


@intrinsic
def _add_groups(
    typing: Any, sums: Any, at: Any, stride: Any, added: Any, small: Any, small_at: Any,
    inputs: Any, wide: Any, count: Any, weight: Any,
) -> Any:  # fmt: skip
    """What a tile of rows gives with so many groups of inputs.

    Args:
        sums: to what it is added, of bfloat16 weights: row by row, from `at` on, `stride` apart.
        added: where it goes, of codes: [ROWS, W].
        small: rows of bfloat16, the tile's from `small_at` on, `inputs` apart.
        wide: the groups' weights [groups, P, W], as pairs.
        weight: what they were read from; its type tells.
    """
    number = types.intp
    signature = types.void(sums, number, number, added, small, number, number, wide, number, weight)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not KNOWN:  # never called
            return context.get_dummy_value()
        kinds = signature.args
        of_codes = kinds[9].dtype in _CENTRES

        def data(array: int) -> Any:
            return context.make_array(kinds[array])(context, builder, args[array]).data

        def place(data: Any, *at: Any) -> Any:
            for numbers in at:
                data = builder.gep(data, [numbers])
            return builder.bitcast(data, _POINTER)

        values, weights = builder.gep(data(4), [args[5]]), data(7)
        values_apart = builder.mul(args[6], ir.Constant(I64, 2))
        weights_apart = ir.Constant(I64, 4 * WIDTH)
        into = data(3) if of_codes else builder.gep(data(0), [args[1]])
        apart = weights_apart if of_codes else builder.mul(args[2], ir.Constant(I64, 4))
        lanes = [ir.Constant(I64, lane) for lane in range(0, WIDTH, LANES)]

        for j, lane in enumerate(lanes):
            if of_codes:
                _call(builder, "tilezero", _register(j))
            else:
                _call(builder, "tileloadd64", _register(j), place(into, lane), apart)

        def add(group: Any, _: list[Any]) -> list[Any]:
            of_values = builder.mul(group, ir.Constant(I64, GROUP))
            of_weights = builder.mul(group, ir.Constant(I64, GROUP // 2 * WIDTH))
            _call(builder, "tileloadd64", _ROWS_IN, place(values, of_values), values_apart)
            for j, lane in enumerate(lanes):
                line = place(weights, of_weights, lane)
                _call(builder, "tileloadd64", _WEIGHTS_IN, line, weights_apart)
                _call(builder, "tdpbf16ps", _register(j), _ROWS_IN, _WEIGHTS_IN)
            return []

        loop(builder, ir.Constant(I64, 0), args[8], [], add)
        for j, lane in enumerate(lanes):
            _call(builder, "tilestored64", _register(j), place(into, lane), apart)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _add_scaled(
    typing: Any, sums: Any, at: Any, stride: Any, rows: Any, added: Any, total: Any, total_at: Any,
    groups: Any, weight: Any, steps: Any, lows: Any, slab: Any, chunk: Any, first: Any,
) -> Any:  # fmt: skip
    """Of codes: sums[at + h * stride :][:W] += step * added[h] + (low + centre * step) * total[h].

    Args:
        added: what centred codes gave, [ROWS, W].
        total: the sums of the rows' values over this group, from `total_at` on, `groups` apart.
        first: the group's first input.
    """
    number = types.intp
    signature = types.void(
        sums, number, number, number, added, total, number, number, weight, steps, lows,
        number, number, number,
    )  # fmt: skip

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        centre = _CENTRES.get(kinds[8].dtype)
        if centre is None:
            return context.get_dummy_value()

        def data(place: int) -> Any:
            return context.make_array(kinds[place])(context, builder, args[place]).data

        tile = StoredTile(context, builder, kinds[8:11], args[8:11], args[11:13])
        tile.enter_group(args[13])
        middle = ir.Constant(FLOATS, [float(centre)] * LANES)
        scales = [
            (step, tile.multiply_add(step, middle, low))
            for step, low in tile.scales(list(range(_VECTORS)))
        ]

        def add(row: Any, _: list[Any]) -> list[Any]:
            place = builder.add(args[6], builder.mul(args[7], row))
            total = everywhere(builder, builder.load(builder.gep(data(5), [place])))
            line = builder.add(args[1], builder.mul(args[2], row))
            of_row = builder.mul(row, ir.Constant(I64, WIDTH))
            for j, (step, low) in enumerate(scales):
                pointer = vector_at(builder, data(0), line, j)
                sum_ = tile.multiply_add(low, total, builder.load(pointer, align=4))
                codes = builder.load(vector_at(builder, data(4), of_row, j), align=_LINE)
                builder.store(tile.multiply_add(step, codes, sum_), pointer, align=4)
            return []

        loop(builder, ir.Constant(I64, 0), args[3], [], add)
        return context.get_dummy_value()

    return signature, generate


@compiled()
def _config(rows):  # type: ignore[no-untyped-def]
    """How the tile registers are cut: of sums and of values `rows` lines, of weights 16."""
    config = np.zeros(64, dtype=np.uint8)
    config[0] = 1  # the palette
    for register in range(_WEIGHT + 1):
        config[16 + 2 * register] = _LINE
        config[48 + register] = rows if register < _WEIGHT else GROUP // 2
    return config


@compiled(parallel=True)
def _multiply_in_tiles(weight_SICW, steps, lows, x_RI, norms_I, start_S, least_R, out_RO):  # type: ignore[no-untyped-def]
    """As `_multiply_pairs`."""
    slabs, inputs, chunks, _ = weight_SICW.shape
    rows, outputs = out_RO.shape
    groups = (inputs + GROUP - 1) // GROUP
    tiles = (rows + ROWS - 1) // ROWS
    high = (rows + tiles - 1) // tiles  # rows of a tile
    small_RI = np.empty((tiles * high, groups * GROUP), dtype=np.uint16)
    total_RG = np.empty((tiles * high, groups), dtype=np.float32)
    for row in prange(tiles * high):
        if row < rows:
            wanted = start_S[row + 1] - start_S[row]
            _round_largest(x_RI[row], norms_I, wanted, least_R[row], small_RI[row], total_RG[row])
        else:
            small_RI[row] = 0
            total_RG[row] = 0
    config, at_once = _config(high), _at_once(weight_SICW)
    small_, total_ = small_RI.reshape(-1), total_RG.reshape(-1)
    for slab in prange(slabs):
        _configure(config)
        width = chunks * WIDTH
        sums_ = aligned(tiles * high * width)
        sums_[:] = 0
        added_ = aligned(ROWS * WIDTH)
        wide_GX = aligned(at_once * GROUP // 2 * WIDTH).reshape((at_once, GROUP // 2 * WIDTH))
        for group in range(0, groups, at_once):
            count = min(at_once, groups - group)
            if inputs < (group + count) * GROUP:
                wide_GX[:] = 0
            for chunk in range(chunks):
                for g in range(count):
                    first = (group + g) * GROUP
                    end = min(first + GROUP, inputs)
                    _pair_rows(wide_GX[g], weight_SICW, steps, lows, slab, chunk, first, end)
                for tile in range(tiles):
                    at, row = tile * high * width + chunk * WIDTH, tile * high
                    of_row = (row * groups + group) * GROUP
                    _add_groups(
                        sums_, at, width, added_, small_, of_row, groups * GROUP, wide_GX, count,
                        weight_SICW,
                    )  # fmt: skip
                    _add_scaled(
                        sums_, at, width, high, added_, total_, row * groups + group, groups,
                        weight_SICW, steps, lows, slab, chunk, group * GROUP,
                    )  # fmt: skip
        _release()
        begin = slab * width
        count = min(width, outputs - begin)
        sums_RO = sums_.reshape((tiles * high, width))
        for row in range(rows):
            out_RO[row, begin : begin + count] = sums_RO[row, :count]


# Only one of them is compiled: with every caller, which takes its time.
multiply_small = _multiply_in_tiles if KNOWN else _multiply_pairs
