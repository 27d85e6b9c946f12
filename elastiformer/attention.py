"""Attention of packed queries over each request's own cache, behind one small interface.

A back end takes all of a layer's queries at once and says its name. `Portable` runs PyTorch's
scaled dot product attention, one call a request, on any device. `Compiled` runs all requests that
ask with one token in one call, on a CPU, and prompts in tile registers where it has them. `Varlen`
runs PyTorch's variable-length attention, one call a layer, on CUDA devices that have it. Which one
runs is decided once (`backend`), and what it cannot express (a capped score, some heads only) is
the portable one's.
Encoders, whose tokens see one another both ways, have one of their own (both_ways.py).

Shape letters: N packed queries   Q queries of a request   K keys   A query heads
    G key/value heads   H head size   S single queries
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from elastiformer import many_queries
from elastiformer.cache import Held
from elastiformer.families import Layer
from elastiformer.row_kernels import on_host
from elastiformer.sides import Sides
from elastiformer.single_queries import Singles, attend

Masks = dict[tuple[int, int, int, int | None], Tensor]


@dataclass(frozen=True, slots=True)
class Read:
    """What the queries of one request read in one layer.

    `positions_K` is None where the keys are those of positions 0, 1, …, K - 1.
    """

    queries: slice  # among the packed ones, in order of position
    first: int  # position of the first query
    last: int
    sees_all: bool  # a single query, after which there is no key
    held: Held
    positions_K: Tensor | None
    masks: Masks = field(default_factory=dict)  # of the step's other layers, too

    @property
    def count(self) -> int:
        count: int = self.queries.stop - self.queries.start
        return count

    @property
    def in_order(self) -> bool:
        """The queries are the latest tokens, with none left out, and no key comes after them."""
        return self.sees_all or self.last == self.held.length - 1 == self.first + self.count - 1

    @property
    def is_square(self) -> bool:
        """The queries are exactly the tokens whose keys there are."""
        return self.positions_K is None and self.count == self.held.length


class Reads:
    """What the queries of one layer read, request by request."""

    def __init__(
        self, singles: Singles, each: Callable[[], list[Read]], sides: Sides | None = None
    ) -> None:
        self.singles, self._each, self.sides = singles, each, sides

    @cached_property
    def each(self) -> list[Read]:
        """One by one, in order of the queries; single ones, too."""
        return self._each()


class Backend(Protocol):
    """Runs the attention of one layer for packed queries."""

    name: str

    def attend(self, query_NAH: Tensor, position_N: Tensor, reads: Reads, layer: Layer) -> Tensor:
        """The attention output [N, A, H]; a query sees the keys up to its own position."""


class Portable:
    """PyTorch's scaled dot product attention, request by request."""

    name = "sdpa"

    def attend(self, query_NAH: Tensor, position_N: Tensor, reads: Reads, layer: Layer) -> Tensor:
        outs = [self.one(query_NAH, position_N, read, layer) for read in reads.each]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def one(self, query_NAH: Tensor, position_N: Tensor, read: Read, layer: Layer) -> Tensor:
        """The attention output of one request's queries."""
        keys_GKH, values_GKH = read.held.keys_GKH, read.held.values_GKH
        working, query_QAH = query_NAH.dtype, query_NAH[read.queries].to(keys_GKH.dtype)
        _, heads, size = query_QAH.shape
        kv_heads = len(keys_GKH)
        seen_QK: Tensor | None = None
        if read.sees_all and (layer.window is None or read.last < layer.window):
            if layer.softcap is None:
                # The heads of a group read the same keys: as queries of one head.
                out_GMH = F.scaled_dot_product_attention(
                    query_QAH.view(1, kv_heads, -1, size),
                    keys_GKH[None],
                    values_GKH[None],
                    scale=layer.scale,
                )
                return out_GMH.view(1, heads, size).to(working)
        elif not (read.is_square and layer.window is None and layer.softcap is None):
            seen_QK = _seen_in_step(position_N[read.queries], read, layer.window)
        query_AQH = query_QAH.transpose(0, 1)
        if layer.softcap is not None:
            out_AQH = _softcapped(query_AQH, keys_GKH, values_GKH, seen_QK, layer)
            return out_AQH.transpose(0, 1).to(working)
        out_AQH = F.scaled_dot_product_attention(
            query_AQH[None],
            keys_GKH[None],
            values_GKH[None],
            attn_mask=seen_QK,
            is_causal=seen_QK is None,
            scale=layer.scale,
            enable_gqa=kv_heads < heads,
        )[0]
        return out_AQH.transpose(0, 1).to(working)


