"""Promises of the store of prefixes: a hit is what would have been computed, or there is none."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from elastiformer import DENSE, Capacity, Chunk, ElasticModel, Sequence, Unit, Usage
from elastiformer.errors import CacheFull
from elastiformer.pool import BLOCK_TOKENS
from elastiformer.prefixes import PIECE_TOKENS
from tests.elastiformer.elastic import elastic, text
from tests.tiny import LAYERS

CLOSE = {"atol": 2e-4, "rtol": 2e-4}  # float32, other shapes, so other rounding
PROMPT = 2 * PIECE_TOKENS + 7
ROOM = 16 * PIECE_TOKENS
PIECE_BLOCKS = PIECE_TOKENS // BLOCK_TOKENS * LAYERS
IDS = text(PROMPT, seed=21)[0].tolist()
OTHER = text(PROMPT, seed=22)[0].tolist()

CAPACITIES = [
    DENSE,
    Capacity.parse({"channels": 0.5, "heads": 0.5}),
    Capacity.parse({"attention_tokens": 0.3, "mlp_tokens": 0.75}),
    Capacity.parse({"prompt": {"attention_tokens": 0.75}, "output": {"mlp_tokens": 0.3}}),
]
ROUTED = CAPACITIES[2]


def opened(family: str = "llama", kv: str = "complete", tokens: int = ROOM) -> ElasticModel:
    model = elastic(family, kv=kv)
    model.open_cache(tokens)
    return model


def begin(
    model: ElasticModel,
    prompt: list[int],
    capacity: Capacity = DENSE,
    new: int = 1,
    scored: bool = False,
) -> Sequence:
    most = len(prompt) + new
    return model.sequence(capacity, len(prompt), most, scored, prompt=prompt)


def feed(model: ElasticModel, sequence: Sequence, ids: list[int], *stops: int) -> Tensor:
    """Run what a sequence lacks of `ids`, in chunks that end at `stops`: its logits."""
    rows = []
    for stop in (*stops, len(ids)):
        if stop > sequence.length:
            rows += model.step([Chunk(sequence, ids[sequence.length : stop])])
    return torch.cat(rows)


def remember(
    model: ElasticModel, prompt: list[int], capacity: Capacity = DENSE, new: int = 1
) -> None:
    """A request that comes, leaves its prompt's beginning behind, and goes."""
    sequence = begin(model, prompt, capacity, new)
    feed(model, sequence, prompt, *range(PIECE_TOKENS, len(prompt), PIECE_TOKENS))
    sequence.release()


def cached(model: ElasticModel, prompt: list[int], capacity: Capacity = DENSE) -> int:
    """What a request would find; it leaves at once."""
    sequence = begin(model, prompt, capacity)
    sequence.release()
    return sequence.cached_tokens


def computed(
    served: ElasticModel, prompt: list[int], capacity: Capacity, known: int
) -> tuple[Tensor, Usage]:
    """Logits without any store, and the usage of what comes after the first `known` tokens."""
    model = ElasticModel(served.base, served.adapter)
    sequence = model.sequence(capacity, len(prompt), len(prompt) + 1)
    model.step([Chunk(sequence, prompt[:known])])
    before = copy.deepcopy(sequence.usage)
    logits = feed(model, sequence, prompt)
    after = {}
    for each in fields(Usage):
        now, then = getattr(sequence.usage, each.name), getattr(before, each.name)
        after[each.name] = (
            {key: now[key] - then.get(key, 0) for key in now}
            if isinstance(now, dict)
            else now - then
        )
    return logits, Usage(**after)


# A hit.


@pytest.mark.parametrize("kv", ["complete", "kept"])
@pytest.mark.parametrize("capacity", CAPACITIES, ids=lambda each: str(each.as_json()))
def test_a_hit_gives_what_computing_gives_and_costs_nothing(family, kv, capacity):
    model = opened(family, kv)
    remember(model, IDS, capacity)
    sequence = begin(model, IDS, capacity)
    assert sequence.cached_tokens == sequence.length == 2 * PIECE_TOKENS
    assert sequence.usage == Usage()
    logits = feed(model, sequence, IDS)
    expected, usage = computed(model, IDS, capacity, 2 * PIECE_TOKENS)

    torch.testing.assert_close(logits, expected, **CLOSE)
    assert sequence.usage == usage


