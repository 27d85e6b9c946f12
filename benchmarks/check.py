"""What was planned, held against a server: the same requests at the same moments, both ways."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.sender import Sender, Sent
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
    kept: float  # share of those sent
    kept_on_paper: float
    first_token_ms: float | None  # median
    first_token_ms_on_paper: float | None


@dataclass(frozen=True, slots=True)
class Held:
    """One rate, kept up for long; counted are the requests that came after a warm-up."""

    part: float  # of the planned rate
    rate: float
    sent: int
    finished: int  # until nobody could be served in time any more
    failed: int
    kept: float  # share of those sent
    kept_on_paper: float
    first_token_ms: float | None  # median of those that got one


@dataclass(frozen=True, slots=True)
class Planned:
    """One mix of capacities: its step times, the rate it holds, and what was seen of it."""

    mode: str
    times: StepTimes
    overhead: float  # factor on each step: HTTP and threads
    rate: float  # with the promise, for good
    saturated: float  # finished per second when there is always one more waiting
    checked: tuple[Checked, ...] = ()
    checked_rate: float | None = None  # where the promise broke
    checked_rate_on_paper: float | None = None  # over the same rates and the same time
    held: tuple[Held, ...] = ()  # by rate

    @property
    def error(self) -> float | None:
        if not self.checked_rate or not self.checked_rate_on_paper:
            return None
        return abs(self.checked_rate_on_paper / self.checked_rate - 1)

    def held_parts(self, share: float) -> tuple[float | None, float | None]:
        """Times the planned rate: the most that got the promise for long, and the least above it
        that did not; None where none was tried that did, or did not."""
        most = max((each.part for each in self.held if each.kept >= share), default=None)
        missed = [each.part for each in self.held if each.kept < share]
        least = min((part for part in missed if most is None or part > most), default=None)
        return most, least


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
        # As long again for the last ones to be answered: then who is not was not served in time.
        phase = sender.at(moments(rate, seconds, seed), mix, 2 * seconds)
        paper = simulate_at(host, jobs, rate, seconds, seed, until=2 * seconds)
        points.append(
            Checked(
                rate=rate,
                sent=len(phase.requests),
                finished=len(phase.finished),
                finished_on_paper=sum(fate.ended is not None for fate in paper),
                failed=sum(each.failed for each in phase.requests),
                kept=promise.share_kept(map(times_or_late, phase.requests)),
                kept_on_paper=promise.share_kept(map(times_or_late, paper)),
                first_token_ms=median_ms([each.to_first_token for each in phase.requests]),
                first_token_ms_on_paper=median_ms([fate.to_first_token for fate in paper]),
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


def median_ms(seconds: Sequence[float | None]) -> float | None:
    known = [each for each in seconds if each is not None]
    return 1000 * statistics.median(known) if known else None


def times_or_late(request: Sent | Fate) -> tuple[float | None, float | None]:
    """Of one without an end the first token never came."""
    if request.ended is None:
        return math.inf, None
    return request.to_first_token, request.between_tokens


def simulate_at(
    host: Host,
    jobs: Sequence[Job],
    rate: float,
    seconds: float,
    seed: int,
    until: float | None = None,
) -> list[Fate]:
    """Arrivals for so many seconds, followed up to `until`, or as long as they come."""
    return simulate(host, poisson(jobs, rate, seconds, seed), until or seconds)


def times_of(fates: Sequence[Fate]) -> list[tuple[float | None, float | None]]:
    return [(fate.to_first_token, fate.between_tokens) for fate in fates if fate.ended is not None]
