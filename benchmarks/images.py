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
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import models
from benchmarks.images_report import (
    AT_ONCE,
    DROPPED,
    MERGED,
    MIXED,
    ROUTED,
    TASKS,
    UNIFORM,
    WHOLE,
    Batched,
    Measured,
    report,
)
from benchmarks.merging import Shrink, ShrinkingEncoder, drop_random, merge_alike
from benchmarks.results import write
from benchmarks.runs import timed
from benchmarks.timing import Interval, Spread, ratios, take_turns
from elastiformer import Capacity
from elastiformer.encoder import ElasticEncoder
from elastiformer.encoder_weights import task_of
from elastiformer.errors import InputError
from elastiformer.sequence import Chunk, Item
from training.calibrate import CAPACITIES, capacities
from training.encoder_calibrate import labels_of, some
from training.examples import read_examples
from training.options import real, whole
from training.progress import track

DEFAULT_BASE = "fashion-mnist"
MIXED_BATCH, MIXED_CAPACITIES = 16, (1.0, 0.8, 0.6)

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
    return write(report(args, model, len(items), measured, batched), args.out)


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
