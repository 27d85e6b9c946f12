"""One piece of memory for the keys and values of all sequences, handed out in blocks.

A block holds the keys and values of some tokens of one layer. A sequence takes all the blocks it
can ever need at once, side by side, so nothing it was promised can run out later, and its keys
lie in order: attention reads them where they are. When the free blocks suffice but lie apart, the
holders are moved together, between steps.

It does not know what a block holds (cache.py, prefixes.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from elastiformer.errors import CacheFull

BLOCK_TOKENS = 16


@dataclass(eq=False, slots=True)
class Extent:
    """Some blocks side by side. `moved` is called after they were moved to another place."""

    start: int
    blocks: int
    moved: Callable[[], None]


class Pool:
    """A number of blocks, each `block_rows` rows of the width of a head."""

    def __init__(
        self,
        blocks: int,
        block_rows: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        grows: bool = False,
    ) -> None:
        self.total_blocks, self.block_rows = blocks, block_rows
        # Written to, so that memory is the pool's from now on and not only when it is first used.
        self.rows = torch.empty(blocks * block_rows, width, dtype=dtype, device=device).zero_()
        self._grows = grows
        self._held: list[Extent] = []  # by place
        self._dropped: deque[Extent] = deque()  # by holders that nobody released
        self._taken = 0
        self._evict: Callable[[], bool] = lambda: False
        self._evictable: Callable[[], int] = lambda: 0

    @property
    def free_blocks(self) -> int:
        """Blocks that could be taken now; those of stored prefixes among them."""
        self._collect()
        return self.total_blocks - self._taken + self._evictable()

    @property
    def held_bytes(self) -> int:
        return self._taken * self.block_rows * self.rows.shape[1] * self.rows.element_size()

    def evict_with(self, evict: Callable[[], bool], evictable: Callable[[], int]) -> None:
        """Let a store use free blocks: `evict` gives one extent back, False when it has none."""
        self._evict, self._evictable = evict, evictable

    def take(self, blocks: int, moved: Callable[[], None]) -> Extent:
        """Blocks side by side.

        Raises:
            CacheFull: fewer are free.
        """
        assert blocks > 0, f"{blocks} blocks"
        if self.free_blocks < blocks:
            if not self._grows:
                raise CacheFull(
                    f"the cache of keys and values has {self.free_blocks} free blocks; "
                    f"{blocks} are needed"
                )
            self._grow(max(2 * self.total_blocks, self._taken + blocks))
        while self.total_blocks - self._taken < blocks:
            evicted = self._evict()
            assert evicted, "what counts as free can be evicted"
        place, start = self._gap(blocks)
        if start is None:
            self._move_together()
            place, start = self._gap(blocks)
        assert start is not None, "enough blocks are free and side by side"
        extent = Extent(start, blocks, moved)
        self._held.insert(place, extent)
        self._taken += blocks
        return extent

    def spare(self, blocks: int, moved: Callable[[], None]) -> Extent | None:
        """Blocks that nobody needs now, without evicting or moving anything; None without any.

        They are the last ones free, out of the way of sequences, which take the first.
        """
        end = self.total_blocks
        for place in range(len(self._held), -1, -1):
            below = self._held[place - 1] if place else None
            bottom = 0 if below is None else below.start + below.blocks
            if end - bottom >= blocks:
                extent = Extent(end - blocks, blocks, moved)
                self._held.insert(place, extent)
                self._taken += blocks
                return extent
            end = bottom if below is None else below.start
        return None

    def give(self, extent: Extent) -> None:
        """Take back what was handed out."""
        self._held.remove(extent)
        self._taken -= extent.blocks

    def drop(self, extent: Extent) -> None:
        """Take back what a holder left that was collected as garbage; at any moment."""
        self._dropped.append(extent)

    def _collect(self) -> None:
        while self._dropped:
            self.give(self._dropped.popleft())

    def of(self, extent: Extent) -> Tensor:
        """The rows of an extent, [blocks x block_rows, width]."""
        first = extent.start * self.block_rows
        return self.rows[first : first + extent.blocks * self.block_rows]

    def _gap(self, blocks: int) -> tuple[int, int | None]:
        """The first place among the held extents where so many blocks are free, and its start."""
        end = 0
        for place, extent in enumerate(self._held):
            if extent.start - end >= blocks:
                return place, end
            end = extent.start + extent.blocks
        if self.total_blocks - end >= blocks:
            return len(self._held), end
        return len(self._held), None

    def _move_together(self) -> None:
        end = 0
        for extent in self._held:
            if extent.start > end:
                here = self.of(extent)
                # The places may overlap.
                content = here.clone() if extent.start - end < extent.blocks else here
                first = end * self.block_rows
                self.rows[first : first + len(content)] = content
                extent.start = end
                extent.moved()
            end += extent.blocks

    def _grow(self, blocks: int) -> None:
        rows = self.rows.new_empty(blocks * self.block_rows, self.rows.shape[1])
        rows[: len(self.rows)] = self.rows
        self.rows, self.total_blocks = rows, blocks
        for extent in self._held:
            extent.moved()
