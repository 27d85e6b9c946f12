"""Attention of single queries, each over its own part of the pool, compiled for a CPU.

In decoding every request asks with one token. PyTorch's attention is one call a request, and
starting it costs more than computing it; here all requests and heads of a layer are one call.

Shape letters: N rows of the pool   Q queries   A query heads   G key/value heads   H head size
    S single queries   K keys
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic
from torch import Tensor

from elastiformer.kernels import TURN, compiled
from elastiformer.row_kernels import _exponential


@dataclass(frozen=True, slots=True)
class Singles:
    """Requests that ask with one token each, which sees all keys that there are."""

    rows_NH: Tensor  # of the pool
    kv_heads: int
    query_S: np.ndarray  # which of the packed queries
    last_S: np.ndarray  # its position
    key_S: np.ndarray  # where the keys begin among the rows, head after head
    value_S: np.ndarray
    room_S: np.ndarray  # how far apart the heads are
    length_S: np.ndarray  # how many tokens they hold

    def __len__(self) -> int:
        return len(self.query_S)

    def before(self, position: int) -> Singles:
        """Those whose query stands before a position."""
        kept_S = self.last_S < position
        if kept_S.all():
            return self
        arrays = (self.query_S, self.last_S, self.key_S, self.value_S, self.room_S, self.length_S)
        return Singles(self.rows_NH, self.kv_heads, *(array[kept_S] for array in arrays))


def attend(singles: Singles, query_QAH: np.ndarray, scale: float, out_QAH: np.ndarray) -> None:
    """Fill in the attention output of single queries, each over all keys of its request."""
    with TURN:
        _attend(
            on_host(singles.rows_NH), query_QAH, singles.query_S, singles.key_S, singles.value_S,
            singles.room_S, singles.length_S, query_QAH.shape[1], singles.kv_heads,
            np.float32(scale), out_QAH,
        )  # fmt: skip


def on_host(rows_NH: Tensor) -> np.ndarray:
    """The pool as kernels take it: of bfloat16, the bits."""
    is_small = rows_NH.dtype == torch.bfloat16
    rows: np.ndarray = (rows_NH.view(torch.uint16) if is_small else rows_NH).numpy()
    return rows


@intrinsic
def _wide(typing: Any, stored: Any) -> Any:
    """A stored number as float32: of type uint16 it is a bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0] == types.float32:
            return args[0]
        bits = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.Constant(bits.type, 16)), ir.FloatType())

    return types.float32(stored), generate


@compiled(fastmath={"contract", "reassoc", "nsz"})
def _exponentials(score_K: Any) -> Any:
    """exp(score - largest) in place, and their sum."""
    largest = score_K[0]
    for k in range(len(score_K)):
        largest = max(largest, score_K[k])
    total = np.float32(0)
    for k in range(len(score_K)):
        score_K[k] = _exponential(score_K[k] - largest)
        total += score_K[k]
    return total


@compiled(parallel=True, fastmath={"contract", "reassoc", "nsz"})
def _attend(  # type: ignore[no-untyped-def]
    rows_NH, query_QAH, query_S, key_S, value_S, room_S, length_S, heads, kv_heads, scale, out_QAH
):
    size, group = query_QAH.shape[2], heads // kv_heads
    for task in prange(len(query_S) * heads):
        single, head = task // heads, task % heads
        query, keys, room = query_S[single], length_S[single], room_S[single]
        first_key = key_S[single] + head // group * room
        first_value = value_S[single] + head // group * room
        score_K = np.empty(keys, dtype=np.float32)
        for k in range(keys):
            score = np.float32(0)
            for h in range(size):
                score += query_QAH[query, head, h] * _wide(rows_NH[first_key + k, h])
            score_K[k] = scale * score
        total = _exponentials(score_K)
        out_H = np.zeros(size, dtype=np.float32)
        for k in range(keys):
            weight = score_K[k]
            for h in range(size):
                out_H[h] += weight * _wide(rows_NH[first_value + k, h])
        for h in range(size):
            out_QAH[query, head, h] = out_H[h] / total
