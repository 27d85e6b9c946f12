"""Every setting of the server: its name, its bound, its meaning.

Each is a variable `ELASTI_<NAME>` and a flag `--<name>` of `python -m service`; a flag wins over
a variable. Nothing here loads a model or opens a port.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from elastiformer.capacity import Capacity
from elastiformer.errors import CapacityError
from elastiformer.tasks import IMAGE_TEXT_TO_TEXT, Task
from service.hosts import Hosts

ADAPTERS = Path(__file__).resolve().parent.parent / "elastiformer" / "adapters"
# The first is the default of requests that name no model.
EMBEDDED_DEFAULTS = {
    "smollm2": "smollm2-135m-instruct",
    "sentiment": "sentiment",
    "fashion-mnist": "fashion-mnist",
    "fashion-vlm": "fashion-vlm",
}
TASKS = ("generate", "classify", IMAGE_TEXT_TO_TEXT, *(task.value for task in Task))
DEFAULT_EFFORT = {"low": 0.6, "medium": 0.8, "high": 1.0}
Limited = Literal["nobody", "auto", "unnamed", "all"]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model to serve: `NAME=BASE[,adapter=DIR][,task=TASK]`."""

    name: str
    base: str
    adapter: str | None = None
    task: str | None = None  # None: what the base's config says

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """Raises ValueError, naming the part that is wrong."""
        name, equals, rest = text.strip().partition("=")
        base, *extras = rest.split(",")
        if not (name and equals and base):
            raise ValueError(f"a model is NAME=BASE[,adapter=DIR][,task=TASK]; got {text!r}")
        if "@" in name:
            raise ValueError(f"a model's name cannot hold '@', which sets a capacity; got {name!r}")
        named: dict[str, str] = {}
        for extra in extras:
            key, equals, value = extra.partition("=")
            if key not in ("adapter", "task") or not equals or not value:
                raise ValueError(f"beside BASE stand adapter=DIR and task=TASK; got {extra!r}")
            named[key] = value
        if "task" in named and named["task"] not in TASKS:
            raise ValueError(f"task is one of {', '.join(TASKS)}; got {named['task']!r}")
        return cls(name, base, **named)


@dataclass(frozen=True, slots=True)
class Key:
    """A caller with a key: its own default, its most, and the least that load leaves it."""

    name: str
    capacity: Capacity | None = None
    ceiling: float = 1.0
    floor: float | None = None  # None: the server's
    key: str = field(default="", repr=False)  # never in a log


