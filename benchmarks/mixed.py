"""Whole requests at mixed capacities in one batch, against the same requests in uniform batches.

48 requests, 16 at each of 1.0, 0.8 and 0.6, each a prompt and some new tokens. Once in three
batches of 16 that hold all three capacities, once in three batches of one capacity each: the
same requests, the same size of batch. Also 16 requests that are one mixed batch, against the
same 16 split by capacity into batches of 5 and 6, which are smaller and so dearer.

Takes about `--seconds`, and at least two rounds: some three minutes on two cores with the
default model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from benchmarks import machine, models
from benchmarks.results import Goal, Report, Table, told, write
from benchmarks.runs import generate, timed
from benchmarks.timing import Spread, ratios, take_turns
from elastiformer import Capacity, ElasticModel
from training.options import real, whole

BATCH = 16
CAPACITIES = (1.0, 0.8, 0.6)
UNIFORM, MIXED = "uniform, 3 x 16", "mixed, 3 x 16"
SPLIT, TOGETHER = "uniform, 5 + 5 + 6", "mixed, 16"

Batch = list[tuple[Capacity, list[int]]]  # requests that run together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_model_arguments(parser)
    parser.add_argument("--seconds", type=real(least=0), default=150.0, help="of taking turns")
    parser.add_argument("--least", type=whole(1), default=2, help="rounds, however long they take")
    parser.add_argument("--prompt", type=whole(2), default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=whole(2), default=32, help="new tokens of each request")


@dataclass(frozen=True, slots=True)
class Measured:
    """One way to batch the requests."""

    way: str
    seconds: Spread
    speed: Spread  # uniform time over this way's, of the same round and the same requests


def run(args: argparse.Namespace) -> dict[str, Any]:
    model = models.load(args)
    models.check_context(model, args.prompt + args.tokens)
    ways = _ways(model, args.prompt)
    taken = take_turns(
        {name: partial(_seconds, model, batches, args.tokens) for name, batches in ways.items()},
        args.seconds,
        args.least,
        "turns",
    )
    measured = [
        Measured(name, Spread.of(taken[name]), Spread.of(ratios(taken[uniform], taken[name])))
        for uniform, names in ((UNIFORM, (UNIFORM, MIXED)), (SPLIT, (SPLIT, TOGETHER)))
        for name in names
    ]
    return write(_report(args, model, measured), args.out)


def _ways(model: ElasticModel, prompt_tokens: int) -> dict[str, list[Batch]]:
    count = BATCH * len(CAPACITIES)
    ids = models.text_ids(model, prompt_tokens + 37 * count)
    capacities = [Capacity(share, share) for share in CAPACITIES]
    requests: Batch = [
        (capacities[at % len(capacities)], ids[37 * at : 37 * at + prompt_tokens])
        for at in range(count)
    ]
    first = requests[:BATCH]
    return {
        UNIFORM: _by_capacity(requests, capacities),
        MIXED: [requests[at : at + BATCH] for at in range(0, count, BATCH)],
        SPLIT: _by_capacity(first, capacities),
        TOGETHER: [first],
    }


def _by_capacity(requests: Batch, capacities: Sequence[Capacity]) -> list[Batch]:
    return [[each for each in requests if each[0] == capacity] for capacity in capacities]


def _seconds(model: ElasticModel, batches: Sequence[Batch], new_tokens: int) -> float:
    def work() -> None:
        for batch in batches:
            generate(model, [c for c, _ in batch], [ids for _, ids in batch], new_tokens)

    return timed(model, work)


# On paper.


def _report(args: argparse.Namespace, model: ElasticModel, measured: list[Measured]) -> Report:
    rows = [
        [
            each.way,
            told(each.seconds),
            f"{each.speed.median:.3f} [{each.speed.lower:.3f}, {each.speed.upper:.3f}]",
            str(each.seconds.count),
        ]
        for each in measured
    ]
    columns = ("batches", "seconds, median [quartiles]", "speed over uniform", "rounds")
    mixed = next(each for each in measured if each.way == MIXED)
    return Report(
        name="mixed",
        title=f"Mixed against uniform batches: {models.name_of(args)}",
        setting=machine.setting(model, args.command_line),
        parameters={
            "model": models.name_of(args),
            "seconds": args.seconds,
            "prompt_tokens": args.prompt,
            "new_tokens": args.tokens,
            "capacities": list(CAPACITIES),
        },
        results=[asdict(each) for each in measured],
        tables=[Table("The same requests, batched in other ways", columns, rows)],
        notes=(
            "The first two rows hold the same 48 requests, the last two the same 16. A speed is "
            "uniform time over this time, of the same round."
        ),
        draw=lambda figure: _draw(figure, measured),
        goals=[Goal("mixed over uniform, same size of batch", 0.97, mixed.speed.median)],
        size=(7, 3.2),
    )


def _draw(figure: Any, measured: Sequence[Measured]) -> None:
    axis = figure.subplots()
    colours = ["tab:orange" if each.way in (MIXED, TOGETHER) else "0.7" for each in measured]
    middles = [each.seconds.median for each in measured]
    errors = [
        [each.seconds.median - each.seconds.lower for each in measured],
        [each.seconds.upper - each.seconds.median for each in measured],
    ]
    bars = axis.barh(
        [each.way for each in measured], middles, xerr=errors, capsize=3, color=colours
    )
    axis.bar_label(bars, [f"{middle:.2f} s" for middle in middles], label_type="center")
    axis.invert_yaxis()
    axis.set(xlabel="seconds for the same requests")
