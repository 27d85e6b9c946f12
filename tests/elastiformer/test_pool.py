"""Promises of the pool: no block has two owners, nothing held is lost, what is free can be had."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from elastiformer import DENSE, Capacity, ElasticModel, Unit
from elastiformer.errors import CacheFull
from elastiformer.pool import BLOCK_TOKENS, Extent, Pool
from tests.elastiformer.elastic import elastic
from tests.examples import examples
from tests.tiny import HEAD_DIM, KV_HEADS, LAYERS

BLOCKS, BLOCK_ROWS, WIDTH = 11, 3, 2
FLOAT_BYTES = 4


def pool(grows: bool = False, blocks: int = BLOCKS) -> Pool:
    return Pool(blocks, BLOCK_ROWS, WIDTH, torch.float32, torch.device("cpu"), grows)


@dataclass(eq=False)
class Holder:
    """Somebody with blocks, who wrote one number all over them."""

    number: int
    blocks: int
    extent: Extent | None = None
    start: int = 0  # where it last saw its blocks
    told: bool = False  # that they were moved

    def moved(self) -> None:
        self.told = True


class Holders(RuleBasedStateMachine):
    """Sequences and a store that take and give back blocks, beside a plain list of them."""

    grows = False
    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool(self.grows)
        self.pool.evict_with(self.evict, lambda: sum(piece.blocks for piece in self.stored))
        self.count = 0
        self.held: list[Holder] = []
        self.stored: list[Holder] = []  # the oldest first
        self.evicted = 0

    def evict(self) -> bool:
        if not self.stored:
            return False
        self.pool.give(self.stored.pop(0).extent)
        self.evicted += 1
        return True

    @property
    def free(self) -> int:
        """Free blocks without any eviction."""
        return self.pool.total_blocks - sum(each.blocks for each in self.held + self.stored)

    def settle(self, holder: Holder, extent: Extent) -> Holder:
        assert extent.blocks == holder.blocks
        self.pool.of(extent)[:] = float(holder.number)
        holder.extent, holder.start = extent, extent.start
        return holder

    def newcomer(self, blocks: int) -> Holder:
        self.count += 1
        return Holder(self.count, blocks)

    @rule(target=sequences, blocks=st.integers(1, BLOCKS + 1))
    def take(self, blocks):
        holder, before = self.newcomer(blocks), self.evicted
        free, stored = self.free, [piece.blocks for piece in self.stored]
        fits = blocks <= free + sum(stored)
        try:
            extent = self.pool.take(blocks, holder.moved)
        except CacheFull as refusal:
            assert not fits and not self.grows
            assert str(blocks) in str(refusal)
            holder.blocks = 0
            return holder
        assert fits or self.grows
        if fits:  # the oldest made room, and no more of them than had to
            gone = self.evicted - before
            assert gone == 0 or free + sum(stored[: gone - 1]) < blocks
        self.held.append(self.settle(holder, extent))
        return holder

    @rule(blocks=st.integers(1, 4))
    def store(self, blocks):
        piece, before = self.newcomer(blocks), self.evicted
        starts = [each.start for each in self.held + self.stored]
        extent = self.pool.spare(blocks, piece.moved)
        assert self.evicted == before, "spare blocks are those that nobody has"
        assert [each.extent.start for each in self.held + self.stored] == starts
        if extent is None:
            assert self.largest_gap() < blocks
        else:
            self.stored.append(self.settle(piece, extent))

    @rule(holder=consumes(sequences))
    def give(self, holder):
        if holder.blocks:
            self.held.remove(holder)
            self.pool.give(holder.extent)

    @rule(holder=consumes(sequences))
    def forget(self, holder):
        if holder.blocks:
            self.held.remove(holder)
            self.pool.drop(holder.extent)
            assert self.pool.free_blocks == self.free + sum(piece.blocks for piece in self.stored)

    def largest_gap(self) -> int:
        spans = sorted((each.extent.start, each.blocks) for each in self.held + self.stored)
        edges = [(0, 0), *spans, (self.pool.total_blocks, 0)]
        return max(after - (start + blocks) for (start, blocks), (after, _) in pairwise(edges))

    @invariant()
    def nobody_shares_a_block(self):
        spans = sorted((each.extent.start, each.blocks) for each in self.held + self.stored)
        for (start, blocks), (after, _) in pairwise([*spans, (self.pool.total_blocks, 0)]):
            assert start >= 0 and start + blocks <= after

    @invariant()
    def everybody_finds_what_they_wrote_and_hears_of_moves(self):
        for each in self.held + self.stored:
            assert bool((self.pool.of(each.extent) == each.number).all())
            assert len(self.pool.of(each.extent)) == each.blocks * BLOCK_ROWS
            assert each.told or each.extent.start == each.start
            each.start, each.told = each.extent.start, False

    @invariant()
    def the_books_are_right(self):
        stored = sum(piece.blocks for piece in self.stored)
        held = sum(each.blocks for each in self.held)
        assert self.pool.free_blocks == self.pool.total_blocks - held
        row_bytes = WIDTH * FLOAT_BYTES
        assert self.pool.held_bytes == (held + stored) * BLOCK_ROWS * row_bytes


class HoldersOfAGrowingPool(Holders):
    """The same over a pool that refuses nobody."""

    grows = True


TestHolders = Holders.TestCase
TestHoldersOfAGrowingPool = HoldersOfAGrowingPool.TestCase
TestHolders.settings = TestHoldersOfAGrowingPool.settings = examples(60)


def test_free_blocks_that_lie_apart_are_moved_together():
    memory, heard = pool(), []
    extents = [memory.take(2, lambda at=at: heard.append(at)) for at in range(5)]
    for at, extent in enumerate(extents):
        memory.of(extent)[:] = float(at)
    memory.give(extents[0])
    memory.give(extents[2])
    assert memory.free_blocks == 5
    wide = memory.take(5, lambda: None)

    assert heard == [1, 3, 4]
    assert {extent.start for extent in (wide, extents[1], extents[3], extents[4])} == {0, 2, 4, 6}
    for at in (1, 3, 4):
        assert bool((memory.of(extents[at]) == at).all())


def test_a_pool_that_grows_tells_its_holders():
    memory, heard = pool(grows=True), []
    first = memory.take(BLOCKS, lambda: heard.append("first"))
    memory.of(first)[:] = 7.0
    memory.take(1, lambda: None)

    assert heard == ["first"] and bool((memory.of(first) == 7).all())
    assert memory.total_blocks > BLOCKS


def test_a_request_too_large_for_what_is_free_evicts_nothing():
    memory = pool()
    stored = [memory.spare(2, lambda: None)]
    memory.evict_with(lambda: bool(stored) and memory.give(stored.pop()) is None, lambda: 2)
    memory.take(4, lambda: None)
    with pytest.raises(CacheFull):
        memory.take(BLOCKS - 3, lambda: None)

    assert len(stored) == 1


# What a model's sequences take.


def opened(tokens: int, kv: str = "complete", prefixes: bool = False) -> ElasticModel:
    model = elastic(units=[Unit.ATTENTION_TOKENS, Unit.CHANNELS], kv=kv)
    model.open_cache(tokens, prefixes=prefixes)
    return model


def test_an_opened_cache_holds_the_dense_tokens_it_was_opened_for():
    model = opened(10 * BLOCK_TOKENS)

    assert model.cache.free_blocks == model.cache.total_blocks == 10 * LAYERS
    sequence = model.sequence(DENSE, 3, 10 * BLOCK_TOKENS)
    assert model.cache.free_blocks == 0
    token_bytes = 2 * KV_HEADS * HEAD_DIM * FLOAT_BYTES * LAYERS
    assert model.cache.held_bytes == 10 * BLOCK_TOKENS * token_bytes
    with pytest.raises(CacheFull, match="0 free blocks"):
        model.sequence(DENSE, 1, 1)
    sequence.release()
    sequence.release()
    assert model.cache.free_blocks == model.cache.total_blocks


@pytest.mark.parametrize("kv", ["complete", "kept"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.3])
@pytest.mark.parametrize(("prompt", "most"), [(1, 2), (150, 160), (20, 200)])
def test_what_a_sequence_will_take_is_known_beforehand(kv, share, prompt, most):
    model = opened(400, kv)
    capacity = DENSE if share == 1.0 else Capacity.parse({"attention_tokens": share})
    foreseen = model.blocks_for(capacity, prompt, most)
    model.sequence(capacity, prompt, most).release()
    sequence = model.sequence(capacity, prompt, most)

    assert model.cache.total_blocks - model.cache.free_blocks == foreseen
    whole = -(-most // BLOCK_TOKENS) * LAYERS
    if kv == "complete" or share == 1.0:
        assert foreseen == whole
    elif most > 100:
        assert foreseen < (share + 0.25) * whole
    sequence.release()


def test_a_sequence_that_nobody_released_gives_its_room_back():
    model = opened(64)
    sequence = model.sequence(DENSE, 3, 64)
    assert model.cache.free_blocks == 0
    del sequence
    gc.collect()

    assert model.cache.free_blocks == model.cache.total_blocks
    model.sequence(DENSE, 3, 64).release()


def test_without_an_opened_cache_every_sequence_has_memory_of_its_own():
    model = elastic()
    sequences = [model.sequence(DENSE, 3, 512) for _ in range(5)]

    assert model.cache is None and model.prefixes is None
    for sequence in sequences:
        sequence.release()
