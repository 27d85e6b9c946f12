"""The fleet of a drill on one machine, and the jobs of the Prometheus that reads it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from deploy.ray import refusals
from deploy.ray.fleet import LISTENER, TARGETS, Fleet
from deploy.stage import NAME

HOST = "127.0.0.1"
MAX_RUNNING, ONGOING, QUEUED = 4, 5, 24
_JOBS = Path(__file__).resolve().parent / "prometheus.yml"


def jobs(address: str) -> list[dict[str, Any]]:
    """As the configuration has them, for this fleet and in a hurry."""
    read: list[dict[str, Any]] = yaml.safe_load(_JOBS.read_text("utf-8"))["scrape_configs"]
    for each in read:
        (listed,) = each["http_sd_configs"]
        listed["url"] = address + listed["url"][listed["url"].index(TARGETS) :]
        listed["refresh_interval"] = "1s"
    return read


def small_fleet(folder: Path) -> Fleet:
    """One replica or two, of a tiny model."""
    return Fleet(
        replicas=1,
        most_replicas=2,
        ongoing=ONGOING,
        queued=QUEUED,
        target=3,
        upscale_seconds=1,
        downscale_seconds=2,
        settings={
            "models": f"{NAME}={folder / 'base'},adapter={folder / 'adapter'}",
            "threads": 1,
            "max_running": MAX_RUNNING,
            "drain_seconds": 20,
            "log_level": "critical",
        },
    )


@contextmanager
def running(fleet: Fleet, port: int, folder: Path) -> Iterator[None]:
    """A Ray of our own on this machine, with the fleet on it, until the block is left."""
    # A token for this cluster alone; without one, Ray would keep one in the home folder.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    os.environ[refusals.VARIABLE] = refusals.PATH
    import ray
    from ray import serve

    from deploy.ray.app import build, listener

    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        namespace="drill",
        _temp_dir=str(folder / "ray"),
        _system_config={"metrics_report_interval_ms": 1000},
    )
    try:
        serve.start(http_options={"host": HOST, "port": port})
        serve.run(listener, name=LISTENER, route_prefix=TARGETS)
        serve.run(build(fleet.model_dump()), name="drill", route_prefix="/")
        yield
    finally:
        serve.shutdown()
        ray.shutdown()
