"""One training run in one process or in several: what they share, and nothing else.

The frozen base is the same everywhere (or sharded, see below); only routers and LoRA are trained.
They are a few megabytes, so their gradient is flattened and summed in one all-reduce. A
DistributedDataParallel wrapper would do the same with buckets, hooks on the base's forward and a
search for unused parameters at every step, since no batch uses every router.

With `shard_base` the base's weights are spread over the processes by FSDP2, a layer at a time:
for a base that does not fit one device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of a run."""

    rank: int
    size: int
    device: str  # "auto" for a process by itself

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks to people."""
        return self.rank == 0

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.size == 1:
            return flag
        device = torch.device("cpu" if self.device == "cpu" else self.device)
        return bool(self.sum(torch.tensor(float(flag), device=device)) > 0)

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined() -> Iterator[World]:
    """The world that torchrun made, or a process by itself."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, "auto")
        return
    on_gpu = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu:
        torch.cuda.set_device(local)
    store, rank, size = next(rendezvous("env://"))
    # A restart gets the store of the run before it, where it would find the addresses of processes
    # that are gone. With several hosts the counts may differ; there the launcher must part them.
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)  # type: ignore[attr-defined]
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield World(dist.get_rank(), size, f"cuda:{local}" if on_gpu else "cpu")
    finally:
        dist.destroy_process_group()


def sum_gradients(world: World, parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """Give every parameter the gradient of the whole batch; returns its norm.

    A parameter that no row used gets zeros, so that the optimizer treats all processes alike.
    """
    flat = torch.cat(
        [
            torch.zeros(p.numel(), device=p.device) if p.grad is None else p.grad.flatten()
            for p in parameters.values()
        ]
    )
    world.sum(flat)
    at = 0
    for parameter in parameters.values():
        count = parameter.numel()
        parameter.grad = flat[at : at + count].view_as(parameter)
        at += count
    norm: Tensor = flat.norm()
    return norm


def shard_base(world: World, base: nn.Module, layers: str) -> None:
    """Spread the frozen weights over the processes, each layer gathered while it runs.

    Args:
        layers: the path of the base's list of layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu" if world.device == "cpu" else "cuda", (world.size,))
    for layer in base.get_submodule(layers).children():
        fully_shard(layer, mesh=mesh)
    fully_shard(base, mesh=mesh)

    # Every process walks back through every layer, or one would wait for the others' weights:
    # a row whose plans hold no router near the bottom would stop early.
    def begin_gradient(module: nn.Module, args: Any, out: Tensor) -> None:
        if torch.is_grad_enabled():
            out.requires_grad_()

    embedding: nn.Module = base.get_input_embeddings()  # type: ignore[operator]
    embedding.register_forward_hook(begin_gradient)
