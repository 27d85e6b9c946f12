"""Keys and values of prompts' beginnings, kept for requests that begin alike.

What a token leaves in the cache depends on every token before it and on the plan each of them ran
under. So a stored piece is found by its tokens *and* their plans, piece after piece from the
start: nothing computed at one capacity is served to another, and nothing of phase output to a
prompt. A hit copies into the sequence's own room: tens of kilobytes a token, instead of a token's
products. Stored pieces live in blocks of the pool that nobody needs, and give way when somebody
does, the least recently used first.

Pieces are multiples of PIECE_TOKENS. Of a prompt that several sequences are known to share, the
rest before its last token is stored too; it serves that prompt and no longer one.

Shape letters: L layers   G key/value heads
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from elastiformer.pool import Extent, Pool
from elastiformer.priced import PricedPlan
from elastiformer.sequence import DebtKey, Sequence

PIECE_TOKENS = 32

_Key = tuple[tuple[int, ...], tuple[PricedPlan, ...]]  # of a piece: its tokens and their plans


@dataclass(eq=False, slots=True)
class _Piece:
    """Some multiple of PIECE_TOKENS, or a prompt's rest, after its parent's tokens."""

    parent: _Piece | None
    key: _Key
    stop: int  # tokens from the start of the prompt to the end of this piece
    extent: Extent | None = None
    kept_L: np.ndarray | None = None  # tokens that each layer holds of it
    positions_L: list[Tensor] | None = None  # theirs, where not every token is held
    debts: dict[DebtKey, tuple[float, int]] = field(default_factory=dict)
    children: dict[_Key, _Piece] = field(default_factory=dict)


class PrefixStore:
    """All stored pieces of one model."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._root = _Piece(None, ((), ()), 0)
        self._by_use: OrderedDict[_Piece, None] = OrderedDict()  # children before their parents
        self._blocks = 0
        self.stored_tokens = self.queried_tokens = self.hit_tokens = 0
        pool.evict_with(self._evict, lambda: self._blocks)

    def adopt(self, sequence: Sequence, prompt: Many[int], most: int) -> None:
        """Copy the longest stored beginning of a prompt into a new sequence.

        Args:
            most: its tokens at most, unless all that are prompt are stored.
        """
        usable = len(prompt) - 1  # the last prompt token is of phase output
        self.queried_tokens += usable
        path: list[_Piece] = []
        here = self._root
        while child := self._next(here, sequence, prompt, usable):
            path.append(child)
            here = child
        if here.stop < usable:
            path = [piece for piece in path if piece.stop <= most]
            here = path[-1] if path else self._root
        if path:
            self._copy(path, sequence)
            self.hit_tokens += here.stop
            self._touch(here)
        sequence.stored = here.stop

    def store(self, sequence: Sequence, prompt: Many[int]) -> None:
        """Keep what a sequence has computed of its prompt, as far as there is room."""
        self._store_pieces(sequence, prompt)
        if sequence.shares_prompt and sequence.length >= len(prompt) - 1:
            self._store_rest(sequence, prompt)

    def _store_pieces(self, sequence: Sequence, prompt: Many[int]) -> None:
        usable = min(sequence.length, len(prompt) - 1) // PIECE_TOKENS * PIECE_TOKENS
        if usable <= sequence.stored:
            return
        simple = not sequence.has_debts
        if not simple and sequence.length != usable:
            return  # how matters stood at `usable` is no longer known
        here = self._find(sequence, prompt, sequence.stored)
        step = PIECE_TOKENS if simple else usable - sequence.stored
        while here is not None and here.stop < usable:
            here = self._add(here, sequence, prompt, here.stop + step)
        sequence.stored = usable

    def _store_rest(self, sequence: Sequence, prompt: Many[int]) -> None:
        """Keep what comes after the last whole piece, once.

        The prompt's last token and what follows are of phase output, which moves no prompt's
        debts: so matters still stand as they did before that token.
        """
        stop = len(prompt) - 1
        if sequence.stored < stop:
            here = self._find(sequence, prompt, stop // PIECE_TOKENS * PIECE_TOKENS)
            if here is not None:
                self._add(here, sequence, prompt, stop)
            sequence.stored = stop

    def _next(
        self, here: _Piece, sequence: Sequence, prompt: Many[int], usable: int
    ) -> _Piece | None:
        lengths = sorted({len(tokens) for tokens, _ in here.children}, reverse=True)
        for length in lengths:
            stop = here.stop + length
            if stop == usable or (stop < usable and length % PIECE_TOKENS == 0):
                child = here.children.get(_key(sequence, prompt, here.stop, stop))
                if child is not None:
                    return child
        return None

    def _find(self, sequence: Sequence, prompt: Many[int], stop: int) -> _Piece | None:
        """The piece that ends at `stop`; None when it has been evicted."""
        here: _Piece | None = self._root
        while here is not None and here.stop < stop:
            here = self._next(here, sequence, prompt, stop)
        return here

    def _add(
        self, parent: _Piece, sequence: Sequence, prompt: Many[int], stop: int
    ) -> _Piece | None:
        key = _key(sequence, prompt, parent.stop, stop)
        if key in parent.children:
            return parent.children[key]
        cache = sequence.cache
        # By position: the parent may be another sequence's, whose routes rounding may have turned.
        firsts_L, stops_L = (
            np.array([cache.tokens_before(layer, place) for layer in range(len(cache.length_L))])
            for place in (parent.stop, stop)
        )
        rows = [
            cache.held_rows(layer, first, end)
            for layer, (first, end) in enumerate(
                zip(firsts_L.tolist(), stops_L.tolist(), strict=True)
            )
        ]
        needed = sum(map(len, rows))
        blocks = max(1, -(-needed // self._pool.block_rows))
        extent = self._room(blocks, parent)
        if extent is None:
            return None
        self._pool.of(extent)[:needed] = self._pool.rows[self._index(np.concatenate(rows))]
        piece = _Piece(parent, key, stop, extent, stops_L - firsts_L)
        if not cache.complete:
            held_L = [cache.positions_K(layer) for layer in range(len(rows))]
            piece.positions_L = [
                held[first:end].clone()
                for held, first, end in zip(held_L, firsts_L, stops_L, strict=True)
                if held is not None
            ]
        piece.debts = sequence.debts()
        parent.children[key] = piece
        self._blocks += blocks
        self.stored_tokens += stop - parent.stop
        self._touch(piece)
        return piece

    def _room(self, blocks: int, parent: _Piece) -> Extent | None:
        """Blocks for a new piece, if need be of pieces that are used less than its parent."""
        self._touch(parent)
        extent = self._pool.spare(blocks, lambda: None)
        while extent is None and next(iter(self._by_use), parent) is not parent:
            self._evict()
            extent = self._pool.spare(blocks, lambda: None)
        return extent

    def _copy(self, path: Many[_Piece], sequence: Sequence) -> None:
        cache = sequence.cache
        sources, targets = [], []
        for piece in path:
            assert piece.extent is not None and piece.kept_L is not None
            first = piece.extent.start * self._pool.block_rows
            for layer, kept in enumerate(piece.kept_L):
                if piece.positions_L is not None:
                    cache.note_positions(layer, piece.positions_L[layer])
                target = cache.rows_for(layer, int(kept)).reshape(-1)
                sources.append(np.arange(first, first + len(target)))
                targets.append(target)
                first += len(target)
            cache.length_L += piece.kept_L
        rows = self._pool.rows
        rows[self._index(np.concatenate(targets))] = rows[self._index(np.concatenate(sources))]
        sequence.resume(path[-1].stop, path[-1].debts)

    def _touch(self, piece: _Piece) -> None:
        """Note its use; its parents' after its own, so that a child is always evicted first."""
        here: _Piece | None = piece
        while here is not None and here is not self._root:
            self._by_use[here] = None
            self._by_use.move_to_end(here)
            here = here.parent

    def _evict(self) -> bool:
        if not self._by_use:
            return False
        piece, _ = self._by_use.popitem(last=False)
        assert piece.parent is not None and piece.extent is not None and not piece.children
        del piece.parent.children[piece.key]
        self._pool.give(piece.extent)
        self._blocks -= piece.extent.blocks
        self.stored_tokens -= piece.stop - piece.parent.stop
        return True

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).to(self._pool.rows.device)


def _key(sequence: Sequence, prompt: Many[int], start: int, stop: int) -> _Key:
    plans = tuple(sequence.plan_at(position) for position in range(start, stop))
    return tuple(prompt[start:stop]), plans
