"""What single probes cannot tell, asked of whole paths: a few knobs, turned while it helps.

Probed alone, a layer shows nothing of how losses add up when everything is lowered at once. So
the curves get knobs: how much each field counts, how steep all are, how far layers differ. A knob
is turned a little either way, a path is made and its loss measured, and what is better stays. A
path of whole sub-layers is an order, in which neighbours change places.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from elastiformer.calibration import Step
from training.allotment import LEAST_KL, Curves

Path = tuple[Step, ...]
Score = tuple[int, float]  # capacities out of reach; mean logarithm of the loss at the others

FIELD_FACTOR, STEEPNESS_FACTOR, CONTRAST_FACTOR = 2.5, 1.35, 1.35


@dataclass(frozen=True, slots=True)
class Knobs:
    """Factors on what the probes said; all 1 says the same."""

    fields: dict[str, float] = field(default_factory=dict)
    steepness: float = 1.0
    contrast: float = 1.0  # above 1, layers differ by more than was probed

    def turned(self, names: Sequence[str]) -> Iterator[tuple[Knobs, Knobs]]:
        """Each knob turned up, and turned down."""
        yield (
            replace(self, steepness=self.steepness * STEEPNESS_FACTOR),
            replace(self, steepness=self.steepness / STEEPNESS_FACTOR),
        )
        for name in names if len(names) > 1 else ():
            now = self.fields.get(name, 1.0)
            yield (
                replace(self, fields=self.fields | {name: now * FIELD_FACTOR}),
                replace(self, fields=self.fields | {name: now / FIELD_FACTOR}),
            )
        yield (
            replace(self, contrast=self.contrast * CONTRAST_FACTOR),
            replace(self, contrast=self.contrast / CONTRAST_FACTOR),
        )


def reshaped(curves: Curves, knobs: Knobs) -> Curves:
    """The curves as the knobs have them."""
    logs: dict[tuple[str, float], list[float]] = {}
    for (_, name), points in curves.probed.items():
        for share, kl in points.items():
            logs.setdefault((name, share), []).append(math.log(max(kl, LEAST_KL)))
    means = {key: sum(values) / len(values) for key, values in logs.items()}

    def changed(name: str, share: float, kl: float) -> float:
        mean = means[name, share]
        log_kl = mean + knobs.contrast * (math.log(max(kl, LEAST_KL)) - mean)
        return knobs.fields.get(name, 1.0) * math.exp(log_kl)

    return Curves(
        curves.layers,
        {
            (layer, name): {share: changed(name, share, kl) for share, kl in points.items()}
            for (layer, name), points in curves.probed.items()
        },
        {name: knobs.steepness * value for name, value in curves.steepness.items()},
    )


def reorder(
    order: Path, judge: Callable[[Path], Score], until: float, sweeps: int
) -> tuple[Path, Score]:
    """Swap neighbours while it helps, `sweeps` times through or until the clock reads `until`."""
    score = judge(order)
    for _ in range(sweeps):
        before = score
        for at in range(len(order) - 1):
            if time.monotonic() > until:
                return order, score
            other = (*order[:at], order[at + 1], order[at], *order[at + 2 :])
            other_score = judge(other)
            if other_score < score:
                order, score = other, other_score
        if score == before:
            break
    return order, score


def tune(
    curves: Curves,
    names: Sequence[str],
    make: Callable[[Curves], Path],
    judge: Callable[[Path], Score],
    until: float,
    sweeps: int,
) -> tuple[Path, Score, Knobs]:
    """Turn every knob, `sweeps` times or until the clock reads `until`."""
    knobs = Knobs()
    path = make(curves)
    score = judge(path)
    for _ in range(sweeps):
        before = score
        for at in range(sum(1 for _ in knobs.turned(names))):
            for direction in (0, 1):
                if time.monotonic() > until:
                    return path, score, knobs
                tried = list(knobs.turned(names))[at][direction]
                other = make(reshaped(curves, tried))
                other_score = judge(other)
                if other_score < score:
                    path, score, knobs = other, other_score, tried
                    break  # the other direction would be worse
        if score == before:
            break
    return path, score, knobs
