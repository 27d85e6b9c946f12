"""Where a number was measured: the machine, the releases, the numbers' type, the day.

A time means nothing without it. No name of a host or a person is taken down.
"""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.nn import functional as F

from elastiformer.elastic import Elastic

_SETS = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16", "neon", "sve", "bf16")
_PACKAGES = ("torch", "transformers", "fastapi", "uvicorn", "numpy")
_VARIABLES = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")
_UNTOLD = ("ELASTI_CACHE", "ELASTI_KEYS_FILE")  # where things lie on this machine
_ROWS = (64, 512)  # of products with a weight, beside the square one
_BLOCK, _SIDE = 64 * 1024 * 1024, 1536  # bytes to read, and a square product's side


@dataclass(frozen=True, slots=True)
class Setting:
    """Under which conditions one command ran."""

    processor: str
    cores: int
    threads: int
    instruction_sets: tuple[str, ...]
    memory_gib: float
    accelerator: str | None
    dtype: str
    device: str
    attention: str  # which back end the library chose
    versions: dict[str, str]
    date: str
    command: str


def setting(model: Elastic, command_line: Sequence[str]) -> Setting:
    able = torch.cpu.get_capabilities()
    device = model.device
    return Setting(
        processor=processor(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        instruction_sets=tuple(name for name in _SETS if able.get(name)),
        memory_gib=round(_memory_bytes() / 2**30, 1),
        accelerator=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        dtype=str(model.dtype).removeprefix("torch."),
        device=device.type,
        attention=model.attention_backend,
        versions={"python": platform.python_version(), **_versions()},
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        command=_command(command_line),
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """How fast this machine reads memory and multiplies, at its best, in one type of number."""

    bytes_per_second: float
    flops_per_second: float

    def or_better(self, other: Limits) -> Limits:
        """What was reached once, in either of two measurements."""
        return Limits(
            max(self.bytes_per_second, other.bytes_per_second),
            max(self.flops_per_second, other.flops_per_second),
        )


def limits(dtype: torch.dtype, device: torch.device) -> Limits:
    """Measured now: the best of several tries, since a limit is what was reached once.

    Of multiplying, too, the best of several shapes: which one is fastest depends on the library.
    """
    size = torch.empty(0, dtype=dtype).element_size()
    columns = 8192
    block = torch.ones(4 * _BLOCK // size // columns, columns, dtype=dtype, device=device)
    row = torch.ones(1, columns, dtype=dtype, device=device)
    square = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
    weight = torch.ones(2 * _SIDE, 2 * _SIDE, dtype=dtype, device=device)
    by_product = _best(lambda: F.linear(row, block), device)
    by_sum = _best(lambda: block.sum(), device)
    flops_per_second = 2 * _SIDE**3 / _best(lambda: square @ square, device)
    for rows in _ROWS:
        some = torch.ones(rows, 2 * _SIDE, dtype=dtype, device=device)
        taken = _best(lambda some=some: F.linear(some, weight), device)
        flops_per_second = max(flops_per_second, 2 * rows * weight.numel() / taken)
    return Limits(4 * _BLOCK / min(by_product, by_sum), flops_per_second)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident_bytes(process: int | None = None) -> int:
    """The memory that a process holds now; this one without a number."""
    status = Path(f"/proc/{process or 'self'}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def _best(work: object, device: torch.device, tries: int = 7) -> float:
    assert callable(work)
    taken = []
    for _ in range(tries):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return min(taken)


def _command(command_line: Sequence[str]) -> str:
    # How threads wait decides much where several processes share the cores.
    told = [name for name in _VARIABLES if name in os.environ]
    # The server that is measured takes its settings from here, too.
    told += sorted(
        name for name in os.environ if name.startswith("ELASTI_") and name not in _UNTOLD
    )
    named = [f"{name}={os.environ[name]}" for name in told]
    return shlex.join([*named, "python", "-m", "benchmarks", *command_line])


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
