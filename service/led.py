"""One server over several processes, as torchrun starts them: the first one serves, the others
compute their parts of its model.

    torchrun --nproc-per-node 2 -m service --model mine=./llama,adapter=./adapter
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from elastiformer.errors import ElastiError
from elastiformer.led import LedModel
from service.settings import ModelSpec, Settings


def processes() -> int:
    """How many torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def check(settings: Settings) -> None:
    """Raises ValueError where it cannot be divided among processes."""
    if processes() > 1 and len(settings.served) > 1:
        names = ", ".join(spec.name for spec in settings.served)
        raise ValueError(f"--model: over {processes()} processes one model is served; got {names}")


@contextmanager
def group() -> Iterator[None]:
    """All processes, until the block is left; nothing where there is one."""
    if processes() == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    try:
        yield
    finally:
        dist.destroy_process_group()


def load(spec: ModelSpec, settings: Settings) -> LedModel:
    """This process's part of the model.

    Raises:
        ElastiError: as `ShardedModel.load`.
    """
    return LedModel.load(spec.base, spec.adapter, settings.dtype, settings.device)


def follow(settings: Settings, tell: Callable[[str], None]) -> int:
    """What every process but the first does, until that one ends.

    Signals to stop are the first one's: it drains, and then lets the others go.
    """
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    (spec,) = settings.served
    try:
        model = load(spec, settings)
    except ElastiError as error:
        tell(f"error: {error}")
        return 1
    tell(f"process {dist.get_rank()} of {dist.get_world_size()} computes its part of {spec.name}")
    model.follow()
    return 0
