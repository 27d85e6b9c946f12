"""Attention of one request's tokens over its own cache, by PyTorch's SDPA.

It also registers what PyTorch's FlopCounterMode does not know: the formulas of SDPA on a CPU and
of `embedding_bag`, as the rectangle of queries and keys, and as chosen rows times their width.

Shape letters: Q queries   K keys   A query heads   G key/value heads   H head size
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula, sdpa_flop_count

from elastiformer.cache import LayerCache


def attend(
    query_QAH: Tensor,
    positions_Q: Tensor,
    cache: LayerCache,
    scale: float,
    window: int | None,
    softcap: float | None,
    heads: slice | None = None,
    fresh: bool = False,
) -> Tensor:
    """The attention output [Q, A, H] of queries at `positions_Q` over all that `cache` holds.

    Args:
        heads: the key/value heads that the query heads read, all by default.
        fresh: the queries are exactly the tokens that the cache holds, in order.
    """
    keys_GKH, values_GKH = cache.keys_GTH, cache.values_GTH
    if heads is not None:
        keys_GKH, values_GKH = keys_GKH[heads], values_GKH[heads]
    queries, query_heads, size = query_QAH.shape
    kv_heads = len(keys_GKH)
    group = query_heads // kv_heads
    if softcap is None and fresh and window is None and queries > 1:
        out_AQH = F.scaled_dot_product_attention(
            query_QAH.transpose(0, 1)[None],
            keys_GKH.repeat_interleave(group, 0)[None],
            values_GKH.repeat_interleave(group, 0)[None],
            is_causal=True,
            scale=scale,
        )[0]
        return out_AQH.transpose(0, 1)

    # The query heads of a group read the same keys: as more queries of one head, nothing is copied.
    query_GRH = query_QAH.view(queries, kv_heads, group, size).permute(1, 2, 0, 3)
    query_GRH = query_GRH.reshape(kv_heads, group * queries, size)
    seen_QK = _seen(positions_Q, cache.positions_T, window)
    seen_RK = None if seen_QK is None else seen_QK.repeat(group, 1)
    if softcap is None:
        out_GRH = F.scaled_dot_product_attention(
            query_GRH[None],
            keys_GKH[None],
            values_GKH[None],
            attn_mask=seen_RK,
            scale=scale,
        )[0]
    else:
        out_GRH = _softcapped(query_GRH, keys_GKH, values_GKH, seen_RK, scale, softcap)
    out_GAQH = out_GRH.view(kv_heads, group, queries, size)
    return out_GAQH.permute(2, 0, 1, 3).reshape(queries, query_heads, size)


def _seen(positions_Q: Tensor, positions_K: Tensor, window: int | None) -> Tensor | None:
    """Which keys each query sees; None when a single query, the latest, sees them all."""
    # A lone query may stand before keys of its own chunk whose tokens skipped this head or layer.
    is_latest = len(positions_Q) == 1 and bool(positions_Q[-1] == positions_K[-1])
    if is_latest and window is None:
        return None
    back_QK = positions_Q[:, None] - positions_K[None, :]
    seen_QK = back_QK >= 0
    if window is not None:
        seen_QK &= back_QK < window
    return seen_QK


def _softcapped(
    query_GRH: Tensor,
    keys_GKH: Tensor,
    values_GKH: Tensor,
    seen_RK: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    scores_GRK = softcap * torch.tanh(query_GRH @ keys_GKH.transpose(1, 2) * scale / softcap)
    if seen_RK is not None:
        scores_GRK = scores_GRK.masked_fill(~seen_RK, torch.finfo(scores_GRK.dtype).min)
    weights_GRK = scores_GRK.softmax(-1, dtype=torch.float32).to(query_GRH.dtype)
    return weights_GRK @ values_GKH


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _sdpa_cpu_flops(
    query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


@register_flop_formula(torch.ops.aten._embedding_bag)
def _embedding_bag_flops(weight: Any, indices: Any, *_: Any, **__: Any) -> int:
    chosen = 1
    for size in indices:
        chosen *= size
    return int(2 * chosen * weight[1])


@register_flop_formula(torch.ops.aten._embedding_bag_forward_only)
def _embedding_bag_forward_flops(weight: Any, indices: Any, *_: Any, **__: Any) -> int:
    return _embedding_bag_flops(weight, indices)
