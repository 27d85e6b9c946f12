"""What a CPU does to one row at a time between two products, compiled: norms, rotations, gates,
and sums.

Each of them is one call for all rows. As PyTorch's operators, at one row, they would take longer
to start than to run. The arithmetic is strict, so a row gets the same bits whatever other rows
there are, in whichever loop it is done.

Shape letters: N rows   D width   M heads   H head size   R rotated part of a head   I neurons
    G key/value heads   P rows of the pool   S some rows   E all numbers of a memory
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic
from torch import Tensor

from elastiformer.kernels import TURN, compiled

_ALONE = 4  # so few rows are done faster by one thread,
_SUMS_ALONE = 2**18  # and so few sums
_SUMS = 16  # kept side by side, so that vector code can add them
_SHIFT = np.float32(1.5 * 2**23)  # a float32 of this size has no room for fractions
SILU, GELU = 0, 1
SUMMED = (torch.float32, torch.bfloat16)  # types of which `add` takes two alike
# Division by zero gives infinity, as in PyTorch: a check for it would keep loops from vector code.
_STRICT: Any = {"fastmath": False, "error_model": "numpy"}


def normalise(x_ND: np.ndarray, scale_D: np.ndarray, epsilon: float, out_ND: np.ndarray) -> None:
    """Fill in x / (root mean square of its row) * scale.

    Args:
        out_ND: float32, or of bfloat16 the bits, as uint16.
    """
    if len(x_ND) <= _ALONE:
        _normalise_in_turn(x_ND, scale_D, np.float32(epsilon), out_ND)
        return
    with TURN:
        _normalise_side_by_side(x_ND, scale_D, np.float32(epsilon), out_ND)


def gate(form: int, side_by_side_N2I: np.ndarray, out_NI: np.ndarray) -> None:
    """Fill in activation(first half of the columns) * second half.

    Args:
        form: SILU, or GELU in its approximation by tanh.
        side_by_side_N2I, out_NI: float32, or of bfloat16 the bits, as uint16.
    """
    if len(out_NI) <= _ALONE:
        _gate_in_turn(form, side_by_side_N2I, out_NI)
        return
    with TURN:
        _gate_side_by_side(form, side_by_side_N2I, out_NI)


def turn(x_NMH: np.ndarray, heads: int, cos_NR: np.ndarray, sin_NR: np.ndarray) -> None:
    """Rotate the first heads of each row, in place.

    Args:
        x_NMH: float32, or of bfloat16 the bits, as uint16.
    """
    if len(x_NMH) <= _ALONE:
        _turn_in_turn(x_NMH, heads, cos_NR, sin_NR)
        return
    with TURN:
        _turn_side_by_side(x_NMH, heads, cos_NR, sin_NR)


def add(into_ND: Tensor, index_S: np.ndarray, x_SD: Tensor) -> None:
    """Add to some rows, each of which comes once, in place.

    PyTorch's `index_add_` goes number by number where what it adds to is a part of longer rows.

    Args:
        into_ND, x_SD: both float32, or both bfloat16; the numbers of a row side by side.
    """
    given = flat(into_ND), into_ND.stride(0), index_S, on_host(x_SD)
    if x_SD.numel() <= _SUMS_ALONE:
        _add_in_turn(*given)
        return
    with TURN:
        _add_side_by_side(*given)


def on_host(x: Tensor) -> np.ndarray:
    """A tensor as kernels take it: of bfloat16, the bits."""
    is_small = x.dtype == torch.bfloat16
    array: np.ndarray = (x.view(torch.uint16) if is_small else x).numpy()
    return array


def flat(x_ND: Tensor) -> np.ndarray:
    """The memory from a tensor's first number to its last, of rows that may lie apart: [E]."""
    first_1D = x_ND[:1]
    assert first_1D.is_contiguous(), "a row whose numbers do not lie side by side"
    count = (len(x_ND) - 1) * x_ND.stride(0) + first_1D.numel()
    return on_host(x_ND.as_strided((count,), (1,)))


