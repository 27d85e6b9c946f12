"""A classifier's tokens: routed, and an image's merged where alike or dropped at random instead.

All ways classify the same images with the same weights, in turns within one process: what is
served at each capacity, token merging (ToMe) and random dropping at several strengths. What
counts is the accuracy at equal measured time. A classifier of texts (`--base sentiment`) is only
routed. Also: how much of the FLOPs that a capacity saves becomes time, and 48 items, 16 at each
of 1.0, 0.8 and 0.6, in batches of 16 that hold all three against batches of one capacity each.
Images or texts with labels: a .jsonl file or a folder, as `python -m training evaluate` reads
them.

Takes about a minute for 2,000 images on one core, and twice `--seconds`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine, models
from benchmarks.merging import Shrink, ShrinkingEncoder, drop_random, merge_alike
from benchmarks.results import Goal, Report, Table, told, write
from benchmarks.runs import timed
from benchmarks.timing import Interval, Spread, ratios, take_turns
from elastiformer import Capacity
from elastiformer.encoder import ElasticEncoder
from elastiformer.encoder_weights import task_of
from elastiformer.errors import InputError
from elastiformer.sequence import Chunk, Item
from elastiformer.tasks import Task
from training.calibrate import CAPACITIES, capacities
from training.encoder_calibrate import labels_of, some
from training.examples import read_examples
from training.options import real, whole
from training.progress import track

ROUTED, MERGED = "routed", "merged (ToMe)"
DROPPED, AT_ONCE = "dropped at random, by layer", "dropped at random, at the start"
OTHERS = (MERGED, DROPPED, AT_ONCE)
WHOLE = (ROUTED, "1")
DEFAULT_BASE = "fashion-mnist"
GOAL_CAPACITY = 0.5
LITTLE = 0.02  # of the FLOPs: where less is saved, a quotient by it is noise
UNIFORM, MIXED = "uniform, 3 x 16", "mixed, 3 x 16"
MIXED_BATCH, MIXED_CAPACITIES = 16, (1.0, 0.8, 0.6)
# Task: how its benchmark is called, and by how much its throughput is to rise at GOAL_CAPACITY.
TASKS = {Task.IMAGE_CLASSIFICATION: ("images", 1.7), Task.TEXT_CLASSIFICATION: ("texts", 1.6)}
LOSSES = {Task.IMAGE_CLASSIFICATION: 0.5, Task.TEXT_CLASSIFICATION: 1.0}  # points, at most

NOTES = (
    "The same weights and items; *full* is what is served at capacity 1.0. FLOPs are of all that a "
    "batch takes. Mixed and uniform batches hold the same items at the same capacities."
)
NOTES_OF_OTHERS = (
    " Merged and dropped run as plain batches without any bookkeeping, and in the last layer, as "
    "in what is served, compute only what the head reads. In the time of a capacity: their best, "
    "a straight line between two strengths; empty where none is so fast."
)

Way = Callable[[Sequence[Item]], Tensor]  # -> logits [images, labels]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_model_arguments(parser)
    parser.set_defaults(base=DEFAULT_BASE)
    parser.add_argument("--data", required=True, help="images or texts with labels, never seen")
    parser.add_argument("--capacities", type=capacities, default=capacities(CAPACITIES))
    parser.add_argument("--items", type=whole(2), default=2000, help="images or texts, at most")
    parser.add_argument("--batch", type=whole(1), default=16, help="items of a step")
    parser.add_argument(
        "--less", type=whole(1), default=8, help="most tokens merged or dropped by a layer"
    )
    parser.add_argument("--seconds", type=real(least=0), default=60.0, help="of taking turns")
    parser.add_argument("--least", type=whole(1), default=5, help="rounds, however long they take")
    parser.add_argument("--seed", type=int, default=0, help="of random dropping")


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


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.threads:
        torch.set_num_threads(args.threads)
    task = task_of(args.base)
    if task not in TASKS:
        raise InputError(f"--base {args.base}: its task is one of {', '.join(TASKS)}; got {task}")
    model = ElasticEncoder.load(args.base, models.adapter_of(args), args.dtype, args.device, task)
    if model.calibration is None:
        raise InputError("--adapter: a calibrated one is needed")
    model.measure_costs()
    examples = some(read_examples(args.data, model), args.items)
    labels = labels_of(examples)
    if None in labels:
        raise InputError(f"--data {args.data}: {labels.count(None)} items have no label")
    items = examples.items(range(len(examples.each)))
    ways = _ways(model, args)
    right = {
        name: _accuracy(ways[name], items, labels, args.batch)
        for name in track(list(ways), label="accuracy")
    }
    batch = items[: args.batch]
    turns = {str(name): partial(_turn, model, way, batch) for name, way in ways.items()}
    taken = take_turns(turns, args.seconds, args.least, "taking turns")
    dense = taken[str(WHOLE)]
    flops = {name: _flops(model, name, way, batch) for name, way in ways.items()}
    measured = [
        Measured(
            *name,
            right[name],
            Spread.of(taken[str(name)]).scaled(1000 / len(batch)),
            Interval.of(ratios(taken[str(name)], dense)),
            flops[name] / flops[WHOLE],
        )
        for name in ways
    ]
    batched = _batched(model, items, args)
    return write(_report(args, model, len(items), measured, batched), args.out)


def _ways(model: ElasticEncoder, args: argparse.Namespace) -> dict[tuple[str, str], Way]:
    """By way and strength; of `ROUTED` the strength is the capacity."""
    assert model.calibration is not None
    ways: dict[tuple[str, str], Way] = {
        (ROUTED, f"{each:g}"): partial(_routed, model, each)
        for each in args.capacities
        if each >= model.calibration.lowest - 1e-9
    }
    if not model.encoder.reads_images:
        return ways
    shrinking = ShrinkingEncoder(model.encoder)
    patches = model.context - model.encoder.class_tokens
    layers = len(model.shape.layers) - 1
    draw = torch.Generator().manual_seed(args.seed)
    for less in range(args.less + 1):
        for name, shrink in ((MERGED, merge_alike), (DROPPED, drop_random(draw))):
            ways[name, f"{less} a layer"] = partial(_shrunk, model, shrinking, shrink, less, False)
        # As many in all as the others have worked on less, on average.
        at_once = min(round(less * layers / 2), patches - 1)
        ways[AT_ONCE, f"{at_once}"] = partial(
            _shrunk, model, shrinking, drop_random(draw), at_once, True
        )
    return ways


def _routed(model: ElasticEncoder, capacity: float, items: Sequence[Item]) -> Tensor:
    return torch.stack(model.encode(items, [Capacity(capacity, capacity)] * len(items)))


def _shrunk(
    model: ElasticEncoder,
    shrinking: ShrinkingEncoder,
    shrink: Shrink,
    less: int,
    at_once: bool,
    items: Sequence[Item],
) -> Tensor:
    pixels = [item.pixels_CHW for item in items if item.pixels_CHW is not None]
    pixels_BCHW = torch.stack(pixels).to(model.device, model.dtype)
    return shrinking.logits(pixels_BCHW, shrink, less, at_once)


def _turn(model: ElasticEncoder, way: Way, batch: Sequence[Item]) -> float:
    return timed(model, lambda: way(batch))


def _flops(model: ElasticEncoder, name: tuple[str, str], way: Way, batch: Sequence[Item]) -> float:
    """Of one batch: what the model says that it spent, and of other ways what PyTorch counts."""
    kind, strength = name
    if kind == ROUTED:
        capacity = Capacity(float(strength), float(strength))
        sequences = [model.sequence(capacity, item) for item in batch]
        model.step([Chunk(each, list(each.item.ids)) for each in sequences])
        return sum(each.usage.flops for each in sequences)
    with FlopCounterMode(display=False) as counter:
        way(batch)
    return float(counter.get_total_flops())


def _batched(
    model: ElasticEncoder, items: Sequence[Item], args: argparse.Namespace
) -> list[Batched]:
    """The same items at three capacities, mixed and sorted; none where there are too few."""
    assert model.calibration is not None
    count = MIXED_BATCH * len(MIXED_CAPACITIES)
    if len(items) < count or model.calibration.lowest > min(MIXED_CAPACITIES) + 1e-9:
        return []
    shares = [MIXED_CAPACITIES[at % len(MIXED_CAPACITIES)] for at in range(count)]
    asked = [(Capacity(c, c), item) for c, item in zip(shares, items, strict=False)]
    kinds = len(MIXED_CAPACITIES)
    ordered = [each for at in range(kinds) for each in asked[at::kinds]]
    ways = {UNIFORM: ordered, MIXED: asked}
    taken = take_turns(
        {name: partial(_batches, model, each) for name, each in ways.items()},
        args.seconds,
        args.least,
        "mixed",
    )
    return [
        Batched(
            name,
            Spread.of(taken[name]).scaled(1000 / count),
            Spread.of(ratios(taken[UNIFORM], taken[name])),
        )
        for name in ways
    ]


def _batches(model: ElasticEncoder, asked: Sequence[tuple[Capacity, Item]]) -> float:
    def work() -> None:
        for at in range(0, len(asked), MIXED_BATCH):
            some = asked[at : at + MIXED_BATCH]
            model.encode([item for _, item in some], [capacity for capacity, _ in some])

    return timed(model, work)


def _accuracy(way: Way, items: Sequence[Item], labels: Sequence[int | None], batch: int) -> float:
    said = [
        int(label)
        for at in range(0, len(items), batch)
        for label in way(items[at : at + batch]).argmax(-1)
    ]
    return sum(mine == label for mine, label in zip(said, labels, strict=True)) / len(items)


# On paper.


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


def _report(
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
