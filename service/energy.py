"""How much energy requests took: a counter of the device's, shared out by FLOPs.

A GPU counts the energy of the whole board, whoever works on it, and renews its count some ten
times a second: a step is often shorter. So what steps spent in FLOPs is noted, and each time the
count has moved, the difference is shared out over the notes. What the board takes while no engine
works is nobody's. A request pays up to its end; what the counter shows later falls to those who
still run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Bill:
    """What one request took until now."""

    joules: float = 0.0
    noted_flops: int = 0  # spent since the counter last moved


class Meter:
    """One device's counter, shared by the engines that work on it."""

    def __init__(self, joules: Callable[[], float]) -> None:
        self._joules = joules
        self._last = joules()
        self._noted: list[Bill] = []
        self._working = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """An engine starts to work: what was used while none did is nobody's."""
        with self._lock:
            if self._working == 0:
                self._last = self._joules()
            self._working += 1

    @contextmanager
    def resting(self) -> Iterator[None]:
        """An engine that had begun has nothing to do inside the block."""
        with self._lock:
            self._working -= 1
        yield
        self.begin()

    def share(self, spent: Iterable[tuple[Bill, int]]) -> None:
        """Note what a step spent, in FLOPs, and share out what the counter shows."""
        with self._lock:
            for bill, flops in spent:
                if bill.noted_flops == 0:
                    self._noted.append(bill)
                bill.noted_flops += flops
            now = self._joules()
            used, total = now - self._last, sum(bill.noted_flops for bill in self._noted)
            if used <= 0 or total == 0:
                return
            self._last = now
            for bill in self._noted:
                bill.joules += used * bill.noted_flops / total
                bill.noted_flops = 0
            self._noted.clear()

    def close(self, bill: Bill) -> None:
        """A request has ended: it pays no more."""
        with self._lock:
            if bill in self._noted:
                self._noted.remove(bill)


def meter_of(device: str) -> Meter | None:
    """The meter of a device such as `cuda:0`; None where no counter can be read.

    It needs an NVIDIA GPU that counts (Volta or newer, not a part of one), its driver, and the
    package nvidia-ml-py.
    """
    if not device.startswith("cuda"):
        return None
    try:
        import pynvml
    except ImportError:
        return None
    import torch

    place = torch.device(device)
    try:
        pynvml.nvmlInit()
        # By its name for good: CUDA numbers only the devices that it is allowed to see.
        name = f"GPU-{torch.cuda.get_device_properties(place).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(name)

        def joules() -> float:
            torch.cuda.synchronize(place)  # else a step is read before it has run
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000

        return Meter(joules)
    except pynvml.NVMLError:
        return None
