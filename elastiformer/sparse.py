"""The sparse form: packed rows, each under its own plan, and what is left out is not computed.

One forward for all families, over the base's own modules and weights. A sub-layer gathers the
rows that stay, computes them group by group, and adds the branch to the residual of those rows
alone. Rows at capacity 1.0 meet no router and no repair.

It knows nothing of the masked form (masked.py), which takes the same decisions in training.

Shape letters: N packed tokens   R output rows   D width   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elastiformer.accounting import ModelShape
from elastiformer.adapter import Adapter
from elastiformer.families import Layout
from elastiformer.keeping import Keeping
from elastiformer.packed import Packed, Taken
from elastiformer.products import Products
from elastiformer.sequence import Chunk
from elastiformer.sparse_attention import Rotations, SparseAttention
from elastiformer.sparse_mlp import SparseMlp


class SparseForm:
    """Runs steps of packed rows for one model. One thread owns it."""

    def __init__(self, layout: Layout, adapter: Adapter | None, shape: ModelShape) -> None:
        self.layout, self.adapter, self.shape = layout, adapter, shape
        products = Products(layout, adapter)
        keeping = Keeping(products)
        self._attention = SparseAttention(products, keeping)
        self._mlp = SparseMlp(products, keeping)

    @torch.inference_mode()
    def step(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Run the chunks; float32 logits [output rows, vocabulary] of each."""
        packed = Packed(chunks, self.layout.head.weight.device)  # type: ignore[arg-type]
        taken = Taken(packed, self.shape)
        h_ND = self._embed(packed)
        rotations = self._rotations(packed, h_ND)
        for layer in self.layout.layers:
            h_ND = self._attention.run(layer, h_ND, packed, taken, rotations)
            h_ND = self._mlp.run(layer, h_ND, packed, taken)
        outputs = packed.output_rows()
        logits = self._logits(h_ND, outputs)
        taken.settle(outputs, self.adapter.units if self.adapter is not None else ())
        for chunk in chunks:
            chunk.sequence.length += len(chunk.ids)
        return logits

    def _embed(self, packed: Packed) -> Tensor:
        h_ND: Tensor = self.layout.embedding(packed.ids_N)
        if self.layout.positions is not None:
            h_ND = h_ND + self.layout.positions(packed.position_N)
        return h_ND

    def _rotations(self, packed: Packed, h_ND: Tensor) -> Rotations:
        """Cosines and sines [N, rotated], by the type of layer that has frequencies of its own."""
        rotary = self.layout.rotary
        if rotary is None:
            return {}
        # Where frequencies depend on a sequence's length, batch-mates must not change them.
        spans = packed.spans if self.layout.rotary_by_length else [slice(None)]
        kinds = {
            layer.layer_type if self.layout.rotary_by_layer_type else None: None
            for layer in self.layout.layers
        }
        rotations = {}
        for kind in kinds:
            extra = () if kind is None else (kind,)
            parts = [rotary(h_ND, packed.position_N[span][None], *extra) for span in spans]
            cos_N, sin_N = (torch.cat([part[at][0] for part in parts]) for at in (0, 1))
            rotations[kind] = (cos_N, sin_N)
        return rotations

    def _logits(self, h_ND: Tensor, outputs: list[list[int]]) -> list[Tensor]:
        wanted = [row for rows in outputs for row in rows]
        if len(wanted) < len(h_ND):
            h_ND = h_ND[wanted]
        logits_RV = self.layout.head(self.layout.final_norm(h_ND))
        if self.layout.logit_softcap is not None:
            logits_RV = logits_RV / self.layout.logit_softcap
            logits_RV = torch.tanh(logits_RV) * self.layout.logit_softcap
        return list(logits_RV.float().split([len(rows) for rows in outputs]))
