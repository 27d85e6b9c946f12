"""The cosines and sines by which a step's queries and keys are rotated, by type of layer.

Where they depend on the position alone they are looked up: computing them anew takes as long as a
layer of one row.

Shape letters: N rows   P positions   D width   R rotated part of a head
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from elastiformer.families import Layer, Layout
from elastiformer.packed import Packed
from elastiformer.pointwise import Rotation, turns_halves

_LEAST = 512  # positions that are computed at once

Rotations = dict[str | None, Rotation]  # by layer type; None: of all layers
Table = dict[str | None, tuple[Tensor, Tensor]]  # likewise; cosines and sines [P, R]


class Rotary:
    """Makes the rotations of one model's steps."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        # A layer of each type that has frequencies of its own.
        self._examples: dict[str | None, Layer] = {
            layer.layer_type if layout.rotary_by_layer_type else None: layer
            for layer in layout.layers
        }
        self._tables: dict[torch.dtype, Table] = {}  # encoders have steps of two types
        self._unchecked = dict(self._examples)

    def of(self, packed: Packed, h_ND: Tensor) -> Rotations:
        """The rotations of packed rows; none where nothing is rotated."""
        if self._layout.rotary is None:
            return {}
        if self._layout.rotary_by_length:
            # Batch-mates must not change each other's frequencies.
            positions = [packed.original_N[span] for span in packed.spans]
            found = {kind: self._computed(kind, positions, h_ND) for kind in self._examples}
        else:
            at_N = packed.original_N
            found = {
                kind: (cos_PR.index_select(0, at_N), sin_PR.index_select(0, at_N))
                for kind, (cos_PR, sin_PR) in self._covering(
                    max(packed.originals) + 1, h_ND
                ).items()
            }
        return {kind: Rotation(*both) for kind, both in found.items()}

    def _covering(self, positions: int, h_ND: Tensor) -> Table:
        """A table of at least so many positions, in the type of the residual."""
        known = self._tables.get(h_ND.dtype, {})
        if not known or len(next(iter(known.values()))[0]) < positions:
            every_P = torch.arange(
                max(_LEAST, 1 << (positions - 1).bit_length()), device=h_ND.device
            )
            with _disable_current_modes():  # whoever counts operators did not ask for these
                known = {kind: self._computed(kind, [every_P], h_ND) for kind in self._examples}
            self._tables[h_ND.dtype] = known
        return known

    def _computed(
        self, kind: str | None, positions: Sequence[Tensor], h_ND: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions that stand in sequences of their own."""
        rotary = self._layout.rotary
        assert rotary is not None, "a rotation of what is not rotated"
        extra = () if kind is None else (kind,)
        parts = [rotary(h_ND, each[None], *extra) for each in positions]
        cos_NR, sin_NR = (torch.cat([part[at][0] for part in parts]) for at in (0, 1))
        if (layer := self._unchecked.pop(kind, None)) is not None:
            assert turns_halves(layer, cos_NR.shape[1], h_ND.dtype, h_ND.device), kind
        return cos_NR, sin_NR
