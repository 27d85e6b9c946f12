"""How hard an engine is pressed, by how long callers have just waited for it; and the ceiling that
follows for the capacity of new requests.

The longest wait counts, of who waits still as of who has begun; what is past counts half after
each `patience`. So the ceiling falls while a queue grows, and rises again slower than it drains:
between the two it settles where what is asked for is what the machine can do. Waits up to a quarter
of the patience are no load: a request that comes within a step waits for its end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_EASY = 0.25  # of the patience
_STEPS = 20  # from 0 to 1: few capacities, so that requests still share stored prefixes


class Load:
    """One engine's. Written by the engine's thread, read by any."""

    def __init__(
        self, patience_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """No load yet.

        Args:
            patience_seconds: the wait at which the pressure is 1.
        """
        self._patience, self._clock = patience_seconds, clock
        self._longest = (0.0, clock())  # a wait in seconds, and when it was seen

    def waited(self, seconds: float) -> None:
        """Somebody has waited for so long, and has begun or waits still."""
        now = self._clock()
        if seconds >= self._faded(now):
            self._longest = (seconds, now)

    @property
    def pressure(self) -> float:
        """From 0, nobody has waited to speak of, to 1."""
        share = self._faded(self._clock()) / self._patience
        return min(max((share - _EASY) / (1 - _EASY), 0.0), 1.0)

    def _faded(self, now: float) -> float:
        seconds, seen = self._longest
        return float(seconds * 0.5 ** ((now - seen) / self._patience))


def ceiling(pressure: float, floor: float) -> float:
    """The most capacity under a pressure: in a straight line from 1 down to the floor, in steps."""
    return max(math.floor((1 - (1 - floor) * pressure) * _STEPS + 1e-9) / _STEPS, floor)
