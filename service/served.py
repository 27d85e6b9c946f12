"""The models behind their names: how they are loaded, found, and described.

A name is `NAME` or `NAME@CAPACITY`; the part after `@` is a form of the knob.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from elastiformer import ElasticModel
from elastiformer.capacity import Unit
from elastiformer.elastic import Elastic
from elastiformer.encoder import ElasticEncoder
from elastiformer.encoder_weights import task_of
from elastiformer.tasks import IMAGE_TEXT_TO_TEXT, Task
from elastiformer.vlm import ElasticVlm
from elastiformer.vlm_weights import is_vlm
from service import led
from service.bench import Bench, apart
from service.build import hashes
from service.encoder_engine import EncoderEngine
from service.energy import Meter, meter_of
from service.engine import Engine
from service.errors import EngineDead, UnknownModel
from service.load import Load
from service.metrics import Metrics
from service.scheduler import Limits, piece_tokens
from service.settings import ModelSpec, Settings

# Named capacities of /v1/models; any other number in the range is as good.
NAMED_CAPACITIES = (0.9, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3)


@dataclass(frozen=True, slots=True)
class Machinery:
    """What a model runs on, as its server found it at start."""

    device: str
    dtype: str
    attention: str
    cache_tokens: int
    cache_bytes: int
    prefix_cache: bool
    energy: bool  # whether the device's counter can be read
    adapter_files: dict[str, str]  # SHA-256 of the adapter's files, taken once; empty without one
    costs: str | None = None  # which product runs for how many rows; None where not measured

    @classmethod
    def of(cls, model: Elastic, settings: Settings, costs: str | None, energy: bool) -> Machinery:
        return cls(
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            attention=model.attention_backend,
            cache_tokens=0 if model.cache is None else settings.cache_tokens,
            cache_bytes=0 if model.cache is None else model.cache.rows.nbytes,
            prefix_cache=model.prefixes is not None,
            energy=energy,
            adapter_files=hashes(folder) if (folder := _folder(model)) is not None else {},
            costs=costs,
        )

    def __str__(self) -> str:
        if not self.cache_tokens:
            return f"{self.dtype} on {self.device}, attention by {self.attention}"
        stored = "with" if self.prefix_cache else "without"
        return (
            f"{self.dtype} on {self.device}, attention by {self.attention}, cache of "
            f"{self.cache_tokens} tokens ({self.cache_bytes / 2**20:.0f} MiB) {stored} prefixes"
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Served:
    """A model under its name, and the engine that runs it."""

    spec: ModelSpec
    engine: Engine
    machinery: Machinery
    identity: str | None = None  # of its adapter; a hash of all tensors, so taken once
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def model(self) -> Elastic:
        return self.engine.model

    @property
    def encoder(self) -> ElasticEncoder | None:
        """The model where it is an encoder."""
        return self.model if isinstance(self.model, ElasticEncoder) else None

    @property
    def vlm(self) -> ElasticVlm | None:
        """The model where it reads images and writes text."""
        return self.model if isinstance(self.model, ElasticVlm) else None

    @property
    def reads_images(self) -> bool:
        return self.vlm is not None or (
            self.encoder is not None and self.encoder.encoder.reads_images
        )

    @property
    def task(self) -> str:
        if self.encoder is not None or self.vlm is not None:
            return self.model.task
        return self.spec.task or "generate"

    @property
    def units(self) -> tuple[Unit, ...]:
        return self.model.adapter.units if self.model.adapter else ()

    @property
    def meta(self) -> dict[str, Any]:
        """What a caller should know before choosing a capacity."""
        calibration = self.model.calibration
        heads = self.encoder is not None and self.task != Task.FEATURES
        return {
            "task": self.task,
            **({"labels": list(self.encoder.labels)} if heads and self.encoder else {}),
            "base": self.spec.base,
            "adapter": self.identity,
            "units": [unit.value for unit in self.units],
            "capacity": {"lowest": self.model.lowest, "highest": 1.0},
            "calibration": [
                {name: value for name, value in asdict(row).items() if value is not None}
                for row in (calibration.measured if calibration else ())
            ],
        }

    @property
    def aliases(self) -> tuple[str, ...]:
        lowest = self.model.lowest
        return tuple(f"{self.name}@{each:g}" for each in NAMED_CAPACITIES if each >= lowest)


@dataclass(frozen=True, slots=True)
class Found:
    """A served model, and the capacity that its alias asked for."""

    served: Served
    alias: str | None


class Catalogue:
    """Every served model, by name; the first one is the default."""

    def __init__(self, models: Iterable[Served]) -> None:
        self._by_name = {served.name: served for served in models}
        assert self._by_name, "a server serves at least one model"

    def __iter__(self) -> Iterator[Served]:
        return iter(self._by_name.values())

    @property
    def default(self) -> Served:
        return next(iter(self._by_name.values()))

    def check_alive(self) -> None:
        """Raises EngineDead, naming every model whose engine has died."""
        if dead := [served.name for served in self if not served.engine.alive]:
            raise EngineDead(f"the engine of {', '.join(dead)} has stopped working")

    def find(self, name: str | None) -> Found:
        """Raises UnknownModel, naming what is served."""
        if name is None:
            return Found(self.default, None)
        known, at, alias = name.partition("@")
        if known not in self._by_name:
            raise UnknownModel(
                f"model: {name!r} is not served here; served: {', '.join(self._by_name)}"
            )
        return Found(self._by_name[known], alias if at else None)


def load(
    settings: Settings, metrics: Metrics, say: Callable[[str], None] = lambda text: None
) -> Catalogue:
    """Load every model of the settings; `say` hears what is being done.

    Raises:
        ElastiError: a base or an adapter that cannot be loaded, or do not fit.
    """
    return apart(lambda: _load(settings, metrics, say))


def _load(settings: Settings, metrics: Metrics, say: Callable[[str], None]) -> Catalogue:
    shared = Bench("engines")
    models: list[Served] = []
    meters: dict[str, Meter | None] = {}  # of each device one: engines share it
    for spec in settings.served:
        beside = f" with the adapter {spec.adapter}" if spec.adapter else ", without an adapter"
        say(f"loading {spec.name}: {spec.base}{beside}")
        begun = time.monotonic()
        model = load_model(spec, settings)
        costs = str(model.measure_costs())
        device = str(model.device)
        if device not in meters:
            meters[device] = meter_of(device)
        bench = shared if device == "cpu" else None
        served = serve(spec, model, settings, metrics, costs, meters[device], bench)
        models.append(served)
        taken = time.monotonic() - begun
        say(f"  {served.machinery}")
        say(f"  {costs}")
        say(f"  context {model.context}, capacities {model.lowest:g} to 1, in {taken:.1f} s")
    return Catalogue(models)


def load_model(spec: ModelSpec, settings: Settings) -> Elastic:
    """The model of a spec, for the task that it names or else its config does.

    Raises:
        ElastiError: a base or an adapter that cannot be loaded, or do not fit.
    """
    if led.processes() > 1:
        return led.load(spec, settings)
    where = {"dtype": settings.dtype, "device": settings.device}
    if spec.task is not None and spec.task in set(Task):
        return ElasticEncoder.load(spec.base, spec.adapter, task=Task(spec.task), **where)
    if spec.task is None and (task := task_of(spec.base)) is not None:
        return ElasticEncoder.load(spec.base, spec.adapter, task=task, **where)
    if spec.task == IMAGE_TEXT_TO_TEXT or is_vlm(spec.base):
        return ElasticVlm.load(spec.base, spec.adapter, **where)
    return ElasticModel.load(spec.base, spec.adapter, **where)


def serve(
    spec: ModelSpec,
    model: Elastic,
    settings: Settings,
    metrics: Metrics,
    costs: str | None = None,
    meter: Meter | None = None,
    bench: Bench | None = None,
) -> Served:
    """Put a model behind a name, with an engine of its own that is not started yet.

    Args:
        bench: where the engine works; unset: on one of its own.
    """
    kind: type[Engine] = EncoderEngine
    if isinstance(model, ElasticModel):
        kind = Engine
        piece = piece_tokens(settings.max_step_tokens)
        model.open_cache(settings.cache_tokens, settings.prefix_cache, piece)
    limits = Limits(
        max_waiting=settings.max_waiting,
        max_running=settings.max_running,
        max_step_tokens=settings.max_step_tokens,
        cache_blocks=1 if model.cache is None else model.cache.total_blocks,
    )
    engine = kind(
        spec.name,
        model,
        limits,
        metrics,
        settings.request_timeout_seconds,
        settings.max_decode_delay_seconds,
        meter=meter,
        bench=bench,
        load=Load(settings.load_patience_seconds),
    )
    machinery = Machinery.of(model, settings, costs, meter is not None)
    served = Served(spec, engine, machinery, model.adapter.identity if model.adapter else None)
    metrics.open(spec.name, served.identity or "none", spec.base, served.units)
    return served


def _folder(model: Elastic) -> Path | None:
    return model.adapter.path if model.adapter is not None else None
