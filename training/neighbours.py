"""Where the heads of a vision transformer look before it is trained: each at one neighbour of a
patch, as convolutions do.

Places stand in the table of positions as waves of the row and the column. What is learnt on top of
that is another file's.

Legend: P patches, U the width's numbers that hold places.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from training.fashion_mnist import SIDE

PATCH = 4  # pixels a side
GRID = SIDE // PATCH
OFFSETS = [(-1, 0), (0, 1), (1, 0), (0, -1), (-1, -1), (-1, 1), (1, 1), (1, -1)]
PERIOD = 15  # patches: waves of these lengths tell all shifts below it apart
WAVES = 7  # an axis


@torch.no_grad()
def neighbourly(vit: Any) -> None:
    """Let each head begin by looking at one neighbour of each patch.

    Waves of the row and the column stand in a few of the width's numbers, as the table of
    positions; queries read them, keys read them shifted, and the product is largest one patch away.
    """
    head_width = vit.config.hidden_size // vit.config.num_attention_heads
    places_PU = positions(GRID, head_width)
    used = places_PU.shape[1]
    waves = used // 4
    embeddings = vit.vit.embeddings
    embeddings.patch_embeddings.projection.weight[:used] = 0
    embeddings.patch_embeddings.projection.bias.zero_()
    embeddings.position_embeddings[0, 1:, :used] = places_PU
    for number, layer in enumerate(vit.vit.layers):
        for head in range(vit.config.num_attention_heads):
            mine = slice(head * head_width, head * head_width + used)
            place = (number * vit.config.num_attention_heads + head) % len(OFFSETS)
            turned = _turned(OFFSETS[place], waves)
            layer.attention.q_proj.weight[mine, :used] += 0.7 * torch.eye(used)
            layer.attention.k_proj.weight[mine, :used] += 0.7 * turned


def positions(grid: int, head_width: int) -> Tensor:
    """Waves of row and column for each patch of a square grid, as heads of this width read them."""
    waves = min(WAVES, head_width // 4)
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    return torch.cat([_waves(rows.flatten(), waves), _waves(columns.flatten(), waves)], 1)


def _waves(places: Tensor, waves: int) -> Tensor:
    angle = places[:, None] * torch.arange(1, waves + 1) * (2 * math.pi / PERIOD)
    return torch.stack([angle.cos(), angle.sin()], 2).flatten(1)


def _turned(offset: tuple[int, int], waves: int) -> Tensor:
    """The matrix that moves `positions` of each patch to those of the patch that has it there."""
    turned = torch.zeros(4 * waves, 4 * waves)
    at = 0
    for shift in offset:
        for wave in range(1, waves + 1):
            a = -wave * shift * 2 * math.pi / PERIOD
            turned[at : at + 2, at : at + 2] = torch.tensor(
                [[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]
            )
            at += 2
    return turned
