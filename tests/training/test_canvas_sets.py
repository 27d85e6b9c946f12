"""Which image tokens a step of learning to answer sees."""

import torch

from training.canvas_sets import LEAST, WHOLE_EVERY, middle_sets, mixed_sets
from training.canvas_tower import PATCHES, Sight
from training.canvases import KINDS

CANVASES, COVERED, MIDDLE = 4, 30, 7


def sight():
    """Sure that an item covers the first patches, and has its middle in one of them."""
    kinds_BPK = torch.zeros(CANVASES, PATCHES, len(KINDS) + 1)
    kinds_BPK[:, :COVERED, 0] = kinds_BPK[:, COVERED:, -1] = 50.0
    middles_BP2 = torch.zeros(CANVASES, PATCHES, 2)
    middles_BP2[..., 0] = 1.0
    middles_BP2[:, MIDDLE, 1] = 5.0
    return Sight(kinds_BPK, torch.zeros(CANVASES, PATCHES, 5), middles_BP2)


def chance(step):
    return torch.Generator().manual_seed(step)


def test_at_first_the_middles_stay_and_now_and_then_all():
    for step in range(1, WHOLE_EVERY):
        kept_BP = middle_sets(10, sight(), step, chance(step))
        assert kept_BP.shape == (CANVASES, 10) and bool((kept_BP == MIDDLE).any(1).all())
        assert bool((kept_BP.diff(dim=1) > 0).all())
    assert middle_sets(10, sight(), WHOLE_EVERY, chance(0)).shape[1] == PATCHES


def test_then_sets_of_every_size_some_of_items_alone_some_even():
    sizes, shares = [], []
    for step in range(200):
        kept_BP = mixed_sets(sight(), step, chance(step))
        assert bool((kept_BP.diff(dim=1) > 0).all())
        size = kept_BP.shape[1]
        sizes.append(size)
        assert size == PATCHES if step % WHOLE_EVERY == 0 else LEAST <= size <= PATCHES
        if size <= COVERED:
            shares += ((kept_BP < COVERED).float().mean(1)).tolist()
    assert min(sizes) < 1.2 * LEAST and sum(size < PATCHES / 3 for size in sizes) > 60
    alone = sum(share == 1 for share in shares) / len(shares)
    even = sum(share < 2 * COVERED / PATCHES for share in shares) / len(shares)
    assert 0.15 < alone < 0.6 and 0.2 < even < 0.6
    assert torch.equal(mixed_sets(sight(), 3, chance(3)), mixed_sets(sight(), 3, chance(3)))
