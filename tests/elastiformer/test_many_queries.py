"""Attention of many queries in tile registers: against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from elastiformer import kernels, many_queries
from elastiformer.row_kernels import on_host

pytestmark = pytest.mark.skipif(
    not many_queries.takes(many_queries.SIZES), reason="the processor has no tile registers"
)


@pytest.fixture(autouse=True)
def _threads():
    kernels.use_threads()


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads", "size"),
    [(80, 80, 9, 3, 64), (10, 90, 9, 3, 64), (17, 17, 4, 4, 128), (2, 33, 2, 1, 64)],
)
def test_it_is_attention_to_the_keys_up_to_each_position(queries, keys, heads, kv_heads, size):
    torch.manual_seed(queries)
    room, first = -(-keys // 16) * 16, keys - queries
    key_GKH, value_GKH = torch.randn(2, kv_heads, keys, size).bfloat16()
    # What lies between is no number, as it may be where nobody has written yet.
    rows_NH = torch.full((3 + 2 * kv_heads * room, size), float("nan"), dtype=torch.bfloat16)
    held = rows_NH[3:].view(2, kv_heads, room, size)
    held[0, :, :keys], held[1, :, :keys] = key_GKH, value_GKH
    place = (3, 3 + kv_heads * room, room, keys)
    query_QAH = (3 * torch.randn(queries, heads, size)).bfloat16()
    out_QAH = torch.full_like(query_QAH, float("nan"))
    arrays = on_host(query_QAH), on_host(rows_NH)
    position_Q = np.arange(first, keys)
    position_Q[0] = max(first - 7, 0)  # not all need stand side by side
    many_queries.attend(*arrays, place, position_Q, kv_heads, size**-0.5, on_host(out_QAH))
    sees_QK = torch.from_numpy(position_Q)[:, None] >= torch.arange(keys)
    expected_AQH = F.scaled_dot_product_attention(
        query_QAH.transpose(0, 1)[None].double(),
        key_GKH[None].double(),
        value_GKH[None].double(),
        attn_mask=sees_QK,
        enable_gqa=True,
    )[0]
    off_QAH = out_QAH.double() - expected_AQH.transpose(0, 1)
    assert off_QAH.square().mean().sqrt() < 0.003 * expected_AQH.square().mean().sqrt()
    assert off_QAH.abs().max() < 0.02

    # Some of the queries by themselves, before the later keys are there, get the same bits.
    some = slice(queries // 3, queries // 3 + 5)
    alone_QAH = torch.empty_like(query_QAH[some])
    place = (*place[:3], min(first + some.stop, keys))
    arrays = on_host(query_QAH[some].contiguous()), on_host(rows_NH)
    of_some = position_Q[some]
    many_queries.attend(*arrays, place, of_some, kv_heads, size**-0.5, on_host(alone_QAH))
    assert np.array_equal(on_host(alone_QAH), on_host(out_QAH[some]))


def test_scores_far_apart_give_numbers():
    """All weight on one key, the others' far below what float32 holds."""
    rows_NH = torch.zeros(32, 64)
    rows_NH[:16, 0] = torch.linspace(-900, 900, 16)
    rows_NH[16:] = torch.arange(16)[:, None]
    query_QAH = torch.full((16, 1, 64), 40.0).bfloat16()
    out_QAH, small_NH = torch.empty_like(query_QAH), rows_NH.bfloat16()
    arrays = on_host(query_QAH), on_host(small_NH)
    many_queries.attend(*arrays, (0, 16, 16, 16), np.arange(16), 1, 1.0, on_host(out_QAH))
    assert torch.equal(out_QAH[:, 0], small_NH[16:])  # of each the latest
