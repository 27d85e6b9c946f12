"""What PyTorch's FlopCounterMode does not know: formulas of the operators that steps are made of.

Attention counts the rectangle of queries and keys; a picked product its picks times its outputs.
Importing this file registers them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import elastiformer.products  # noqa: F401  (defines one of the operators)


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _sdpa_cpu_flops(
    query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    batch, heads, queries, size = query
    return int(2 * batch * heads * queries * key[2] * (size + value[3]))


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def _packed_linear_flops(
    x: Any, weight: Any, bias: Any, attr: str, scalars: Any, *_: Any, **__: Any
) -> int:
    if scalars:  # products.py says how many channels were picked
        return int(2 * scalars[0] * weight[0])
    rows = 1
    for size in x[:-1]:
        rows *= size
    return int(2 * rows * weight[0] * weight[1])


@register_flop_formula(torch.ops.elasti.picked_linear)
def _picked_linear_flops(_: Any, weight: Any, picks: int, *__: Any, **___: Any) -> int:
    return int(2 * picks * weight[0])


@register_flop_formula(torch.ops.aten._embedding_bag)
def _embedding_bag_flops(weight: Any, indices: Any, *_: Any, **__: Any) -> int:
    chosen = 1
    for size in indices:
        chosen *= size
    return int(2 * chosen * weight[1])


@register_flop_formula(torch.ops.aten._embedding_bag_forward_only)
def _embedding_bag_forward_flops(weight: Any, indices: Any, *_: Any, **__: Any) -> int:
    return _embedding_bag_flops(weight, indices)


@register_flop_formula(torch.ops.elasti.tiled_linear)
def _tiled_linear_flops(
    picks: Any, weight: Any, steps: Any, lows: Any, outputs: int, *__: Any, **___: Any
) -> int:
    return int(2 * picks[1][0] * outputs)
