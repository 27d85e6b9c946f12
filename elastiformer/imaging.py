"""The sparse form of a vision-language model: image tokens take their features from the projector.

All else is the causal form. Only image tokens that stay are among the rows.

Shape letters: N packed tokens   D width
"""

from __future__ import annotations

from torch import Tensor

from elastiformer.imaged import ImagedSequence
from elastiformer.packed import Packed
from elastiformer.sparse import SparseForm


class ImagingForm(SparseForm):
    """Runs steps of packed rows for one vision-language model. One thread owns it."""

    def _inputs(self, packed: Packed) -> Tensor:
        h_ND = super()._inputs(packed)
        for chunk, span in zip(packed.chunks, packed.spans, strict=True):
            sequence = chunk.sequence
            if not isinstance(sequence, ImagedSequence):
                continue
            start, stop = sequence.length, sequence.length + len(chunk.ids)
            for placed, shown in sequence.shown.items():
                first, end = max(placed.place, start), min(placed.end, stop)
                if first < end:
                    rows = slice(span.start + first - start, span.start + end - start)
                    features_KD = shown.features_KD[first - placed.place : end - placed.place]
                    h_ND[rows] = features_KD.to(h_ND.dtype)
        return h_ND
