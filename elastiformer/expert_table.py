"""One layer's MLP laid out expert by expert: an expert's neurons side by side.

The base's own weights stay as they are; what is here is made once, when a plan first needs it.

Shape letters: R rows   I inputs   O outputs   K picked channels   M experts   S neurons of one
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from elastiformer.adapter import Adapter
from elastiformer.families import Layer, Projection
from elastiformer.products import picked


@dataclass(frozen=True, slots=True, eq=False)
class FrontMatrix:
    """The gate or up projection of one layer, expert by expert."""

    weight_MSI: Tensor
    bias_MS: Tensor | None

    @classmethod
    def of(cls, projection: Projection, order_I: Tensor, experts: int) -> FrontMatrix:
        weight_OI, bias_O = projection.weight_OI.detach()[order_I], projection.bias_O
        bias_MS = None if bias_O is None else bias_O.detach()[order_I].view(experts, -1)
        return cls(weight_OI.view(experts, -1, weight_OI.shape[1]), bias_MS)

    def run(self, expert: int, x_RI: Tensor, channels_RK: Tensor | None) -> Tensor:
        weight_SI = self.weight_MSI[expert]
        bias_S = None if self.bias_MS is None else self.bias_MS[expert]
        if channels_RK is None:
            return F.linear(x_RI, weight_SI, bias_S)
        return picked(weight_SI.T.contiguous(), bias_S, x_RI, channels_RK)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertTable:
    """The matrices of one layer's MLP.

    Left out on purpose: the bias of the down projection, which is added once and not per expert.
    """

    order_I: Tensor
    gate: FrontMatrix | None
    up: FrontMatrix
    down_MOS: Tensor
    down_IO: Tensor  # all neurons, in the experts' order: for picking among them

    @classmethod
    def of(cls, layer: Layer, adapter: Adapter) -> ExpertTable:
        assert adapter.neuron_order is not None, "experts without an order of the neurons"
        order_I, experts = adapter.neuron_order[layer.index], adapter.spec.experts
        gate = None if layer.gate is None else FrontMatrix.of(layer.gate, order_I, experts)
        down_OI = layer.down.weight_OI.detach()[:, order_I]
        down_MOS = down_OI.view(len(down_OI), experts, -1).transpose(0, 1).contiguous()
        up = FrontMatrix.of(layer.up, order_I, experts)
        return cls(order_I, gate, up, down_MOS, down_OI.T.contiguous())

    def neurons(self, expert: int) -> slice:
        """The expert's place in the experts' order."""
        size = self.down_MOS.shape[2]
        return slice(expert * size, (expert + 1) * size)
