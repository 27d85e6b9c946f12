"""What was measured of a classifier's tokens, on paper: each way at each strength, and what the
others give in the time of a capacity.

Nothing is measured here.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from benchmarks import machine, models
from benchmarks.results import Goal, Report, Table, told
from benchmarks.timing import Interval, Spread
from elastiformer.encoder import ElasticEncoder
from elastiformer.tasks import Task

ROUTED, MERGED = "routed", "merged (ToMe)"
DROPPED, AT_ONCE = "dropped at random, by layer", "dropped at random, at the start"
OTHERS = (MERGED, DROPPED, AT_ONCE)
WHOLE = (ROUTED, "1")
GOAL_CAPACITY = 0.5
LITTLE = 0.02  # of the FLOPs: where less is saved, a quotient by it is noise
UNIFORM, MIXED = "uniform, 3 x 16", "mixed, 3 x 16"
# Task: how its benchmark is called, and by how much its throughput is to rise at GOAL_CAPACITY.
TASKS = {Task.IMAGE_CLASSIFICATION: ("images", 1.7), Task.TEXT_CLASSIFICATION: ("texts", 1.6)}
LOSSES = {Task.IMAGE_CLASSIFICATION: 0.5, Task.TEXT_CLASSIFICATION: 1.0}  # points, at most

NOTES = (
    "The same weights and items; *full* is what is served at capacity 1.0. FLOPs are of all that a "
    "batch takes. Mixed and uniform batches hold the same items at the same capacities."
)
NOTES_OF_OTHERS = (
    " Merged and dropped run as plain batches without any bookkeeping, and in the last layer, as "
    "in what is served, compute only what the head reads, but make all keys. In the time of a "
    "capacity: their best, a straight line between two strengths; empty where none is so fast."
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One way at one strength."""

    way: str
    setting: str
    accuracy: float
    milliseconds: Spread  # of one item
    ratio: Interval  # over what is served at capacity 1.0, within a round
    flop_ratio: float  # likewise, of all that one batch takes

    @property
    def realised(self) -> float | None:
        """The share of the saved FLOPs that became saved time; None where next to none were."""
        saved = 1 - self.flop_ratio
        return (1 - self.ratio.median) / saved if saved > LITTLE else None


@dataclass(frozen=True, slots=True)
class Batched:
    """One way to batch the same items at several capacities."""

    way: str
    milliseconds: Spread  # of one item
    speed: Spread  # uniform time over this way's, of the same round


@dataclass(frozen=True, slots=True)
class AtEqualTime:
    """What merging and dropping give in the time that a capacity takes; None: never so fast."""

    capacity: float
    time_ratio: float
    routed: float
    others: Mapping[str, float | None]


def at_equal_time(measured: Sequence[Measured]) -> list[AtEqualTime]:
    """For each capacity, the accuracy of the other ways in its time, between their strengths."""
    curves = {
        name: sorted((each.ratio.median, each.accuracy) for each in measured if each.way == name)
        for name in OTHERS
    }
    return [
        AtEqualTime(
            float(each.setting),
            each.ratio.median,
            each.accuracy,
            {name: best_within(curve, each.ratio.median) for name, curve in curves.items()},
        )
        for each in measured
        if each.way == ROUTED
    ]


def best_within(curve: Sequence[tuple[float, float]], time: float) -> float | None:
    """The best accuracy that a curve of (time, accuracy) gives in no more than `time`.

    Between two of its points it is a straight line; None if all of it takes longer.
    """
    inside = [accuracy for taken, accuracy in curve if taken <= time]
    for (before, low), (after, high) in pairwise(sorted(curve)):
        if before <= time < after:
            inside.append(low + (high - low) * (time - before) / (after - before))
    return max(inside, default=None)