@pytest.mark.parametrize("kv", ["complete", "kept"])
def test_the_debts_of_token_routers_go_on_from_where_they_stood(kv):
    """Without them the controller would begin anew, and keep other tokens than it should."""
    model = opened(kv=kv)
    remember(model, IDS[: PIECE_TOKENS + 1], ROUTED)
    prompt = IDS[:PIECE_TOKENS] + OTHER[:30]
    sequence = begin(model, prompt, ROUTED)
    assert sequence.cached_tokens == PIECE_TOKENS
    assert any(abs(owed) > 0.5 for owed, _ in sequence.debts().values())
    logits = feed(model, sequence, prompt)
    expected, usage = computed(model, prompt, ROUTED, PIECE_TOKENS)

    torch.testing.assert_close(logits, expected, **CLOSE)
    assert sequence.usage == usage


def test_the_last_prompt_token_is_always_computed():
    model = opened()
    remember(model, IDS)

    assert cached(model, IDS[: 2 * PIECE_TOKENS]) == PIECE_TOKENS
    assert cached(model, IDS[: 2 * PIECE_TOKENS + 1]) == 2 * PIECE_TOKENS
    assert cached(model, IDS[:1]) == 0


def test_a_prompt_hits_as_far_as_it_is_the_same():
    model = opened()
    remember(model, IDS)

    assert cached(model, IDS[: PIECE_TOKENS + 5] + OTHER[:40]) == PIECE_TOKENS
    assert cached(model, IDS[: PIECE_TOKENS - 1] + OTHER[:40]) == 0
    assert cached(model, IDS[:PIECE_TOKENS] * 2 + [1]) == PIECE_TOKENS


def test_a_sequence_does_not_see_what_happens_to_the_store_after_its_hit():
    model = opened(tokens=8 * PIECE_TOKENS)
    remember(model, IDS)
    sequence = begin(model, IDS)
    for seed in range(4):  # enough to evict all of it
        remember(model, text(PROMPT, seed=30 + seed)[0].tolist())
    logits = feed(model, sequence, IDS)
    expected, _ = computed(model, IDS, DENSE, 2 * PIECE_TOKENS)

    torch.testing.assert_close(logits, expected, **CLOSE)


# No hit.


@pytest.mark.parametrize("stored", CAPACITIES, ids=lambda each: str(each.as_json()))
def test_nothing_computed_at_one_capacity_is_served_to_another(stored):
    model = opened()
    remember(model, IDS, stored)
    others = [each for each in CAPACITIES if each is not stored]

    assert [cached(model, IDS, other) for other in others] == [0, 0, 0]
    assert cached(model, IDS, stored) == 2 * PIECE_TOKENS


def test_only_the_prompts_own_share_decides():
    model = opened()
    remember(model, IDS, Capacity.parse({"prompt": {"channels": 0.5}, "output": 1.0}))
    same = Capacity.parse({"prompt": {"channels": 0.5}, "output": {"heads": 0.5}})

    assert cached(model, IDS, same) == 2 * PIECE_TOKENS


@pytest.mark.parametrize("capacity", [DENSE, ROUTED], ids=["dense", "routed"])
def test_a_scored_prompt_neither_finds_nor_leaves_anything(capacity):
    model = opened()
    scored = begin(model, IDS, capacity, scored=True)
    feed(model, scored, IDS, PIECE_TOKENS, 2 * PIECE_TOKENS)
    assert model.prefixes.stored_tokens == 0
    remember(model, IDS, capacity)

    assert begin(model, IDS, capacity, scored=True).cached_tokens == 0
    assert cached(model, IDS, capacity) == 2 * PIECE_TOKENS


def test_generated_tokens_are_not_stored_as_a_prompt():
    model = opened()
    short = IDS[: PIECE_TOKENS - 4]
    sequence = begin(model, short, new=20)
    feed(model, sequence, short)
    for token in OTHER[:19]:
        model.step([Chunk(sequence, [token])])
    sequence.release()

    assert model.prefixes.stored_tokens == 0
    assert cached(model, short + OTHER[:19]) == 0