@intrinsic
def _wide(typing: Any, stored: Any) -> Any:
    """A stored number as float32: of type uint16 it is a bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0] == types.float32:
            return args[0]
        bits = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.Constant(bits.type, 16)), ir.FloatType())

    return types.float32(stored), generate


@intrinsic
def _as_float(typing: Any, bits: Any) -> Any:
    """The float32 of these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _as_bits(typing: Any, number: Any) -> Any:
    """The 32 bits of this float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def _as_stored(typing: Any, number: Any, like: Any) -> Any:
    """A float32 as an array stores it: in one of type uint16 as the nearest bfloat16."""
    stored = like.dtype

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if stored == types.float32:
            return args[0]
        word = ir.IntType(32)
        bits = builder.bitcast(args[0], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.add(builder.add(bits, word(0x7FFF)), odd)
        return builder.trunc(builder.lshr(rounded, word(16)), ir.IntType(16))

    return stored(types.float32, like), generate


@compiled(**_STRICT)
def _normalise_row(x_D, scale_D, epsilon, out_D):  # type: ignore[no-untyped-def]
    width = len(x_D)
    sums = np.zeros(_SUMS, dtype=np.float32)
    even = width // _SUMS * _SUMS
    for d in range(0, even, _SUMS):
        for j in range(_SUMS):
            sums[j] += x_D[d + j] * x_D[d + j]
    total = np.float32(0)
    for j in range(_SUMS):
        total += sums[j]
    for d in range(even, width):
        total += x_D[d] * x_D[d]
    inverse = np.float32(1) / np.sqrt(total / np.float32(width) + epsilon)
    for d in range(width):
        out_D[d] = _as_stored(x_D[d] * inverse * scale_D[d], out_D)


@compiled(**_STRICT)
def _exponential(x):  # type: ignore[no-untyped-def]
    """exp(x), by Cephes' polynomial, to a bit or two; what is beyond float32 stays just in it."""
    x = x if x > np.float32(-87) else np.float32(-87)
    x = x if x < np.float32(88) else np.float32(88)
    shifted = x * np.float32(1.4426950408889634) + _SHIFT  # whole numbers are in its last bits
    n = shifted - _SHIFT
    r = x - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r + np.float32(1)
    return p * _as_float(np.int32((_as_bits(shifted) + np.int32(127)) << np.int32(23)))


@compiled(**_STRICT)
def _gate_row(form, side_by_side_2I, out_I):  # type: ignore[no-untyped-def]
    neurons = len(out_I)
    if form == SILU:
        for i in range(neurons):
            g = _wide(side_by_side_2I[i])
            active = g / (np.float32(1) + _exponential(-g))
            out_I[i] = _as_stored(active * _wide(side_by_side_2I[neurons + i]), out_I)
    else:
        for i in range(neurons):
            g = _wide(side_by_side_2I[i])
            # 2 sqrt(2 / pi) (g + 0.044715 g^3): half of it is what the tanh is of
            z = np.float32(1.5957691216057308) * (g + np.float32(0.044715) * g * g * g)
            active = g / (np.float32(1) + _exponential(-z))
            out_I[i] = _as_stored(active * _wide(side_by_side_2I[neurons + i]), out_I)


@compiled(**_STRICT)
def _turn_row(x_MH, heads, cos_R, sin_R):  # type: ignore[no-untyped-def]
    half = len(cos_R) // 2
    for head in range(heads):
        for r in range(half):
            first, second = _wide(x_MH[head, r]), _wide(x_MH[head, half + r])
            x_MH[head, r] = _as_stored(first * cos_R[r] - second * sin_R[r], x_MH)
            turned = second * cos_R[half + r] + first * sin_R[half + r]
            x_MH[head, half + r] = _as_stored(turned, x_MH)


@compiled(**_STRICT)
def _normalise_in_turn(x_ND, scale_D, epsilon, out_ND):  # type: ignore[no-untyped-def]
    for row in range(len(x_ND)):
        _normalise_row(x_ND[row], scale_D, epsilon, out_ND[row])


@compiled(parallel=True, **_STRICT)
def _normalise_side_by_side(x_ND, scale_D, epsilon, out_ND):  # type: ignore[no-untyped-def]
    for row in prange(len(x_ND)):
        _normalise_row(x_ND[row], scale_D, epsilon, out_ND[row])


@compiled(**_STRICT)
def _gate_in_turn(form, side_by_side_N2I, out_NI):  # type: ignore[no-untyped-def]
    for row in range(len(out_NI)):
        _gate_row(form, side_by_side_N2I[row], out_NI[row])


@compiled(parallel=True, **_STRICT)
def _gate_side_by_side(form, side_by_side_N2I, out_NI):  # type: ignore[no-untyped-def]
    for row in prange(len(out_NI)):
        _gate_row(form, side_by_side_N2I[row], out_NI[row])


@compiled(**_STRICT)
def _turn_in_turn(x_NMH, heads, cos_NR, sin_NR):  # type: ignore[no-untyped-def]
    for row in range(len(x_NMH)):
        _turn_row(x_NMH[row], heads, cos_NR[row], sin_NR[row])


@compiled(parallel=True, **_STRICT)
def _turn_side_by_side(x_NMH, heads, cos_NR, sin_NR):  # type: ignore[no-untyped-def]
    for row in prange(len(x_NMH)):
        _turn_row(x_NMH[row], heads, cos_NR[row], sin_NR[row])


@compiled(**_STRICT)
def _add_row(into_D, x_D):  # type: ignore[no-untyped-def]
    for d in range(len(x_D)):
        into_D[d] = _as_stored(_wide(into_D[d]) + _wide(x_D[d]), into_D)


@compiled(**_STRICT)
def _add_in_turn(into_E, stride, index_S, x_SD):  # type: ignore[no-untyped-def]
    for place in range(len(index_S)):
        first = index_S[place] * stride
        _add_row(into_E[first : first + x_SD.shape[1]], x_SD[place])


@compiled(parallel=True, **_STRICT)
def _add_side_by_side(into_E, stride, index_S, x_SD):  # type: ignore[no-untyped-def]
    for place in prange(len(index_S)):
        first = index_S[place] * stride
        _add_row(into_E[first : first + x_SD.shape[1]], x_SD[place])
