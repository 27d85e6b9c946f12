"""Which image tokens a step of learning to answer sees, drawn from what the tower sees of a canvas.

At first few, always those where an item has its middle: that is quickest learnt from. Then sets of
every size and kind, so that whoever leaves image tokens out later finds a model that knows them.

Legend: B batch, P patches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training.canvas_tower import PATCHES, Sight

WHOLE_EVERY = 8  # steps: so often a step sees all image tokens
LEAST = 16  # image tokens of a canvas, of the sets of every kind
EVEN = 1 / 3  # of those sets are drawn from all patches alike
SURELY = 1.5  # a leaning of 1 is enough to take what is covered before all else


def middle_sets(count: int, sight: Sight, step: int, chance: torch.Generator) -> Tensor:
    """So many tokens, among them those where an item has its middle; ascending."""
    middle_BP = sight.middles_BP2[..., -1].cpu() > 0
    drawn_BP = torch.rand(middle_BP.shape, generator=chance)
    return _best(drawn_BP + middle_BP, PATCHES if step % WHOLE_EVERY == 0 else count)


def mixed_sets(sight: Sight, step: int, chance: torch.Generator) -> Tensor:
    """From LEAST tokens to all, drawn evenly or leaning, lightly to wholly, towards items.

    Small numbers are as likely as large ones: a logarithm is what is drawn evenly.
    """
    covered_BP = 1 - sight.kinds_BPK.float().softmax(2)[..., -1].cpu()
    canvases = len(covered_BP)
    leaning_B1 = SURELY * torch.rand(canvases, 1, generator=chance)
    leaning_B1 *= torch.rand(canvases, 1, generator=chance) >= EVEN
    drawn_BP = torch.rand(covered_BP.shape, generator=chance)
    share = float(torch.rand((), generator=chance))
    count = round(LEAST * math.exp(share * math.log(PATCHES / LEAST)))
    chosen_BP = drawn_BP + leaning_B1 * covered_BP
    return _best(chosen_BP, PATCHES if step % WHOLE_EVERY == 0 else count)


def _best(chosen_BP: Tensor, count: int) -> Tensor:
    return chosen_BP.topk(count).indices.sort(1).values
