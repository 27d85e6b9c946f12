"""What was planned, held against a server: the same requests at the same moments, both ways."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.sender import Sender
from benchmarks.simulation import (
    Fate,
    Host,
    Promise,
    StepTimes,
    crossing,
    moments,
    poisson,
    simulate,
)
from service.scheduler import Job
from training.progress import track

AROUND = (0.6, 0.8, 1.0, 1.2, 1.4)  # times the planned rate: what is checked


@dataclass(frozen=True, slots=True)
class Checked:
    """One rate, as the sender saw it and as the simulation has it."""

    rate: float
    sent: int
    finished: int
    finished_on_paper: int
    failed: int
    kept: float  # share of those that finished or failed
    kept_on_paper: float
    first_token_ms: float | None  # median
    first_token_ms_on_paper: float | None


@dataclass(frozen=True, slots=True)
class Planned:
    """One mix of capacities: its step times, the rate it holds, and what was seen of it."""

    mode: str
    times: StepTimes
    rate: float  # with the promise, for good
    saturated: float  # finished per second when there is always one more waiting
    checked: tuple[Checked, ...] = ()
    checked_rate: float | None = None  # where the promise broke
    checked_rate_on_paper: float | None = None  # over the same rates and the same time

    @property
    def error(self) -> float | None:
        if not self.checked_rate or not self.checked_rate_on_paper:
            return None
        return abs(self.checked_rate_on_paper / self.checked_rate - 1)


def check(
    planned: Planned,
    host: Host,
    jobs: Sequence[Job],
    mix: Sequence[float],
    promise: Promise,
    sender: Sender,
    seconds: float,
) -> Planned:
    """Rates around the planned one: sent to a server, and on paper."""
    points = []
    around = planned.rate or planned.saturated  # where nothing is held, the most there is
    for seed, part in enumerate(track(AROUND, label=planned.mode)):
        rate = round(part * around, 3)
        phase = sender.at(moments(rate, seconds, seed), mix, seconds)
        seen = [(each.to_first_token, each.between_tokens) for each in phase.finished]
        failed = sum(each.failed for each in phase.requests)
        paper = times_of(simulate_at(host, jobs, rate, seconds, seed))
        points.append(
            Checked(
                rate=rate,
                sent=len(phase.requests),
                finished=len(seen),
                finished_on_paper=len(paper),
                failed=failed,
                kept=promise.share_kept([*seen, *[(math.inf, None)] * failed]),
                kept_on_paper=promise.share_kept(paper),
                first_token_ms=_median_ms([first for first, _ in seen]),
                first_token_ms_on_paper=_median_ms([first for first, _ in paper]),
            )
        )
    return replace(
        planned,
        checked=tuple(points),
        checked_rate=crossing([(each.rate, each.kept) for each in points], promise.share),
        checked_rate_on_paper=crossing(
            [(each.rate, each.kept_on_paper) for each in points], promise.share
        ),
    )


def _median_ms(seconds: Sequence[float | None]) -> float | None:
    known = [each for each in seconds if each is not None]
    return 1000 * statistics.median(known) if known else None


def simulate_at(
    host: Host, jobs: Sequence[Job], rate: float, seconds: float, seed: int
) -> list[Fate]:
    return simulate(host, poisson(jobs, rate, seconds, seed), until=seconds)


def times_of(fates: Sequence[Fate]) -> list[tuple[float | None, float | None]]:
    return [(fate.to_first_token, fate.between_tokens) for fate in fates if fate.ended is not None]
