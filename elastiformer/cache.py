"""Keys and values of one request, each layer with an occupancy of its own.

With `kv: complete` every layer holds every token; with `kv: kept` a layer holds only the tokens
whose attention it kept, and the cache really is that much smaller.

Shape letters: G key/value heads   C room   H head size
"""

from __future__ import annotations

import torch
from torch import Tensor

from elastiformer.accounting import LayerShape

_FIRST_ROOM = 64  # tokens


class LayerCache:
    """Keys, values and positions of one layer; grows by doubling, up to the request's bound."""

    def __init__(
        self, shape: LayerShape, most_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.length = 0
        self._most = most_tokens
        self._room = 0
        empty = torch.empty(shape.kv_heads, 0, shape.head_dim, dtype=dtype, device=device)
        self._keys_GCH, self._values_GCH = empty, empty
        self._positions_C = torch.empty(0, dtype=torch.long, device=device)

    def append(self, keys_GNH: Tensor, values_GNH: Tensor, positions_N: Tensor) -> None:
        added = keys_GNH.shape[1]
        end = self.length + added
        if end > self._room:
            self._grow(end)
        self._keys_GCH[:, self.length : end] = keys_GNH
        self._values_GCH[:, self.length : end] = values_GNH
        self._positions_C[self.length : end] = positions_N
        self.length = end

    @property
    def keys_GTH(self) -> Tensor:
        return self._keys_GCH[:, : self.length]

    @property
    def values_GTH(self) -> Tensor:
        return self._values_GCH[:, : self.length]

    @property
    def positions_T(self) -> Tensor:
        return self._positions_C[: self.length]

    @property
    def bytes(self) -> int:
        """What the tokens held here take; the room set aside for more is not counted."""
        heads, _, size = self._keys_GCH.shape
        return 2 * heads * size * self.length * self._keys_GCH.element_size()

    def _grow(self, needed: int) -> None:
        room = max(needed, min(self._most, max(2 * self._room, _FIRST_ROOM)))
        heads, _, size = self._keys_GCH.shape
        keys_GCH = self._keys_GCH.new_empty(heads, room, size)
        values_GCH = keys_GCH.new_empty(heads, room, size)
        positions_C = self._positions_C.new_empty(room)
        keys_GCH[:, : self.length] = self.keys_GTH
        values_GCH[:, : self.length] = self.values_GTH
        positions_C[: self.length] = self.positions_T
        self._keys_GCH, self._values_GCH = keys_GCH, values_GCH
        self._positions_C, self._room = positions_C, room
