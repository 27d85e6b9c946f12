"""Attention of whole requests, every query over all keys of its own, in tile registers (AMX).

PyTorch's takes requests of one length in a call, others padded to it, and where these have a few
dozen keys it is several times slower than tiles. Here all requests of a layer are one call. A
query gets the same bits whichever requests go with it. A request's only query, as of a class token
where the others ask nothing, goes without tiles: to lay its keys out for them would take longer.

Shape letters: N rows   Q queries   K keys   A query heads   G key/value heads   H head size
    M keys' heads and values' heads   E all numbers of a memory   S requests, and one more
"""

from __future__ import annotations

import numpy as np
from numba import prange
from torch import Tensor

from elastiformer import amx
from elastiformer.amx import _configure, _release
from elastiformer.kernels import TURN, compiled
from elastiformer.many_queries import _config, _score, _weigh, adding
from elastiformer.row_kernels import _as_stored, _wide, flat, on_host
from elastiformer.tile_blocks import TILE, pack_queries, pack_values, put_out
from elastiformer.vectors import aligned

SIZES = 32  # heads of a multiple of so many channels
_TILES = 2
_add_two = adding(_TILES)


def takes(head_size: int) -> bool:
    """Whether queries of heads so wide can be answered here."""
    return amx.ABLE and head_size % SIZES == 0


def attend(
    query_QAH: Tensor,
    keys_values_NMH: Tensor,
    query_start_S: np.ndarray,
    key_start_S: np.ndarray,
    scale: float,
    out_QAH: Tensor,
) -> None:
    """Fill in the attention output of all queries. Only where `takes` says so.

    Args:
        query_QAH, keys_values_NMH, out_QAH: bfloat16; rows of the first two may lie apart.
        query_start_S, key_start_S: where each request's begin, and the last one's end.
    """
    _, heads, size = query_QAH.shape
    with TURN:
        _attend(
            flat(query_QAH), query_QAH.stride(0), heads, query_start_S,
            flat(keys_values_NMH), keys_values_NMH.stride(0), keys_values_NMH.shape[1] // 2,
            key_start_S, size, np.float32(scale), on_host(out_QAH),
        )  # fmt: skip


@compiled(fastmath={"contract", "reassoc", "nsz"})
def _ask_alone(query_H, key_value_E, key_at, value_at, apart, keys, scale_2, out_H):  # type: ignore[no-untyped-def]
    """The attention output of one head's one query."""
    size = len(query_H)
    weight_K, sum_H = np.empty(keys, dtype=np.float32), np.zeros(size, dtype=np.float32)
    most = np.float32(-np.inf)
    for k in range(keys):
        key_H, score = key_value_E[key_at + k * apart :][:size], np.float32(0)
        for h in range(size):
            score += _wide(query_H[h]) * _wide(key_H[h])
        weight_K[k] = score * scale_2
        most = max(most, weight_K[k])
    total = np.float32(0)
    for k in range(keys):
        value_H, weight = key_value_E[value_at + k * apart :][:size], np.exp2(weight_K[k] - most)
        total += weight
        for h in range(size):
            sum_H[h] += weight * _wide(value_H[h])
    for h in range(size):
        out_H[h] = _as_stored(sum_H[h] / total, out_H)


@compiled(parallel=True)
def _attend(  # type: ignore[no-untyped-def]
    query_E, query_apart, heads, query_start_S, key_value_E, apart, kv_heads, key_start_S, size,
    scale, out_QAH,
):  # fmt: skip
    group, tiles, steps = heads // kv_heads, size // 16, size // SIZES
    config = _config()
    scale_2 = scale * np.float32(1.4426950408889634)
    for task in prange((len(query_start_S) - 1) * kv_heads):
        request, kv_head = task // kv_heads, task % kv_heads
        first, end = query_start_S[request], query_start_S[request + 1]
        if first == end:
            continue
        keys = key_start_S[request + 1] - key_start_S[request]
        blocks, of_keys = (keys + 31) // 32, (keys + 15) // 16
        key_at = key_start_S[request] * apart + kv_head * size
        if end - first == 1:
            for head in range(kv_head * group, (kv_head + 1) * group):
                query_H = query_E[first * query_apart + head * size :][:size]
                value_at = key_at + kv_heads * size
                out_H = out_QAH[first, head]
                _ask_alone(query_H, key_value_E, key_at, value_at, apart, keys, scale_2, out_H)
            continue
        key_ = np.empty(of_keys * 16 * size, dtype=np.uint16)
        key_[keys * size :] = 0
        for k in range(keys):
            at = key_at + k * apart
            key_[k * size : (k + 1) * size] = key_value_E[at : at + size]
        value_ = aligned(tiles * blocks * TILE)
        for block in range(blocks):
            at, count = key_at + kv_heads * size + 32 * block * apart, min(32, keys - 32 * block)
            to = block * TILE
            pack_values(key_value_E, at, apart, tiles, count, value_, to, blocks * TILE)
        query_, totals_, added_ = aligned(steps * TILE), aligned(16), aligned(_TILES * TILE)
        score_, weight_ = aligned(of_keys * TILE), aligned(blocks * TILE)
        position_ = np.full(16, keys - 1, dtype=np.int32)
        _configure(config)
        for begin in range(first, end, 16):
            count = min(16, end - begin)
            for head in range(kv_head * group, (kv_head + 1) * group):
                at = begin * query_apart + head * size
                pack_queries(query_E, at, query_apart, count - 1, steps, query_)
                _score(key_, 0, size, query_, steps, of_keys, score_)
                _weigh(score_, scale_2, position_, keys // 2, of_keys * 8, weight_, totals_)
                for some in range(0, tiles, _TILES):
                    _add_two(value_, some * blocks * TILE, blocks * TILE, weight_, blocks, added_)
                    to = (begin * heads + head) * size + some * 16
                    put_out(added_, _TILES, totals_, out_QAH, to, heads * size, count)
        _release()
