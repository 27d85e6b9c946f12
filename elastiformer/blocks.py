"""Products of a few rows with a weight in blocks, in tile registers (AMX), by one thread.

As amx.py, but the weight is bfloat16 and lies as the registers read it: nothing is to be laid out
while others wait. Callers have their tile registers set up by `shape`.

Shape letters: R rows, whole tiles   I inputs   O outputs   E some weights beside each other
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor
from torch.nn import functional as F

from elastiformer import amx
from elastiformer.amx import _call, _register
from elastiformer.kernels import compiled
from elastiformer.tile_blocks import bytes_at, data, times
from elastiformer.vectors import I64, aligned, loop

GROUP, OUTPUTS = 32, 32  # inputs and outputs of a block: two tile registers of it
BLOCK = GROUP * OUTPUTS
MOST_ROWS = 2 * amx.ROWS  # that are multiplied at a time
_LINE = 64  # bytes of a tile's row


class Blocks(NamedTuple):
    """A weight, or one for each head, as tile registers read it."""

    weight_: np.ndarray  # the bits of bfloat16: blocks of outputs, of groups, then two tiles each
    bias_O: np.ndarray  # empty where there is none
    groups: int
    blocks: int  # of outputs, of one head


def blocks_of(weight_EOI: Tensor, bias_O: Tensor | None = None) -> Blocks:
    """Lay a bfloat16 weight out: [O, I], or [E, O, I] with a bias of all of them."""
    *_, outputs, inputs = weight_EOI.shape
    padding = (0, -inputs % GROUP, 0, -outputs % OUTPUTS)
    padded_EOI = F.pad(weight_EOI.detach(), padding)
    groups, blocks = padded_EOI.shape[-1] // GROUP, padded_EOI.shape[-2] // OUTPUTS
    # Two tiles of outputs; in a tile's row, both inputs of a pair for each of sixteen outputs.
    cut = padded_EOI.reshape(-1, blocks, 2, OUTPUTS // 2, groups, GROUP // 2, 2)
    weight_ = cut.permute(0, 1, 4, 2, 5, 3, 6).contiguous().view(torch.uint16).flatten().numpy()
    biased = np.empty(0, dtype=np.float32) if bias_O is None else bias_O.detach().float().numpy()
    return Blocks(weight_, biased, groups, blocks)


def _multiplying(tiles: int) -> Any:
    """Multiplies so many tiles of rows with a block of a weight."""

    @intrinsic
    def multiply(
        typing: Any, small: Any, at: Any, apart: Any, high: Any, weight: Any, weight_at: Any,
        groups: Any, out: Any, out_at: Any, out_apart: Any,
    ) -> Any:  # fmt: skip
        """out[row, output] = the rows' bfloat16 values, from `at` on, `apart`, times the block.

        Args:
            high: the rows of a tile.
        """
        number = types.intp
        signature = types.void(
            small, number, number, number, weight, number, number, out, number, number
        )

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if not amx.KNOWN:  # never called
                return context.get_dummy_value()
            values, weights, into = (
                data(context, builder, signature, args, place) for place in (0, 4, 7)
            )
            at, apart, high, weight_at, groups, out_at, out_apart = (
                args[place] for place in (1, 2, 3, 5, 6, 8, 9)
            )
            line, values_apart, into_apart = (
                ir.Constant(I64, _LINE), times(builder, apart, 2), times(builder, out_apart, 4)
            )  # fmt: skip
            sums = [[_register(2 * tile + half) for half in range(2)] for tile in range(tiles)]
            of_values = [_register(4 + tile) for tile in range(tiles)]
            of_weights = [_register(6 + half) for half in range(2)]
            for register in (each for both in sums for each in both):
                _call(builder, "tilezero", register)

            def add(group: Any, _: list[Any]) -> list[Any]:
                for half, register in enumerate(of_weights):
                    place = builder.add(weight_at, times(builder, group, BLOCK))
                    place = builder.add(place, ir.Constant(I64, half * BLOCK // 2))
                    _call(builder, "tileloadd64", register, bytes_at(builder, weights, place), line)
                for tile, register in enumerate(of_values):
                    place = builder.add(at, times(builder, group, GROUP))
                    place = builder.add(place, times(builder, builder.mul(high, apart), tile))
                    source = bytes_at(builder, values, place)
                    _call(builder, "tileloadd64", register, source, values_apart)
                    for half in range(2):
                        _call(builder, "tdpbf16ps", sums[tile][half], register, of_weights[half])
                return []

            loop(builder, ir.Constant(I64, 0), groups, [], add)
            for tile in range(tiles):
                for half in range(2):
                    place = builder.add(out_at, times(builder, builder.mul(high, out_apart), tile))
                    place = builder.add(place, ir.Constant(I64, half * OUTPUTS // 2))
                    to = bytes_at(builder, into, place)
                    _call(builder, "tilestored64", sums[tile][half], to, into_apart)
            return context.get_dummy_value()

        return signature, generate

    return multiply


_multiply_one, _multiply_two = _multiplying(1), _multiplying(2)


@compiled()
def shape(high):  # type: ignore[no-untyped-def]
    """How the tile registers are cut: of sums and of values `high` lines, of weights 16."""
    config = np.zeros(64, dtype=np.uint8)
    config[0] = 1  # the palette
    for register in range(8):
        config[16 + 2 * register] = _LINE
        config[48 + register] = high if register < 6 else GROUP // 2
    return config


@compiled()
def product(small_RI, at, high, weight, head, out_RO, out_at):  # type: ignore[no-untyped-def]
    """out[:, out_at:] = what rows hold from `at` on, times a head's weight.

    Whole blocks of both: behind the inputs the weight is zero, and what is put behind the outputs
    is to be put over.
    """
    rows, apart = small_RI.shape
    out_apart = out_RO.shape[1]
    small_, out_ = small_RI.reshape(-1), out_RO.reshape(-1)
    for block in range(weight.blocks):
        weight_at = (head * weight.blocks + block) * weight.groups * BLOCK
        to = out_at + block * OUTPUTS
        if rows > high:
            _multiply_two(
                small_, at, apart, high, weight.weight_, weight_at, weight.groups, out_, to,
                out_apart,
            )  # fmt: skip
        else:
            _multiply_one(
                small_, at, apart, high, weight.weight_, weight_at, weight.groups, out_, to,
                out_apart,
            )  # fmt: skip


@compiled()
def _apart(width):  # type: ignore[no-untyped-def]
    # Whole blocks, one more, as blocks of the last head may reach over: and so no power of two.
    return (width + GROUP - 1) // GROUP * GROUP + GROUP


@compiled()
def room(rows, width):  # type: ignore[no-untyped-def]
    """For the outputs of a product."""
    apart = _apart(width)
    return aligned(rows * apart).reshape((rows, apart))


@compiled()
def small_room(rows, width):  # type: ignore[no-untyped-def]
    """For what a product reads; zero, as what is behind the inputs and the rows must be finite."""
    apart = _apart(width)
    room_ = aligned(rows * apart // 2)
    room_[:] = 0
    return room_.view(np.uint16).reshape((rows, apart))
