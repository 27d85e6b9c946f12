"""Class tokens that read others without keys and values, where nobody else of their item asks.

A query's score of a token is q . (W x) = (W^T q) . x, and the sum of values it weighs is W times
the weighted sum of x. So one query a head does not need a key and a value of every token: it
absorbs the weights, and reads what the tokens bring to the layer. That is exact, and of a token
that asks nothing and is not asked for more it leaves no product at all. (The bias of keys adds the
same to all scores of a query, so it is left out; that of values is added once.)

Tokens with a repair and those without have different weights: two sides, of which each token has
one. The scheme is that of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, 2.1.2).

Shape letters: N rows of items   Q queries   A query heads   H head size   G key/value heads
    D width   O heads x head size   S sides   X sides x heads, or heads x queries of an item
    C items, and one more   B items beside each other   T rows of the longest   K rows of a block
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from elastiformer import class_kernels
from elastiformer.accounting import ModelShape
from elastiformer.capacity import Site
from elastiformer.class_kernels import AS_IT_IS, NORMED, AffineNorm, affine_of
from elastiformer.families import Layer, Layout, Projection
from elastiformer.keeping import Kept
from elastiformer.packed import Packed, Rows
from elastiformer.readings import Reading
from elastiformer.workshop import Workshop


def absorbing(layout: Layout, shape: ModelShape, outputs: int) -> frozenset[int]:
    """The layers in which class tokens can read so, and in which it is less work.

    Not where keys are rotated, normed or hidden by a window, nor where tokens that skip attention
    leave none.

    Args:
        outputs: class tokens of an item.
    """
    if shape.kv != "complete":
        return frozenset()
    return frozenset(
        layer.index
        for layer in layout.layers
        if layer.rotate is None
        and layer.key_norm is None
        and layer.window is None
        and layer.softcap is None
        and outputs * layer.shape.heads < layer.shape.kv_width
    )


class Absorbed(NamedTuple):
    """What queries absorb of each side, by query heads."""

    keys_SAHD: Tensor
    values_SAHD: Tensor
    bias_O: Tensor | None  # of values, heads side by side


class Brought(NamedTuple):
    """What rows bring to a layer: x, or its norm if one is to be done as they are read."""

    x_ND: Tensor
    norm: AffineNorm = AS_IT_IS


class DirectReading:
    """Runs the attention of class tokens that ask alone."""

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop
        self._weights: dict[tuple[int, tuple[str | None, ...]], tuple[int, Absorbed]] = {}

    @cached_property
    def norms(self) -> list[AffineNorm | None]:
        """Each layer's, as far as it is one. Copied for who reads so: a causal model never does."""
        return [affine_of(layer.attention_norm) for layer in self._workshop.layout.layers]

    def brought(self, layer: Layer, x_ND: Tensor, normed: bool = False) -> Brought:
        """What rows of the residual bring to a layer; its norm is done as they are read.

        Args:
            normed: whether all of it was done but for its scale and shift.
        """
        if reads_plainly(x_ND) or (affine := self.norms[layer.index]) is None:
            return Brought(self._workshop.attention_norms[layer.index](x_ND))
        return Brought(x_ND, affine._replace(epsilon=NORMED) if normed else affine)

    def run(self, layer: Layer, asking: Rows, kept: Kept, h_ND: Tensor, packed: Packed) -> None:
        """Add the branch to the residual of the rows that ask, in place.

        Args:
            asking: the class tokens of the items of which no keys are made here; each runs whole.
        """
        read = packed.direct(layer.index)
        brought = self.brought(layer, read.of(h_ND))
        branch_QD = self.branch(layer, asking.of(h_ND), brought, asking, read, packed)
        kept.join(h_ND, branch_QD, asking, layer.after_attention)

    def branch(
        self,
        layer: Layer,
        h_QD: Tensor,
        brought: Brought,
        asking: Rows,
        read: Rows,
        packed: Packed,
    ) -> Tensor:
        """What attention adds to the rows that ask: [Q, D].

        Args:
            h_QD: their residual.
            brought: by the rows that are read, all of their items.
        """
        tools, shape = self._workshop, layer.shape
        x_QD = tools.attention_norms[layer.index](h_QD)
        query_QO = tools.product(layer.query).run(Reading(x_QD))
        names, sides = zip(*self._sides(layer, read, packed), strict=True)
        keys_SAHD, values_SAHD, bias_O = self._absorbed(layer, names)
        query_AQH = query_QO.view(-1, shape.heads, shape.head_dim).transpose(0, 1)
        query_XQH = query_AQH.to(keys_SAHD.dtype)
        if len(sides) > 1:
            query_XQH = query_XQH.repeat(len(sides), 1, 1)
        own_XQD = torch.bmm(query_XQH, keys_SAHD.flatten(0, 1))
        own_SAQD = own_XQD.view(len(sides), shape.heads, *own_XQD.shape[1:])
        sums_SAQD = _sums(own_SAQD, brought, (asking, read), sides, packed, layer)
        out_XQH = torch.bmm(sums_SAQD.flatten(0, 1), values_SAHD.flatten(0, 1).transpose(1, 2))
        if len(sides) > 1:
            out_XQH = out_XQH.view(len(sides), shape.heads, -1, shape.head_dim).sum(0)
        out_QO = out_XQH.transpose(0, 1).flatten(1)
        if bias_O is not None:
            out_QO = out_QO.add_(bias_O)
        return tools.at_site(layer, Site.ATTENTION_OUT).run(Reading(out_QO.to(h_QD.dtype)))

    def _sides(self, layer: Layer, read: Rows, packed: Packed) -> list[tuple[str | None, Rows]]:
        """The rows that are read, by the repair of their keys and values."""
        rest, found = read, list[tuple[str | None, Rows]]()
        for name, rows in self._workshop.mending.of_keys(layer, packed):
            some = rows.within(rest)
            if some.count:
                found.append((name, some))
                rest = rest.without(some)
        return [(None, rest), *found] if rest.count else found

    def _absorbed(self, layer: Layer, names: tuple[str | None, ...]) -> Absorbed:
        key, version = (layer.index, names), self.version(layer, names)
        if key not in self._weights or self._weights[key][0] != version:
            self._weights[key] = version, self.absorb(layer, names)
        return self._weights[key][1]

    def version(self, layer: Layer, names: tuple[str | None, ...]) -> int:
        """Which state the repairs of some sides are in."""
        return sum(self._workshop.mending.version(layer, name) for name in names)

    def absorb(self, layer: Layer, names: tuple[str | None, ...]) -> Absorbed:
        """What queries absorb of sides with these repairs (None: without one)."""
        mending, shape = self._workshop.mending, layer.shape

        def of_sides(part: Projection) -> Tensor:
            each = [mending.folded(layer, part, name) for name in names]
            weight_SOD = torch.stack(each) if len(each) > 1 else each[0][None]
            weight_SGHD = weight_SOD.view(len(names), shape.kv_heads, shape.head_dim, -1)
            group = shape.heads // shape.kv_heads
            return weight_SGHD if group == 1 else weight_SGHD.repeat_interleave(group, 1)

        with _disable_current_modes():  # whoever counts operators did not ask for these
            bias_O = layer.value.bias_O
            if bias_O is not None:
                bias_GH = bias_O.detach().view(shape.kv_heads, shape.head_dim)
                bias_O = bias_GH.repeat_interleave(shape.heads // shape.kv_heads, 0).flatten()
            return Absorbed(of_sides(layer.key), of_sides(layer.value), bias_O)


def reads_plainly(x_ND: Tensor) -> bool:
    """Whether PyTorch's operators read these rows, and want their norm done before."""
    return not x_ND.is_cpu or bool(torch._C._len_torch_dispatch_stack())  # somebody counts


def _sums(
    own_SAQD: Tensor,
    brought: Brought,
    asking_read: tuple[Rows, Rows],
    sides: Sequence[Rows],
    packed: Packed,
    layer: Layer,
) -> Tensor:
    """The rows of each item, summed as each of its queries weighs them, side by side."""
    x_ND, (asking, read) = brought.x_ND, asking_read
    sides = [rows.among(read) for rows in sides]
    ask_C, read_C = packed.bounds(asking), packed.bounds(read)
    if reads_plainly(x_ND):
        return _padded_sums(own_SAQD, x_ND, sides, ask_C, read_C, layer.scale)
    side_N = np.zeros(read.count, dtype=np.uint8)
    for place, rows in enumerate(sides[1:], 1):
        side_N[rows.rows_R] = place
    return class_kernels.sums(own_SAQD, x_ND, side_N, ask_C, read_C, brought.norm, layer.scale)


def _padded_sums(
    own_SAQD: Tensor,
    x_ND: Tensor,
    sides: Sequence[Rows],
    ask_C: np.ndarray,
    read_C: np.ndarray,
    scale: float,
) -> Tensor:
    """The same by PyTorch's own operators: items beside each other, padded."""
    items = np.flatnonzero(np.diff(ask_C) > 0)
    heads, queries, width = own_SAQD.shape[1:]
    each = queries // len(items)  # class tokens of an item
    x_SBTD, score_SBXT = [], []
    for own_AQD, rows in zip(own_SAQD, sides, strict=True):
        own_BXD = own_AQD.view(heads, len(items), each, width).transpose(0, 1).flatten(1, 2)
        begin_C = np.searchsorted(rows.rows_R, read_C)
        count_B1 = np.diff(begin_C)[items][:, None]
        place_T = np.arange(max(1, int(count_B1.max())))
        hidden_BT = place_T >= count_B1
        at_BT = np.where(hidden_BT, 0, begin_C[items][:, None] + place_T)
        x_BTD = x_ND[torch.from_numpy(rows.rows_R[at_BT]).to(x_ND.device)].to(own_BXD.dtype)
        score_BXT = torch.bmm(own_BXD, x_BTD.transpose(1, 2)).float() * scale
        hidden_B1T = torch.from_numpy(hidden_BT).to(x_ND.device)[:, None]
        score_SBXT.append(score_BXT.masked_fill(hidden_B1T, -torch.inf))
        x_SBTD.append(x_BTD)
    weight_BXT = torch.cat(score_SBXT, 2).softmax(2).to(own_SAQD.dtype)
    parts = torch.split(weight_BXT, [score_BXT.shape[2] for score_BXT in score_SBXT], 2)
    sums = []
    for part_BXT, x_BTD in zip(parts, x_SBTD, strict=True):
        sum_BAQD = torch.bmm(part_BXT, x_BTD).view(len(items), heads, each, width)
        sums.append(sum_BAQD.transpose(0, 1).reshape(heads, queries, width))
    return torch.stack(sums)
