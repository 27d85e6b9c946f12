"""Attention of single queries, each over its own part of the pool: against PyTorch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from elastiformer import kernels
from elastiformer.single_queries import Singles, attend

LENGTHS = (1, 15, 16, 17, 70)


@pytest.fixture(autouse=True)
def _threads():
    kernels.use_threads()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (4, 4, 12), (5, 1, 40)])
def test_it_is_pytorchs_attention_and_a_query_alone_gets_the_same_bits(
    heads, kv_heads, size, dtype
):
    torch.manual_seed(size)
    rows_NH = torch.randn(3 + 2 * kv_heads * sum(LENGTHS), size).to(dtype)
    query_QAH = torch.randn(len(LENGTHS) + 2, heads, size)
    # Of each request first the keys, head after head, then the values; a gap before all.
    key_S = 3 + 2 * kv_heads * np.cumsum([0, *LENGTHS[:-1]])
    room_S = np.array(LENGTHS)
    query_S = np.array([4, 2, 0, 5, 1])
    singles = Singles(
        rows_NH, kv_heads, query_S, room_S - 1, key_S, key_S + kv_heads * room_S, room_S, room_S
    )
    out_QAH = np.full(query_QAH.shape, np.nan, dtype=np.float32)
    attend(singles, query_QAH.numpy(), 0.3, out_QAH)
    for single, (query, length) in enumerate(zip(query_S, LENGTHS, strict=True)):
        of_request = rows_NH[key_S[single] :][: 2 * kv_heads * length].float()
        key_GKH, value_GKH = of_request.view(2, kv_heads, length, size)
        expected_AH = F.scaled_dot_product_attention(
            query_QAH[query, None, :, None], key_GKH[None], value_GKH[None], scale=0.3,
            enable_gqa=True,
        )[0, :, 0]  # fmt: skip
        found_AH = torch.from_numpy(out_QAH[query])
        # Where numbers go in pairs, queries and weights are rounded to bfloat16.
        off = 1e-2 if dtype == torch.bfloat16 and size == 64 else 2e-5
        torch.testing.assert_close(found_AH, expected_AH, rtol=off, atol=off)
        one = slice(single, single + 1)
        arrays = (query_S, room_S - 1, key_S, key_S + kv_heads * room_S, room_S, room_S)
        alone_QAH = np.empty_like(out_QAH)
        attend(
            Singles(rows_NH, kv_heads, *(array[one] for array in arrays)),
            query_QAH.numpy(),
            0.3,
            alone_QAH,
        )
        assert np.array_equal(alone_QAH[query], out_QAH[query])
    assert np.isnan(out_QAH[[3, 6]]).all()  # nobody asked
