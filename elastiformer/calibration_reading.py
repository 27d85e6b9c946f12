"""A table of calibration.json, read: what is wrong with it is named, all at once. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from itertools import pairwise
from typing import Any

from elastiformer.calibration import (
    FIELDS,
    FORMAT,
    TOKEN_FIELDS,
    Calibration,
    DataRecord,
    ImageFloor,
    Measured,
    Quantiles,
    SearchRecord,
    Step,
)
from elastiformer.capacity import Phase, Site, Unit
from elastiformer.errors import AdapterError


def read_calibration(value: object) -> Calibration:
    """Read what `Calibration.as_json` wrote.

    Raises:
        AdapterError: naming every problem at once.
    """
    reader = _Reader()
    calibration = reader.calibration(value)
    if reader.problems or calibration is None:
        raise AdapterError("calibration.json cannot be used:\n  " + "\n  ".join(reader.problems))
    return calibration


class _Reader:
    """Turns parsed JSON into a Calibration, and notes every problem on the way."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def calibration(self, value: object) -> Calibration | None:
        if not isinstance(value, Mapping):
            self.problems.append(f"an object is expected; got {type(value).__name__}")
            return None
        if value.get("format") != FORMAT:
            self.problems.append(f"format: this version reads {FORMAT}; got {value.get('format')}")
            return None
        paths = self._object(value.get("paths"), "paths")
        thresholds = self._object(value.get("thresholds"), "thresholds")
        data = value.get("data")
        return Calibration(
            lowest=self._number(value.get("lowest"), "lowest", 0.0, 1.0),
            context=self._count(value.get("context"), "context"),
            paths={phase: self._path(paths.get(phase.value), phase) for phase in Phase},
            thresholds={
                phase: self._thresholds(thresholds.get(phase.value, {}), phase) for phase in Phase
            },
            measured=tuple(
                self._measured(row, f"measured[{index}]")
                for index, row in enumerate(self._list(value.get("measured"), "measured"))
            ),
            data=None if data is None else self._data(data),
            image_tokens=(
                None
                if value.get("image_tokens") is None
                else self._number(value["image_tokens"], "image_tokens", 0.0, 1.0)
            ),
            image_floors=self._image_floors(value.get("image_floors", [])),
            channel_quantiles=self._channel_quantiles(value.get("channel_quantiles")),
            search=None if value.get("search") is None else self._search(value["search"]),
        )

    def _channel_quantiles(self, value: object) -> Quantiles:
        if value is None:
            return ()
        name = "channel_quantiles"
        entry = self._object(value, name)
        by_site = [
            [
                self._quantiles(quantiles, f"{name}.{site}[{layer}]", least=0.0)
                for layer, quantiles in enumerate(self._list(entry.get(site), f"{name}.{site}"))
            ]
            for site in Site
        ]
        sizes = {len(quantiles) for of_site in by_site for quantiles in of_site}
        if len({len(of_site) for of_site in by_site}) > 1 or len(sizes) > 1:
            self.problems.append(
                f"{name}: every site has as many layers, and all as many quantiles"
            )
            return ()
        return tuple(zip(*by_site, strict=True))

    def _image_floors(self, value: object) -> tuple[ImageFloor, ...]:
        floors: list[ImageFloor] = []
        for index, item in enumerate(self._list(value, "image_floors")):
            name = f"image_floors[{index}]"
            entry = self._object(item, name)
            floor = ImageFloor(
                *(
                    self._number(entry.get(key), f"{name}.{key}", 0.0, 1.0)
                    for key in ("capacity", "share")
                )
            )
            before = floors[-1] if floors else ImageFloor(0.0, 0.0)
            if not before.capacity < floor.capacity < 1 or floor.share < before.share:
                self.problems.append(
                    f"{name}: capacities rise, all below 1, and shares do not fall; got "
                    f"{floor.capacity:g}: {floor.share:g} after "
                    f"{before.capacity:g}: {before.share:g}"
                )
            floors.append(floor)
        return tuple(floors)

    def _path(self, value: object, phase: Phase) -> tuple[Step, ...]:
        steps: list[Step] = []
        now: dict[tuple[int, str], float] = {}
        for index, item in enumerate(self._list(value, f"paths.{phase}")):
            name = f"paths.{phase}[{index}]"
            entry = self._object(item, name)
            field = entry.get("field")
            if field not in FIELDS:
                self.problems.append(f"{name}.field: one of {', '.join(FIELDS)}; got {field!r}")
                continue
            layer = self._count(entry.get("layer"), f"{name}.layer", least=0)
            share = self._number(entry.get("share"), f"{name}.share", 0.0, 1.0)
            if share == 0.0 and field not in TOKEN_FIELDS:
                self.problems.append(f"{name}.share: of {field} at least one is kept; got 0")
            before = now.get((layer, field), 1.0)
            if share >= before:
                self.problems.append(
                    f"{name}: lowers {field} of layer {layer} from {before:g} to {share:g}; "
                    "a step goes down"
                )
            now[layer, field] = share
            steps.append(Step(layer, field, share))
        return tuple(steps)

    def _thresholds(self, value: object, phase: Phase) -> dict[Unit, dict[int, tuple[float, ...]]]:
        found: dict[Unit, dict[int, tuple[float, ...]]] = {}
        for unit, by_layer in self._object(value, f"thresholds.{phase}").items():
            name = f"thresholds.{phase}.{unit}"
            if unit not in TOKEN_FIELDS:
                self.problems.append(f"{name}: not a unit that has thresholds")
                continue
            layers = found.setdefault(Unit(unit), {})
            for layer, values in self._object(by_layer, name).items():
                if not str(layer).isdecimal():
                    self.problems.append(f"{name}: a layer is a number; got {layer!r}")
                    continue
                layers[int(layer)] = self._quantiles(values, f"{name}.{layer}")
        return found

    def _quantiles(self, value: object, name: str, least: float = -math.inf) -> tuple[float, ...]:
        values = tuple(
            self._number(item, f"{name}[{index}]", least, math.inf)
            for index, item in enumerate(self._list(value, name))
        )
        if len(values) < 2:
            self.problems.append(f"{name}: at least 2 quantiles; got {len(values)}")
        if any(low > high for low, high in pairwise(values)):
            self.problems.append(f"{name}: quantiles must not fall")
        return values

    def _measured(self, value: object, name: str) -> Measured:
        entry = self._object(value, name)
        known = [field.name for field in fields(Measured)]
        return Measured(
            **{
                key: self._number(entry.get(key), f"{name}.{key}", -math.inf, math.inf)
                for key in known
                if key in ("capacity", "spent") or entry.get(key) is not None
            }
        )

    def _data(self, value: object) -> DataRecord:
        entry = self._object(value, "data")
        return DataRecord(
            name=self._text(entry.get("name"), "data.name"),
            sha256=self._text(entry.get("sha256"), "data.sha256"),
            windows=self._count(entry.get("windows"), "data.windows"),
            window_tokens=self._count(entry.get("window_tokens"), "data.window_tokens"),
            seed=self._count(entry.get("seed"), "data.seed", least=0),
        )

    def _search(self, value: object) -> SearchRecord:
        entry = self._object(value, "search")
        counts = {
            name: self._count(entry.get(name), f"search.{name}", least=0)
            for name in ("probes", "unanswered", "paths_judged")
        }
        by_clock = entry.get("ended_by_clock")
        if not isinstance(by_clock, bool):
            self.problems.append(f"search.ended_by_clock: true or false; got {by_clock!r}")
        return SearchRecord(**counts, ended_by_clock=by_clock is True)

    def _object(self, value: object, name: str) -> Mapping[str, Any]:
        if isinstance(value, Mapping):
            return value
        self.problems.append(f"{name}: an object is expected; got {type(value).__name__}")
        return {}

    def _list(self, value: object, name: str) -> list[Any]:
        if isinstance(value, list):
            return value
        self.problems.append(f"{name}: a list is expected; got {type(value).__name__}")
        return []

    def _text(self, value: object, name: str) -> str:
        if isinstance(value, str):
            return value
        self.problems.append(f"{name}: a text is expected; got {type(value).__name__}")
        return ""

    def _count(self, value: object, name: str, least: int = 1) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and value >= least:
            return value
        self.problems.append(f"{name}: a whole number, at least {least}; got {value!r}")
        return least

    def _number(self, value: object, name: str, least: float, most: float) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and math.isfinite(value) and least <= value <= most:  # type: ignore[arg-type, operator]
            return float(value)  # type: ignore[arg-type]
        bound = f"a number in [{least:g}, {most:g}]"
        if math.isinf(most):
            bound = "a finite number" + ("" if math.isinf(least) else f", at least {least:g}")
        self.problems.append(f"{name}: {bound}; got {value!r}")
        return 1.0
