"""Text that is read as it is needed: larger than memory, or on the Hub; seeded and resumable.

Documents are tokenised and packed in their order. A block of windows is held at a time and
shuffled, so the data should come in no order of its own over longer runs than that. Where a block
begins is three numbers, from which the same block is read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from training.data import (
    hash_of,
    in_windows,
    place_of,
    read_documents,
    seed_of,
    tokens_in,
    tokens_of,
)
from training.files import DataError

BLOCK = 1024  # windows that are shuffled together
HASHED = 1000  # documents, the first ones: a stream is not read twice for its hash


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """Where a run stands: the block it is in, where that begins, and what was taken of it."""

    epoch: int = 0
    document: int = 0  # of the epoch, in which the block begins
    offset: int = 0  # that document's tokens before it
    block: int = 0  # blocks before it
    taken: int = 0  # windows of it


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Windows that were read, and where the next ones begin."""

    ids_WT: Tensor
    after: StreamPosition


class StreamedWindows:
    """Windows of a stream, a batch at a time; the same in every process of a run."""

    def __init__(
        self,
        data: str,
        tokenizer: PreTrainedTokenizerBase,
        window: int,
        seed: int,
        held_out: float = 0.0,
        block: int = BLOCK,
    ) -> None:
        """Read nothing yet.

        Args:
            held_out: documents whose fixed place in [0, 1) lies below are never trained on.
            block: windows that are shuffled together.
        """
        self._data, self._tokenizer, self._window = data, tokenizer, window
        self._seed, self._held_out, self._most = seed, held_out, block
        self._at = StreamPosition()
        self._held: Block | None = None

    def take(self, rows: int) -> Tensor:
        """The next `rows` windows, over the end of a block or of an epoch if need be.

        Raises:
            DataError: as `read_documents`, or nothing to train on.
        """
        chosen: list[Tensor] = []
        while rows:
            block = self._block()
            order = self._order(self._at.block, len(block.ids_WT))
            some = order[self._at.taken : self._at.taken + rows]
            chosen.append(block.ids_WT[some])
            rows -= len(some)
            self._at = replace(self._at, taken=self._at.taken + len(some))
            if self._at.taken == len(block.ids_WT):
                self._at, self._held = block.after, None
        return torch.cat(chosen)

    def state(self) -> list[int]:
        """The position, as a checkpoint keeps it."""
        return list(astuple(self._at))

    def go_on(self, state: Sequence[int]) -> None:
        """From a position that `state` told; what lies before it is read over."""
        self._at, self._held = StreamPosition(*state), None

    def first_block(self) -> Tensor:
        """The windows that are trained on first, unshuffled."""
        return self._block().ids_WT

    def held_windows(self, wanted: int) -> Tensor:
        """The first windows of what is held out.

        Raises:
            DataError: the whole stream holds not one.
        """
        enough = wanted * tokens_in(self._window, self._tokenizer)
        ids: list[int] = []
        for document in read_documents(self._data, self._tokenizer, stream=True):
            if self._is_held_out(document):
                ids += tokens_of(document, self._tokenizer)
            if len(ids) >= enough:
                break
        ids_WT = self._in_windows(ids[:enough])
        if len(ids_WT) == 0:
            raise DataError(
                f"{self._data} (held out): {len(ids)} tokens, fewer than a window of {self._window}"
            )
        return ids_WT

    def sha256(self) -> str:
        """Of the first documents."""
        stream = read_documents(self._data, self._tokenizer, stream=True)
        return hash_of(islice(stream, HASHED))

    def _block(self) -> Block:
        if self._held is None:
            self._held = self._read(self._at)
        return self._held

    def _read(self, at: StreamPosition) -> Block:
        """The block that begins here: full, or what is left of the epoch."""
        room = self._most * tokens_in(self._window, self._tokenizer)
        ids: list[int] = []
        offset = at.offset
        for number, document in self._trained_on(at.document):
            tokens = tokens_of(document, self._tokenizer)[offset:]
            if len(ids) + len(tokens) > room:
                used = offset + room - len(ids)
                after = StreamPosition(at.epoch, number, used, at.block + 1)
                return Block(self._in_windows([*ids, *tokens[: room - len(ids)]]), after)
            ids += tokens
            offset = 0
        ids_WT = self._in_windows(ids)
        if len(ids_WT) == 0:
            if at.document == at.offset == 0:
                raise DataError(
                    f"{self._data}: {len(ids)} tokens, fewer than a window of {self._window}"
                )
            return self._read(StreamPosition(at.epoch + 1, block=at.block))
        return Block(ids_WT, StreamPosition(at.epoch + 1, block=at.block + 1))

    def _trained_on(self, first: int) -> Iterator[tuple[int, str]]:
        """Documents from this one on, by their number, without those held out."""
        stream = read_documents(self._data, self._tokenizer, stream=True)
        for number, document in enumerate(islice(stream, first, None), start=first):
            if not self._is_held_out(document):
                yield number, document

    def _is_held_out(self, document: str) -> bool:
        return place_of(document) < self._held_out

    def _in_windows(self, ids: Sequence[int]) -> Tensor:
        return in_windows(torch.tensor(ids, dtype=torch.long), self._tokenizer, self._window)

    def _order(self, block: int, windows: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of("block", self._seed, block))
        return torch.randperm(windows, generator=generator)