class Compiled:
    """All requests that ask with one token in one call (single_queries.py), on a CPU.

    Where it has tile registers, longer asks go there (many_queries.py). Other asks, windows that
    hide a key, and capped scores are the portable back end's.
    """

    name = "compiled"

    def __init__(self) -> None:
        self._portable = Portable()

    @staticmethod
    def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
        return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)

    def attend(self, query_NAH: Tensor, position_N: Tensor, reads: Reads, layer: Layer) -> Tensor:
        singles = reads.singles
        if layer.window is not None:
            singles = singles.before(layer.window)
        counted = torch._C._len_torch_dispatch_stack()  # somebody counts operators
        if layer.softcap is not None or counted:
            return self._portable.attend(query_NAH, position_N, reads, layer)
        if not len(singles):
            outs = [self._one(query_NAH, position_N, read, layer) for read in reads.each]
            return outs[0] if len(outs) == 1 else torch.cat(outs)
        query_NAH = query_NAH.float().contiguous()
        out_NAH = torch.empty_like(query_NAH)
        attend(singles, query_NAH.numpy(), layer.scale, out_NAH.numpy())
        if len(singles) < len(query_NAH):
            done = set(singles.query_S.tolist())
            for read in reads.each:
                if read.queries.start not in done:
                    at = read.queries
                    out_NAH[at] = self._one(query_NAH, position_N, read, layer)
        return out_NAH

    def _one(self, query_NAH: Tensor, position_N: Tensor, read: Read, layer: Layer) -> Tensor:
        """The attention output of one request's queries."""
        held, is_hidden = read.held, layer.window is not None and read.last >= layer.window
        fits = read.positions_K is None and read.count > 1 and not is_hidden
        if not (
            fits and held.rows_NH.dtype == torch.bfloat16 and many_queries.takes(query_NAH.shape[2])
        ):
            return self._portable.one(query_NAH, position_N, read, layer)
        query_QAH = query_NAH[read.queries].to(torch.bfloat16).contiguous()
        out_QAH = torch.empty_like(query_QAH)
        many_queries.attend(
            on_host(query_QAH),
            on_host(held.rows_NH),
            (held.key, held.value, held.room, held.length),
            position_N[read.queries].numpy(),
            held.kv_heads,
            layer.scale,
            on_host(out_QAH),
        )
        return out_QAH.to(query_NAH.dtype)


class Varlen:
    """PyTorch's variable-length attention (FlashAttention): all requests in one call, on CUDA.

    It needs every query's keys in order and up to the last query's position, which holds with
    `kv: complete`; other reads, capped scores and odd heads are the portable back end's.
    """

    name = "varlen"

    def __init__(self) -> None:
        self._portable = Portable()

    @staticmethod
    def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
        if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
            return False
        return torch.cuda.get_device_capability(device) >= (8, 0)

    @staticmethod
    def _takes_heads(size: int) -> bool:
        return size % 8 == 0 and size <= 256  # as FlashAttention does

    def attend(self, query_NAH: Tensor, position_N: Tensor, reads: Reads, layer: Layer) -> Tensor:
        fits = all(read.positions_K is None and read.in_order for read in reads.each)
        if not fits or layer.softcap is not None or not self._takes_heads(query_NAH.shape[2]):
            return self._portable.attend(query_NAH, position_N, reads, layer)
        keys_SGH = torch.cat([read.held.keys_GKH.transpose(0, 1) for read in reads.each])
        values_SGH = torch.cat([read.held.values_GKH.transpose(0, 1) for read in reads.each])
        counts = [read.count for read in reads.each]
        lengths = [read.held.length for read in reads.each]
        out_NAH = varlen_attn(
            query_NAH,
            keys_SGH,
            values_SGH,
            _bounds(counts, query_NAH.device),
            _bounds(lengths, query_NAH.device),
            max(counts),
            max(lengths),
            scale=layer.scale,
            window_size=(-1 if layer.window is None else layer.window - 1, 0),
            enable_gqa=True,
        )
        assert isinstance(out_NAH, Tensor)
        return out_NAH


def backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The fastest back end that runs here."""
    if Varlen.runs_on(device, dtype):
        return Varlen()
    return Compiled() if Compiled.runs_on(device, dtype) else Portable()


def _bounds(counts: Sequence[int], device: torch.device) -> Tensor:
    bounds = torch.zeros(len(counts) + 1, dtype=torch.int32)
    bounds[1:] = torch.tensor(counts).cumsum(0)
    return bounds.to(device, non_blocking=True)


def _seen_in_step(positions_Q: Tensor, read: Read, window: int | None) -> Tensor:
    """`_seen`, made once a step where every layer asks the same."""
    if read.positions_K is not None or read.last - read.first + 1 != read.count:
        return _seen(positions_Q, read, window)
    key = (read.first, read.last, read.held.length, window)
    if key not in read.masks:
        read.masks[key] = _seen(positions_Q, read, window)
    return read.masks[key]


def _seen(positions_Q: Tensor, read: Read, window: int | None) -> Tensor:
    """Which keys each query sees."""
    positions_K = read.positions_K
    if positions_K is None:
        positions_K = torch.arange(read.held.length, device=positions_Q.device)
    back_QK = positions_Q[:, None] - positions_K[None, :]
    seen_QK = back_QK >= 0
    if window is not None:
        seen_QK &= back_QK < window
    return seen_QK


def _softcapped(
    query_AQH: Tensor, keys_GKH: Tensor, values_GKH: Tensor, seen_QK: Tensor | None, layer: Layer
) -> Tensor:
    assert layer.softcap is not None
    group = len(query_AQH) // len(keys_GKH)
    keys_AKH = keys_GKH.repeat_interleave(group, 0)
    scores_AQK = layer.scale * (query_AQH @ keys_AKH.transpose(1, 2))
    scores_AQK = layer.softcap * torch.tanh(scores_AQK / layer.softcap)
    if seen_QK is not None:
        scores_AQK = scores_AQK.masked_fill(~seen_QK, torch.finfo(scores_AQK.dtype).min)
    weights_AQK = scores_AQK.softmax(-1, dtype=torch.float32).to(query_AQH.dtype)
    return weights_AQK @ values_GKH.repeat_interleave(group, 0)
