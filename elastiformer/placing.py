"""Where one step's keys and values go, and what its queries read: the step's view of the caches.

An encoder has none: its keys and values live for one layer of one step (`WholePlacing`).

Shape letters: N packed tokens   R rows   L layers   C chunks   G key/value heads   H head size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from elastiformer.attention import Masks, Read, Reads
from elastiformer.cache import Held
from elastiformer.packed import Packed, Rows
from elastiformer.row_kernels import on_host
from elastiformer.sides import Bounds, Sides
from elastiformer.single_queries import Singles
from elastiformer.sub_layers import Cached


class Lies(NamedTuple):
    """Where each chunk's keys lie in each layer: int64 [L, C]."""

    first_LC: np.ndarray  # among the rows of the pool
    room_LC: np.ndarray  # how far apart the heads are
    length_LC: np.ndarray  # how many tokens they hold


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of one chunk among some rows."""

    chunk: int
    queries: slice
    first: int  # position
    last: int
    ends_chunk: bool  # a single row, the chunk's last


class Placing:
    """The caches of one step's chunks."""

    def __init__(self, packed: Packed) -> None:
        self._packed = packed
        self._caches = [chunk.sequence.cache for chunk in packed.chunks]
        self._pool = self._caches[0].pool
        assert all(cache.pool is self._pool for cache in self._caches), "caches of two pools"
        self._parts: dict[Rows, list[_Part]] = {}
        self._masks: Masks = {}
        self._single_parts: dict[Rows, np.ndarray] = {}
        self._due = [(0, packed.everything)]  # by the layer from which on
        # With complete caches every layer takes every row: they grow by all of them at once.
        self._complete = self._caches[0].complete
        if self._complete:
            for cache, span in zip(self._caches, packed.spans, strict=True):
                cache.grow(span.stop - span.start)

    def made_ahead(self, rows: Rows, begin: int) -> None:
        """Note that these rows have placed theirs in all layers from one on but the last."""
        self._due.append((begin, self._due[-1][1].without(rows)))

    def due(self, layer: int) -> Rows:
        """Of complete caches, the rows whose keys and values this layer has to make."""
        if layer == len(self._first_LC) - 1:
            return self._packed.everything
        return next(rows for begin, rows in reversed(self._due) if begin <= layer)

    def place(self, layer: int, rows: Rows, keys_values_RMH: Tensor | None) -> None:
        """Write the keys and values [R, 2G, H] of these rows into their caches."""
        index_RG = rows.of(self._index_LNG[layer]) if self._complete else self._next(layer, rows)
        if keys_values_RMH is None:
            return
        into_NH = self._pool.rows
        if into_NH.device.type == "cpu" and into_NH.dtype == torch.float32:
            # NumPy's assignment starts sooner than PyTorch's.
            into_NH.numpy()[index_RG.numpy()] = keys_values_RMH.numpy()
        else:
            into_NH[index_RG] = keys_values_RMH.to(into_NH.dtype)

    def place_in_all_layers(self) -> Cached:
        """Where keys and values go and lie, of chunks of one row each that every layer takes.

        Caches that are not complete grow by them here: once a step.
        """
        index_LNG, lies = self.grow_in_all_layers(), self.lies
        value_LC = lies.first_LC + self._caches[0].shape.kv_heads * lies.room_LC
        chunk_C = np.arange(len(self._caches))
        rows_PH = on_host(self._pool.rows)
        return Cached(
            rows_PH, index_LNG, chunk_C, lies.first_LC, value_LC, lies.room_LC, lies.length_LC
        )

    def lone(self, rows: Rows) -> Cached:
        """Where keys and values of some rows go in all layers, and what each of them reads.

        Of complete caches: each reads the keys up to its own position.
        """
        chunk_R = self._packed.chunk_N[rows.rows_R]
        first_LR, room_LR = self._first_LC[:, chunk_R], self._room_LC[:, chunk_R]
        value_LR = first_LR + self._caches[0].shape.kv_heads * room_LR
        length_R = self._packed.position_on_host_N[rows.rows_R] + 1
        length_LR = np.tile(length_R, (len(first_LR), 1))
        return Cached(
            on_host(self._pool.rows), self.places(rows),  np.arange(rows.count),
            first_LR, value_LR, room_LR, length_LR,
        )  # fmt: skip

    def places(self, rows: Rows, layers: slice = slice(None)) -> np.ndarray:
        """Of complete caches, where keys and values of some rows go in some layers: [L, R, 2G]."""
        return np.ascontiguousarray(self._whole_LNG[layers, rows.rows_R])

    @property
    def complete(self) -> bool:
        """Whether every layer takes every row."""
        return self._complete

    def grow_in_all_layers(self) -> np.ndarray:
        """Make room for chunks of one row each that every layer takes: its places [L, N, 2G]."""
        if self._complete:
            return self._whole_LNG
        lies, part_G = self.lies, np.arange(self._caches[0].shape.rows_per_token)
        assert (lies.length_LC < lies.room_LC).all(), "a token more than there is room for"
        for cache, position in zip(self._caches, self._packed.positions, strict=True):
            cache.hold(position)
        index_LNG: np.ndarray = (lies.first_LC + lies.length_LC)[:, :, None]
        return index_LNG + lies.room_LC[:, :, None] * part_G

    @property
    def rows_PH(self) -> Tensor:
        """The pool's."""
        return self._pool.rows

    @property
    def lies(self) -> Lies:
        """Where the chunks' keys lie now."""
        if self._complete:
            length_LC = np.tile(self._length_C, (len(self._first_LC), 1))
        else:
            length_LC = _side_by_side([cache.length_L for cache in self._caches])
        return Lies(self._first_LC, self._room_LC, length_LC)

    def keys(self, layer: int) -> np.ndarray:
        """How many keys each chunk's cache holds in a layer: [C]."""
        if self._complete:
            return self._length_C
        return np.array([cache.length_L[layer] for cache in self._caches])

    def reads(self, layer: int, rows: Rows) -> Reads:
        """What the queries of these rows read, request by request."""
        return Reads(self._singles(layer, rows), lambda: self._each(layer, rows))

    def _singles(self, layer: int, rows: Rows) -> Singles:
        if rows not in self._single_parts:
            alone = [part for part in self._parts_of(rows) if part.ends_chunk]
            numbers = [(part.queries.start, part.last, part.chunk) for part in alone]
            self._single_parts[rows] = np.array(numbers, dtype=np.int64).reshape(-1, 3).T
        query_S, last_S, chunk_S = self._single_parts[rows]
        first_S, room_S = self._first_LC[layer][chunk_S], self._room_LC[layer][chunk_S]
        heads = self._caches[0].shape.kv_heads
        length_S = self.keys(layer)[chunk_S]
        second_S = first_S + heads * room_S
        return Singles(self._pool.rows, heads, query_S, last_S, first_S, second_S, room_S, length_S)

    @cached_property
    def _first_LC(self) -> np.ndarray:
        return _side_by_side([cache.first_rows_L for cache in self._caches])

    @cached_property
    def _room_LC(self) -> np.ndarray:
        return _side_by_side([cache.room_L for cache in self._caches])

    @cached_property
    def _length_C(self) -> np.ndarray:
        """Of complete caches, which have grown by the whole step from its first layer on."""
        return np.array([cache.length_L.item(0) for cache in self._caches])

    def _each(self, layer: int, rows: Rows) -> list[Read]:
        return [
            Read(
                part.queries,
                part.first,
                part.last,
                part.ends_chunk,
                self._caches[part.chunk].held(layer),
                self._caches[part.chunk].positions_K(layer),
                self._masks,
            )
            for part in self._parts_of(rows)
        ]

    def _parts_of(self, rows: Rows) -> Sequence[_Part]:
        if rows not in self._parts:
            packed = self._packed
            bounds = np.searchsorted(rows.rows_R, packed.starts).tolist()
            self._parts[rows] = [
                _Part(
                    chunk,
                    slice(bounds[chunk], bounds[chunk + 1]),
                    packed.positions[rows.rows_R[bounds[chunk]]],
                    packed.positions[rows.rows_R[bounds[chunk + 1] - 1]],
                    bounds[chunk + 1] - bounds[chunk] == 1
                    and rows.rows_R[bounds[chunk]] == span.stop - 1,
                )
                for chunk, span in enumerate(packed.spans)
                if bounds[chunk + 1] > bounds[chunk]
            ]
        return self._parts[rows]

    @cached_property
    def _index_LNG(self) -> Tensor:
        return torch.from_numpy(self._whole_LNG).to(self._packed.device)

    @cached_property
    def _whole_LNG(self) -> np.ndarray:
        """Of complete caches, the places of all rows in all layers: [L, N, 2G]."""
        assert self._complete, "caches that are not complete"
        packed = self._packed
        first_LN = self._first_LC[:, packed.chunk_N] + packed.position_on_host_N
        part_G = np.arange(self._caches[0].shape.rows_per_token)
        places_LNG: np.ndarray = (
            first_LN[..., None] + self._room_LC[:, packed.chunk_N, None] * part_G
        )
        return places_LNG

    def _next(self, layer: int, rows: Rows) -> Tensor:
        """The places of some rows in one layer, [R, 2G]; the caches grow by them there."""
        packed = self._packed
        parts_RG = [np.empty((0, self._caches[0].shape.rows_per_token), dtype=np.int64)]
        bounds = np.searchsorted(rows.rows_R, packed.starts).tolist()
        position_R = rows.of(packed.position_N)
        for chunk, cache in enumerate(self._caches):
            begin, end = bounds[chunk], bounds[chunk + 1]
            parts_RG.append(cache.rows_for(layer, end - begin))
            cache.note_positions(layer, position_R[begin:end])
            cache.length_L[layer] += end - begin
        return torch.from_numpy(np.concatenate(parts_RG)).to(packed.device)


