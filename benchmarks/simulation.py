"""A server on paper: the real scheduler, random arrivals, and step times that were measured.

The model has two parts. A step of so many decoding rows and so many prompt tokens takes what a
table of measured steps says, linear in between. Which rows and tokens a step holds is decided by
the server's own `Scheduler` and `Pace`, run step by step on a clock that only the table moves. No
thread, no model, no HTTP: what those cost is one factor on every step, fitted to a light load.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean

from service.pace import Pace
from service.scheduler import Entry, Job, Limits, Scheduler

_FACTORS, _HALVINGS = (0.25, 4.0), 12


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a step: `seconds[i][j]` with `rows[i]` decoding and `tokens[j]` of prompts.

    Both axes begin at 0. Between two points it is linear; beyond the last ones it goes on as
    between the last two.
    """

    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def of(self, rows: int, tokens: int) -> float:
        row, across = _between(self.rows, rows)
        column, along = _between(self.tokens, tokens)
        return sum(
            weight * self.seconds[row + down][column + right]
            for down, right, weight in (
                (0, 0, (1 - across) * (1 - along)),
                (0, 1, (1 - across) * along),
                (1, 0, across * (1 - along)),
                (1, 1, across * along),
            )
        )


def _between(points: Sequence[int], at: int) -> tuple[int, float]:
    """The interval that holds `at`, or the last one, and how far into it."""
    place = min(max(bisect_right(points, at) - 1, 0), len(points) - 2)
    return place, (at - points[place]) / (points[place + 1] - points[place])


@dataclass(frozen=True, slots=True)
class Host:
    """A server as the simulation knows it."""

    limits: Limits
    max_decode_delay_seconds: float
    times: StepTimes
    overhead: float = 1.0  # of each step: threads, HTTP, whoever sends


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it comes, and the job that it is."""

    second: float
    job: Job


@dataclass(slots=True)
class Fate:
    """What became of one request; seconds since the beginning."""

    arrived: float
    admitted: float | None = None
    first_token: float | None = None
    ended: float | None = None
    tokens: int = 0

    @property
    def to_first_token(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrived

    @property
    def between_tokens(self) -> float | None:
        """The mean over the request."""
        if self.ended is None or self.first_token is None or self.tokens < 2:
            return None
        return (self.ended - self.first_token) / (self.tokens - 1)


def moments(rate: float, seconds: float, seed: int) -> list[float]:
    """When requests come that know nothing of each other, so many per second on average."""
    draw = random.Random(seed)
    found: list[float] = []
    now = draw.expovariate(rate)
    while now < seconds:
        found.append(now)
        now += draw.expovariate(rate)
    return found


def poisson(jobs: Sequence[Job], rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Arrivals at random moments, the jobs in turn."""
    return [
        Arrival(second, jobs[place % len(jobs)])
        for place, second in enumerate(moments(rate, seconds, seed))
    ]


def simulate(host: Host, arrivals: Iterable[Arrival], until: float = float("inf")) -> list[Fate]:
    """Run a server over these arrivals, up to a second or to the last token."""
    coming = sorted(arrivals, key=lambda arrival: arrival.second)
    scheduler, pace = Scheduler(host.limits), Pace()
    fates = [Fate(arrival.second) for arrival in coming]
    fate_of: dict[Entry, Fate] = {}
    now, arrived = 0.0, 0
    while arrived < len(coming) or not scheduler.idle:
        if scheduler.idle:
            now = max(now, coming[arrived].second)
        if now >= until:
            break
        while arrived < len(coming) and coming[arrived].second <= now:
            entry = Entry(coming[arrived].job)
            fate_of[entry] = fates[arrived]
            scheduler.waiting.append(entry)  # a queue without a bound: nobody is refused
            arrived += 1
        for entry in scheduler.admit():
            fate_of[entry].admitted = now
        shares = scheduler.shares(pace.prompt_tokens(host.max_decode_delay_seconds))
        rows = sum(share.count == 1 for share in shares)
        tokens = sum(share.count for share in shares if share.count > 1)
        taken = host.overhead * host.times.of(rows, tokens)
        pace.learn(taken, shares)
        now += taken
        for share in shares:
            entry = share.entry
            entry.done += share.count
            if entry.ready == 0:
                _draw(scheduler, entry, fate_of[entry], now)
    return fates


def factor_for(host: Host, arrivals: Sequence[Arrival], seconds: float) -> float:
    """The overhead under which these arrivals take so many seconds each, on average; 1/4 to 4."""

    def on_average(factor: float) -> float:
        fates = simulate(replace(host, overhead=factor), arrivals)
        return fmean(fate.ended - fate.arrived for fate in fates if fate.ended is not None)

    low, high = _FACTORS
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if on_average(middle) < seconds else (low, middle)
    return (low + high) / 2


def _draw(scheduler: Scheduler, entry: Entry, fate: Fate, now: float) -> None:
    entry.tokens.append(0)
    fate.tokens += 1
    if fate.first_token is None:
        fate.first_token = now
    if fate.tokens == entry.job.most_new:
        fate.ended = now
        scheduler.remove(entry)


@dataclass(frozen=True, slots=True)
class Promise:
    """What callers are promised, and how many of them at least."""

    first_token_seconds: float
    between_tokens_seconds: float
    share: float

    def kept(self, to_first_token: float | None, between_tokens: float | None) -> bool:
        """For one finished request; one of a single token has nothing between."""
        return (to_first_token or 0.0) <= self.first_token_seconds and (
            between_tokens or 0.0
        ) <= self.between_tokens_seconds

    def share_kept(self, requests: Iterable[tuple[float | None, float | None]]) -> float:
        """Of finished requests, each by its two times; 1 of none."""
        kept = [self.kept(first, between) for first, between in requests]
        return sum(kept) / len(kept) if kept else 1.0


def held_rate(
    share_at: Callable[[float], float], share: float, most: float, steps: int = 8
) -> float:
    """The highest rate at which that share is kept, by halving; `most` if it is kept there."""
    if share_at(most) >= share:
        return most
    low, high = 0.0, most
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if share_at(middle) >= share else (low, middle)
    return low


def crossing(points: Sequence[tuple[float, float]], share: float) -> float | None:
    """Where a measured share first falls below: (rate, share) by rate; None if it never does.

    Straight lines between the points; from all requests kept at rate 0.
    """
    for (rate, kept), (next_rate, next_kept) in pairwise([(0.0, 1.0), *points]):
        if next_kept < share <= kept:
            return rate + (next_rate - rate) * (kept - share) / (kept - next_kept)
    return None
