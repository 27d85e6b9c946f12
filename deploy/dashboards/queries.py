"""PromQL as the panels need it: the variables of a dashboard, rates, shares, quantiles.

A ratio divides two sums; it never averages ratios. What Grafana writes into the variables,
`Window.filled` writes where there is no Grafana.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RATE = "$__rate_interval"
RANGE = "$__range"

# A request refused at the door has no model, nor has a build: shown whichever is chosen.
_SCOPE = 'job=~"$job",instance=~"$instance",model_name=~"$model{none}"'


# From a server's start for each of its models, and of a fleet also for what has none yet.
ALWAYS_THERE = "elasti_num_requests_waiting"


@dataclass(frozen=True, slots=True)
class Variable:
    """What a reader of a dashboard may choose: one, some or all of a label's values."""

    name: str
    title: str
    label: str
    among: str  # the metric whose labels are offered


JOB = Variable("job", "Job", "job", ALWAYS_THERE)
MODEL = Variable("model", "Model", "model_name", f'{ALWAYS_THERE}{{job=~"$job"}}')
INSTANCE = Variable("instance", "Instance", "instance", f'{ALWAYS_THERE}{{job=~"$job"}}')
VARIABLES = (JOB, MODEL, INSTANCE)


@dataclass(frozen=True, slots=True)
class Amount:
    """A number that a reader of a dashboard writes in."""

    name: str
    title: str
    question: str
    default: str


PRICE = Amount("price", "Price of an exaFLOP", "What do you pay for 10^18 FLOPs?", "1")
_EXAFLOP, _HOUR_SECONDS = "1e18", 3600


@dataclass(frozen=True, slots=True)
class Window:
    """What Grafana would write for the variables, over so much time."""

    range_seconds: int
    rate_seconds: int
    chosen: Mapping[str, Sequence[str]]  # values, by the variable's name
    price: str = PRICE.default

    def filled(self, expr: str) -> str:
        """The query with its variables written out."""
        values = {
            RATE: f"{self.rate_seconds}s",
            RANGE: f"{self.range_seconds}s",
            f"${PRICE.name}": self.price,
            **{f"${name}": _any_of(values) for name, values in self.chosen.items()},
        }
        for variable, value in values.items():
            expr = expr.replace(variable, value)
        return expr


def _any_of(values: Sequence[str]) -> str:
    """A regular expression, as Grafana writes it between a query's quotes."""
    escaped = (re.sub(r"([\\^$*+?.()|\[\]{}])", r"\\\\\1", value) for value in values)
    return f"({'|'.join(escaped)})"


def series(name: str, only: str = "", without_model: bool = False) -> str:
    """A metric, as far as the dashboard's variables choose it; `only` narrows it further."""
    scope = _SCOPE.format(none="|" if without_model else "")
    return f"{name}{{{scope}{',' + only if only else ''}}}"


def rate(name: str, by: str = "", only: str = "", without_model: bool = False) -> str:
    """How fast a counter grows, summed."""
    return f"{_sum(by)}(rate({series(name, only, without_model)}[{RATE}]))"


def grown(name: str, by: str = "", only: str = "", without_model: bool = False) -> str:
    """By how much a counter grew in the time shown, summed."""
    return f"{_sum(by)}(increase({series(name, only, without_model)}[{RANGE}]))"


def level(name: str, by: str = "", only: str = "") -> str:
    """A gauge, summed."""
    return f"{_sum(by)}({series(name, only)})"


def some(expr: str) -> str:
    """Without the series that are at 0: tiers that nobody uses are there too."""
    return f"({expr} > 0)"


def or_none(expr: str) -> str:
    """0 where nothing was ever counted; for a sum without labels."""
    return f"({expr} or vector(0))"


def over(part: str, whole: str) -> str:
    return f"{part} / {whole}"


def left_of(part: str, whole: str) -> str:
    """The share that is missing."""
    return f"1 - {part} / {whole}"


def money(flops: str) -> str:
    """What so many FLOPs cost, at the price that is written in."""
    return f"({flops}) / {_EXAFLOP} * ${PRICE.name}"


def money_per_hour(flops_per_second: str) -> str:
    return money(f"({flops_per_second}) * {_HOUR_SECONDS}")


def per_request(expr: str, requests: str) -> str:
    """Each of some series, over one sum without labels."""
    return f"{expr} / scalar({requests})"


def quantile(share: float, histogram: str, by: str = "") -> str:
    """Below which value this share of the observations lies."""
    buckets = rate(f"{histogram}_bucket", by=f"le,{by}" if by else "le")
    # No comparison holds for the NaN of a tier that nobody used.
    return f"histogram_quantile({share:g}, {buckets}) >= 0"


def quantile_of_all(share: float, histogram: str) -> str:
    """The same, over the whole time shown."""
    return f"histogram_quantile({share:g}, {grown(f'{histogram}_bucket', by='le')})"


def buckets(histogram: str) -> str:
    """How many observations fell under each bound, for a heatmap."""
    return f"sum by (le) (increase({series(f'{histogram}_bucket')}[{RATE}]))"


def mean(histogram: str, by: str = "") -> str:
    return over(rate(f"{histogram}_sum", by), rate(f"{histogram}_count", by))


def _sum(by: str) -> str:
    return f"sum by ({', '.join(by.split(','))}) " if by else "sum"
