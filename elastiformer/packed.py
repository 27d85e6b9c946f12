"""One step's rows: the tokens of any mix of requests, side by side, each with its own plan.

Rows that a layer treats alike form a group, and a group is computed in one go. Which rows those
are is worked out on the host, from the plans alone, wherever no router has a say.

Shape letters: N packed tokens   R rows of a group   L layers   S sites   G key/value heads
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from itertools import chain, pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from elastiformer import row_kernels, spare_rows
from elastiformer.allowances import Allowances
from elastiformer.capacity import Phase
from elastiformer.device_allowances import DeviceAllowances
from elastiformer.pointwise import Rotation
from elastiformer.sequence import Chunk, Kind, Numbering
from elastiformer.sequence import Sequence as Owner

S = TypeVar("S", bound=Hashable)
_FEW = 32  # rows that PyTorch adds in the time that it takes to start a kernel of ours


class Rows:
    """Some rows of a batch, ascending."""

    def __init__(self, rows_R: np.ndarray, of: int, device: torch.device) -> None:
        self.rows_R, self.count, self.all = rows_R, len(rows_R), len(rows_R) == of
        self._of, self._device = of, device
        self._rotations: dict[Rotation, Rotation] = {}
        self._met: dict[Rows, Rows] = {}

    @cached_property
    def index_R(self) -> Tensor:
        return torch.from_numpy(self.rows_R).to(self._device)

    @cached_property
    def _slice(self) -> slice | None:
        """The rows as a slice, where they stand side by side: then nothing is copied."""
        first = int(self.rows_R[0]) if self.count else 0
        if self.count and self.rows_R[-1] - first + 1 != self.count:
            return None
        return slice(first, first + self.count)

    @cached_property
    def _is_here_N(self) -> np.ndarray:
        is_here_N = np.zeros(self._of, dtype=bool)
        is_here_N[self.rows_R] = True
        return is_here_N

    def of(self, x_N: Tensor) -> Tensor:
        if self.all:
            return x_N
        if self._slice is not None:
            return x_N[self._slice]
        out_R = spare_rows.empty((self.count, *x_N.shape[1:]), x_N.dtype, x_N.device)
        # Several times faster than indexing.
        return torch.index_select(x_N, 0, self.index_R, out=out_R)

    def put(self, into_N: Tensor, x_R: Tensor) -> None:
        into_N[self._slice if self._slice is not None else self.index_R] = x_R

    def add(self, into_N: Tensor, x_R: Tensor) -> None:
        """Add in place."""
        if self.all:
            into_N += x_R
        elif self._slice is not None:
            into_N[self._slice] += x_R
        elif self.count > _FEW and into_N.is_cpu and into_N.dtype in row_kernels.SUMMED:
            row_kernels.add(into_N, self.rows_R, x_R.to(into_N.dtype).contiguous())
        else:
            into_N.index_add_(0, self.index_R, x_R.to(into_N.dtype))

    def without(self, rows: Rows) -> Rows:
        """Those of these rows that are not among `rows`."""
        return self._some(self.rows_R[~rows._is_here_N[self.rows_R]])

    def turn(self, rotation: Rotation) -> Rotation:
        """The rotation of these rows; made once, as every layer asks."""
        if self.all:
            return rotation
        if rotation not in self._rotations:
            at = self._slice if self._slice is not None else self.index_R
            self._rotations[rotation] = rotation.of(at)
        return self._rotations[rotation]

    def among(self, rows: Rows) -> Rows:
        """Where these rows stand among `rows`, all of which they are part of."""
        if rows.all:
            return self
        return Rows(np.searchsorted(rows.rows_R, self.rows_R), rows.count, self._device)

    def within(self, rows: Rows) -> Rows:
        """Those of these rows that are among `rows`, too."""
        if rows.all or self is rows or not self.count:
            return self
        if self.all:
            return rows
        if rows not in self._met:  # every layer asks again
            self._met[rows] = self._some(self.rows_R[rows._is_here_N[self.rows_R]])
        return self._met[rows]

    def _some(self, rows_R: np.ndarray) -> Rows:
        return self if len(rows_R) == self.count else Rows(rows_R, self._of, self._device)


class Packed:
    """The rows of one step."""

    def __init__(self, chunks: Sequence[Chunk], device: torch.device) -> None:
        self.chunks, self.device = chunks, device
        sizes = [len(chunk.ids) for chunk in chunks]
        self.starts = np.cumsum([0, *sizes])
        bounds: list[int] = self.starts.tolist()
        self.count = bounds[-1]
        self.spans = [slice(begin, end) for begin, end in pairwise(bounds)]
        numbering, self.kind_N = Numbering(), np.empty(self.count, dtype=np.int64)
        for chunk, first, size in zip(chunks, bounds, sizes, strict=False):
            if size == 1:
                self.kind_N[first] = chunk.sequence.number(numbering)
            else:
                self.kind_N[first : first + size] = chunk.sequence.numbers(size, numbering)
        self.distinct_kinds = tuple(numbering.kinds)
        # Where each row stands; after what ran before, from its chunk's first row on.
        before_C = np.array([chunk.sequence.length for chunk in chunks]) - self.starts[:-1]
        self.position_on_host_N = np.arange(self.count) + np.repeat(before_C, sizes)
        self._number = {kind: at for at, kind in enumerate(self.distinct_kinds)}
        self._rows: dict[frozenset[Kind], Rows] = {}
        self._bounds: dict[Rows, np.ndarray] = {}
        # Filled in by who knows:
        self.repaired: dict[int, list[tuple[str, Rows]]] = {}  # by layer
        # Where rows take channels by thresholds:
        self.allowances: Allowances | DeviceAllowances | None = None
        # By way of NumPy, which reads lists several times faster than PyTorch.
        ids_N = np.fromiter(chain.from_iterable(chunk.ids for chunk in chunks), np.int64)
        self.ids_N, self.position_N = (
            torch.from_numpy(each_N).to(device) for each_N in (ids_N, self.position_on_host_N)
        )

    @cached_property
    def positions(self) -> list[int]:
        """Of each row, among its sequence's tokens that run."""
        positions: list[int] = self.position_on_host_N.tolist()
        return positions

    @cached_property
    def kinds(self) -> list[Kind]:
        """Of each row."""
        return [self.distinct_kinds[number] for number in self.kind_N.tolist()]

    @cached_property
    def sequences(self) -> list[Owner]:
        """Of each row."""
        return [chunk.sequence for chunk in self.chunks for _ in chunk.ids]

    @cached_property
    def originals(self) -> list[int]:
        """Where the rows stand in what callers sent, image tokens that were dropped included."""
        if not any(chunk.sequence.moved for chunk in self.chunks):
            return self.positions
        pairs = zip(self.sequences, self.positions, strict=True)
        return [sequence.original(place) for sequence, place in pairs]

    @cached_property
    def original_N(self) -> Tensor:
        if self.originals is self.positions:
            return self.position_N
        return torch.tensor(self.originals, dtype=torch.long, device=self.device)

    def rows_of(self, kinds: frozenset[Kind]) -> Rows:
        if kinds not in self._rows:
            rows_R = np.arange(self.count)
            if len(kinds) < len(self.distinct_kinds):
                wanted_K = np.zeros(len(self.distinct_kinds), dtype=bool)
                wanted_K[[self._number[kind] for kind in kinds]] = True
                rows_R = rows_R[wanted_K[self.kind_N]]
            self._rows[kinds] = Rows(rows_R, self.count, self.device)
        return self._rows[kinds]

    def rows_where(self, holds: Callable[[Kind], bool]) -> Rows:
        return self.rows_of(frozenset(kind for kind in self.distinct_kinds if holds(kind)))

    def groups(self, signature: Callable[[Kind], S]) -> Iterator[tuple[S, Rows]]:
        """The rows, by what `signature` says of their kind."""
        alike: dict[S, list[Kind]] = {}
        for kind in self.distinct_kinds:
            alike.setdefault(signature(kind), []).append(kind)
        for value, kinds in alike.items():
            yield value, self.rows_of(frozenset(kinds))

    def rows(self, rows_R: np.ndarray) -> Rows:
        return Rows(rows_R, self.count, self.device)

    @cached_property
    def everything(self) -> Rows:
        return Rows(np.arange(self.count), self.count, self.device)

    @cached_property
    def outputs(self) -> Rows:
        """The rows whose logits are needed."""
        return self.rows_where(lambda kind: kind.phase is Phase.OUTPUT)

    @cached_property
    def output_counts(self) -> list[int]:
        """How many of them each chunk has."""
        counts: list[int] = np.diff(self.bounds(self.outputs)).tolist()
        return counts

    @cached_property
    def picking(self) -> Rows:
        """The rows that pick channels anywhere."""
        return self.rows_where(lambda kind: kind.plan.picks)

    @property
    def picks(self) -> bool:
        """Whether any row picks channels anywhere."""
        return self.picking.count > 0

    @cached_property
    def has_lone_rows(self) -> bool:
        """Whether any request runs one token alone, as decoding does."""
        return any(len(chunk.ids) == 1 for chunk in self.chunks)

    @cached_property
    def keeps_sub_layers(self) -> bool:
        """Whether all rows keep every sub-layer, by their plans."""
        return all(kind.plan.keeps_sub_layers for kind in self.distinct_kinds)

    @cached_property
    def leaves_heads_out(self) -> bool:
        return any(kind.plan.leaves_heads_out for kind in self.distinct_kinds)

    @cached_property
    def leaves_experts_out(self) -> bool:
        return any(kind.plan.leaves_experts_out for kind in self.distinct_kinds)

    def bounds(self, rows: Rows) -> np.ndarray:
        """Where each chunk's begin among some rows, and the last one's end: [C + 1]."""
        if rows not in self._bounds:
            self._bounds[rows] = np.searchsorted(rows.rows_R, self.starts)
        return self._bounds[rows]

    @cached_property
    def _reads_directly(self) -> bool:
        return any(kind.plan.direct for kind in self.distinct_kinds)

    def direct(self, layer: int) -> Rows:
        """The rows of items of which no keys are made in a layer (direct_reading.py)."""
        if not self._reads_directly:
            return self.nothing
        return self.rows_where(lambda kind: layer in kind.plan.direct)

    def keyed(self, layer: int) -> Rows:
        """All other rows."""
        return self.rows_where(lambda kind: layer not in kind.plan.direct)

    @cached_property
    def takes_N(self) -> np.ndarray:
        """The rows that may take channels by thresholds, where there are some (allowances.py)."""
        takes_K = np.array(
            [kind.phase is Phase.OUTPUT and kind.plan.only_picks for kind in self.distinct_kinds]
        )
        takes_N: np.ndarray = takes_K[self.kind_N] & (self.position_on_host_N > 0)
        return takes_N

    @cached_property
    def chunk_N(self) -> np.ndarray:
        """Of each row."""
        return np.repeat(np.arange(len(self.chunks)), np.diff(self.starts))

    @cached_property
    def nothing(self) -> Rows:
        return Rows(np.arange(0), self.count, self.device)

    @cached_property
    def channels_LTK(self) -> np.ndarray:
        """How many channels each kind keeps at each site (T)."""
        counts_KLT = np.array([kind.plan.channels for kind in self.distinct_kinds])
        return np.ascontiguousarray(counts_KLT.transpose(1, 2, 0))

    def channels(self, layer: int, site: int, rows: Rows) -> int | np.ndarray:
        """How many channels the rows keep at a site; one number where they agree."""
        if len(self.distinct_kinds) == 1:
            return self.distinct_kinds[0].plan.channels[layer][site]
        counts_K = [kind.plan.channels[layer][site] for kind in self.distinct_kinds]
        if counts_K.count(counts_K[0]) == len(counts_K):
            return counts_K[0]
        counts_R: np.ndarray = np.array(counts_K)[self.kind_N[rows.rows_R]]
        return counts_R
