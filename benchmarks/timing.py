"""Taking turns: what is compared runs alternately, so that the machine's moods fall on all alike.

A ratio is taken within each round and then summed up, so a slow minute cancels out. Who begins
changes from round to round, since what ran before leaves its traces in the caches.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from training.progress import bar

Turn = Callable[[], float]  # does its work once; the seconds that the measured part of it took


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one thing."""

    count: int
    least: float
    lower: float  # quartile
    median: float
    upper: float  # quartile

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        assert values, "nothing was measured"
        if len(values) == 1:
            return cls(1, values[0], values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(len(values), min(values), lower, median, upper)

    def scaled(self, factor: float) -> Spread:
        return Spread(
            self.count,
            self.least * factor,
            self.lower * factor,
            self.median * factor,
            self.upper * factor,
        )


@dataclass(frozen=True, slots=True)
class Interval:
    """A median, and where it lies with 95 % confidence (bootstrap)."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], draws: int = 2000) -> Interval:
        draw = random.Random(0)
        medians = sorted(
            statistics.median(draw.choices(values, k=len(values))) for _ in range(draws)
        )
        return cls(
            statistics.median(values), medians[draws * 25 // 1000], medians[draws * 975 // 1000]
        )


def take_turns(
    ways: Mapping[str, Turn],
    seconds: float,
    least: int,
    label: str,
    most: int = 1_000_000,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Run all ways alternately, for `seconds` or at least `least` rounds; seconds of each turn.

    The first `warm_up` rounds do not count.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    whole = round(seconds)
    shown = bar(label, whole, unit="s")
    began = time.monotonic()
    rounds = 0
    while rounds < least + warm_up or (
        time.monotonic() - began < seconds and rounds < most + warm_up
    ):
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            turn = ways[name]()
            if rounds >= warm_up:
                taken[name].append(turn)
        rounds += 1
        passed = min(round(time.monotonic() - began), whole)
        shown.set_postfix(rounds=rounds, refresh=False)
        shown.update(passed - shown.n)
    shown.close()
    return taken


def ratios(taken: Sequence[float], over: Sequence[float]) -> list[float]:
    """Each turn over the other way's turn of the same round."""
    return [mine / theirs for mine, theirs in zip(taken, over, strict=True)]
