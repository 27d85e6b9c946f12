"""What an operator says of a fleet: how many replicas, on what, and how much may wait.

Its fields are the `args` of the application in serve.yaml. Ray is not known here.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.settings import Settings

REPLICA = "X-Elasti-Replica"  # the header that says which replica answered
LISTENER, TARGETS = "targets", "/targets"  # the application that lists them, and its route
PROXIES = f"{TARGETS}/proxies"  # below it, where the proxies' metrics are
ELSEWHERE = {"host", "port"}  # the proxies' own: http_options in serve.yaml


class Fleet(BaseModel):
    """Every replica is the same server, with the same models."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replicas: int = Field(default=1, ge=1, description="that always run")
    most_replicas: int | None = Field(
        default=None, ge=1, description="with more than `replicas`, their number follows the load"
    )
    gpus: float = Field(default=0.0, ge=0, description="of each replica; 0: it computes on the CPU")
    cpus: float = Field(default=1.0, gt=0, description="of each replica, and as many threads")
    ongoing: int | None = Field(
        default=None,
        ge=1,
        description="requests in one replica; unset: a quarter above what it runs",
    )
    queued: int = Field(
        default=256,
        ge=1,
        description="requests that wait at each proxy; one more is refused with 503",
    )
    target: float | None = Field(
        default=None,
        gt=0,
        description="requests a replica shall have; unset: three quarters of its rows",
    )
    upscale_seconds: float = Field(
        default=30.0, ge=0, description="of too much load, before one is added"
    )
    downscale_seconds: float = Field(
        default=600.0, ge=0, description="of too little, before one is ended"
    )
    metrics_port: int = Field(
        default=0,
        ge=0,
        le=65000,
        description="of a replica's /metrics, or the first free above; 0: any",
    )
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="of the server, by name; what is not here comes from ELASTI_ variables",
    )

    @model_validator(mode="after")
    def _check(self) -> Fleet:
        if self.most_replicas is not None and self.most_replicas < self.replicas:
            raise ValueError(
                f"most_replicas: {self.most_replicas}; replicas, of which there are always some, "
                f"is {self.replicas}"
            )
        if ours := sorted(ELSEWHERE & self.settings.keys()):
            raise ValueError(f"settings: {', '.join(ours)} belongs to http_options of the proxies")
        if stray := sorted(self.settings.keys() - Settings.model_fields.keys()):
            raise ValueError(f"settings: {', '.join(stray)} is no setting of the server")
        return self

    @property
    def is_elastic(self) -> bool:
        """Whether the number of replicas follows the load."""
        return self.most_replicas is not None and self.most_replicas > self.replicas

    def server(self) -> Settings:
        """Raises pydantic's ValidationError, naming each setting that is wrong."""
        return Settings(**self.settings)

    def most_ongoing(self, settings: Settings) -> int:
        # A little more than a step holds: the next row is there when one ends, and what waits
        # longer waits at the proxy, where another replica can still take it.
        return self.ongoing or settings.max_running + max(1, settings.max_running // 4)

    def target_ongoing(self, settings: Settings) -> float:
        return self.target or 0.75 * settings.max_running
