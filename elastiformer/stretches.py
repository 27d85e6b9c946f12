"""The plans of a sequence's tokens, stretch by stretch.

Within a stretch of positions a schedule alternates between two plans. So what a step's rows run
under is worked out for all of them at once, and what one row runs under without a look-up.

Shape letters: N positions
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from elastiformer.calibration import Schedule
from elastiformer.capacity import Phase
from elastiformer.priced import PricedPlan

END = sys.maxsize  # where a stretch stops that has no end


class PricedSchedule(NamedTuple):
    """A schedule and its plans' prices: a plan is too long to be looked up for every token."""

    schedule: Schedule
    fuller: PricedPlan
    leaner: PricedPlan

    @classmethod
    def of_one(cls, plan: PricedPlan) -> PricedSchedule:
        """All positions under one plan."""
        return cls(Schedule(plan.plan, plan.plan, 1.0, 1.0, 1.0), plan, plan)

    def at(self, position: int) -> PricedPlan:
        return self.fuller if self.schedule.is_fuller(position) else self.leaner

    def fuller_N(self, first: int, stop: int) -> np.ndarray:
        """Which positions from `first` to before `stop` run under the fuller plan: bool."""
        # As `Schedule.is_fuller` says of each: the same products of the same float64.
        floors = np.floor(np.arange(first, stop + 1) * self.schedule.fraction)
        is_fuller_N: np.ndarray = floors[1:] > floors[:-1]
        return is_fuller_N


class Stretch(NamedTuple):
    """Positions of one phase under one schedule, from `first` to before `stop`."""

    plans: PricedSchedule
    phase: Phase
    first: int
    stop: int = END

    def until(self, stop: int) -> Stretch:
        """What of it is before `stop`."""
        return self._replace(stop=min(self.stop, stop))


class Plans:
    """The plan of each token of one sequence, by phase and position.

    Args:
        find: the stretch that begins at a position, or at the part of one that is left there.
    """

    def __init__(self, find: Callable[[Phase, int], Stretch]) -> None:
        self._find = find
        self._latest: Stretch | None = None  # positions are asked for in their order

    def __call__(self, phase: Phase, position: int) -> PricedPlan:
        return self.stretch(phase, position).plans.at(position)

    def stretch(self, phase: Phase, position: int) -> Stretch:
        """A stretch that holds this position."""
        latest = self._latest
        if latest is None or not latest.first <= position < latest.stop or latest.phase != phase:
            latest = self._latest = self._find(phase, position)
        return latest
