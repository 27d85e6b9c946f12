"""Rotations that are looked up are those that the family computes, in every type."""

from __future__ import annotations

import pytest
import torch

from elastiformer import DENSE, Chunk, ElasticModel
from elastiformer.packed import Packed
from elastiformer.rotary import Rotary
from tests.devices import DEVICE
from tests.tiny import CONTEXT, WIDTH, tiny


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_is_looked_up_is_what_the_family_computes(family):
    model = ElasticModel(tiny(family))
    rotary = Rotary(model.layout)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        for start in (0, CONTEXT - 9, 3 * CONTEXT):  # the last is beyond the first table
            request = model.sequence(DENSE, 9, 9)
            request.length = start
            packed = Packed([Chunk(request, [1] * 9)], model.device)
            h_ND = torch.zeros(9, WIDTH, dtype=dtype, device=DEVICE)
            found = rotary.of(packed, h_ND)
            position_1T = torch.arange(start, start + 9, device=DEVICE)[None]
            for kind, rotation in found.items():
                extra = () if kind is None else (kind,)
                cos_1TR, sin_1TR = model.layout.rotary(h_ND, position_1T, *extra)
                assert rotation.cos_NR.dtype == dtype
                torch.testing.assert_close(rotation.cos_NR, cos_1TR[0])
                torch.testing.assert_close(rotation.sin_NR, sin_1TR[0])
