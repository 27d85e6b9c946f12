"""From how many rows on a dense product beats picking channels: measured on this machine.

Picking reads a part of the weight, but each row its own part. A dense product reads all of it,
once for all rows. So which one is faster depends on the number of rows, on the share of channels
kept, and on the processor. Both give the same numbers; only time is at stake.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MOST_ROWS = 4


@dataclass(eq=False, slots=True)
class FewRows:
    """Up to how many rows picking is faster, for each share of SHARES.

    Unmeasured it is one: a single row reads least by picking, on every processor tried.
    """

    most: tuple[int, ...] = (1,) * len(SHARES)

    def rows(self, share: float) -> int:
        return self.most[min(bisect_left(SHARES, share), len(SHARES) - 1)]


@dataclass(frozen=True, slots=True)
class CostTable:
    """What was measured, by the shape of the product (inputs, outputs)."""

    few: Mapping[tuple[int, int], FewRows] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.few:
            return "picking channels for single rows (not measured)"
        parts = [
            f"{inputs}x{outputs}: "
            + " ".join(f"{share:g}:{rows}" for share, rows in zip(SHARES, few.most, strict=True))
            for (inputs, outputs), few in sorted(self.few.items())
        ]
        return "rows up to which channels are picked, by share kept; " + "; ".join(parts)


def compare(
    picked: Callable[[float, int], None], dense: Callable[[float, int], None], seconds: float
) -> FewRows:
    """Time both ways; each is called with a share and a number of rows, and runs one product.

    Args:
        seconds: to spend in all, about.
    """
    each = seconds / (2 * len(SHARES) * MOST_ROWS)
    most = []
    for share in SHARES:
        rows = 0
        while rows < MOST_ROWS:
            fast = _best_of(picked, share, rows + 1, each)
            if fast > _best_of(dense, share, rows + 1, each):
                break
            rows += 1
        most.append(rows)
    return FewRows(_falling(most))


def _best_of(run: Callable[[float, int], None], share: float, rows: int, seconds: float) -> float:
    """The median of as many runs as fit, at least three."""
    run(share, rows)
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < until:
        begun = time.perf_counter()
        run(share, rows)
        taken.append(time.perf_counter() - begun)
    return sorted(taken)[len(taken) // 2]


def _falling(most: Sequence[int]) -> tuple[int, ...]:
    """Never more rows for a larger share: what says otherwise is noise."""
    falling: list[int] = []
    for rows in most:
        falling.append(min(rows, falling[-1]) if falling else rows)
    return tuple(falling)
