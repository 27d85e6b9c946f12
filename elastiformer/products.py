"""The matrix products of the sparse form: whole, over picked channels, by head, by expert.

A product over picked channels reads only those columns of the weight: per token, the channels of
the largest size x column norm. In PyTorch that is `embedding_bag` over the transposed weight,
which is made once, when a plan first needs it. Experts need their neurons side by side, so their
matrices are laid out anew, once, too; the base's own weights stay as they are.

Shape letters: R rows   I inputs   O outputs   M experts   S neurons of one expert
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from elastiformer.adapter import Adapter
from elastiformer.families import Layer, Projection
from elastiformer.routers import best


def whole(projection: Projection, x_RI: Tensor) -> Tensor:
    return F.linear(x_RI, projection.weight_OI, projection.bias_O)


def largest(x_RI: Tensor, norms_I: Tensor, count: int) -> Tensor:
    """Each row's `count` channels of the largest size x column norm: indices [R, count]."""
    weighed_RI = x_RI.abs().float() * norms_I
    if len(x_RI) == 1:
        return weighed_RI.topk(count, dim=1, sorted=False).indices
    kept_RI = best(weighed_RI, torch.full((len(x_RI),), count, device=x_RI.device))
    return torch.nonzero(kept_RI)[:, 1].view(len(x_RI), count)


def only(x_RI: Tensor, index_RK: Tensor) -> Tensor:
    """`x`, zero but for the picked channels: what a low-rank repair of a picked product reads."""
    return torch.zeros_like(x_RI).scatter_(1, index_RK, x_RI.gather(1, index_RK))


class Transposes:
    """Weights as inputs x outputs, so that a picked channel is one row; each made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int, int], Tensor] = {}

    def of(self, projection: Projection, outputs: slice = slice(None)) -> Tensor:
        start = outputs.start or 0
        stop = projection.stop - projection.start if outputs.stop is None else outputs.stop
        key = (id(projection), start, stop)
        if key not in self._made:
            weight_IO = projection.weight_OI[start:stop].detach().T.contiguous()
            self._made[key] = weight_IO
        return self._made[key]


def picked(weight_IO: Tensor, bias_O: Tensor | None, x_RI: Tensor, index_RK: Tensor) -> Tensor:
    """The product over the picked channels only; it reads `count` rows of the weight per token."""
    value_RK = x_RI.gather(1, index_RK)
    rows, count = index_RK.shape
    if rows == 1 and count > 1 and torch.get_num_threads() > 1:
        # One bag runs on one thread: halve the only row, and add.
        offsets = torch.tensor([0, count // 2], device=index_RK.device)
        halves = F.embedding_bag(
            index_RK[0], weight_IO, offsets, mode="sum", per_sample_weights=value_RK[0]
        )
        out_RO = halves.sum(0, keepdim=True)
    else:
        out_RO = F.embedding_bag(index_RK, weight_IO, mode="sum", per_sample_weights=value_RK)
    return out_RO if bias_O is None else out_RO + bias_O


@dataclass(frozen=True, slots=True, eq=False)
class ExpertTable:
    """One layer's MLP with the neurons of each expert side by side.

    Left out on purpose: the bias of the down projection, which is added once and not per expert.
    """

    order_I: Tensor
    gate_MSI: Tensor | None
    gate_bias_MS: Tensor | None
    up_MSI: Tensor
    up_bias_MS: Tensor | None
    down_MOS: Tensor
    down_IO: Tensor  # all neurons, in the experts' order: for picking among them

    @classmethod
    def of(cls, layer: Layer, adapter: Adapter) -> ExpertTable:
        assert adapter.neuron_order is not None
        order_I = adapter.neuron_order[layer.index]
        experts = adapter.spec.experts

        def fronts(projection: Projection | None) -> tuple[Tensor | None, Tensor | None]:
            if projection is None:
                return None, None
            weight_OI, bias_O = projection.weight_OI.detach()[order_I], projection.bias_O
            bias_MS = None if bias_O is None else bias_O.detach()[order_I].view(experts, -1)
            return weight_OI.view(experts, -1, weight_OI.shape[1]), bias_MS

        gate_MSI, gate_bias_MS = fronts(layer.gate)
        up_MSI, up_bias_MS = fronts(layer.up)
        assert up_MSI is not None
        down_OI = layer.down.weight_OI.detach()[:, order_I]
        down_MOS = down_OI.view(len(down_OI), experts, -1).transpose(0, 1).contiguous()
        return cls(
            order_I,
            gate_MSI,
            gate_bias_MS,
            up_MSI,
            up_bias_MS,
            down_MOS,
            down_OI.T.contiguous(),
        )
