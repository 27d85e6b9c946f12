"""The server as an application of Ray Serve: one app, many replicas.

    serve run deploy/ray/serve.yaml

Each replica is the app of `python -m service` with its engines, on GPUs of its own. Ray's proxies
stand before them: they choose a replica, hold a bounded queue, pass streams through, and cancel
the work of a caller who leaves. Every replica serves the same models.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import ray
import torch
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.ray.arrivals import Waited
from deploy.ray.fleet import LISTENER, REPLICA, Fleet
from deploy.ray.targets import BEAT_SECONDS, Target, Targets, open_page
from service.app import create_app
from service.logs import REQUEST_ID, configure
from service.metrics import Metrics
from service.served import load
from service.settings import Settings, read_keys
from service.tracing import from_environment

log = logging.getLogger("elasti.ray")
SILENT = LoggingConfig(enable_access_log=False)  # the server writes a line of its own
RETRY_SECONDS = 1.0  # what a refused caller is told
HEALTH_SECONDS = 5.0  # between two questions whether a replica's engines live


class Server:
    """One replica."""

    async def __init__(  # type: ignore[misc]  # Ray waits for it
        self, settings: Settings, metrics_port: int
    ) -> None:
        tell = configure(settings.log_format, settings.log_level)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self._settings = settings
        self._name = serve.get_replica_context().replica_id.unique_id
        self._targets = serve.get_app_handle(LISTENER)
        self._metrics = Metrics()
        self._keys = read_keys(settings.keys_file) if settings.keys_file else ()
        # Beside the event loop, on which Ray asks whether this replica is alive.
        self._catalogue = await asyncio.to_thread(load, settings, self._metrics, tell)
        self._tracing = from_environment(tell)
        host = ray.util.get_node_ip_address()
        port = open_page(self._metrics, host, metrics_port)
        self._target = Target(self._name, f"{host}:{port}", os.getpid())
        self._beating = asyncio.create_task(self._beat())

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app(self._settings, self._catalogue, self._metrics, self._keys, self._tracing)
        app.add_middleware(Signed, name=self._name)
        app.add_middleware(Waited)
        return app

    def check_health(self) -> None:
        """Ray ends a replica that raises here, and starts another."""
        self._catalogue.check_alive()

    async def _beat(self) -> None:
        while True:
            try:
                await self._targets.beat.remote(self._target)
            except Exception as error:  # of many kinds, while the listener starts anew
                log.warning("the list of replicas did not hear of this one: %s", error)
            await asyncio.sleep(BEAT_SECONDS)


class Signed:
    """Every answer says which replica gave it. Plain ASGI."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self._app = app
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[REPLICA] = self._name
                del headers[REQUEST_ID]  # the proxy sets it
            await send(message)

        await self._app(scope, receive, signed)


def build(args: dict[str, Any]) -> serve.Application:
    """The application, from the `args` of serve.yaml.

    Raises:
        ValidationError: naming each argument or setting that is wrong.
    """
    fleet = Fleet(**args)
    settings = fleet.server()
    scale: dict[str, Any] = {"num_replicas": fleet.replicas}
    if fleet.is_elastic:
        scale = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=fleet.replicas,
                max_replicas=fleet.most_replicas,
                target_ongoing_requests=fleet.target_ongoing(settings),
                upscale_delay_s=fleet.upscale_seconds,
                downscale_delay_s=fleet.downscale_seconds,
            )
        }
    server = serve.deployment(
        serve.ingress()(Server),
        name="server",
        ray_actor_options={"num_cpus": fleet.cpus, "num_gpus": fleet.gpus},
        max_ongoing_requests=fleet.most_ongoing(settings),
        max_queued_requests=fleet.queued,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_SECONDS),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.drain_seconds + 5,
        health_check_period_s=HEALTH_SECONDS,
        logging_config=SILENT,
        **scale,
    )
    return server.bind(settings, fleet.metrics_port)


def machines() -> list[str]:
    """Where each machine of the cluster shows Ray's own metrics."""
    return [
        f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
        for node in ray.nodes()
        if node["Alive"]
    ]


# The list of the replicas: an application of its own, so that it answers beside a full queue. It
# must be there, under the name LISTENER, before a replica is.
listener: serve.Application = serve.deployment(
    Targets, name="targets", ray_actor_options={"num_cpus": 0}, logging_config=SILENT
).bind(machines)
