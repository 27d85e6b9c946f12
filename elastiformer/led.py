"""A sharded model that one process leads: what that one runs, the others run beside it.

Whoever serves knows the leader alone, and uses it as any model. Before it makes a sequence or runs
a step it says so to the others, who do the same with their parts (`follow`): so their caches and
stores of prefixes go the same way, and the sums over all meet. What is said goes by Gloo, on the
CPU, however the sums are exchanged.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence as Many
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch.distributed as dist
from torch import Tensor

from elastiformer.capacity import Capacity
from elastiformer.errors import ElastiError
from elastiformer.model import ElasticModel
from elastiformer.planning import PIECE_TOKENS
from elastiformer.sequence import Chunk, Sequence
from elastiformer.sharded import ShardedModel

_PATIENCE = datetime.timedelta(days=3650)  # a server may have nothing to do for long


class Parted(BaseException):
    """A step failed here and perhaps not elsewhere. No `Exception`: to go on would be to wait for
    sums that never come, so whoever runs the model has to end."""


@dataclass(frozen=True, slots=True)
class _Opened:
    tokens: int
    prefixes: bool
    piece_tokens: int


@dataclass(frozen=True, slots=True)
class _Made:
    number: int
    capacity: Capacity
    prompt_tokens: int
    most_tokens: int
    scored: bool
    prompt: tuple[int, ...] | None
    shared: bool


@dataclass(frozen=True, slots=True)
class _Ran:
    chunks: tuple[tuple[int, list[int]], ...]  # a sequence's number, and its tokens


@dataclass(frozen=True, slots=True)
class _Ended:
    pass


_Order = _Opened | _Made | _Ran | _Ended


class LedModel(ShardedModel):
    """One process's part. The first process's is the leader; `follow` is for all others."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Of the leader: its sequences that hold room, and what was released since it last spoke.
        self._made, self._numbers = 0, dict[Sequence, int]()
        self._gone: list[int] = []

    @cached_property
    def _talk(self) -> dist.ProcessGroup:
        talk: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_PATIENCE)
        return talk

    # The leader.

    def open_cache(
        self, tokens: int, prefixes: bool = True, piece_tokens: int = PIECE_TOKENS
    ) -> None:
        self._say(_Opened(tokens, prefixes, piece_tokens))
        super().open_cache(tokens, prefixes, piece_tokens)

    def sequence(
        self,
        capacity: Capacity,
        prompt_tokens: int,
        most_tokens: int,
        scored: bool = False,
        prompt: Many[int] | None = None,
        shared: bool = False,
    ) -> Sequence:
        self._made += 1
        number, known = self._made, None if prompt is None else tuple(prompt)
        self._say(_Made(number, capacity, prompt_tokens, most_tokens, scored, known, shared))
        made = super().sequence(capacity, prompt_tokens, most_tokens, scored, prompt, shared)
        self._numbers[made] = number
        made.on_release = lambda: self._let_go(made)
        return made

    def step(self, chunks: Many[Chunk]) -> list[Tensor]:
        self._say(_Ran(tuple((self._numbers[each.sequence], each.ids) for each in chunks)))
        try:
            return super().step(chunks)
        except Exception as error:
            raise Parted("a step over several processes failed") from error

    def end(self) -> None:
        """Let the others go, if they still listen."""
        with suppress(Parted):
            self._say(_Ended())

    def _let_go(self, sequence: Sequence) -> None:
        if (number := self._numbers.pop(sequence, None)) is not None:
            self._gone.append(number)

    def _say(self, order: _Order) -> None:
        try:
            dist.broadcast_object_list([order, tuple(self._gone)], src=0, group=self._talk)
        except RuntimeError as error:
            raise Parted("another process is gone") from error
        self._gone.clear()

    # The others.

    def follow(self) -> None:
        """Lay out the weights, then do as the leader does, until it ends.

        Raises:
            RuntimeError: the leader is gone, or a step failed.
        """
        super(ElasticModel, self).measure_costs()  # alone: the leader's tries come as orders
        sequences: dict[int, Sequence] = {}
        while True:
            heard: list[object] = [None, None]
            dist.broadcast_object_list(heard, src=0, group=self._talk)
            order, gone = heard
            assert isinstance(gone, tuple), "a list of numbers goes with every order"
            for number in gone:
                sequences.pop(number).release()
            match order:
                case _Opened(tokens, prefixes, piece_tokens):
                    super().open_cache(tokens, prefixes, piece_tokens)
                case _Made(number, capacity, prompt_tokens, most_tokens, scored, prompt, shared):
                    with suppress(ElastiError):  # refused there as here
                        sequences[number] = super().sequence(
                            capacity, prompt_tokens, most_tokens, scored, prompt, shared
                        )
                case _Ran(chunks):
                    super().step([Chunk(sequences[number], ids) for number, ids in chunks])
                case _:
                    return
