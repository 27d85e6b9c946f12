"""The least time that a plan needs here: by the bytes of weights that some row needs, by FLOPs.

Each product takes at least as long as reading its weights, and as multiplying. Of the weights of
a routed sub-layer nothing is needed when no row is kept there; of picked channels, those that some
row picked. How much rows agree in their channels is measured on the pretrained model's own inputs.
Heads and experts are taken to be needed whole. Norms, activations and picking cost nothing here.

Shape letters: T tokens   I inputs of a projection   R rows
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.machine import Limits
from elastiformer import ElasticModel, LayerPlan, Plan, Site
from elastiformer.accounting import LayerShape, layer_counts

_DRAWS = 4  # batches that are drawn to see how much of the channels their rows share
_ATTENTION = (Site.ATTENTION_IN, Site.ATTENTION_OUT)


@dataclass(frozen=True, slots=True)
class _Product:
    bytes: float
    flops: float

    def seconds(self, limits: Limits) -> float:
        return max(self.bytes / limits.bytes_per_second, self.flops / limits.flops_per_second)


class Roofline:
    """The least seconds of a decode step of one model on one machine."""

    def __init__(self, model: ElasticModel, limits: Limits, ids: Sequence[int]) -> None:
        self._model, self._limits = model, limits
        self._scores = _scores(model, ids)
        self._unions: dict[tuple[int, Site, int, int], float] = {}

    def seconds(self, plan: Plan, rows: int, context: int) -> float:
        """Of one step of so many rows, each over `context` keys, all under one plan."""
        size, of_keys = self._model.bytes_per_weight, self._model.dtype.itemsize
        shape = self._model.shape
        head = shape.width * shape.vocabulary
        products = [_Product(head * size, 2 * head * rows)]
        for index, (layer, kept) in enumerate(zip(shape.layers, plan, strict=True)):
            for site in Site:
                products.append(self._at_site(index, layer, kept, site, rows, size))
            staying = rows * kept.attention_tokens
            keys = staying * context
            products.append(
                _Product(2 * layer.kv_width * of_keys * keys, 4 * layer.attention_width * keys)
            )
        return sum(product.seconds(self._limits) for product in products)

    def _at_site(
        self, index: int, layer: LayerShape, plan: LayerPlan, site: Site, rows: int, size: float
    ) -> _Product:
        counts = layer_counts(layer, plan)
        share = plan.attention_tokens if site in _ATTENTION else plan.mlp_tokens
        staying = rows * share
        inputs, outputs, kept = {
            Site.ATTENTION_IN: (
                layer.width,
                layer.attention_width + 2 * layer.kv_width,
                counts.attention_in,
            ),
            Site.ATTENTION_OUT: (layer.attention_width, layer.width, counts.attention_out),
            Site.MLP_IN: (
                layer.width,
                layer.mlp_width * (2 if layer.gated else 1),
                counts.mlp_in,
            ),
            Site.MLP_OUT: (layer.mlp_width, layer.width, counts.mlp_out),
        }[site]
        needed = self._union(index, site, kept, max(1, round(staying))) * inputs
        read = needed * outputs * size * min(1.0, staying)
        return _Product(read, 2 * kept * outputs * staying)

    def _union(self, layer: int, site: Site, kept: int, rows: int) -> float:
        """The share of a site's channels that some of so many rows picks."""
        scores_TI = self._scores[layer, site]
        tokens, inputs = scores_TI.shape
        if kept >= inputs:
            return 1.0
        key = (layer, site, kept, rows)
        if key not in self._unions:
            picked_TK = scores_TI.topk(kept, dim=-1).indices
            draw = random.Random(0)
            shares = []
            for _ in range(_DRAWS):
                chosen = picked_TK[[draw.randrange(tokens) for _ in range(rows)]]
                shares.append(len(set(chosen.flatten().tolist())) / inputs)
            self._unions[key] = sum(shares) / len(shares)
        return self._unions[key]


@torch.inference_mode()
def _scores(model: ElasticModel, ids: Sequence[int]) -> dict[tuple[int, Site], Tensor]:
    """Size x column norm of each channel for each token, [T, I], by layer and site."""
    found: dict[tuple[int, Site], Tensor] = {}
    hooks = [
        layer.at_site(site)[0].module.register_forward_pre_hook(
            _noting(found, (layer.index, site), model.layout.column_norms(layer, site))
        )
        for layer in model.layout.layers
        for site in Site
    ]
    try:
        model.teacher(torch.tensor([list(ids)], device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _noting(
    found: dict[tuple[int, Site], Tensor], key: tuple[int, Site], norms_I: Tensor
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[key] = inputs[0].flatten(0, -2).float().abs() * norms_I

    return note
