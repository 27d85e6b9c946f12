"""Attention of encoders: every token sees those before it and those after it.

Shape letters: N packed queries   Q queries of a request   K keys   A query heads   H head size
    G key/value heads   B requests of one call   R rows with keys and values
    M keys' heads and values' heads
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from elastiformer import whole_requests
from elastiformer.attention import Read, Reads
from elastiformer.families import Layer
from elastiformer.spare_rows import empty


class BothWays:
    """An encoder's attention: every query sees all keys of its request, or a window both ways.

    Requests with as many queries and keys are one call, as images are, and so are others of like
    length, padded. In bfloat16, where a CPU has tile registers, all are one (whole_requests.py).
    Where a window hides keys, each request is a call.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, head_size: int) -> None:
        in_tiles = _takes_tiles(device, dtype, head_size)
        self.name = "tiles, both ways" if in_tiles else "sdpa, both ways"

    def attend(self, query_NAH: Tensor, position_N: Tensor, reads: Reads, layer: Layer) -> Tensor:
        sides = reads.sides
        assert sides is not None, "whole requests"
        if layer.window is not None and sides.keys.counts_C.max() > layer.window:
            outs = [self.one(query_NAH, position_N, read, layer) for read in reads.each]
            return torch.cat(outs)
        working, keys_values_RMH = query_NAH.dtype, sides.keys_values_RMH
        if _goes_in_tiles(query_NAH):
            out_NAH = empty(tuple(query_NAH.shape), working, query_NAH.device)
            starts = sides.queries.starts, sides.keys.starts
            whole_requests.attend(query_NAH, keys_values_RMH, *starts, layer.scale, out_NAH)
            return out_NAH
        if sides.queries.each == 1 and working == torch.bfloat16 and query_NAH.is_cpu:
            # For lone queries PyTorch's kernel takes twice as long in bfloat16.
            query_NAH, keys_values_RMH = query_NAH.float(), keys_values_RMH.float()
        if sides.queries.each is not None and sides.keys.each is not None:
            sizes = sides.queries.each, sides.keys.each
            return _together(query_NAH, keys_values_RMH, *sizes, layer.scale).to(working)
        out_NAH = empty(tuple(query_NAH.shape), query_NAH.dtype, query_NAH.device)
        for group in sides.queries.groups(sides.keys, query_NAH.device):
            out_RAH = _together(
                query_NAH.index_select(0, group.query_R),
                keys_values_RMH.index_select(0, group.key_R),
                group.queries,
                group.keys,
                layer.scale,
                group.held_B11K,
            )
            out_NAH.index_copy_(0, group.asked_R, out_RAH.index_select(0, group.real_R))
        return out_NAH.to(working)

    def one(self, query_NAH: Tensor, position_N: Tensor, read: Read, layer: Layer) -> Tensor:
        """The attention output of one request's queries."""
        seen_QK = None
        if layer.window is not None and read.held.length > layer.window:
            seen_QK = _near(position_N[read.queries], read, layer.window)
        out_AQH = F.scaled_dot_product_attention(
            query_NAH[read.queries].transpose(0, 1)[None],
            read.held.keys_GKH[None],
            read.held.values_GKH[None],
            attn_mask=seen_QK,
            scale=layer.scale,
        )[0]
        return out_AQH.transpose(0, 1)


def _takes_tiles(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    return device.type == "cpu" and dtype == torch.bfloat16 and whole_requests.takes(head_size)


def _goes_in_tiles(query_NAH: Tensor) -> bool:
    counted = torch._C._len_torch_dispatch_stack()  # somebody counts operators
    return not counted and _takes_tiles(query_NAH.device, query_NAH.dtype, query_NAH.shape[2])


def _together(
    query_NAH: Tensor,
    keys_values_RMH: Tensor,
    queries: int,
    keys: int,
    scale: float,
    held_B11K: Tensor | None = None,
) -> Tensor:
    """The attention output of requests of one size, each with all keys that it holds: [N, A, H]."""
    query_BQAH = query_NAH.view(-1, queries, *query_NAH.shape[1:])
    keys_values_BKMH = keys_values_RMH.view(-1, keys, *keys_values_RMH.shape[1:])
    key_BKGH, value_BKGH = keys_values_BKMH.chunk(2, dim=2)
    out_BAQH = F.scaled_dot_product_attention(
        query_BQAH.transpose(1, 2),
        key_BKGH.transpose(1, 2),
        value_BKGH.transpose(1, 2),
        attn_mask=held_B11K,
        scale=scale,
    )
    return out_BAQH.transpose(1, 2).flatten(0, 1)


def _near(positions_Q: Tensor, read: Read, window: int) -> Tensor:
    """Which keys each query sees in a window that reaches both ways."""
    positions_K = read.positions_K
    if positions_K is None:
        positions_K = torch.arange(read.held.length, device=positions_Q.device)
    return (positions_Q[:, None] - positions_K[None, :]).abs() < window
