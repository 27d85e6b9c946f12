"""Layers of like shape in one compiled call: norms, searches, products, and what is between.

In decoding, what a sub-layer's parts cost to call one by one is as much as they cost to run. The
parts are the very same, so a row gets the same bits here as where they are called one by one.

Shape letters: L layers   N rows   D width   O outputs of a product   M heads, all of them
    A query heads   G key/value heads   H head size   I neurons or inputs   R rotated part of a head
    P rows of the pool   T sites   Q single queries (a row each)   C chunks of a slab
    W outputs of a chunk   S slabs of a weight (in start_S: rows + 1)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import prange

from elastiformer.amx import multiply_small
from elastiformer.kernels import TURN, compiled
from elastiformer.lanes import _multiply_one, _multiply_some
from elastiformer.largest import _search_row, _search_side_by_side
from elastiformer.row_kernels import (
    _ALONE,
    _as_stored,
    _gate_row,
    _gate_side_by_side,
    _normalise_row,
    _normalise_side_by_side,
    _turn_row,
    _turn_side_by_side,
)
from elastiformer.single_queries import _attend
from elastiformer.thresholds import Grants, _take, _take_side_by_side


class Weight(NamedTuple):
    """A product as the kernels take it; in `Layers`, of all of them, with L before all else."""

    site: int  # among a layer's
    weight_SICW: np.ndarray
    steps: np.ndarray
    lows: np.ndarray
    bias_O: np.ndarray  # empty where there is none
    norms_I: np.ndarray  # by which channels are picked
    outputs: int
    summed: int
    ahead: int
    pairs: bool  # whether several rows are multiplied as in pairs.py, or amx.py

    def of(self, layers: slice) -> Weight:
        """Of some layers."""
        return self._replace(
            weight_SICW=self.weight_SICW[layers],
            steps=self.steps[layers],
            lows=self.lows[layers],
            bias_O=self.bias_O[layers],
            norms_I=self.norms_I[layers],
        )


class Heads(NamedTuple):
    """How a layer's attention is cut into heads."""

    queries: int
    kv: int
    scale: np.float32


class Layers(NamedTuple):
    """Some layers in a row whose weights lie in memory one after the other."""

    attention_scale_LD: np.ndarray  # of the norm
    attention_epsilon: np.float32
    front: Weight  # queries, keys and values
    heads: Heads
    out: Weight
    mlp_scale_LD: np.ndarray
    mlp_epsilon: np.float32
    gated: Weight  # the gate and what it is to act on
    form: int  # of the gate (row_kernels.py)
    down: Weight

    def of(self, layers: slice) -> Layers:
        """Some of them."""
        return self._replace(
            attention_scale_LD=self.attention_scale_LD[layers],
            mlp_scale_LD=self.mlp_scale_LD[layers],
            front=self.front.of(layers),
            out=self.out.of(layers),
            gated=self.gated.of(layers),
            down=self.down.of(layers),
        )


class Cached(NamedTuple):
    """Where the rows' keys and values go and lie, as in single_queries.py."""

    rows_PH: np.ndarray
    index_LNG: np.ndarray  # for this step's: [L, N, 2G]
    query_Q: np.ndarray
    key_LQ: np.ndarray
    value_LQ: np.ndarray
    room_LQ: np.ndarray
    length_LQ: np.ndarray

    def of(self, layers: slice) -> Cached:
        """What some of the layers need of it."""
        by_layer = (self.key_LQ, self.value_LQ, self.room_LQ, self.length_LQ)
        of_layers = (array_LQ[layers] for array_LQ in by_layer)
        return Cached(self.rows_PH, self.index_LNG[layers], self.query_Q, *of_layers)


class Turns(NamedTuple):
    """Cosines and sines of the rows; of no columns where nothing is rotated."""

    cos_NR: np.ndarray
    sin_NR: np.ndarray


def run(h_ND: np.ndarray, layers: Layers, turns: Turns, cached: Cached, grants: Grants) -> None:
    """Run layers over the residual, in place, of rows that are each a request's latest token."""
    # None: rows in turn; else side by side. By its type Numba compiles the one or the other.
    side = None if len(h_ND) <= _ALONE else 1
    with TURN:
        _run(h_ND, layers, turns, cached, grants, side)


@compiled()
def _add_bias(out_NO, bias_O):  # type: ignore[no-untyped-def]
    if len(bias_O):
        for row in range(len(out_NO)):
            for output in range(len(bias_O)):
                out_NO[row, output] += bias_O[output]


@compiled()
def _product_of_pairs(x_NI, weight, layer, start_S, least_N):  # type: ignore[no-untyped-def]
    out_NO = np.empty((len(x_NI), weight.outputs), dtype=np.float32)
    multiply_small(
        weight.weight_SICW[layer], weight.steps[layer], weight.lows[layer],
        x_NI, weight.norms_I[layer], start_S, least_N, out_NO,
    )  # fmt: skip
    _add_bias(out_NO, weight.bias_O[layer])
    return out_NO


