"""A weight as the kernels of a CPU read it: in tiles, in the smallest form that loses nothing.

A step of few rows waits for memory, so fewer bytes are less time. A model kept in float32 mostly
came from a smaller form: its weights are bfloat16 or float16 numbers, or lie on a grid of at most
256 steps for every 32 inputs, as GGUF's Q4_1, Q4_0 and Q8_0 leave them. Where all of a weight does,
bit for bit, it is stored so and widened on the way to the processor; else as float32.

Shape letters: O outputs   I inputs   S slabs   C chunks of a slab   W outputs of a chunk
    G groups of inputs   R rows   P picks of all rows; in start_S: S rows + 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from elastiformer import amx, kernels, lanes, largest, pairs
from elastiformer.stored_tile import GROUP, WIDTH
from elastiformer.thresholds import SEARCHED
from elastiformer.vectors import LANES

# A slab holds long lines of memory for each input, or else a single row that leaves inputs out
# waits for memory as long as one that leaves none. All inputs take longer for it.
_MOST_CHUNKS = 16
_FORMS = {
    np.int8: "grid of 16",
    np.uint8: "grid of 256",
    np.uint16: "bfloat16",
    np.int16: "float16",
    np.float32: "float32",
}


class Picks(NamedTuple):
    """The inputs that each row of a product reads: its own, ascending, row after row."""

    index_P: np.ndarray
    value_P: np.ndarray
    start_S: np.ndarray


class Wanted(NamedTuple):
    """What decides which inputs the rows pick: those of the largest size x norm."""

    norms_I: np.ndarray
    start_S: np.ndarray  # where each row's picks begin, and the last ones end
    least_R: np.ndarray  # what just these reach, or SEARCHED


_NO_NORMS = np.empty(0, dtype=np.float32)  # of rows that pick all


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """One weight; of a grid of 16 two outputs share a byte, [S, I, C, W / 2].

    `steps` and `lows` [S, G, C, W] are of the grid, where there is one.
    """

    outputs: int
    weight_SICW: np.ndarray
    steps: np.ndarray
    lows: np.ndarray

    @classmethod
    def of(cls, weight_OI: Tensor) -> Tiles:
        """Lay out a float32 weight."""
        full_SIO, lines = _in_slabs(weight_OI)
        if (on_grid := cls._gridded(len(weight_OI), full_SIO, lines[0])) is not None:
            return on_grid
        nothing = (lanes.NOTHING, lanes.NOTHING)
        for dtype, stored in ((torch.bfloat16, torch.uint16), (torch.float16, torch.int16)):
            small_SIO = full_SIO.to(dtype)
            if torch.equal(small_SIO.float(), full_SIO):
                small = small_SIO.view(stored).view(*full_SIO.shape[:2], *lines)
                return cls(len(weight_OI), small.numpy(), *nothing)
        full = full_SIO.view(*full_SIO.shape[:2], *lines)
        return cls(len(weight_OI), full.numpy(), *nothing)

    @classmethod
    def on_grid(cls, weight_OI: Tensor) -> Tiles | None:
        """Lay out a float32 weight that lies on a grid; None where it lies on none."""
        full_SIO, (chunks, _) = _in_slabs(weight_OI)
        return cls._gridded(len(weight_OI), full_SIO, chunks)

    @classmethod
    def _gridded(cls, outputs: int, full_SIO: Tensor, chunks: int) -> Tiles | None:
        grid = _on_grid(full_SIO.numpy())
        if grid is None:
            return None
        return cls(outputs, *(a.reshape(*a.shape[:2], chunks, -1) for a in grid))

    @staticmethod
    def one_after_another(tiles: Sequence[Tiles]) -> tuple[list[np.ndarray], list[Tiles]]:
        """Tiles that are alike, in common memory: the arrays of all of them, and each one."""
        stacked = [
            arrays[0][None] if len(tiles) == 1 else _stack(arrays)
            for arrays in zip(*(own.arrays for own in tiles), strict=True)
        ]
        views = zip(*stacked, strict=True)
        return stacked, [Tiles(own.outputs, *view) for own, view in zip(tiles, views, strict=True)]

    @property
    def form(self) -> str:
        """What the weight is stored as."""
        return _FORMS[self.weight_SICW.dtype.type]

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.weight_SICW, self.steps, self.lows

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def takes_pairs(self) -> bool:
        """Whether rows in bfloat16 can be multiplied as in pairs.py, or amx.py."""
        if amx.KNOWN and not amx.ABLE:
            return False
        return pairs.takes(self.weight_SICW.shape[1], self.weight_SICW.dtype)

    def multiply_pairs(self, x_RI: np.ndarray, wanted: Wanted | None = None) -> np.ndarray:
        """The product with rows of float32, rounded to bfloat16 on the way: float32 [R, O].

        Args:
            wanted: which inputs the rows pick; None: all.
        """
        rows, inputs = x_RI.shape
        out_RO = np.empty((rows, self.outputs), dtype=np.float32)
        if wanted is None:
            wanted = Wanted(_NO_NORMS, even_starts(rows, inputs), all_searched(rows))
        amx.multiply(*self.arrays, x_RI, *wanted, out_RO)
        return out_RO

    def multiply(self, picks: Picks, summed: int = 1024) -> np.ndarray:
        """The product with the picked inputs of each row: float32 [R, O].

        Args:
            summed: how many inputs are added up in one go; whole groups.
        """
        out_RO = np.empty((len(picks.start_S) - 1, self.outputs), dtype=np.float32)
        lanes.multiply(self.weight_SICW, self.steps, self.lows, *picks, summed, out_RO)
        return out_RO


def search(x_RI: np.ndarray, wanted: Wanted) -> Picks:
    """Each row's channels of the largest size x norm; of equal ones the first."""
    norms_I, start_S, least_R = wanted
    count = int(start_S[-1])
    index_P, value_P = np.empty(count, dtype=np.int32), np.empty(count, dtype=np.float32)
    largest.search(x_RI, norms_I, index_P, value_P, start_S, least_R)
    return Picks(index_P, value_P, start_S)


