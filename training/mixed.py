"""bfloat16 for the products of training, float32 for the rest, on processors that have both.

PyTorch's attention on a CPU goes backward in bfloat16 several times slower than in float32, so
under autocast the attention itself stays in float32. The weights are float32 throughout.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

NAME = "sdpa_in_float32"


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **others: Any,
) -> tuple[Tensor, None]:
    wide = [each.float() for each in (query, key, value)]
    with torch.autocast(query.device.type, enabled=False):
        done, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *wide, attention_mask, **others)
    return done.to(query.dtype), None


def mixed(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose attention stays in float32 under `autocast()`."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(NAME)
    return model


def autocast(device: str = "cpu") -> AbstractContextManager[Any]:
    """Products in bfloat16, where the processor computes in it."""
    able = torch.cpu.get_capabilities()
    fast = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.autocast(device, torch.bfloat16, enabled=bool(fast) or device != "cpu")
