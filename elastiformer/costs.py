"""Which of two ways to compute the same is the faster one here: measured, before use or in use.

Row by row reads what some row needs and computes what each row needs, but many rows at once use
the processor better. So which one is faster depends on the number of rows, on the share of
channels kept, and on the processor. Both give the same numbers; only time is at stake.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

_MARGIN = 0.97
SHARES = (0.3, 0.5, 0.65, 0.8, 0.9, 1.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(eq=False, slots=True)
class FewRows:
    """Up to how many rows going row by row is faster, for each share of SHARES."""

    most: tuple[int, ...] = (8,) * len(SHARES)  # a guess, until it is measured

    def rows(self, share: float) -> int:
        return self.most[min(bisect_left(SHARES, share), len(SHARES) - 1)]


SINGLE_ROWS = FewRows((1,) * len(SHARES))


TRIAL_TURNS = 3  # of each way
_AGAIN = 64  # of so many pieces of work one goes the way that seemed slower
_LATEST = 5  # turns of each way that count


class Trial:
    """Which of two ways is faster, found in use: either will do, so at first they take turns.

    For each kind of work both have some turns; then the one with the lower median goes on, and now
    and then the other has another turn: whatever else ran here may have misled the first ones.
    """

    def __init__(self, turns: int = TRIAL_TURNS, again: int = _AGAIN) -> None:
        self._turns, self._again = turns, again
        self._taken: defaultdict[tuple[Hashable, bool], deque[float]] = defaultdict(
            lambda: deque(maxlen=max(turns, _LATEST))
        )
        self._count: defaultdict[Hashable, int] = defaultdict(int)

    def goes_first_way(self, work: Hashable) -> bool:
        """Which way it is to be this time."""
        first, second = self._taken[work, True], self._taken[work, False]
        if min(len(first), len(second)) < self._turns:
            return len(first) <= len(second)
        is_first_faster = median(first) <= median(second)
        return is_first_faster != (self._count[work] % self._again == 0)

    def took(self, work: Hashable, first_way: bool, seconds: float) -> None:
        """Note a turn."""
        self._taken[work, first_way].append(seconds)
        self._count[work] += 1


@dataclass(frozen=True, slots=True)
class CostTable:
    """What was measured, by the shape of the product (inputs, outputs)."""

    few: Mapping[tuple[int, int], FewRows] = field(default_factory=dict)
    threads: str | None = None  # the pool of compiled kernels; None where none ran

    def __str__(self) -> str:
        if not self.few:
            return "not measured"
        parts = [
            f"{inputs}x{outputs}: "
            + " ".join(f"{share:g}:{rows}" for share, rows in zip(SHARES, few.most, strict=True))
            for (inputs, outputs), few in sorted(self.few.items())
        ]
        told = "rows up to which a product goes row by row, by share kept; " + "; ".join(parts)
        if self.threads not in (None, "omp"):
            told += f"; threads: {self.threads}, slower than PyTorch's own: install libgomp"
        return told


def compare(
    by_row: Callable[[float, int], None],
    at_once: Callable[[float, int], None],
    seconds: float,
    shares_alike: bool = False,
    finish: Callable[[], None] = lambda: None,
) -> FewRows:
    """Time both ways; each is called with a share and a number of rows, and runs one product.

    Args:
        seconds: to spend in all, about.
        shares_alike: whether rows that leave channels out take as long as whole ones; then only
            these are timed: searching for picks, which serving does elsewhere, would blur it.
        finish: returns when what was called has run; a device computes after the call.
    """
    measured = SHARES[-1:] if shares_alike else SHARES
    each = seconds / (len(measured) * len(ROWS).bit_length())
    most = []
    for share in measured:
        slower = bisect_left(
            ROWS, True, key=lambda rows: not _is_faster(by_row, at_once, share, rows, each, finish)
        )
        most.append(ROWS[slower - 1] if slower else 0)
    most = most[:1] * (len(SHARES) - len(most)) + most
    return FewRows(_falling(most))


def _is_faster(
    first: Callable[[float, int], None],
    second: Callable[[float, int], None],
    share: float,
    rows: int,
    seconds: float,
    finish: Callable[[], None],
) -> bool:
    """Compare the least of each: whatever else runs here only adds. The two take turns.

    A tie is no reason to go row by row: of many rows that would cost more if it was an error.
    """
    taken: dict[bool, list[float]] = {True: [], False: []}
    until = time.perf_counter() + seconds
    while len(taken[False]) < 3 or time.perf_counter() < until:
        for is_first, run in ((True, first), (False, second)):
            finish()
            begun = time.perf_counter()
            run(share, rows)
            finish()
            taken[is_first].append(time.perf_counter() - begun)
    return min(taken[True]) < _MARGIN * min(taken[False])


def _falling(most: Sequence[int]) -> tuple[int, ...]:
    """Never fewer rows for a smaller share: what says otherwise is noise."""
    return tuple(max(most[place:]) for place in range(len(most)))
