"""Keys and values of one sequence, each layer with an occupancy of its own.

With `kv: complete` every layer holds every token; with `kv: kept` a layer holds only the tokens
whose attention it kept, and the sequence takes that much less of the pool. How much a layer can
come to hold is known beforehand: the controller of the token routers (routers.py) bounds it.

Shape letters: L layers   G key/value heads   H head size   C a layer's room   K keys   N rows
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elastiformer.accounting import ModelShape
from elastiformer.pool import BLOCK_TOKENS, Extent, Pool


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What one token leaves in one layer, and how many layers there are."""

    layers: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, shape: ModelShape) -> CacheShape:
        first = shape.layers[0]
        alike = {(layer.kv_heads, layer.head_dim) for layer in shape.layers}
        assert len(alike) == 1, "layers with caches of different shapes"
        return cls(len(shape.layers), first.kv_heads, first.head_dim)

    @property
    def rows_per_token(self) -> int:
        return 2 * self.kv_heads

    def pool(
        self, tokens: int, dtype: torch.dtype, device: torch.device, grows: bool = False
    ) -> Pool:
        """A pool with room for so many tokens in every layer."""
        blocks = self.layers * blocks_of(tokens)
        rows = BLOCK_TOKENS * self.rows_per_token
        return Pool(blocks, rows, self.head_dim, dtype, device, grows)


@dataclass(frozen=True, slots=True)
class Held:
    """Where one layer's keys and values lie: head by head, from two rows of a pool on."""

    rows_NH: Tensor
    key: int
    value: int
    room: int
    kv_heads: int
    length: int  # K

    def head(self, head: int) -> Held:
        """Those of one head."""
        at = head * self.room
        return Held(self.rows_NH, self.key + at, self.value + at, self.room, 1, self.length)

    @property
    def keys_GKH(self) -> Tensor:
        return self._part(self.key)

    @property
    def values_GKH(self) -> Tensor:
        return self._part(self.value)

    def _part(self, first: int) -> Tensor:
        part = self.rows_NH[first : first + self.kv_heads * self.room]
        return part.view(self.kv_heads, self.room, -1)[:, : self.length]


def blocks_of(tokens: int) -> int:
    """The blocks that hold so many tokens of one layer."""
    return -(-tokens // BLOCK_TOKENS)


class SequenceCache:
    """The keys and values of one sequence, in one extent of a pool.

    A layer's part of it is [2, G, C, H]: keys and values, head by head, token after token.
    """

    def __init__(
        self,
        pool: Pool,
        shape: CacheShape,
        rooms_L: Sequence[int],
        complete: bool,
        device: torch.device,
    ) -> None:
        self.shape, self.complete = shape, complete
        self.pool = pool
        blocks_L = [blocks_of(room) for room in rooms_L]
        self.room_L = np.array([BLOCK_TOKENS * blocks for blocks in blocks_L])
        self.length_L = np.zeros(shape.layers, dtype=np.int64)
        before_L = np.cumsum([0, *blocks_L[:-1]])
        self._offset_L = before_L * pool.block_rows
        self._first_rows: list[np.ndarray] = []  # none once it was moved; no cycle with the pool
        # Of the tokens of all layers, layer after layer, each with room for as many as it may hold.
        self._first_position_L = np.cumsum([0, *self.room_L[:-1]])
        self._positions_P: Tensor | None = None
        if not complete:
            total = int(self.room_L.sum())
            self._positions_P = torch.empty(total, dtype=torch.long, device=device)
        self._extent: Extent | None = pool.take(sum(blocks_L), self._first_rows.clear)
        self._dropped = weakref.finalize(self, pool.drop, self._extent)

    @property
    def bytes(self) -> int:
        """What the tokens held here take; room set aside for more is not counted."""
        tokens = int(self.length_L.sum())
        size = self.pool.rows.element_size()
        return tokens * self.shape.rows_per_token * self.shape.head_dim * size

    @property
    def first_rows_L(self) -> np.ndarray:
        """Where each layer's part begins among the rows of the pool."""
        assert self._extent is not None, "a sequence that was released"
        if not self._first_rows:
            self._first_rows.append(self._extent.start * self.pool.block_rows + self._offset_L)
        return self._first_rows[0]

    def first_row(self, layer: int) -> int:
        return int(self.first_rows_L[layer])

    def held(self, layer: int) -> Held:
        """All that a layer holds."""
        first, room, heads = self.first_row(layer), int(self.room_L[layer]), self.shape.kv_heads
        length = int(self.length_L[layer])
        return Held(self.pool.rows, first, first + heads * room, room, heads, length)

    def positions_K(self, layer: int) -> Tensor | None:
        """The position of each key; None where every token has one, in order."""
        if self._positions_P is None:
            return None
        first = int(self._first_position_L[layer])
        return self._positions_P[first : first + int(self.length_L[layer])]

    def tokens_before(self, layer: int, position: int) -> int:
        """How many tokens a layer holds of those before a position."""
        positions_K = self.positions_K(layer)
        return position if positions_K is None else int((positions_K < position).sum())

    def rows_for(self, layer: int, tokens: int) -> np.ndarray:
        """Where the next tokens of a layer go among the pool's rows: [N, 2G]."""
        room, length = int(self.room_L[layer]), int(self.length_L[layer])
        assert length + tokens <= room, f"layer {layer}: {length} + {tokens} tokens in room {room}"
        part_G = self.first_row(layer) + room * np.arange(self.shape.rows_per_token)
        return part_G + (length + np.arange(tokens))[:, None]

    def grow(self, tokens: int) -> None:
        """Let every layer hold so many tokens more, of a cache that is complete."""
        assert self.complete, "layers that hold different tokens"
        # So all of them have the same length and room.
        fits = self.length_L.item(0) + tokens <= self.room_L.item(0)
        assert fits, "more tokens than there is room for"
        self.length_L += tokens

    def note_positions(self, layer: int, positions_N: Tensor) -> None:
        """Where the tokens stand that the next `rows_for` of this layer are for."""
        if self._positions_P is not None:
            first = int(self._first_position_L[layer] + self.length_L[layer])
            self._positions_P[first : first + len(positions_N)] = positions_N

    def hold(self, position: int) -> None:
        """Let every layer hold one token more, that stands at this position."""
        if self._positions_P is not None:
            at_L = self._first_position_L + self.length_L
            if self._positions_P.is_cpu:  # NumPy's assignment starts sooner than PyTorch's
                self._positions_P.numpy()[at_L] = position
            else:
                self._positions_P[torch.from_numpy(at_L)] = position
        self.length_L += 1

    def held_rows(self, layer: int, first: int, stop: int) -> np.ndarray:
        """Where a layer's tokens from `first` to `stop` lie among the pool's rows: [N x 2G]."""
        part_G = self.first_row(layer) + int(self.room_L[layer]) * np.arange(
            self.shape.rows_per_token
        )
        rows: np.ndarray = (part_G + np.arange(first, stop)[:, None]).reshape(-1)
        return rows

    def release(self) -> None:
        """Give the room back; the sequence must not be used after it."""
        if self._extent is not None:
            self._dropped.detach()
            self.pool.give(self._extent)
            self._extent = None
            self._first_rows.clear()
            self.length_L[:] = 0
