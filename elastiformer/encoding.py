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
from enum import StrEnum
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from elastiformer.accounting import ModelShape
from elastiformer.adapter import Adapter
from elastiformer.encoders import EncoderLayout, Reads
from elastiformer.packed import Packed
from elastiformer.placing import Placing, WholePlacing
from elastiformer.sequence import Chunk, Item, WholeSequence
from elastiformer.sparse import SparseForm
from elastiformer.tasks import Task


class Pooling(StrEnum):
    """How the features of an item's tokens become one."""

    MEAN = "mean"
    CLASS = "class"


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
        self._head_weights = sum(each.weight.numel() for each in encoder.head_modules)
        self._patches = encoder.patches

    def _placing(self, packed: Packed) -> Placing:
        return WholePlacing(packed)

    def _embed(self, packed: Packed) -> Tensor:
        parts_TD: list[Tensor] = []
        items = [_item(chunk) for chunk in packed.chunks]
        for _, alike in groupby(items, key=_pixels_shape):
            group = list(alike)
            if group[0].pixels_CHW is None:
                parts_TD += [self._tokens(item) for item in group]
            else:
                pixels = [item.pixels_CHW for item in group if item.pixels_CHW is not None]
                pixels_BCHW = torch.stack(pixels).to(self.workshop.device, self.workshop.dtype)
                parts_TD += self.encoder.embeddings(pixels_BCHW)
        for item, part_TD in zip(items, parts_TD, strict=True):
            assert len(part_TD) == len(item.ids), f"{len(part_TD)} tokens of {len(item.ids)}"
        return torch.cat(parts_TD).to(self.workshop.working_dtype)

    def _tokens(self, item: Item) -> Tensor:
        ids_1T = torch.tensor([item.ids], device=self.workshop.device)
        if item.types is None or not self.encoder.takes_types:
            embedded_1TD: Tensor = self.encoder.embeddings(ids_1T)
            return embedded_1TD[0]
        types_1T = torch.tensor([item.types], device=self.workshop.device)
        embedded_1TD = self.encoder.embeddings(ids_1T, token_type_ids=types_1T)
        return embedded_1TD[0]

    def _logits(self, h_ND: Tensor, packed: Packed) -> list[Tensor]:
        """What the head makes of each item: float32 [outputs], of every token [T, outputs]."""
        h_RD = self.workshop.final_norm(packed.outputs.of(h_ND))
        if self.encoder.task is not Task.FEATURES:
            h_RD = h_RD.to(self.workshop.dtype)  # as the base's own head takes it
        parts_TD = list(torch.split(h_RD, packed.output_counts))
        if self.encoder.task is Task.FEATURES:
            outputs = [self._pooled(part_TD) for part_TD in parts_TD]
        elif self.encoder.reads is Reads.TOKENS:
            outputs = list(torch.split(headed(self.encoder, h_RD[None])[0], packed.output_counts))
        elif self.encoder.reads is Reads.CLASS:
            outputs = list(headed(self.encoder, torch.stack(parts_TD)))
        else:
            outputs = [headed(self.encoder, part_TD[None])[0] for part_TD in parts_TD]
        self._charge(packed)
        return [each.float() for each in outputs]

    def _pooled(self, features_TD: Tensor) -> Tensor:
        of_class = self.pooling is Pooling.CLASS
        pooled_D = features_TD[0].float() if of_class else features_TD.float().mean(0)
        return F.normalize(pooled_D, dim=0) if self.normalized else pooled_D

    def _charge(self, packed: Packed) -> None:
        """Count what stands before and after the layers: it is never left out."""
        for chunk, outputs in zip(packed.chunks, packed.output_counts, strict=True):
            flops = self._outside_flops(_item(chunk), outputs)
            usage = chunk.sequence.usage
            usage.flops += flops
            usage.dense_flops += flops
            usage.parameters_used += flops // 2
            usage.dense_parameters += flops // 2

    def _outside_flops(self, item: Item, outputs: int) -> int:
        """The matrix products of patches and head of one item; 1 multiply-add = 2 FLOPs."""
        times = outputs if self.encoder.task is Task.TOKEN_CLASSIFICATION else 1
        products = times * self._head_weights
        if item.pixels_CHW is not None:
            _, height, width = item.pixels_CHW.shape
            for patch in self._patches:
                across = (height // patch.stride[0]) * (width // patch.stride[1])
                products += across * patch.weight.numel()
        return 2 * products


def headed(encoder: EncoderLayout, last_BTD: Tensor) -> Tensor:
    """What the base's own head makes of these hidden states, [B, O] or [B, T, O]."""
    pooler = encoder.pooler
    pooled = pooler(last_BTD) if pooler is not None else None
    given = BaseModelOutputWithPooling(last_hidden_state=last_BTD, pooler_output=pooled)
    inner: Any = encoder.inner
    inner.forward = lambda *_, **__: given
    try:
        logits: Tensor = encoder.outer(last_BTD).logits
    finally:
        with suppress(AttributeError):
            del inner.forward
    return logits


def _item(chunk: Chunk) -> Item:
    assert isinstance(chunk.sequence, WholeSequence), "an encoder reads whole items"
    return chunk.sequence.item


def _pixels_shape(item: Item) -> Sequence[int]:
    return () if item.pixels_CHW is None else tuple(item.pixels_CHW.shape)
