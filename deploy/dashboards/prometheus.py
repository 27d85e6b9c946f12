"""What a Prometheus answers to a query, over its HTTP API."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

_SECONDS = 30.0


class PrometheusError(Exception):
    """No answer, or a refusal; the message holds the query and what was said."""


@dataclass(frozen=True, slots=True)
class Course:
    """One series of an answer: its labels, and its values by time; NaN where there is none."""

    labels: Mapping[str, str]
    times: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def says_something(self) -> bool:
        return any(math.isfinite(value) for value in self.values)


@dataclass(frozen=True, slots=True)
class Prometheus:
    """One server, by its address."""

    client: httpx.Client
    address: str

    def now(self, expr: str, at: float) -> tuple[Course, ...]:
        """Raises PrometheusError."""
        return tuple(
            Course(each["metric"], *_columns([each["value"]]))
            for each in self._ask("query", query=expr, time=at)
        )

    def over(self, expr: str, start: float, end: float, step: float) -> tuple[Course, ...]:
        """Raises PrometheusError."""
        return tuple(
            Course(each["metric"], *_columns(each["values"]))
            for each in self._ask("query_range", query=expr, start=start, end=end, step=step)
        )

    def values(self, label: str, among: str, start: float, end: float) -> tuple[str, ...]:
        """The values of a label in the series of a selector. Raises PrometheusError."""
        found = self._ask("series", **{"match[]": among}, start=start, end=end)
        return tuple(sorted({each[label] for each in found if label in each}))

    def _ask(self, what: str, **asked: Any) -> list[Any]:
        try:
            answer = self.client.post(f"{self.address}/api/v1/{what}", data=asked, timeout=_SECONDS)
            body = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise PrometheusError(f"{self.address}: no answer: {error}") from error
        if body.get("status") != "success":
            raise PrometheusError(f"{asked}: {body.get('error', answer.status_code)}")
        data = body["data"]
        return list(data["result"] if isinstance(data, dict) else data)


def _columns(pairs: list[Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(float(time) for time, _ in pairs), tuple(float(value) for _, value in pairs)
