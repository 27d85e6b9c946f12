"""Requests drawn at random, and the loop that runs any mix of them to its end.

What a request is held against afterwards: test_any_mix.py.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from hypothesis import event
from hypothesis import strategies as st
from torch import Tensor

from elastiformer import DENSE, Capacity, Chunk, ElasticModel, Phase, Sequence, UnitShares
from elastiformer.accounting import KVPolicy
from elastiformer.errors import CacheFull
from elastiformer.prefixes import PIECE_TOKENS
from tests.elastiformer.elastic import text

LOWEST = 0.5  # capacity that is drawn
LOWEST_OF_CHANNELS = 0.6  # where nothing else is left out: attention scores are always paid
LONGEST = 80  # tokens of a prompt
NEW = 8  # tokens generated
MOST_STEPS = 1000


# What is drawn.


@dataclass(frozen=True)
class Asked:
    """One request, and when it comes and goes."""

    capacity: Capacity = DENSE
    prompt_tokens: int = 1
    new_tokens: int = 1
    scored: bool = False
    stem: int = 0  # prompts of one stem begin alike
    arrives: int = 0  # the step before which it comes
    leaves: int | None = None  # the number of steps after which it is cancelled
    cuts: tuple[int, ...] = (LONGEST,)  # tokens of its chunks, in turn; 0: it sits a step out

    @property
    def most_tokens(self) -> int:
        return self.prompt_tokens + self.new_tokens

    @property
    def prompt(self) -> list[int]:
        return list(stem_ids(self.stem)[: self.prompt_tokens])

    def phase_at(self, position: int) -> Phase:
        is_output = self.scored or position >= self.prompt_tokens - 1
        return Phase.OUTPUT if is_output else Phase.PROMPT


@dataclass(frozen=True)
class Room:
    """The cache of a served model; without one each request has memory of its own."""

    tokens: int
    prefixes: bool


@dataclass(frozen=True)
class Case:
    """A mix, and the model that serves it."""

    kv: KVPolicy
    only_channels: bool  # an adapter that leaves nothing else out and repairs nothing
    in_turn: bool  # only lone rows go row by row: more take turns at the ways they can go
    room: Room | None
    mix: list[Asked]


@lru_cache
def stem_ids(number: int) -> tuple[int, ...]:
    return tuple(text(600, seed=50 + number)[0].tolist())


keep_shares = st.sampled_from((1.0, 0.75, 0.5, 0.3))
any_unit = st.builds(UnitShares, keep_shares, keep_shares, keep_shares, keep_shares, keep_shares)
only_channels = st.builds(UnitShares, channels=keep_shares)


def capacities(of_channels: bool) -> st.SearchStrategy[Capacity]:
    lowest = LOWEST_OF_CHANNELS if of_channels else LOWEST
    shares = st.one_of(
        st.just(1.0),
        st.integers(round(100 * lowest), 100).map(lambda percent: percent / 100),
        only_channels if of_channels else any_unit,
    )
    return st.one_of(
        shares.map(lambda share: Capacity(share, share)), st.builds(Capacity, shares, shares)
    )


lengths = st.integers(1, LONGEST) | st.integers(PIECE_TOKENS, LONGEST)
aligned = st.sampled_from((PIECE_TOKENS, 2 * PIECE_TOKENS))  # so that there is much to store
cuts = st.builds(
    lambda first, rest: (first, *rest),
    st.integers(1, LONGEST) | aligned,
    st.lists(st.integers(0, LONGEST) | aligned, max_size=3),
)
sizes = st.integers(LONGEST, 4 * LONGEST)
rooms = st.none() | st.builds(Room, sizes, st.booleans())
policies = st.sampled_from(("complete", "kept"))


@st.composite
def mixes(draw: st.DrawFn, alike: bool = False, of_channels: bool = False) -> list[Asked]:
    """Requests of few capacities; those that are alike differ in little else than their length."""
    asked = draw(st.lists(capacities(of_channels), min_size=1, max_size=1 if alike else 2))
    arrivals = st.integers(0, 3 if of_channels else 12)  # soon, so that they decode together
    request = st.builds(
        Asked,
        capacity=st.sampled_from(asked),
        prompt_tokens=st.integers(PIECE_TOKENS + 1, LONGEST) if alike else lengths,
        new_tokens=st.integers(NEW, 3 * NEW) if of_channels else st.integers(0, NEW),
        scored=st.just(False) if alike else st.booleans(),
        stem=st.just(0) if alike else st.integers(0, 1),
        arrives=st.sampled_from((0, 5, 10, 15)) if alike else arrivals,
        leaves=st.none() | st.none() | st.integers(0, 8),
        cuts=st.tuples(aligned) if alike else cuts,
    )
    return draw(st.lists(request, min_size=2, max_size=5))


@st.composite
def cases(draw: st.DrawFn, of_channels: bool | None = None) -> Case:
    if of_channels is None:
        of_channels = draw(st.booleans())
    kv = draw(st.sampled_from(("complete",) * 3 + ("kept",)) if of_channels else policies)
    in_turn = draw(st.booleans()) if of_channels else False
    return Case(kv, of_channels, in_turn, draw(rooms), draw(mixes(of_channels=of_channels)))


# Requests together, and what they got.


@dataclass(eq=False)
class Ran:
    """A request on its way through the steps of a mix."""

    asked: Asked
    sequence: Sequence
    cached: int  # tokens of the prompt that it did not have to compute
    ids: list[int]  # prompt and generated
    pieces: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    steps: int = 0
    left: bool = False

    @property
    def fed(self) -> int:
        return self.cached + sum(self.pieces)

    @property
    def is_over(self) -> bool:
        return self.left or self.fed == self.asked.most_tokens

    @property
    def logits(self) -> Tensor:
        return torch.cat(self.rows)

    def next_ids(self) -> list[int]:
        cuts = self.asked.cuts
        count = min(cuts[self.steps % len(cuts)], len(self.ids) - self.fed)
        self.steps += 1
        return self.ids[self.fed : self.fed + count]

    def take(self, count: int, logits_RV: Tensor) -> None:
        self.pieces.append(count)
        self.rows.append(logits_RV)
        if self.fed == len(self.ids) < self.asked.most_tokens:
            self.ids.append(int(logits_RV[-1].argmax()))


def start(model: ElasticModel, asked: Asked) -> Ran:
    """Raises CacheFull."""
    prompt = asked.prompt
    sequence = model.sequence(
        asked.capacity, len(prompt), asked.most_tokens, asked.scored, prompt=prompt
    )
    assert sequence.length == sequence.cached_tokens < len(prompt)
    return Ran(asked, sequence, sequence.cached_tokens, prompt)


def together(model: ElasticModel, mix: list[Asked]) -> list[Ran]:
    """Run a mix to its end: first come, first served, and who finds no room waits."""
    waiting = deque(sorted(mix, key=lambda asked: asked.arrives))
    running: list[Ran] = []
    over: list[Ran] = []
    for step in range(MOST_STEPS):
        while waiting and waiting[0].arrives <= step:
            try:
                running.append(start(model, waiting[0]))
            except CacheFull:
                if not running:
                    _never_fits(model, waiting[0])
                    waiting.popleft()
                    continue
                break
            waiting.popleft()
        for ran in running:
            ran.left = ran.steps == ran.asked.leaves
        chunks = {ran: ids for ran in running if not ran.left and (ids := ran.next_ids())}
        if chunks:
            logits = model.step([Chunk(ran.sequence, ids) for ran, ids in chunks.items()])
            for (ran, ids), rows in zip(chunks.items(), logits, strict=True):
                ran.take(len(ids), rows)
        for ran in [ran for ran in running if ran.is_over]:
            ran.sequence.release()
            running.remove(ran)
            over.append(ran)
        if not waiting and not running:
            return over
    raise AssertionError("a request that never ends")


def _never_fits(model: ElasticModel, asked: Asked) -> None:
    needed = model.blocks_for(asked.capacity, asked.prompt_tokens, asked.most_tokens, asked.scored)
    assert model.cache.free_blocks == model.cache.total_blocks, "nothing runs, and blocks are held"
    assert needed > model.cache.total_blocks, "refused, and there is room"
    event("a request larger than the cache")
