"""The weights of a late layer as its one compiled call reads them (tail_kernels.py).

They are laid out when a step first runs the layer so: a copy of what few rows read of it.

Shape letters: D width   A query heads   H head size   S sides (direct_reading.py)   I some numbers
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastiformer import amx, tail_kernels
from elastiformer.blocks import Blocks, blocks_of
from elastiformer.capacity import Site
from elastiformer.class_kernels import AffineNorm, affine_of
from elastiformer.direct_reading import Absorbed, DirectReading
from elastiformer.families import Layer
from elastiformer.tail_kernels import TailLayer
from elastiformer.workshop import Workshop

Names = tuple[str | None, ...]
_NOTHING = np.empty(0, dtype=np.float32)
_FORMS: dict[int, Callable[[Tensor], Tensor]] = {
    tail_kernels.GELU: F.gelu,
    tail_kernels.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    tail_kernels.QUICK_GELU: lambda x: x * torch.sigmoid(1.702 * x),
    tail_kernels.RELU: F.relu,
}


class TailWeights:
    """Those of one model."""

    def __init__(self, workshop: Workshop, direct: DirectReading) -> None:
        self._workshop, self._direct = workshop, direct
        able = amx.ABLE and workshop.dtype == torch.bfloat16 and workshop.device.type == "cpu"
        self.forms = [_form(layer) if able else None for layer in workshop.layout.layers]
        self._plain: dict[int, TailLayer] = {}  # by layer, with nothing absorbed
        self._layers: dict[tuple[int, Names], tuple[int, TailLayer]] = {}

    def takes(self, first: int) -> bool:
        """Whether all layers from `first` on can run so."""
        return all(form is not None for form in self.forms[first:])

    def of(self, layer: Layer, names: Names) -> TailLayer:
        """A layer, with the repairs of the tokens that are read (None: without one)."""
        key, version = (layer.index, names), self._direct.version(layer, names)
        if key not in self._layers or self._layers[key][0] != version:
            if layer.index not in self._plain:
                self._plain[layer.index] = self._plain_of(layer)
            absorbed = self._direct.absorb(layer, names)
            plain = self._plain[layer.index]
            self._layers[key] = version, _with(plain, absorbed)
        return self._layers[key][1]

    def _plain_of(self, layer: Layer) -> TailLayer:
        form, shape = self.forms[layer.index], layer.shape
        assert form is not None, "a layer that cannot run so"
        norms = (layer.attention_norm, layer.attention_close, layer.mlp_norm, layer.mlp_close)
        attention_norm, attention_close, mlp_norm, mlp_close = map(_norm, norms)
        out, up, down = (
            self._blocks(layer, site)
            for site in (Site.ATTENTION_OUT, Site.MLP_IN, Site.MLP_OUT)
        )  # fmt: skip
        query = blocks_of(layer.query.weight_OI, layer.query.bias_O)
        nothing = Blocks(np.empty(0, dtype=np.uint16), _NOTHING, 0, 0)
        return TailLayer(
            attention_norm, query, nothing, nothing, out, attention_close, mlp_norm, up, down,
            mlp_close, form, shape.width, shape.heads, shape.head_dim, 0, np.float32(layer.scale),
        )  # fmt: skip

    def _blocks(self, layer: Layer, site: Site) -> Blocks:
        (projection,) = layer.at_site(site)
        return blocks_of(projection.weight_OI, projection.bias_O)


def _with(layer: TailLayer, absorbed: Absorbed) -> TailLayer:
    keys_ASDH = absorbed.keys_SAHD.permute(1, 0, 3, 2)
    values_AHSD = absorbed.values_SAHD.permute(1, 2, 0, 3)
    return layer._replace(
        keys=blocks_of(keys_ASDH.flatten(1, 2)),
        values=blocks_of(values_AHSD.flatten(2), absorbed.bias_O),
        sides=len(absorbed.keys_SAHD),
    )


def _norm(module: nn.Module | None) -> AffineNorm:
    norm = affine_of(module)
    assert norm is not None, "a norm that loops cannot do"
    return norm._replace(epsilon=np.float32(norm.epsilon))  # type: ignore[arg-type]


@torch.inference_mode()
def _form(layer: Layer) -> int | None:
    """The layer's activation as the kernel knows it; None: it cannot run the layer."""
    norms = (layer.attention_norm, layer.attention_close, layer.mlp_norm, layer.mlp_close)
    others = (layer.gate, layer.after_attention, layer.after_mlp, layer.query_norm)
    if any(affine_of(norm) is None for norm in norms) or any(each is not None for each in others):
        return None
    sample_I = torch.linspace(-9, 9, 64)
    expected_I = layer.activation(sample_I)
    for form, activation in _FORMS.items():
        if torch.allclose(activation(sample_I), expected_I, rtol=1e-5, atol=1e-6):
            return form
    return None
