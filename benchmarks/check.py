"""What was planned, held against a load generator: the same rates for the same time, both ways."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import guidellm
from benchmarks.simulation import Fate, Host, Promise, StepTimes, crossing, poisson, simulate
from service.scheduler import Job
from training.progress import track

AROUND = (0.6, 0.8, 1.0, 1.2, 1.4)  # times the planned rate: what is checked
SEEDS = 12  # simulations of the time that is checked: as short as that, each is another story


@dataclass(frozen=True, slots=True)
class Checked:
    """One rate, as the load generator saw it and as the simulation has it."""

    rate: float
    sent: int
    finished: int
    kept: float  # share of the finished requests
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
    program: str,
    load: guidellm.Load,
) -> Planned:
    """Rates around the planned one: sent by a load generator, and on paper."""
    points = []
    around = planned.rate or planned.saturated  # where nothing is held, the most there is
    with tempfile.TemporaryDirectory() as folder:
        for part in track(AROUND, label=planned.mode):
            rate = round(part * around, 3)
            phase = guidellm.at_rate(program, load, mix, rate, Path(folder))
            finished = [each for each in phase.requests if each.ended is not None]
            stories = [
                times_of(simulate_at(host, jobs, rate, load.seconds, seed)) for seed in range(SEEDS)
            ]
            points.append(
                Checked(
                    rate=rate,
                    sent=len(phase.requests),
                    finished=len(finished),
                    kept=promise.share_kept(
                        (each.to_first_token, each.between_tokens) for each in finished
                    ),
                    kept_on_paper=statistics.mean(map(promise.share_kept, stories)),
                    first_token_ms=_median_ms([each.to_first_token for each in finished]),
                    first_token_ms_on_paper=_median_ms(
                        [first for story in stories for first, _ in story]
                    ),
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
