"""A server of our own, started for a measurement and stopped after it; loopback only.

What it says on stderr is kept, and told when it does not start.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.models import ROOT
from elastiformer.errors import ElastiError

NAME = "measured"  # of the served model
_START_SECONDS, _STOP_SECONDS = 180.0, 40.0


class ServerError(ElastiError):
    """A server that does not start, or dies; the message holds its last words."""


@dataclass(frozen=True, slots=True)
class Running:
    """A server that is ready."""

    address: str
    process: int
    said: deque[str] = field(repr=False)

    def metrics(self, client: httpx.Client) -> dict[str, float]:
        return totals(client.get(f"{self.address}/metrics").raise_for_status().text)


def totals(page: str) -> dict[str, float]:
    """Each metric, summed over its labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


@contextmanager
def running(
    base: str,
    adapter: str | None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int = 0,
    settings: Mapping[str, object] | None = None,
) -> Iterator[Running]:
    """`python -m service` on a free port, until the block is left.

    Raises:
        ServerError: with what it said.
    """
    model = f"{NAME}={base}" + (f",adapter={adapter}" if adapter else "")
    flags = {
        "--model": model,
        "--host": "127.0.0.1",
        "--port": 0,
        "--dtype": dtype,
        "--device": device,
        "--threads": threads,
        "--log-level": "warning",  # a line for each request would be measured too
        **{f"--{name.replace('_', '-')}": value for name, value in (settings or {}).items()},
    }
    command = [sys.executable, "-m", "service"]
    for flag, value in flags.items():
        command += [flag, str(value)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    said: deque[str] = deque(maxlen=40)
    ready: list[str] = []
    listener = threading.Thread(target=_listen, args=(process, said, ready), daemon=True)
    listener.start()
    try:
        began = time.monotonic()
        while not ready:
            if process.poll() is not None or time.monotonic() - began > _START_SECONDS:
                raise ServerError("the server did not start:\n" + "".join(said))
            time.sleep(0.05)
        yield Running(ready[0], process.pid, said)
    finally:
        _stop(process)
        listener.join()


def _listen(process: subprocess.Popen[str], said: deque[str], ready: list[str]) -> None:
    assert process.stderr is not None
    with process.stderr as lines:
        for line in lines:
            said.append(line)
            if not ready and (found := re.match(r"ready: (\S+)", line)):
                ready.append(found[1])


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