class Settings(BaseSettings):
    """`ELASTI_PORT=8123 python -m service`, or `python -m service --port 8123`."""

    model_config = SettingsConfigDict(
        env_prefix="ELASTI_", frozen=True, extra="ignore", env_ignore_empty=True
    )

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    models: Annotated[tuple[ModelSpec, ...], NoDecode] = Field(
        (),
        description="models to serve, each NAME=BASE[,adapter=DIR][,task=TASK], separated by ';' "
        "(the flag is --model, once per model); none: the embedded defaults",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="numbers the weights are held in; auto: what runs fast on this machine"
    )
    device: str = Field("auto", description="device to run on: auto, cpu, cuda, cuda:1, …")
    threads: int = Field(
        0, ge=0, le=1024, description="threads of a matrix product on a CPU; 0: as PyTorch chooses"
    )
    default_capacity: Any = Field(
        1.0,
        description="capacity of requests that ask for none, and of 'auto' without load: a number "
        "or an object",
    )
    effort: Annotated[dict[str, Any], NoDecode] = Field(
        DEFAULT_EFFORT,
        description="capacity for each value of reasoning_effort, as a JSON object",
    )
    capacity_ceiling: float = Field(
        1.0,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="most capacity that any request gets, whatever it asks",
    )
    load_limits: Limited = Field(
        "auto",
        description="whose capacity falls under load: nobody's, that of 'auto', also of requests "
        "that name none (unnamed), of all",
    )
    load_patience_seconds: float = Field(
        2.0,
        gt=0,
        allow_inf_nan=False,
        description="wait for an engine at which load has brought capacities down to the floor; "
        "it begins at a quarter of that",
    )
    load_floor: float = Field(
        0.5,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="least capacity that load brings a request down to, above a model's lowest",
    )
    keys_file: Path | None = Field(
        None,
        description="JSON file: a list of {key, name, capacity?, ceiling?, floor?}; without it "
        "every caller is let in",
    )
    max_waiting: int = Field(
        256, ge=1, description="sequences that may wait, per model; one more is refused with 429"
    )
    max_running: int = Field(
        16, ge=1, description="sequences that run together in a step, per model"
    )
    max_step_tokens: int = Field(
        512, ge=1, description="tokens of one step, over all sequences; a longer prompt is cut up"
    )
    max_decode_delay_seconds: float = Field(
        0.25,
        gt=0,
        allow_inf_nan=False,
        description="about the longest step while a sequence decodes: prompts wait for the rest",
    )
    cache_tokens: int = Field(
        32768,
        ge=1,
        description="room for keys and values, per model, in tokens at capacity 1",
    )
    prefix_cache: bool = Field(
        True, description="keep the keys and values of prompts' beginnings for later requests"
    )
    default_max_tokens: int = Field(
        1024, ge=1, description="longest chat answer where a request names no limit"
    )
    max_body_bytes: int = Field(
        4_000_000, ge=1, description="largest request body; a larger one is refused with 413"
    )
    image_hosts: Annotated[Hosts | None, NoDecode] = Field(
        None,
        description="hosts that images may be fetched from: names, and addresses or networks that "
        "are not public, separated by ','; none: nothing is fetched",
    )
    request_timeout_seconds: float = Field(
        600.0,
        gt=0,
        allow_inf_nan=False,
        description="longest time for one request, waiting included; then it ends with an error",
    )
    drain_seconds: float = Field(
        30.0,
        ge=0,
        allow_inf_nan=False,
        description="time that running requests get to finish after a signal to stop",
    )
    log_level: Literal["critical", "error", "warning", "info", "debug"] = Field(
        "info", description="least severe messages that are logged"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="form of what is logged: lines, or one JSON object per line"
    )
    build: str | None = Field(
        None, description="what /version calls this build, such as a commit; an image sets it"
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="web origins that browsers may call from, separated by ','; '*': any"
    )

    @field_validator("models", mode="before")
    @classmethod
    def _read_models(cls, value: object) -> object:
        if isinstance(value, str):
            value = [text for text in value.split(";") if text.strip()]
        if isinstance(value, list | tuple):
            specs = tuple(
                ModelSpec.parse(each) if isinstance(each, str) else each for each in value
            )
            names = [spec.name for spec in specs]
            if doubled := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"two models share a name: {', '.join(doubled)}")
            return specs
        return value

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _read_origins(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(origin.strip() for origin in value.split(",") if origin.strip())
        return value

    @field_validator("image_hosts", mode="before")
    @classmethod
    def _read_hosts(cls, value: object) -> object:
        return Hosts.parse(value) if isinstance(value, str) else value

    @field_validator("default_capacity", mode="before")
    @classmethod
    def _read_default(cls, value: object) -> Capacity:
        return _capacity(value, "default_capacity")

    @field_validator("effort", mode="before")
    @classmethod
    def _read_effort(cls, value: object) -> dict[str, Capacity]:
        value = _from_json(value)
        if not isinstance(value, Mapping):
            raise ValueError(f"an object such as {json.dumps(DEFAULT_EFFORT)}; got {value!r}")
        return {str(name): _capacity(each, f"effort.{name}") for name, each in value.items()}

    @property
    def served(self) -> tuple[ModelSpec, ...]:
        """The models asked for; without any, the embedded ones with the adapters kept here."""
        return self.models or tuple(
            ModelSpec(name, base, str(ADAPTERS / base) if (ADAPTERS / base).is_dir() else None)
            for name, base in EMBEDDED_DEFAULTS.items()
        )


def read_keys(path: Path) -> tuple[Key, ...]:
    """The callers in a key file.

    Raises:
        ValueError: naming the file and every entry that is wrong.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"keys_file {path}: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"keys_file {path}: a list of {{key, name, capacity?, ceiling?, floor?}}")
    keys: list[Key] = []
    wrong: list[str] = []
    for place, entry in enumerate(entries):
        try:
            keys.append(_key(entry))
        except (ValueError, CapacityError) as error:
            wrong.append(f"  entry {place}: {error}")
    secrets = [key.key for key in keys]
    if len(set(secrets)) < len(secrets):
        wrong.append("  two entries share a key")
    if wrong:
        raise ValueError("\n".join([f"keys_file {path}:", *wrong]))
    return tuple(keys)


def _key(entry: object) -> Key:
    if not isinstance(entry, Mapping):
        raise ValueError(f"an object with key and name; got {type(entry).__name__}")
    if stray := sorted(set(entry) - {"key", "name", "capacity", "ceiling", "floor"}):
        raise ValueError(f"unknown: {', '.join(stray)}")
    for name in ("key", "name"):
        if not isinstance(entry.get(name), str) or not entry[name]:
            raise ValueError(f"{name}: a text that is not empty")
    capacity = entry.get("capacity")
    ceiling = _fraction(entry.get("ceiling", 1.0), "ceiling")
    floor = _fraction(entry["floor"], "floor") if "floor" in entry else None
    if floor is not None and floor > ceiling:
        raise ValueError(f"floor: at most the ceiling, {ceiling:g}; got {floor:g}")
    return Key(
        name=entry["name"],
        capacity=None if capacity is None else Capacity.parse(capacity),
        ceiling=ceiling,
        floor=floor,
        key=entry["key"],
    )


def _fraction(value: object, name: str) -> float:
    share = Capacity.parse(value, name).prompt
    if not isinstance(share, float):
        raise ValueError(f"{name}: a number above 0 and at most 1")
    return share


def _capacity(value: object, name: str) -> Capacity:
    if isinstance(value, Capacity):
        return value
    try:
        return Capacity.parse(_from_json(value), name)
    except CapacityError as error:
        raise ValueError(str(error)) from None


def _from_json(value: object) -> object:
    """A variable or a flag arrives as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
