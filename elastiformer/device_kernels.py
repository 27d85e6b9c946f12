"""Kernels of a decode step on a GPU, in Triton: norms, takes, gates, and the product of a lone row.

Each stands for several operators of PyTorch, whose launches and whose way through memory would take
longer than their arithmetic. Between kernels values are in the base's type, as there; within one,
and in sums that several programs share, they are float32.

The product of a lone row reads only what the row kept of a weight: for it the weight lies input by
input, and no input of which the row holds nothing is read.

Attention has files of its own (device_attention.py, device_prompt_attention.py).

Shape letters: N rows   D width   I inputs   O outputs   S parts of a sum   L layers   T sites
    J rows that take   B a block
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastiformer.thresholds import HASTE, PATIENCE

PROGRAMS = 264  # that keep a large GPU busy
MOST_PARTS = 16
SILU, GELU = 0, 1


def check(device: torch.device) -> None:
    """Compile and run a kernel."""
    both_112 = torch.zeros(1, 1, 2, device=device)
    gate(SILU, both_112, At(both_112, None), torch.float32)


class Tile(NamedTuple):
    """How the product of a lone row is cut up."""

    inputs: int  # that a program multiplies in one go
    outputs: int
    programs: int  # in all, about
    warps: int


TILES = (
    Tile(32, 128, 1056, 4),
    Tile(64, 64, 1056, 4),
    Tile(32, 256, 528, 4),
    Tile(16, 512, 528, 4),
)
_SPAN = 1024  # channels of a row that a program gives, where rows need not be read whole


class Takes(NamedTuple):
    """What the rows of a step may take, at all layers and sites: int64 [L, T, N] but the ladder.

    Args:
        takes_N: which rows take by thresholds, where granted less than all.
        debts_LTN: channels taken beyond what was granted, before this step.
        owed_LTN: the same after it: to be given the debts, and then brought up to date by several
            programs, none of which may see what others took.
        ladder_LTG: float32.
    """

    takes_N: Tensor
    granted_LTN: Tensor
    debts_LTN: Tensor
    owed_LTN: Tensor
    ladder_LTG: Tensor

    def at(self, layer: int, site: int) -> tuple[Any, ...]:
        """As the kernels take them, of one layer and site."""
        _, sites, rows = self.granted_LTN.shape
        rungs = self.ladder_LTG.shape[2]
        place = layer * sites + site
        return (
            self.takes_N,
            self.granted_LTN,
            self.debts_LTN,
            self.owed_LTN,
            self.ladder_LTG,
            place * rows,
            place * rungs,
            rungs - 1,
        )


class At(NamedTuple):
    """What rows take of the channels of one site."""

    norms_I: Tensor  # by which channels are picked
    takes: tuple[Any, ...] | None  # `Takes.at`; None: every row takes all

    def arguments(self, some: Tensor) -> dict[str, Any]:
        """As the kernels take them; `some` tensor where there is nothing."""
        names = ("takes", "granted", "debts", "owed", "ladder", "place", "ladder_place", "rungs")
        nothing = (some, some, some, some, some, 0, 0, 0)
        return {
            "norms": self.norms_I,
            **dict(zip(names, self.takes or nothing, strict=True)),
            "PICKS": self.takes is not None,
            "PATIENCE": PATIENCE,
            "HASTE": HASTE,
        }


def normalise(
    h_ND: Tensor,
    branch_SND: Tensor | None,
    scale_D: Tensor,
    epsilon: float,
    at: At,
    dtype: torch.dtype,
) -> Tensor:
    """The norm of the residual, zero but for what each row takes; first the branch joins it.

    Args:
        branch_SND: in parts whose sum it is.
    """
    rows, width = h_ND.shape
    out_ND = torch.empty(rows, width, dtype=dtype, device=h_ND.device)
    block = triton.next_power_of_2(width)
    _normalise[(rows,)](
        h_ND, h_ND if branch_SND is None else branch_SND, scale_D, out_ND, width, epsilon, rows,
        PARTS=0 if branch_SND is None else len(branch_SND), BLOCK=block, num_warps=warps(block),
        **at.arguments(h_ND),
    )  # fmt: skip
    return out_ND


def gate(form: int, both_SNO: Tensor, at: At, dtype: torch.dtype) -> Tensor:
    """activation(first half) * second half, zero but for what each row takes.

    Args:
        form: SILU, or GELU in its approximation by tanh.
        both_SNO: in parts whose sum it is.
    """
    parts, rows, both = both_SNO.shape
    out_NI = torch.empty(rows, both // 2, dtype=dtype, device=both_SNO.device)
    block = span(both // 2)
    _gate[(rows, triton.cdiv(both // 2, block))](
        both_SNO, out_NI, both // 2, rows, FORM=form, PARTS=parts, BLOCK=block,
        num_warps=warps(block), **at.arguments(both_SNO),
    )  # fmt: skip
    return out_NI


def take(x_NI: Tensor, rows_J: Tensor, at: At) -> None:
    """Leave of some rows what they take, zero elsewhere, in place.

    Args:
        rows_J: int64; what each takes stands in the same order. Below 0: it is not there.
    """
    inputs = x_NI.shape[1]
    block = span(inputs)
    _take[(len(rows_J), triton.cdiv(inputs, block))](
        x_NI, rows_J, inputs, BLOCK=block, num_warps=warps(block), **at.arguments(x_NI)
    )  # fmt: skip


def take_in_order(x_NI: Tensor, rows_J: Tensor, bounds_Q: Tensor, at: At, place: int) -> None:
    """The same of rows several of which may be one request's: each owes what those before it took.

    Args:
        bounds_Q: int64, where each request's begin among the rows, and the last one's end.
        place: where what requests owe at this site begins; what they are granted goes by rows.
    """
    told = at.arguments(x_NI)
    inputs, rows, rungs = x_NI.shape[1], len(rows_J), told["rungs"] + 1
    counts_JG = torch.zeros(rows, rungs, dtype=torch.int64, device=x_NI.device)
    least_J = torch.empty(rows, dtype=torch.float32, device=x_NI.device)
    block = span(inputs)
    grid = (rows, triton.cdiv(inputs, block))
    _count[grid](
        x_NI, rows_J, told["norms"], told["ladder"], told["ladder_place"], counts_JG, inputs, rungs,
        BLOCK=block, num_warps=warps(block),
    )  # fmt: skip
    _go_on[(len(bounds_Q) - 1,)](
        bounds_Q, told["granted"], told["place"], told["debts"], told["owed"], place,
        told["ladder"], told["ladder_place"], counts_JG, least_J, inputs, rungs - 1,
        PATIENCE=PATIENCE, HASTE=HASTE, num_warps=1,
    )  # fmt: skip
    _keep[grid](x_NI, rows_J, told["norms"], least_J, inputs, BLOCK=block, num_warps=warps(block))


def multiply_one(x_1I: Tensor, weight_IO: Tensor, bias_O: Tensor | None, tile: Tile) -> Tensor:
    """The product of a lone row, which reads no more of the weight than the row kept.

    Returns:
        Float32 in parts whose sum it is: [S, 1, O].
    """
    inputs, outputs = weight_IO.shape
    tiles = triton.cdiv(outputs, tile.outputs)
    parts = max(1, min(tile.programs // tiles, MOST_PARTS, triton.cdiv(inputs, tile.inputs)))
    each = triton.cdiv(triton.cdiv(inputs, parts), tile.inputs) * tile.inputs
    parts = triton.cdiv(inputs, each)
    out_S1O = torch.empty(parts, 1, outputs, dtype=torch.float32, device=weight_IO.device)
    _multiply_one[(tiles, parts)](
        x_1I, weight_IO, weight_IO if bias_O is None else bias_O, out_S1O, inputs, outputs, each,
        HAS_BIAS=bias_O is not None, INPUTS=tile.inputs, OUTPUTS=tile.outputs,
        num_warps=tile.warps,
    )  # fmt: skip
    return out_S1O


def span(channels: int) -> int:
    return min(1 << (channels - 1).bit_length(), _SPAN)


def warps(block: int) -> int:
    return max(1, min(block // 512, 16))


@triton.jit
def sum_of(parts, row, at, inside, rows, width, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row of a sum that lies in parts."""
    total = tl.load(parts + row * width + at, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        some = tl.load(parts + (part * rows + row) * width + at, mask=inside, other=0.0)
        total += some.to(tl.float32)
    return total


@triton.jit
def _rung(  # type: ignore[no-untyped-def]
    grant, debt, inputs, rungs, PATIENCE: tl.constexpr, HASTE: tl.constexpr
):
    """Whose threshold a row takes by, that is granted so much and owes so much (thresholds.py)."""
    beyond = debt - tl.minimum(tl.maximum(debt, -grant), grant)
    wanted = PATIENCE * grant - debt - (HASTE - 1) * beyond
    rung = (2 * rungs * wanted + PATIENCE * inputs) // (2 * PATIENCE * inputs)
    return tl.minimum(tl.maximum(rung, 1), rungs)  # rounded towards 0 below 0: 1 either way


@triton.jit
def _taken(  # type: ignore[no-untyped-def]
    x_B, at_B, inside_B, norms, takes, granted, debts, owed, ladder, place, ladder_place, rungs,
    row, inputs, PATIENCE: tl.constexpr, HASTE: tl.constexpr,
):  # fmt: skip
    """`x`, zero but for what the row takes; what it owes then is brought up to date.

    The first program of a row takes down the grant, each what it took.
    """
    grant = tl.minimum(tl.load(granted + place + row), inputs)
    debt = tl.load(debts + place + row)
    rung = _rung(grant, debt, inputs, rungs, PATIENCE, HASTE)
    is_taking = (tl.load(takes + row) != 0) & (grant < inputs)
    least = tl.where(is_taking, tl.load(ladder + ladder_place + rung), float("-inf"))
    size_B = tl.abs(x_B) * tl.load(norms + at_B, mask=inside_B, other=0.0)
    kept_B = inside_B & ((size_B >= least) | (size_B != size_B))  # what is no number is taken
    more = tl.sum(kept_B.to(tl.int32), 0).to(tl.int64) - tl.where(tl.program_id(1) == 0, grant, 0)
    tl.atomic_add(owed + place + row, tl.where(is_taking, more, 0))
    return tl.where(kept_B, x_B, 0.0)


@triton.jit
def give(  # type: ignore[no-untyped-def]
    x_B, at_B, inside_B, out, norms, takes, granted, debts, owed, ladder, place, ladder_place,
    rungs, row, inputs, PICKS: tl.constexpr, PATIENCE: tl.constexpr, HASTE: tl.constexpr,
):  # fmt: skip
    """Store a row, in the type of `out`, as far as the row takes it."""
    x_B = x_B.to(out.dtype.element_ty).to(tl.float32)
    if PICKS:
        x_B = _taken(
            x_B, at_B, inside_B, norms, takes, granted, debts, owed, ladder, place, ladder_place,
            rungs, row, inputs, PATIENCE, HASTE,
        )  # fmt: skip
    tl.store(out + row * inputs + at_B, x_B.to(out.dtype.element_ty), mask=inside_B)


@triton.jit(do_not_specialize=["place", "ladder_place"])
def _normalise(  # type: ignore[no-untyped-def]
    h, branch, scale, out, width, epsilon, rows, norms, takes, granted, debts, owed, ladder, place,
    ladder_place, rungs, PARTS: tl.constexpr, PICKS: tl.constexpr, PATIENCE: tl.constexpr,
    HASTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at_B = tl.arange(0, BLOCK)
    inside_B = at_B < width
    x_B = tl.load(h + row * width + at_B, mask=inside_B, other=0.0).to(tl.float32)
    if PARTS:
        x_B += sum_of(branch, row, at_B, inside_B, rows, width, PARTS)
        tl.store(h + row * width + at_B, x_B.to(h.dtype.element_ty), mask=inside_B)
    root = tl.rsqrt(tl.sum(x_B * x_B, 0) / width + epsilon)
    x_B = x_B * root * tl.load(scale + at_B, mask=inside_B, other=0.0).to(tl.float32)
    give(
        x_B, at_B, inside_B, out, norms, takes, granted, debts, owed, ladder, place, ladder_place,
        rungs, row, width, PICKS, PATIENCE, HASTE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["place", "ladder_place"])
def _gate(  # type: ignore[no-untyped-def]
    both, out, inputs, rows, norms, takes, granted, debts, owed, ladder, place, ladder_place,
    rungs, FORM: tl.constexpr, PARTS: tl.constexpr, PICKS: tl.constexpr, PATIENCE: tl.constexpr,
    HASTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_B = at_B < inputs
    first_B = sum_of(both, row, at_B, inside_B, rows, 2 * inputs, PARTS)
    second_B = sum_of(both, row, at_B + inputs, inside_B, rows, 2 * inputs, PARTS)
    if FORM == 0:
        first_B = first_B * tl.sigmoid(first_B)
    else:
        inner_B = 0.7978845608028654 * (first_B + 0.044715 * first_B * first_B * first_B)
        first_B = first_B * tl.sigmoid(2 * inner_B)  # 0.5 * (1 + tanh(inner))
    x_B = first_B * second_B
    give(
        x_B, at_B, inside_B, out, norms, takes, granted, debts, owed, ladder, place, ladder_place,
        rungs, row, inputs, PICKS, PATIENCE, HASTE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["place", "ladder_place"])
def _take(  # type: ignore[no-untyped-def]
    x, rows, inputs, norms, takes, granted, debts, owed, ladder, place, ladder_place, rungs,
    PICKS: tl.constexpr, PATIENCE: tl.constexpr, HASTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    one = tl.program_id(0)
    row = tl.load(rows + one)
    if row < 0:
        return
    at_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_B = at_B < inputs
    into_B = x + row * inputs + at_B
    x_B = tl.load(into_B, mask=inside_B, other=0.0).to(tl.float32)
    x_B = _taken(
        x_B, at_B, inside_B, norms, takes, granted, debts, owed, ladder, place, ladder_place,
        rungs, one, inputs, PATIENCE, HASTE,
    )  # fmt: skip
    tl.store(into_B, x_B.to(x.dtype.element_ty), mask=inside_B)


@triton.jit(do_not_specialize=["ladder_place"])
def _count(  # type: ignore[no-untyped-def]
    x, rows, norms, ladder, ladder_place, counts, inputs, rungs, BLOCK: tl.constexpr
):
    """How many channels of a row reach each rung."""
    one = tl.program_id(0)
    row = tl.load(rows + one)
    if row < 0:
        return
    at_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_B = at_B < inputs
    x_B = tl.load(x + row * inputs + at_B, mask=inside_B, other=0.0).to(tl.float32)
    size_B = tl.abs(x_B) * tl.load(norms + at_B, mask=inside_B, other=0.0)
    for rung in range(rungs):
        least = tl.load(ladder + ladder_place + rung)
        reaches_B = inside_B & ((size_B >= least) | (size_B != size_B))
        reaching = tl.sum(reaches_B.to(tl.int32), 0).to(tl.int64)
        tl.atomic_add(counts + one * rungs + rung, reaching)


@triton.jit(do_not_specialize=["place", "own_place", "ladder_place"])
def _go_on(  # type: ignore[no-untyped-def]
    bounds, granted, place, debts, owed, own_place, ladder, ladder_place, counts, least, inputs,
    rungs, PATIENCE: tl.constexpr, HASTE: tl.constexpr,
):  # fmt: skip
    """What each row of a request has to reach, row after row."""
    owner = tl.program_id(0)
    debt = tl.load(debts + own_place + owner)
    for one in range(tl.load(bounds + owner), tl.load(bounds + owner + 1)):
        grant = tl.minimum(tl.load(granted + place + one), inputs)
        rung = _rung(grant, debt, inputs, rungs, PATIENCE, HASTE)
        is_taking = grant < inputs
        reached = tl.load(ladder + ladder_place + rung)
        tl.store(least + one, tl.where(is_taking, reached, float("-inf")))
        taken = tl.load(counts + one * (rungs + 1) + rung)
        debt += tl.where(is_taking, taken - grant, 0)
    tl.store(owed + own_place + owner, debt)


@triton.jit
def _keep(x, rows, norms, least, inputs, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Leave of a row what reaches its threshold."""
    one = tl.program_id(0)
    row = tl.load(rows + one)
    if row < 0:
        return
    at_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_B = at_B < inputs
    into_B = x + row * inputs + at_B
    x_B = tl.load(into_B, mask=inside_B, other=0.0).to(tl.float32)
    size_B = tl.abs(x_B) * tl.load(norms + at_B, mask=inside_B, other=0.0)
    kept_B = (size_B >= tl.load(least + one)) | (size_B != size_B)
    tl.store(into_B, tl.where(kept_B, x_B, 0.0).to(x.dtype.element_ty), mask=inside_B)


@triton.jit
def _multiply_one(  # type: ignore[no-untyped-def]
    x, weight, bias, out, inputs, outputs, each, HAS_BIAS: tl.constexpr, INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    at_O = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside_O = at_O < outputs
    stop = tl.minimum((part + 1) * each, inputs)
    sum_IO = tl.zeros((INPUTS, OUTPUTS), dtype=tl.float32)
    for first in range(part * each, stop, INPUTS):
        at_I = first + tl.arange(0, INPUTS)
        x_I = tl.load(x + at_I, mask=at_I < stop, other=0.0).to(tl.float32)
        weight_IO = tl.load(
            weight + at_I[:, None] * outputs + at_O[None, :],
            mask=(x_I != 0)[:, None] & inside_O[None, :],
            other=0.0,
        )
        sum_IO += x_I[:, None] * weight_IO.to(tl.float32)
    sum_O = tl.sum(sum_IO, 0)
    if HAS_BIAS:
        bias_O = tl.load(bias + at_O, mask=inside_O, other=0.0).to(tl.float32)
        sum_O += tl.where(part == 0, bias_O, 0.0)
    tl.store(out + part * outputs + at_O, sum_O, mask=inside_O)