def test_a_cache_opened_without_prefixes_keeps_none():
    model = elastic()
    model.open_cache(ROOM, prefixes=False)
    remember(model, IDS)

    assert model.prefixes is None
    assert cached(model, IDS) == 0


# What it takes, and how it gives way.


def test_hits_are_counted():
    model = opened()
    counts = model.prefixes
    remember(model, IDS)
    assert (counts.queried_tokens, counts.hit_tokens) == (PROMPT - 1, 0)
    assert counts.stored_tokens == 2 * PIECE_TOKENS
    remember(model, IDS)
    assert (counts.queried_tokens, counts.hit_tokens) == (2 * (PROMPT - 1), 2 * PIECE_TOKENS)
    assert counts.stored_tokens == 2 * PIECE_TOKENS  # once


def test_what_is_stored_counts_as_free_and_gives_way():
    model = opened()
    remember(model, IDS)
    memory = model.cache
    assert memory.held_bytes > 0
    assert memory.free_blocks == memory.total_blocks
    whole = model.sequence(DENSE, 3, ROOM)

    assert memory.free_blocks == 0 and model.prefixes.stored_tokens == 0
    whole.release()
    assert cached(model, IDS) == 0


def test_the_least_recently_used_gives_way_first():
    prompts = [text(PIECE_TOKENS + 1, seed=40 + each)[0].tolist() for each in range(3)]
    model = opened()
    for prompt in prompts:
        remember(model, prompt)
    assert cached(model, prompts[0]) == PIECE_TOKENS
    # All the free blocks, and those of two of the three.
    free = model.cache.total_blocks - PIECE_BLOCKS
    taken = model.sequence(DENSE, 3, free // LAYERS * BLOCK_TOKENS)
    assert model.prefixes.stored_tokens == PIECE_TOKENS
    taken.release()

    assert [cached(model, prompt) for prompt in prompts] == [PIECE_TOKENS, 0, 0]


def test_an_end_gives_way_before_its_beginning():
    model = opened()
    remember(model, IDS)
    free = model.cache.total_blocks - PIECE_BLOCKS
    model.sequence(DENSE, 3, free // LAYERS * BLOCK_TOKENS).release()

    assert cached(model, IDS) == PIECE_TOKENS


def test_a_request_that_finds_no_room_leaves_the_store_alone():
    model = opened()
    remember(model, IDS)
    running = model.sequence(DENSE, 3, ROOM // 2)
    with pytest.raises(CacheFull):
        model.sequence(DENSE, 3, ROOM // 2 + BLOCK_TOKENS)
    running.release()

    assert cached(model, IDS) == 2 * PIECE_TOKENS


def test_room_for_one_piece_stores_the_first_one():
    """The second must not push out the one that it goes on from."""
    own = -(-(PROMPT + 1) // BLOCK_TOKENS)
    model = opened(tokens=(own + PIECE_BLOCKS // LAYERS) * BLOCK_TOKENS)
    sequence = begin(model, IDS)
    feed(model, sequence, IDS)

    assert model.prefixes.stored_tokens == PIECE_TOKENS
    sequence.release()
    assert cached(model, IDS) == PIECE_TOKENS
    model.sequence(DENSE, 3, BLOCK_TOKENS * (own + PIECE_BLOCKS // LAYERS)).release()
    assert model.prefixes.stored_tokens == 0
    assert model.cache.held_bytes == 0


def test_one_sequence_that_stores_piece_after_piece_while_others_push_them_out():
    model = opened(tokens=9 * BLOCK_TOKENS)
    slow = begin(model, IDS, new=0)
    for start in range(0, PROMPT, 8):
        model.step([Chunk(slow, IDS[start : start + 8])])
        with pytest.raises(CacheFull):
            model.sequence(DENSE, 3, ROOM)
        quick = begin(model, text(BLOCK_TOKENS, seed=start)[0].tolist(), new=0)
        quick.release()
    slow.release()

    assert model.cache.free_blocks == model.cache.total_blocks
    model.sequence(DENSE, 3, 9 * BLOCK_TOKENS).release()
    assert model.prefixes.stored_tokens == 0
    assert model.cache.held_bytes == 0


@pytest.mark.parametrize("kv", ["complete", "kept"])
def test_compaction_moves_what_is_stored_with_everything_else(kv):
    model = opened(kv=kv, tokens=16 * BLOCK_TOKENS)
    first = begin(model, OTHER[:BLOCK_TOKENS], new=0)
    second = begin(model, OTHER[: 3 * BLOCK_TOKENS], new=0)
    remember(model, IDS[: PIECE_TOKENS + 1], ROUTED)
    first.release()
    begin(model, OTHER[:9], new=0)
    second.release()
    wide = model.sequence(DENSE, 3, 11 * BLOCK_TOKENS)
    wide.release()
    prompt = IDS[:PIECE_TOKENS] + OTHER[:30]
    sequence = begin(model, prompt, ROUTED)
    assert sequence.cached_tokens == PIECE_TOKENS
    expected, _ = computed(model, prompt, ROUTED, PIECE_TOKENS)

    torch.testing.assert_close(feed(model, sequence, prompt), expected, **CLOSE)
    assert Unit.ATTENTION_TOKENS in {unit for _, unit, _ in sequence.debts()}


def test_pieces_of_two_sequences_fit_together_though_their_routes_differ():
    """Rounding in another batch may send one token another way; no key may then stand twice."""
    model, share = opened(kv="kept"), Capacity.parse({"attention_tokens": 0.5})
    first, second = begin(model, IDS, share), begin(model, IDS, share)

    def nudge(by: float) -> None:
        for name, parameter in model.trainable().items():
            if name.endswith("attention_tokens.bias"):
                parameter.data += by

    model.step([Chunk(first, IDS[:PIECE_TOKENS])])
    nudge(9.0)  # a rounding error that can be relied on
    model.step([Chunk(second, IDS[:PIECE_TOKENS])])
    nudge(-9.0)
    assert (first.cache.length_L != second.cache.length_L).any()
    model.step([Chunk(second, IDS[PIECE_TOKENS : 2 * PIECE_TOKENS])])
    third = begin(model, IDS, share)

    for layer in range(LAYERS):
        found = third.cache.positions_K(layer).tolist()
        assert found == sorted(set(found)), f"layer {layer}"
        if third.cached_tokens == 2 * PIECE_TOKENS:
            after = [place for place in found if place >= PIECE_TOKENS]
            computed_by = second.cache.positions_K(layer).tolist()
            assert after == [place for place in computed_by if place >= PIECE_TOKENS]


@pytest.mark.parametrize("prompt_tokens", [PROMPT, PIECE_TOKENS - 4, 2 * PIECE_TOKENS + 1])
@pytest.mark.parametrize("kv", ["complete", "kept"])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_of_a_shared_prompt_only_the_last_token_is_computed_again(capacity, kv, prompt_tokens):
    model, prompt = opened(kv=kv), IDS[:prompt_tokens]
    most = prompt_tokens + 3
    stops = range(PIECE_TOKENS, prompt_tokens, PIECE_TOKENS)
    first = model.sequence(capacity, prompt_tokens, most, prompt=prompt, shared=True)
    feed(model, first, prompt + OTHER[:2], *stops)  # the rest is stored after tokens that follow
    second = model.sequence(capacity, prompt_tokens, most, prompt=prompt)
    assert second.cached_tokens == prompt_tokens - 1
    expected, usage = computed(model, prompt, capacity, prompt_tokens - 1)
    torch.testing.assert_close(feed(model, second, prompt), expected, **CLOSE)
    assert second.usage.flops == usage.flops


def test_the_rest_of_a_shared_prompt_serves_no_longer_one():
    model, prompt = opened(), IDS[: PIECE_TOKENS + 9]
    shared = model.sequence(DENSE, len(prompt), len(prompt), prompt=prompt, shared=True)
    feed(model, shared, prompt)
    assert cached(model, prompt) == len(prompt) - 1
    assert cached(model, IDS[: len(prompt) + 1]) == PIECE_TOKENS
    assert cached(model, IDS[: 2 * PIECE_TOKENS + 1]) == PIECE_TOKENS
    feed(model, begin(model, IDS), IDS)  # and does not stand in the way of what is stored of it
    assert cached(model, IDS) == 2 * PIECE_TOKENS
