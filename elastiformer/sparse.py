"""The sparse form: packed rows, each under its own plan, and what is left out is not computed.

One forward for all families, over the base's own modules and weights. A sub-layer gathers the
rows that stay, computes them, and adds the branch to the residual of those rows alone. Rows at
capacity 1.0 meet no router and no repair.

It knows nothing of the masked form (masked.py), which takes the same decisions in training.

Shape letters: N packed tokens   R output rows   D width   V vocabulary
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Iterable, Sequence
from importlib.util import find_spec
from math import log2

import torch
from torch import Tensor

import elastiformer.flop_formulas  # noqa: F401  (registers them)
from elastiformer import kernels, memory
from elastiformer.accounting import ModelShape
from elastiformer.adapter import Adapter
from elastiformer.costs import CostTable, Trial
from elastiformer.decoding import Decoding, Prompts
from elastiformer.families import Layer, Layout
from elastiformer.keeping import Keeping
from elastiformer.late_layers import LateLayers
from elastiformer.originals import Originals
from elastiformer.packed import Packed
from elastiformer.placing import Placing
from elastiformer.pointwise import Norm
from elastiformer.rotary import Rotary, Rotations
from elastiformer.sequence import Chunk
from elastiformer.spare_rows import with_room
from elastiformer.sparse_attention import SparseAttention
from elastiformer.sparse_mlp import SparseMlp
from elastiformer.taken import Taken
from elastiformer.workshop import Workshop

_LOG = logging.getLogger(__name__)


class SparseForm:
    """Runs steps of packed rows for one model. One thread owns it."""

    def __init__(
        self,
        layout: Layout,
        adapter: Adapter | None,
        shape: ModelShape,
        originals: Originals | None = None,
    ) -> None:
        self.layout, self.adapter, self.shape = layout, adapter, shape
        self.workshop = Workshop(layout, adapter, originals)
        if self.workshop.device.type == "cpu":
            memory.keep_freed()
        keeping = Keeping(self.workshop)
        self._attention = SparseAttention(self.workshop, keeping)
        self._mlp = SparseMlp(self.workshop, keeping)
        self._decoding, self._trial = _decoding(self.workshop), Trial()
        self._late = LateLayers(self.workshop, self._attention, self._decoding)
        self._rotary = Rotary(layout)

    @torch.inference_mode()
    def step(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Run the chunks; float32 logits [output rows, vocabulary] of each."""
        kernels.use_threads()
        parts = lone, longer = _parts(chunks)
        if longer and (prompts := self._decoding.prompts) is not None:
            packed = Packed(chunks, self.workshop.device)
            if prompts.takes(packed):
                return self._run_packed(packed, prompts)
        if not longer or not self._decoding.may_run_apart:
            return self._run(chunks)
        longs = self._late.parted(longer)
        if not lone:
            return self._run(chunks) if len(longs) == 1 else self._run_apart(chunks, longs)
        if self._late.would_wait(*parts):
            return self._run_apart(chunks, [lone, *longs])
        # Decode rows beside prompts go layer by layer; by themselves they are one call.
        work = tuple(map(_work, parts))
        together = self._trial.goes_first_way(work)
        begun = time.perf_counter()
        logits = self._run(chunks) if together else self._run_apart(chunks, [lone, *longs])
        self._trial.took(work, together, time.perf_counter() - begun)
        return logits

    def _run_apart(self, chunks: Sequence[Chunk], parts: Iterable[list[Chunk]]) -> list[Tensor]:
        """One part after the other; in the order of the chunks the logits of each one's last."""
        found = {
            chunk.sequence: logits_RV
            for part in parts
            for chunk, logits_RV in zip(part, self._run(part), strict=True)
        }
        return [found[chunk.sequence] for chunk in chunks]

    def _run(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        return self._run_packed(Packed(chunks, self.workshop.device))

    def _run_packed(self, packed: Packed, prompts: Prompts | None = None) -> list[Tensor]:
        """Run one step.

        Args:
            prompts: what runs its layers, if it is a step that this takes.
        """
        packed.allowances = (prompts or self.workshop).allowances(packed)
        placing, taken = self._placing(packed), Taken(packed, self.shape)
        h_ND = self._embed(packed)
        rotations = self._rotary.of(packed, h_ND)
        run = self._run_layers if prompts is None else prompts.run
        h_ND = run(h_ND, packed, placing, taken, rotations)
        logits = self._logits(h_ND, packed)
        taken.settle(self.adapter.units if self.adapter is not None else ())
        if packed.allowances is not None:
            packed.allowances.settle()
        for chunk in packed.chunks:
            chunk.sequence.length += len(chunk.ids)
        return logits

    def _run_layers(
        self, h_ND: Tensor, packed: Packed, placing: Placing, taken: Taken, rotations: Rotations
    ) -> Tensor:
        """What the layers leave; `h_ND` may be changed."""
        if not self._decoding.fits(packed):
            return self._layer_by_layer(h_ND, packed, placing, taken, rotations)
        work = self._decoding.work(packed)
        whole = work is None or self._trial.goes_first_way(work)
        begun = time.perf_counter()
        if whole:
            self._decoding.run(h_ND, packed, placing, taken, rotations)
        else:
            h_ND = self._layer_by_layer(h_ND, packed, placing, taken, rotations)
        if work is not None:
            self._trial.took(work, whole, time.perf_counter() - begun)
        return h_ND

    def _layer_by_layer(
        self, h_ND: Tensor, packed: Packed, placing: Placing, taken: Taken, rotations: Rotations
    ) -> Tensor:
        late = self._late.of(packed, placing)
        for layer in self.layout.layers:
            if late is not None and layer.index in late.leaving:
                self._late.leave(layer.index, late, h_ND, packed, placing, rotations)
            if late is None or layer.index not in late.layers:
                h_ND = self._run_layer(layer, h_ND, packed, placing, taken, rotations)
            elif layer.index == late.layers.start:
                self._late.run(late, h_ND, packed, placing, taken, rotations)
        return h_ND

    def _run_layer(
        self,
        layer: Layer,
        h_ND: Tensor,
        packed: Packed,
        placing: Placing,
        taken: Taken,
        rotations: Rotations,
    ) -> Tensor:
        closes = self.workshop.closes[layer.index]
        kind = layer.layer_type if layer.layer_type in rotations else None
        self._attention.run(layer, h_ND, packed, placing, taken, rotations.get(kind))
        h_ND = _closed(h_ND, closes.attention)
        self._mlp.run(layer, h_ND, packed, taken)
        return _closed(h_ND, closes.mlp)

    def prepare(self, seconds: float) -> CostTable:
        """Lay out all products now, and measure which is faster when."""
        kernels.use_threads()
        table = self.workshop.measure(seconds)
        for layer in self.layout.layers:
            self.workshop.product(layer.query, layer.key, layer.value).prepare()
            keys_values = self.workshop.product(layer.key, layer.value)
            self.workshop.mending.prepare(layer, keys_values)
        if self.workshop.head is not None:
            self.workshop.head.prepare()
        self._decoding.prepare()
        self._late.prepare()
        return table

    def _placing(self, packed: Packed) -> Placing:
        return Placing(packed)

    def _embed(self, packed: Packed) -> Tensor:
        h_ND = self._inputs(packed)
        if self.layout.positions is not None:
            h_ND = h_ND + self.layout.positions(packed.original_N)
        return h_ND.to(self.workshop.working_dtype)

    def _inputs(self, packed: Packed) -> Tensor:
        embedded_ND: Tensor = self.layout.embedding(packed.ids_N)
        return embedded_ND

    def _logits(self, h_ND: Tensor, packed: Packed) -> list[Tensor]:
        assert self.workshop.head is not None, "logits without a head"
        if not packed.outputs.count:  # pieces of prompts: the head has nothing to read
            nothing_RV = torch.empty(0, self.workshop.head.outputs, device=h_ND.device)
            return [nothing_RV] * len(packed.chunks)
        h_RD = packed.outputs.of(h_ND)
        logits_RV = self.workshop.head.dense(self.workshop.final_norm(h_RD))
        if self.layout.logit_softcap is not None:
            logits_RV = logits_RV / self.layout.logit_softcap
            logits_RV = torch.tanh(logits_RV) * self.layout.logit_softcap
        return list(torch.split(logits_RV.float(), packed.output_counts))


def _decoding(workshop: Workshop) -> Decoding:
    """What runs rows that each are their request's latest token, on the base's device."""
    if workshop.device.type == "cuda" and find_spec("triton") is not None:
        from elastiformer.device_decoding import DeviceDecoding  # Triton is not everywhere

        try:
            return DeviceDecoding(workshop)
        except Exception as error:  # whatever a compiler that is missing makes of it
            _LOG.warning("decode steps run layer by layer, Triton cannot compile: %s", error)
    return Decoding(workshop)


def _parts(chunks: Sequence[Chunk]) -> tuple[list[Chunk], list[Chunk]]:
    """Those of one token, and the longer ones."""
    parts: tuple[list[Chunk], list[Chunk]] = ([], [])
    for chunk in chunks:
        parts[len(chunk.ids) > 1].append(chunk)
    return parts


def _work(chunks: Sequence[Chunk]) -> Hashable:
    """What so many tokens under such plans are like in time."""
    plans = [chunk.sequence.run_at(chunk.sequence.length) for chunk in chunks]
    linear = sum(plan.total.linear for plan in plans) / len(plans)
    return round(2 * log2(sum(len(chunk.ids) for chunk in chunks))), round(4 * log2(linear))


def _closed(h_ND: Tensor, norm: Norm | None) -> Tensor:
    """The residual after a sub-layer, which some families norm."""
    return h_ND if norm is None else with_room(norm, h_ND)