def _side_by_side(each_CL: Sequence[np.ndarray]) -> np.ndarray:
    """What the caches say of their layers, in one array: [L, C]."""
    # Joined one after another: without a look at each.
    return np.ascontiguousarray(np.concatenate(each_CL).reshape(len(each_CL), -1).T)


class WholePlacing(Placing):
    """Of sequences that run in one step: a layer's keys and values last until the next one's."""

    def __init__(self, packed: Packed) -> None:
        self._packed, self._complete = packed, False
        self._parts: dict[Rows, list[_Part]] = {}
        self._bounds: dict[Rows, Bounds] = {}
        none_S = np.empty(0, dtype=np.int64)
        rows_NH = torch.empty(0, 0, device=packed.device)
        self._nobody = Singles(rows_NH, 1, none_S, none_S, none_S, none_S, none_S, none_S)
        # Of the layer at hand: whose keys and values there are, and these.
        self._placed = packed.nothing
        self._keys_values_RMH: Tensor | None = None

    def place(self, layer: int, rows: Rows, keys_values_RMH: Tensor | None) -> None:
        """Hold the keys and values [R, 2G, H] of these rows."""
        self._placed, self._keys_values_RMH = rows, keys_values_RMH

    def due(self, layer: int) -> Rows:
        return self._packed.everything

    def keys(self, layer: int) -> np.ndarray:
        return self._bounds_of(self._placed).counts_C

    def reads(self, layer: int, rows: Rows) -> Reads:
        assert self._keys_values_RMH is not None, "queries without keys"
        bounds = (self._bounds_of(self._placed), self._bounds_of(rows))
        sides = Sides(self._keys_values_RMH, *bounds)
        return Reads(self._nobody, lambda: self._each(layer, rows), sides)

    def _bounds_of(self, rows: Rows) -> Bounds:
        if rows not in self._bounds:
            self._bounds[rows] = Bounds(self._packed.bounds(rows))
        return self._bounds[rows]

    def _each(self, layer: int, rows: Rows) -> list[Read]:
        assert self._keys_values_RMH is not None, "queries without keys"
        placed, position_R = self._placed, self._placed.of(self._packed.position_N)
        _, heads, size = self._keys_values_RMH.shape
        kv_heads, found = heads // 2, []
        spans = list(pairwise(self._bounds_of(placed).starts.tolist()))
        for part in self._parts_of(rows):
            begin, end = spans[part.chunk]
            count = end - begin
            rows_NH = self._keys_values_RMH[begin:end].transpose(0, 1).reshape(-1, size)
            held = Held(rows_NH, 0, kv_heads * count, count, kv_heads, count)
            positions_K = None if placed.all else position_R[begin:end]
            found.append(Read(part.queries, part.first, part.last, True, held, positions_K))
        return found