def everything(x_RI: np.ndarray) -> Picks:
    """All inputs of each row."""
    rows, inputs = x_RI.shape
    index_P = _all_inputs(1 << (rows - 1).bit_length(), inputs)[: rows * inputs]
    return Picks(index_P, x_RI.reshape(-1), even_starts(rows, inputs))


@lru_cache(maxsize=512)
def even_starts(rows: int, count: int) -> np.ndarray:
    """Where each row's picks begin if all rows have as many; and where the last ones end."""
    return count * np.arange(rows + 1, dtype=np.int64)


@lru_cache(maxsize=512)
def all_searched(rows: int) -> np.ndarray:
    """No row's threshold is known."""
    return np.full(rows, SEARCHED, dtype=np.float32)


@lru_cache(maxsize=64)  # few: asked for powers of two alone
def _all_inputs(rows: int, inputs: int) -> np.ndarray:
    return np.tile(np.arange(inputs, dtype=np.int32), rows)


def _stack(arrays: Sequence[np.ndarray]) -> np.ndarray:
    # PyTorch's memory begins at the start of a cache line.
    return torch.stack([torch.from_numpy(array) for array in arrays]).numpy()


def _slabs(chunks: int) -> tuple[int, int]:
    """How many slabs, and how many chunks each: a share for every thread, little over the end."""
    threads = torch.get_num_threads()
    slabs = threads * -(-chunks // (threads * _MOST_CHUNKS))
    each = -(-chunks // slabs)
    return -(-chunks // each), each


def _in_slabs(weight_OI: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The weight [S, I, outputs of a slab], zeros behind it, and its chunks and their width."""
    outputs, inputs = weight_OI.shape
    slabs, chunks = _slabs(-(-outputs // WIDTH))
    padded_OI = F.pad(weight_OI, (0, 0, 0, slabs * chunks * WIDTH - outputs))
    full_SIO = padded_OI.view(slabs, -1, inputs).transpose(1, 2).contiguous()
    return full_SIO, (chunks, WIDTH)


def _on_grid(full_SIO: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Codes, steps and lows with code x step + low equal to the weight everywhere; else None."""
    slabs, inputs, outputs = full_SIO.shape
    # A few inputs show for most weights that there is no grid.
    if inputs > GROUP and _on_grid(full_SIO[:1, :GROUP].copy()) is None:
        return None
    shape = (slabs, -(-inputs // GROUP), outputs)
    # PyTorch's memory begins at the start of a cache line.
    codes = torch.empty(full_SIO.shape, dtype=torch.uint8).numpy()
    steps, lows = torch.empty(shape).numpy(), torch.empty(shape).numpy()
    if not kernels.fit_grid(full_SIO, GROUP, codes, steps, lows):
        return None
    return _halved(codes), _as_float16(steps), _as_float16(lows)


def _halved(codes_SIO: np.ndarray) -> np.ndarray:
    """Codes below 16 as int8, two a byte: those of two vectors of outputs side by side."""
    if codes_SIO.max() > 15:
        return codes_SIO
    pairs = codes_SIO.reshape(*codes_SIO.shape[:2], -1, 2, LANES)
    both: np.ndarray = pairs[..., 0, :] | pairs[..., 1, :] << 4
    return torch.from_numpy(both).clone().numpy().view(np.int8)


def _as_float16(scales: np.ndarray) -> np.ndarray:
    """Scales as float16 where that loses nothing, under the name int16."""
    small = torch.from_numpy(scales).half()
    return (
        small.view(torch.int16).numpy()
        if torch.equal(small.float(), torch.from_numpy(scales))
        else scales
    )
