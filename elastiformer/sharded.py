"""A base model spread over several devices: each holds a share of every layer's heads and neurons.

Transformers' own tensor-parallel plan decides which part of a weight lies where. Each process
runs the same steps over the same chunks: it computes a sub-layer's branch from its part, and the
branches are summed before they join the residual, which all hold whole. So routers, which read the
residual, decide alike everywhere. What decides over heads or neurons themselves (heads, experts,
channels), and repairs, which lie across them, are refused.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cached_property
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from elastiformer.adapter import Adapter, elastic_shape
from elastiformer.cache import CacheShape
from elastiformer.capacity import Unit
from elastiformer.errors import AdapterError, BaseModelError, UnsupportedModel
from elastiformer.families import Layer, Layout, Projection
from elastiformer.model import ElasticModel
from elastiformer.sparse import SparseForm
from elastiformer.weights import device_of, load_base

CARRIED = (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS)


class ShardedModel(ElasticModel):
    """An ElasticModel over all processes of a group; each runs the same steps.

    Plans and usages are those of the whole model: what a request spends here is what all spend
    together.
    """

    @classmethod
    def load(
        cls,
        base: str,
        adapter: str | os.PathLike[str] | None = None,
        dtype: str = "auto",
        device: str = "auto",
    ) -> Self:
        """As `ElasticModel.load`, in each process of a group that stands.

        Raises:
            BaseModelError, AdapterError: as there.
            BaseModelError: another device than this machine's accelerator, by several processes.
            UnsupportedModel: heads or neurons that cannot be divided among the processes, or
                weights that hold several projections in one.
            AdapterError: units that would decide over what is divided, or a repair.
        """
        processes = dist.get_world_size()
        if processes > 1:
            _check_device(device_of(device), processes)
        loaded = load_base(base, dtype, device, processes)
        return cls._of(loaded, adapter)

    def attach(self, adapter: Adapter | None) -> None:
        if adapter is not None:
            _check(adapter)
        super().attach(adapter)
        # Of keys and values, each process has its own heads'.
        self._cache_shape = CacheShape.of(elastic_shape(self._part, adapter))

    @cached_property
    def _part(self) -> Layout:
        return divided(self.layout, dist.get_rank(), dist.get_world_size())

    @cached_property
    def _sparse(self) -> SparseForm:
        return SparseForm(self._part, self.adapter, self.shape)


def _check_device(place: torch.device, processes: int) -> None:
    # Transformers asks nobody where the parts go.
    known = torch.accelerator.current_accelerator() or torch.device("cpu")
    if place.type != known.type:
        raise BaseModelError(
            f"device '{place}' cannot be used by {processes} processes: Transformers lays out "
            f"their parts on this machine's accelerator, '{known.type}'. Hide it from them "
            "(CUDA_VISIBLE_DEVICES= hides GPUs), or use it"
        )


def divided(layout: Layout, rank: int, size: int) -> Layout:
    """What of a sharded model one process computes with: plain tensors, no copies."""
    for layer in layout.layers:
        shape = layer.shape
        for name, count in (
            ("heads", shape.heads),
            ("key/value heads", shape.kv_heads),
            ("neurons", shape.mlp_width),
        ):
            if count % size:
                raise UnsupportedModel(
                    f"{count} {name} of layer {layer.index} do not divide among {size} processes"
                )
        if any(len(held) > 1 for held in layer.modules.values()):
            raise UnsupportedModel(
                f"layer {layer.index} holds several projections in one weight; such a model "
                "cannot be divided among processes"
            )
    return replace(
        layout,
        layers=tuple(_of_layer(layer, rank, size) for layer in layout.layers),
        head=None if layout.head is None else _whole(layout.head),
        _norms={},
    )


def _of_layer(layer: Layer, rank: int, size: int) -> Layer:
    shape = layer.shape
    return replace(
        layer,
        shape=replace(
            shape,
            heads=shape.heads // size,
            kv_heads=shape.kv_heads // size,
            mlp_width=shape.mlp_width // size,
        ),
        query=_local(layer.query),
        key=_local(layer.key),
        value=_local(layer.value),
        out=_local(layer.out, bias=rank == 0),  # of a sum it is added once
        after_attention=Summed(layer.after_attention),
        gate=None if layer.gate is None else _local(layer.gate),
        up=_local(layer.up),
        down=_local(layer.down, bias=rank == 0),
        after_mlp=Summed(layer.after_mlp),
    )


def _local(projection: Projection, bias: bool = True) -> Projection:
    """The part of a projection that lies here."""
    weight_OI = _here(projection.module.weight)
    assert weight_OI is not None, f"{projection.path} has no weight"
    held = _Part(weight_OI, _here(projection.module.bias) if bias else None)
    return replace(projection, module=held, start=0, stop=len(weight_OI))


def _whole(head: nn.Module) -> nn.Module:
    """The output head, which every process applies to all of its rows."""
    weight = head.weight
    if isinstance(weight, DTensor):
        weight = weight.full_tensor().detach()
    assert isinstance(weight, Tensor), "a head has a weight"
    return _Part(weight, None)


def _here(tensor: object) -> Tensor | None:
    if isinstance(tensor, DTensor):
        local: Tensor = tensor.to_local()
        return local.detach()
    assert tensor is None or isinstance(tensor, Tensor), "a weight or none"
    return None if tensor is None else tensor.detach()


class _Part(nn.Module):
    """A part of a linear map, under the names that a whole one has."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight_OI, persistent=False)
        self.register_buffer("bias", bias_O, persistent=False)


class Summed(nn.Module):
    """The branch over all processes, and then the norm that some families put on it."""

    def __init__(self, norm: nn.Module | None) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, branch_RD: Tensor) -> Tensor:
        dist.all_reduce(branch_RD)
        if self.norm is None:
            return branch_RD
        normed: Tensor = self.norm(branch_RD)
        return normed


def _check(adapter: Adapter) -> None:
    if stray := [unit for unit in adapter.units if unit not in CARRIED]:
        raise AdapterError(
            f"over several processes an adapter may route {', '.join(CARRIED)}; this one also "
            f"routes {', '.join(stray)}"
        )
    if adapter.lora is not None:
        raise AdapterError("over several processes an adapter's repair (LoRA) cannot be used")
