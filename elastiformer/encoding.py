"""The sparse form of encoders: whole texts and images, side by side, each under its own plan.

The layers are those of the causal form. What stands before and after them is the base's own code:
its embeddings, and its head over what the layers left. Only what the head reads is computed in
the last layer.

Shape letters: N packed tokens   D width   T tokens of one item   R rows that a head reads
    B items   O outputs
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from elastiformer.accounting import ModelShape
from elastiformer.adapter import Adapter
from elastiformer.class_tail import ClassTail
from elastiformer.encoder_families import Pooling, Reads
from elastiformer.encoders import EncoderLayout
from elastiformer.packed import Packed
from elastiformer.placing import Placing, WholePlacing
from elastiformer.rotary import Rotations
from elastiformer.sequence import Chunk, Item, WholeSequence
from elastiformer.spare_rows import empty
from elastiformer.sparse import SparseForm
from elastiformer.tail_calls import TailCalls
from elastiformer.taken import Taken
from elastiformer.tasks import Task


class EncoderForm(SparseForm):
    """Runs steps of whole items for one encoder. One thread owns it."""

    def __init__(
        self,
        encoder: EncoderLayout,
        adapter: Adapter | None,
        shape: ModelShape,
        pooling: Pooling,
        normalized: bool,
    ) -> None:
        super().__init__(encoder.layers, adapter, shape)
        self.encoder, self.pooling, self.normalized = encoder, pooling, normalized
        # Whole items are many rows, of which a CPU moves half as many bytes in a small type. What
        # picks channels, or gates, on a CPU does so in float32.
        gated = any(gate is not None for gate in self.workshop.gates)
        self._between = self.workshop.working_dtype if gated else self.workshop.dtype
        self._headed = encoder.task is not Task.FEATURES or pooling is Pooling.OWN
        self._head_weights = sum(each.weight.numel() for each in encoder.head_modules)
        self._probes = encoder.probes
        self._outside_products = lru_cache(maxsize=256)(self._count_outside)
        self._tail: ClassTail | None = None
        if shape.absorbing:
            self._tail = ClassTail(self.workshop, self._attention.direct)

    def _run(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        # In front those whose class tokens go on alone last.
        tail_C = np.array(self._tails(chunks))
        order_C = np.argsort(-tail_C, kind="stable").tolist()
        found = super()._run([chunks[at] for at in order_C])
        outputs = dict(zip(order_C, found, strict=True))
        return [outputs[at] for at in range(len(chunks))]

    def _tails(self, chunks: Sequence[Chunk]) -> list[int]:
        """The layer from which on each item's class tokens go on alone."""
        if self._tail is None:
            return [len(self.layout.layers)] * len(chunks)
        return [_whole(chunk).kinds.tail for chunk in chunks]

    def _layer_by_layer(
        self, h_ND: Tensor, packed: Packed, placing: Placing, taken: Taken, rotations: Rotations
    ) -> Tensor:
        layers, tails = self.layout.layers, self._tails(packed.chunks)
        if self._tail is not None and tails[-1] < len(layers):
            calls = self._tail.calls(h_ND, tails[-1], packed)
            if calls is not None:
                self._enter_in_turn(calls, tails, h_ND, packed, placing, taken, rotations)
                return h_ND
        for layer in layers[: tails[0]]:
            h_ND = self._run_layer(layer, h_ND, packed, placing, taken, rotations)
        if self._tail is not None and tails[0] < len(layers):
            h_ND = self._tail.run(h_ND, tails[0], packed, taken)
        return h_ND

    def _enter_in_turn(
        self,
        calls: TailCalls,
        tails: Sequence[int],
        h_ND: Tensor,
        packed: Packed,
        placing: Placing,
        taken: Taken,
        rotations: Rotations,
    ) -> None:
        """Leave the residual of what a head reads; each item goes to the calls at its own layer."""
        layers = self.layout.layers
        whole, x_ND = packed, h_ND  # what does not run there yet
        for layer in layers:
            count = sum(tail > layer.index for tail in tails)
            if count < len(whole.chunks):
                calls.take(x_ND, count)
                whole = Packed(packed.chunks[:count], packed.device)
                x_ND, placing = x_ND[: whole.count], self._placing(whole)
            if count:
                x_ND = self._run_layer(layer, x_ND, whole, placing, taken, rotations)
            else:
                taken.keys()
            if count < len(packed.chunks):
                calls.run(layer, layer is layers[-1])
        whole.outputs.put(h_ND, whole.outputs.of(x_ND))
        calls.put(h_ND)

    def _placing(self, packed: Packed) -> Placing:
        return WholePlacing(packed)

    def _embed(self, packed: Packed) -> Tensor:
        parts_TD = self._parts([_item(chunk) for chunk in packed.chunks])
        assert sum(map(len, parts_TD)) == packed.count, "other tokens than the items have"
        dtype = self.workshop.working_dtype if packed.picks else self._between
        h_ND = empty((packed.count, parts_TD[0].shape[1]), dtype, self.workshop.device)
        torch.cat([part_TD.to(dtype) for part_TD in parts_TD], out=h_ND)
        return h_ND

    def _parts(self, items: Sequence[Item]) -> list[Tensor]:
        """The embedded tokens of items, one after the other, of some side by side."""
        alike: dict[tuple[object, ...], list[tuple[int, Item]]] = {}
        for place, item in enumerate(items):
            alike.setdefault(_form(item), []).append((place, item))
        part_of: dict[int, Tensor] = {}
        for group in alike.values():
            places, some = zip(*group, strict=True)
            embedded_BTD = self._together(some)
            if len(alike) == 1 and all(len(item.ids) == embedded_BTD.shape[1] for item in some):
                return [embedded_BTD.flatten(0, 1)]
            part_of |= zip(places, map(_seen, embedded_BTD, some), strict=True)
        return [part_of[place] for place in range(len(part_of))]

    def _together(self, items: Sequence[Item]) -> Tensor:
        """The embedded tokens of items of one form, [B, T, D], padded; of an image all patches."""
        tools = self.workshop
        if items[0].pixels_CHW is not None:
            pixels = [item.pixels_CHW for item in items if item.pixels_CHW is not None]
            return self.encoder.embed(torch.stack(pixels).to(tools.device, tools.dtype))
        pad = self.encoder.inner.config.pad_token_id or 0
        ids_BT = padded([item.ids for item in items], pad).to(tools.device)
        if items[0].types is None or not self.encoder.takes_types:
            return self.encoder.embed(ids_BT)
        types_BT = padded([item.types or () for item in items], 0).to(tools.device)
        return self.encoder.embed(ids_BT, token_type_ids=types_BT)

    def _logits(self, h_ND: Tensor, packed: Packed) -> list[Tensor]:
        """What the head makes of each item: float32 [outputs], of every token [T, outputs]."""
        h_RD = self.workshop.final_norm(packed.outputs.of(h_ND))
        if self._headed:
            h_RD = h_RD.to(self.workshop.dtype)  # as the base's own head takes it
        if self._headed and self.encoder.reads is Reads.CLASS:  # of every item as many
            last_BTD = h_RD.view(len(packed.chunks), -1, h_RD.shape[1])
            outputs = list(headed(self.encoder, last_BTD).float().unbind())
        elif self._headed and self.encoder.reads is Reads.TOKENS:
            all_RO = headed(self.encoder, h_RD[None])[0].float()
            outputs = list(torch.split(all_RO, packed.output_counts))
        else:
            outputs = [self._said(part) for part in torch.split(h_RD, packed.output_counts)]
        self._charge(packed)
        unit_length = self.encoder.task is Task.FEATURES and self.normalized
        return [F.normalize(each, dim=0) for each in outputs] if unit_length else outputs

    def _said(self, part_TD: Tensor) -> Tensor:
        """What is made of an item's tokens all together."""
        if self._headed:
            return headed(self.encoder, part_TD[None])[0].float()
        return part_TD[0].float() if self.pooling is Pooling.CLASS else part_TD.float().mean(0)

    def _charge(self, packed: Packed) -> None:
        """Count what stands before and after the layers: it is never left out."""
        for chunk, outputs in zip(packed.chunks, packed.output_counts, strict=True):
            pixels_CHW = _item(chunk).pixels_CHW
            sides = None if pixels_CHW is None else tuple(pixels_CHW.shape[1:])
            parameters, scores = self._outside_products(sides, outputs)
            usage = chunk.sequence.usage
            usage.flops += 2 * (parameters + scores)
            usage.dense_flops += 2 * (parameters + scores)
            usage.parameters_used += parameters
            usage.dense_parameters += parameters

    def _count_outside(self, sides: tuple[int, int] | None, outputs: int) -> tuple[int, int]:
        """The multiply-adds of patches and head of one item: with parameters, and of scores."""
        times = outputs if self.encoder.task is Task.TOKEN_CLASSIFICATION else 1
        parameters, scores = times * self._head_weights, 0
        for probe in self._probes:
            width = probe.embed_dim
            parameters += (1 + 2 * outputs) * width * width  # its query, all keys and values
            scores += 2 * outputs * width
        if sides is not None:
            patches = self.encoder.patch_count(*sides)
            parameters += patches * sum(each.weight.numel() for each in self.encoder.patches)
        return parameters, scores