def report(
    args: argparse.Namespace,
    model: ElasticEncoder,
    items: int,
    measured: Sequence[Measured],
    batched: Sequence[Batched],
) -> Report:
    name, _ = TASKS[Task(model.task)]
    images = model.encoder.reads_images
    equal = at_equal_time(measured)
    rows = [
        [
            each.way,
            each.setting,
            f"{100 * each.accuracy:.2f} %",
            told(each.milliseconds),
            f"{each.ratio.median:.3f} [{each.ratio.low:.3f}, {each.ratio.high:.3f}]",
            f"{each.flop_ratio:.3f}",
            "" if each.realised is None else f"{each.realised:.3f}",
        ]
        for each in measured
    ]
    beside = [
        [
            f"{each.capacity:g}",
            f"{each.time_ratio:.3f}",
            *(
                "" if accuracy is None else f"{100 * accuracy:.2f} %"
                for accuracy in (each.routed, *each.others.values())
            ),
        ]
        for each in equal
    ]
    columns = (
        "way",
        "strength",
        "accuracy",
        "ms an item, median [quartiles]",
        "time / full [95 %]",
        "FLOPs / full",
        "time saved / FLOPs saved",
    )
    tables = [Table("Each way at each strength", columns, rows)]
    if images:
        heads = ("capacity", "time / full", ROUTED, *OTHERS)
        tables.insert(0, Table("At equal time", heads, beside))
    if batched:
        told_of = [
            [
                each.way,
                told(each.milliseconds),
                f"{each.speed.median:.3f} [{each.speed.lower:.3f}, {each.speed.upper:.3f}]",
            ]
            for each in batched
        ]
        of_batches = ("batches", "ms an item, median [quartiles]", "speed over uniform")
        title = "The same items at 1.0, 0.8 and 0.6, batched in other ways"
        tables.append(Table(title, of_batches, told_of))
    return Report(
        name=name,
        title=f"Routing{' against merging and dropping' if images else ''}: {models.name_of(args)}",
        setting=machine.setting(model, args.command_line),
        parameters={"model": models.name_of(args), "items": items, "batch": args.batch},
        results={
            "measured": [{**asdict(each), "realised": each.realised} for each in measured],
            "equal_time": [asdict(each) for each in equal],
            "batched": [asdict(each) for each in batched],
        },
        tables=tables,
        notes=f"{NOTES}{NOTES_OF_OTHERS if images else ''}",
        draw=lambda figure: _draw(figure, measured),
        goals=_goals(Task(model.task), measured, equal, batched),
        size=(7.5, 4.8),
    )


def _goals(
    task: Task,
    measured: Sequence[Measured],
    equal: Sequence[AtEqualTime],
    batched: Sequence[Batched],
) -> list[Goal]:
    _, faster = TASKS[task]
    goals = [
        Goal("mixed over uniform, same size of batch", 0.97, each.speed.median)
        for each in batched
        if each.way == MIXED
    ]
    half = next((each for each in equal if each.capacity == GOAL_CAPACITY), None)
    if half is None:
        return goals
    whole_accuracy = next(each.routed for each in equal if each.capacity == 1.0)
    lost = 100 * (whole_accuracy - half.routed)
    goals = [
        Goal("points of accuracy lost at capacity 0.5", LOSSES[task], lost, at_most=True),
        Goal("throughput at capacity 0.5 over full", faster, 1 / half.time_ratio),
        *goals,
    ]
    if any(each.way == MERGED for each in measured):
        merged = half.others[MERGED]
        ahead = None if merged is None else 100 * (half.routed - merged)
        goals.append(Goal("points ahead of token merging in the time of capacity 0.5", 0.0, ahead))
    return goals


def _draw(figure: Any, measured: Sequence[Measured]) -> None:
    axis = figure.subplots()
    for name, mark in zip((ROUTED, *OTHERS), "os^v", strict=True):
        points = sorted(
            (each.ratio.median, 100 * each.accuracy) for each in measured if each.way == name
        )
        if not points:
            continue
        axis.plot(*zip(*points, strict=True), marker=mark, label=name)
    axis.set(xlabel="time over that at capacity 1.0", ylabel="accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