@compiled()
def _product(x_NI, weight, layer, grants, side):  # type: ignore[no-untyped-def]
    rows, site = len(x_NI), weight.site  # as an argument it would be compiled anew for each
    norms_I = weight.norms_I[layer]
    start_S = np.empty(rows + 1, dtype=np.int64)
    least_N = np.empty(rows, dtype=np.float32)
    rows_N, outputs = np.arange(rows), weight.outputs
    if side is None:
        _take(x_NI, norms_I, grants, layer, site, rows_N, outputs, start_S, least_N)
    else:
        _take_side_by_side(x_NI, norms_I, grants, layer, site, rows_N, outputs, start_S, least_N)
    if weight.pairs and rows > 1:
        return _product_of_pairs(x_NI, weight, layer, start_S, least_N)
    index_P = np.empty(start_S[rows], dtype=np.int32)
    value_P = np.empty(start_S[rows], dtype=np.float32)
    if side is None:
        for row in range(rows):
            _search_row(x_NI, norms_I, index_P, value_P, start_S, least_N, row)
    else:
        _search_side_by_side(x_NI, norms_I, index_P, value_P, start_S, least_N)
    weight_SICW, steps, lows = weight.weight_SICW[layer], weight.steps[layer], weight.lows[layer]
    out_NO = np.empty((rows, weight.outputs), dtype=np.float32)
    if rows == 1:
        _multiply_one(
            weight_SICW, steps, lows, index_P, value_P, weight.summed, weight.ahead, out_NO[0]
        )
    else:
        _multiply_some(weight_SICW, steps, lows, index_P, value_P, start_S, weight.summed, out_NO)
    _add_bias(out_NO, weight.bias_O[layer])
    return out_NO


@compiled()
def _normalised(h_ND, scale_D, epsilon, side):  # type: ignore[no-untyped-def]
    x_ND = np.empty_like(h_ND)
    if side is None:
        for row in range(len(h_ND)):
            _normalise_row(h_ND[row], scale_D, epsilon, x_ND[row])
    else:
        _normalise_side_by_side(h_ND, scale_D, epsilon, x_ND)
    return x_ND


@compiled()
def _add(h_ND, branch_ND):  # type: ignore[no-untyped-def]
    for row in range(len(h_ND)):
        for d in range(h_ND.shape[1]):
            h_ND[row, d] += branch_ND[row, d]


@compiled()
def _place_row(x_MH, first, index_G, rows_PH):  # type: ignore[no-untyped-def]
    """Write the keys and values of a row, its heads from `first` on, to the cache."""
    for part in range(len(index_G)):
        into_H = rows_PH[index_G[part]]
        for h in range(len(into_H)):
            into_H[h] = _as_stored(x_MH[first + part, h], into_H)


@compiled(parallel=True)
def _place_side_by_side(x_NMH, first, index_NG, rows_PH):  # type: ignore[no-untyped-def]
    for row in prange(len(x_NMH)):
        _place_row(x_NMH[row], first, index_NG[row], rows_PH)


@compiled()
def _attention(x_ND, front, heads, turns, cached, layer, out, grants, side):  # type: ignore[no-untyped-def]
    out_NO = _product(x_ND, front, layer, grants, side)
    rows, size = len(x_ND), cached.rows_PH.shape[1]
    out_NMH = out_NO.reshape(rows, out_NO.shape[1] // size, size)
    turned = heads.queries + heads.kv
    if turns.cos_NR.shape[1]:
        if side is None:
            for row in range(rows):
                _turn_row(out_NMH[row], turned, turns.cos_NR[row], turns.sin_NR[row])
        else:
            _turn_side_by_side(out_NMH, turned, turns.cos_NR, turns.sin_NR)
    index_NG = cached.index_LNG[layer]
    if side is None:
        for row in range(rows):
            _place_row(out_NMH[row], heads.queries, index_NG[row], cached.rows_PH)
    else:
        _place_side_by_side(out_NMH, heads.queries, index_NG, cached.rows_PH)
    out_NAH = np.empty((rows, heads.queries, size), dtype=np.float32)
    _attend(
        cached.rows_PH, out_NMH, cached.query_Q, cached.key_LQ[layer], cached.value_LQ[layer],
        cached.room_LQ[layer], cached.length_LQ[layer], heads.queries, heads.kv, heads.scale,
        out_NAH,
    )  # fmt: skip
    return _product(out_NAH.reshape(rows, heads.queries * size), out, layer, grants, side)


@compiled()
def _mlp(x_ND, gated, form, down, layer, grants, side):  # type: ignore[no-untyped-def]
    out_N2I = _product(x_ND, gated, layer, grants, side)
    a_NI = np.empty((len(x_ND), out_N2I.shape[1] // 2), dtype=np.float32)
    if side is None:
        for row in range(len(x_ND)):
            _gate_row(form, out_N2I[row], a_NI[row])
    else:
        _gate_side_by_side(form, out_N2I, a_NI)
    return _product(a_NI, down, layer, grants, side)


@compiled()
def _run(h_ND, layers, turns, cached, grants, side):  # type: ignore[no-untyped-def]
    for layer in range(len(grants.channels_LTK)):
        scale_D = layers.attention_scale_LD[layer]
        x_ND = _normalised(h_ND, scale_D, layers.attention_epsilon, side)
        branch_ND = _attention(
            x_ND, layers.front, layers.heads, turns, cached, layer, layers.out, grants, side
        )
        _add(h_ND, branch_ND)
        x_ND = _normalised(h_ND, layers.mlp_scale_LD[layer], layers.mlp_epsilon, side)
        _add(h_ND, _mlp(x_ND, layers.gated, layers.form, layers.down, layer, grants, side))