def headed(encoder: EncoderLayout, last_BTD: Tensor) -> Tensor:
    """What the base's own head makes of these hidden states, [B, O] or [B, T, O].

    Of features, what the base's own pooler and projection make of them.
    """
    pooled = encoder.pooled(last_BTD)
    given = BaseModelOutputWithPooling(last_hidden_state=last_BTD, pooler_output=pooled)
    inner: Any = encoder.inner
    if inner is encoder.outer:
        return said(encoder, given)
    inner.forward = lambda *_, **__: given
    try:
        return said(encoder, encoder.outer(last_BTD))
    finally:
        with suppress(AttributeError):
            del inner.forward


def said(encoder: EncoderLayout, given: Any) -> Tensor:
    """Of what a base returned, its answer: logits, or features that it pooled itself."""
    if encoder.task is not Task.FEATURES:
        logits: Tensor = given.logits
        return logits
    # A base with a projection gives that alone.
    field = "image_embeds" if "image_embeds" in given else "pooler_output"
    pooled: Tensor = given[field]
    return pooled


def _whole(chunk: Chunk) -> WholeSequence:
    assert isinstance(chunk.sequence, WholeSequence), "an encoder reads whole items"
    return chunk.sequence


def _item(chunk: Chunk) -> Item:
    return _whole(chunk).item


def _form(item: Item) -> tuple[object, ...]:
    """What items must share to be embedded in one call."""
    if item.pixels_CHW is not None:
        return tuple(item.pixels_CHW.shape)
    # Of texts the longest has less than twice the tokens of the shortest: little is padding.
    return len(item.ids).bit_length(), item.types is None


def _seen(embedded_TD: Tensor, item: Item) -> Tensor:
    """The tokens that the item holds: of a text no padding, of a masked image not all."""
    if item.pixels_CHW is None:
        return embedded_TD[: len(item.ids)]
    whole = len(item.ids) == len(embedded_TD)
    return embedded_TD if whole else embedded_TD[torch.tensor(item.ids, device=embedded_TD.device)]


def padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """Rows of numbers, each filled up to the longest."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])
