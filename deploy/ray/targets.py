"""Where Prometheus finds replicas and proxies: replicas tell their address, and one listens.

Every replica opens a port of its own for its metrics, under the names that a single server has.
It tells its address again and again; who has been silent for some time, since it ended or was
killed, is left out. What the proxies count, Ray shows on a page of each machine. The answers are
those of Prometheus' HTTP service discovery. Ray is not known here.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prometheus_client import start_http_server
from starlette.requests import Request

from deploy.ray.fleet import PROXIES
from service.metrics import Metrics

BEAT_SECONDS, FORGOTTEN_SECONDS = 3.0, 10.0
PORTS = 64  # that are tried, from the first one on


@dataclass(frozen=True, slots=True)
class Target:
    """A replica's page of metrics."""

    replica: str
    address: str  # host:port
    process: int


class Targets:
    """The replicas that were heard of a moment ago, and the pages of the machines."""

    def __init__(
        self, machines: Callable[[], list[str]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Nobody was heard of yet.

        Args:
            machines: host:port of the page of Ray's own metrics, on each machine.
        """
        self._machines = machines
        self._clock = clock
        self._heard: dict[str, tuple[float, Target]] = {}

    def __call__(self, request: Request) -> list[dict[str, Any]]:
        """The answer to HTTP: where the proxies are counted, or else the replicas."""
        if request.url.path.rstrip("/") == PROXIES:
            return [{"targets": [page]} for page in self._machines()]
        return self.listed()

    def beat(self, target: Target) -> None:
        """A replica says that it is there."""
        self._heard[target.replica] = (self._clock(), target)

    def listed(self) -> list[dict[str, Any]]:
        """One group for each replica; labels that begin with __meta_ are not stored."""
        oldest = self._clock() - FORGOTTEN_SECONDS
        self._heard = {name: one for name, one in self._heard.items() if one[0] > oldest}
        return [
            {
                "targets": [target.address],
                "labels": {
                    "replica": target.replica,
                    "__meta_elasti_process": str(target.process),
                },
            }
            for _, target in sorted(self._heard.values(), key=lambda one: one[1].replica)
        ]


def open_page(metrics: Metrics, host: str, first_port: int) -> int:
    """Serve /metrics from a thread of its own, however busy the replica is; returns the port.

    Raises:
        OSError: no port from `first_port` on is free.
    """
    tries = range(first_port, first_port + PORTS) if first_port else (0,)
    for port in tries:
        try:
            server, _ = start_http_server(port, host, registry=metrics.registry)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return int(server.server_port)
    raise OSError(f"metrics_port: none of {tries[0]} to {tries[-1]} is free on {host}")
