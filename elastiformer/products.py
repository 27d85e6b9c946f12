"""The matrix products of the sparse form: whole, over picked channels, by head, by expert.

A product over picked channels reads only those columns of the weight: per token, the channels of
the largest size x column norm. In PyTorch that is `embedding_bag` over the transposed weight,
which is made once, when a plan first needs it. Experts need their neurons side by side, so their
matrices are laid out anew, once, too; the base's own weights stay as they are.
`Products` holds all of this for one model; `Repair` is the low-rank addition to some rows.

Shape letters: R rows   I inputs   O outputs   M experts   S neurons of one expert
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from elastiformer.accounting import KVPolicy
from elastiformer.adapter import Adapter
from elastiformer.capacity import Site, Unit
from elastiformer.families import Layer, Layout, Projection
from elastiformer.lora import LoraPair
from elastiformer.packed import Kind
from elastiformer.routers import PartGate, Router, best


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
class FrontMatrix:
    """The gate or up projection of one layer, expert by expert."""

    weight_MSI: Tensor
    bias_MS: Tensor | None

    @classmethod
    def of(cls, projection: Projection, order_I: Tensor, experts: int) -> FrontMatrix:
        weight_OI, bias_O = projection.weight_OI.detach()[order_I], projection.bias_O
        bias_MS = None if bias_O is None else bias_O.detach()[order_I].view(experts, -1)
        return cls(weight_OI.view(experts, -1, weight_OI.shape[1]), bias_MS)

    def run(self, expert: int, x_RI: Tensor, channels: Tensor | None) -> Tensor:
        weight_SI = self.weight_MSI[expert]
        bias_S = None if self.bias_MS is None else self.bias_MS[expert]
        if channels is None:
            return F.linear(x_RI, weight_SI, bias_S)
        return picked(weight_SI.T.contiguous(), bias_S, x_RI, channels)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertTable:
    """One layer's MLP with the neurons of each expert side by side.

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


class Products:
    """The products of one model: its layout, its adapter, and what was laid out anew for them."""

    def __init__(self, layout: Layout, adapter: Adapter | None) -> None:
        self.layout, self.adapter = layout, adapter
        self._transposed: dict[tuple[int, int, int], Tensor] = {}
        self._side_by_side: dict[tuple[int, Site], Tensor] = {}
        self._experts: dict[int, ExpertTable] = {}
        self._pairs: dict[tuple[int, str], dict[str, LoraPair]] = {}

    def of(
        self,
        projection: Projection,
        x_RI: Tensor,
        channels: Tensor | None = None,
        outputs: slice = slice(None),
    ) -> Tensor:
        """The product with a projection, or with one slice of its outputs, over some channels."""
        weight_OI, bias_O = projection.weight_OI[outputs], projection.bias_O
        if bias_O is not None:
            bias_O = bias_O[outputs]
        if channels is None:
            return F.linear(x_RI, weight_OI, bias_O)
        key = (id(projection), outputs.start or 0, len(weight_OI))
        if key not in self._transposed:
            self._transposed[key] = weight_OI.detach().T.contiguous()
        return picked(self._transposed[key], bias_O, x_RI, channels)

    def at_site(
        self, layer: Layer, site: Site, x_RI: Tensor, channels: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The products with all projections that read `site`, in their order.

        Over picked channels they are one product: their rows of the weight lie side by side.
        """
        projections = layer.at_site(site)
        if channels is None:
            return tuple(self.of(projection, x_RI) for projection in projections)
        if (layer.index, site) not in self._side_by_side:
            weights = [projection.weight_OI.detach().T for projection in projections]
            self._side_by_side[layer.index, site] = torch.cat(weights, 1)
        outs_RO = picked(self._side_by_side[layer.index, site], None, x_RI, channels)
        sizes = [len(projection.weight_OI) for projection in projections]
        parts = zip(projections, torch.split(outs_RO, sizes, 1), strict=True)
        return tuple(out if p.bias_O is None else out + p.bias_O for p, out in parts)

    def channels(self, layer: Layer, site: Site, x_RI: Tensor, count: int) -> Tensor | None:
        """The channels to read, [R, count]; None for all of them."""
        if count >= x_RI.shape[1]:
            return None
        return largest(x_RI, self.layout.column_norms(layer, site), count)

    def experts(self, layer: Layer) -> ExpertTable:
        assert self.adapter is not None, "experts without an adapter"
        if layer.index not in self._experts:
            self._experts[layer.index] = ExpertTable.of(layer, self.adapter)
        return self._experts[layer.index]

    def router(self, layer: Layer, unit: Unit) -> Router:
        router = self.adapter.router(layer.index, unit) if self.adapter is not None else None
        assert router is not None, f"a plan that routes {unit} without its routers"
        return router

    @property
    def kv(self) -> KVPolicy:
        return self.adapter.kv if self.adapter is not None else "complete"

    @property
    def part_gate(self) -> PartGate:
        assert self.adapter is not None, "gates without an adapter"
        return self.adapter.spec.part_gate

    def repair_name(self, kind: Kind) -> str | None:
        """The set of low-rank pairs that rows of this kind use; none at capacity 1.0."""
        if kind.is_dense or self.adapter is None or self.adapter.lora is None:
            return None
        return self.adapter.lora.set_name(kind.phase)

    def repair(self, layer: Layer, name: str | None) -> Repair:
        if name is None or self.adapter is None or self.adapter.lora is None:
            return Repair({})
        key = (layer.index, name)
        if key not in self._pairs:  # asked for in every layer of every step
            self._pairs[key] = self.adapter.lora.set_of(*key)
        return Repair(self._pairs[key])


class Repair:
    """The low-rank pairs, by module path, of one group of rows in one layer; perhaps none."""

    def __init__(self, pairs: dict[str, LoraPair]) -> None:
        self._pairs = pairs
        self._inner: dict[str, Tensor] = {}

    @property
    def active(self) -> bool:
        return bool(self._pairs)

    def read(self, projection: Projection, x_RI: Tensor) -> None:
        """Take the input of a projection's module; parts fused in one module share it."""
        pair = self._pairs.get(projection.path)
        if pair is not None and projection.path not in self._inner:
            self._inner[projection.path] = F.linear(x_RI, pair.a_RI.to(x_RI.dtype))

    def add(
        self,
        projection: Projection,
        out_RO: Tensor,
        rows: Tensor | None = None,
        outputs: slice | Tensor = slice(None),
    ) -> Tensor:
        """`out`, repaired; `rows` and `outputs` say which part of what was read it is."""
        inner_RK = self._inner.get(projection.path)
        if inner_RK is None:
            return out_RO
        pair = self._pairs[projection.path]
        if rows is not None:
            inner_RK = inner_RK[rows]
        b_OK = pair.b_OR[projection.start : projection.stop][outputs].to(inner_RK.dtype)
        return out_RO + pair.scale * F.linear(inner_RK, b_OK)
