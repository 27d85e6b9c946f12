"""Attention of whole requests in tile registers: against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from elastiformer import kernels, whole_requests

pytestmark = pytest.mark.skipif(
    not whole_requests.takes(whole_requests.SIZES), reason="the processor has no tile registers"
)
KEYS = np.array([5, 33, 16, 1, 70])  # of each request


@pytest.fixture(autouse=True)
def _threads():
    kernels.use_threads()


def starts_of(counts):
    return np.concatenate([[0], np.cumsum(counts)])


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(12, 12, 32), (6, 2, 64), (2, 1, 96)])
@pytest.mark.parametrize("queries", [KEYS, np.array([5, 17, 0, 1, 1])], ids=["all", "some"])
def test_every_query_attends_to_all_keys_of_its_request(heads, kv_heads, size, queries):
    torch.manual_seed(size)
    asked_S, held_S = starts_of(queries), starts_of(KEYS)
    # Queries, and keys with values, are parts of longer rows; what stands beside is no number.
    wide_NMH = torch.full((held_S[-1], heads + 2 * kv_heads + 1, size), float("nan")).bfloat16()
    keys_values_NMH = wide_NMH[:, heads:-1]
    keys_values_NMH.normal_()
    query_QAH = wide_NMH[: asked_S[-1], :heads].normal_(std=3)
    out_QAH = torch.full((asked_S[-1], heads, size), float("nan"), dtype=torch.bfloat16)
    given = query_QAH, keys_values_NMH, asked_S, held_S, size**-0.5
    whole_requests.attend(*given, out_QAH)
    for request in range(len(KEYS)):
        asked, held = (slice(*starts[request : request + 2]) for starts in (asked_S, held_S))
        if asked.start == asked.stop:
            continue
        key_KGH, value_KGH = keys_values_NMH[held].double().chunk(2, dim=1)
        expected_AQH = F.scaled_dot_product_attention(
            query_QAH[asked].double().transpose(0, 1)[None],
            key_KGH.transpose(0, 1)[None],
            value_KGH.transpose(0, 1)[None],
            enable_gqa=True,
        )[0]
        off_QAH = out_QAH[asked].double() - expected_AQH.transpose(0, 1)
        assert off_QAH.square().mean().sqrt() < 0.003 * expected_AQH.square().mean().sqrt()

        # By itself it gets the same bits.
        alone_QAH = torch.empty_like(out_QAH[asked])
        bounds = np.array([0, len(alone_QAH)]), np.array([0, KEYS[request]])
        parts = query_QAH[asked], keys_values_NMH[held]
        whole_requests.attend(*parts, *bounds, size**-0.5, alone_QAH)
        assert torch.equal(alone_QAH, out_QAH[asked])
