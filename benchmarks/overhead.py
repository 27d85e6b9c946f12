"""What an adapter costs requests that do not use it: all at capacity 1.0, against no adapter.

Three models in one process take turns: one with the adapter, one without, and a second one
without. The two without differ in nothing but their place in memory, so their difference is how
finely this machine can tell. Medians of the ratio within a round, with 95 % confidence.

Takes about `--seconds` for each of prefill, decode at batch 1 and at batch 16: some two minutes
in all on two cores with the default model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import machine, models
from benchmarks.results import Goal, Report, Table, told, write
from benchmarks.runs import STAGGER, TRIAL_STEPS, Decoding, timed
from benchmarks.timing import Interval, Spread, ratios, take_turns
from elastiformer import DENSE, Chunk, ElasticModel
from elastiformer.errors import InputError
from training.options import real, whole

WITHOUT, AGAIN, WITH = "no adapter", "no adapter, a second time", "adapter"
BATCHES = (1, 16)
CONTEXT, STEPS = 128, 700  # before decoding; of each decoded sequence, at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_model_arguments(parser)
    parser.add_argument("--seconds", type=real(least=0), default=35.0, help="for each kind of work")
    parser.add_argument("--least", type=whole(1), default=5, help="rounds, however long they take")
    parser.add_argument("--prompt", type=whole(2), default=512, help="tokens of the prefill")
    parser.add_argument("--context", type=whole(2), default=CONTEXT, help="tokens before decoding")
    least = len(BATCHES) * (TRIAL_STEPS + 1)
    parser.add_argument("--steps", type=whole(least), default=STEPS, help="decode steps, at most")


@dataclass(frozen=True, slots=True)
class Measured:
    """One model at one kind of work."""

    work: str
    model: str
    milliseconds: Spread
    ratio: Interval  # over the model without an adapter, within a round


def run(args: argparse.Namespace) -> dict[str, Any]:
    if models.adapter_of(args) is None:
        raise InputError("--adapter: there is none to measure the cost of")
    bare = argparse.Namespace(**vars(args) | {"adapter": models.NO_ADAPTER})
    loaded = {WITHOUT: models.load(bare), AGAIN: models.load(bare), WITH: models.load(args)}
    longest = max(args.prompt, args.context + STAGGER + args.steps)
    models.check_context(loaded[WITH], longest)
    ids = models.text_ids(loaded[WITH], 2 * longest + 37 * max(BATCHES))
    measured = _measure(
        args,
        "prefill",
        {name: _prefill(model, ids[: args.prompt]) for name, model in loaded.items()},
    )
    running = {
        name: Decoding(model, DENSE, ids, max(BATCHES), args.context, args.steps)
        for name, model in loaded.items()
    }
    most = args.steps // len(BATCHES) - TRIAL_STEPS
    for rows in BATCHES:
        turns = {name: _decode(each, rows) for name, each in running.items()}
        measured += _measure(args, f"decode, batch {rows}", turns, most)
    return write(_report(args, loaded[WITH], measured), args.out)


def _prefill(model: ElasticModel, ids: list[int]) -> Callable[[], float]:
    def turn() -> float:
        request = model.sequence(DENSE, len(ids), len(ids))
        seconds = timed(model, lambda: model.step([Chunk(request, ids)]))
        request.release()
        return seconds

    return turn


def _decode(running: Decoding, rows: int) -> Callable[[], float]:
    return lambda: running.step(rows)


def _measure(
    args: argparse.Namespace,
    work: str,
    turns: Mapping[str, Callable[[], float]],
    most: int = 1_000_000,
) -> list[Measured]:
    taken = take_turns(turns, args.seconds, min(args.least, most), work, most, TRIAL_STEPS)
    return [
        Measured(
            work,
            name,
            Spread.of(taken[name]).scaled(1000),
            Interval.of(ratios(taken[name], taken[WITHOUT])),
        )
        for name in turns
    ]


# On paper.


def _report(args: argparse.Namespace, model: ElasticModel, measured: list[Measured]) -> Report:
    rows = [
        [
            each.work,
            each.model,
            told(each.milliseconds),
            f"{each.ratio.median:.4f} [{each.ratio.low:.4f}, {each.ratio.high:.4f}]",
            str(each.milliseconds.count),
        ]
        for each in measured
    ]
    columns = ("work", "model", "ms, median [quartiles]", "over no adapter [95 %]", "rounds")
    return Report(
        name="overhead",
        title=f"An adapter that nobody uses: {models.name_of(args)}",
        setting=machine.setting(model, args.command_line),
        parameters={
            "model": models.name_of(args),
            "seconds": args.seconds,
            "prompt_tokens": args.prompt,
            "context_tokens": args.context,
        },
        results=[asdict(each) for each in measured],
        tables=[Table("All requests at capacity 1.0", columns, rows)],
        notes=(
            "Three models take turns. The second one without an adapter shows how finely the "
            "machine can tell: a difference no larger than its own is none."
        ),
        draw=lambda figure: _draw(figure, measured),
        goals=[
            Goal(f"time over no adapter, {each.work}", 1.01, each.ratio.median, at_most=True)
            for each in measured
            if each.model == WITH
        ],
        size=(8, 3.6),
    )


def _draw(figure: Any, measured: Sequence[Measured]) -> None:
    axis = figure.subplots()
    works = list(dict.fromkeys(each.work for each in measured))
    for offset, (name, colour) in enumerate(((AGAIN, "0.6"), (WITH, "tab:blue"))):
        mine = [each.ratio for each in measured if each.model == name]
        places = [place + 0.25 * offset - 0.125 for place in range(len(works))]
        middles = [100 * (ratio.median - 1) for ratio in mine]
        errors = [
            [100 * (ratio.median - ratio.low) for ratio in mine],
            [100 * (ratio.high - ratio.median) for ratio in mine],
        ]
        axis.errorbar(places, middles, errors, fmt="o", capsize=4, color=colour, label=name)
    axis.axhline(0, color="0.5", linewidth=0.8)
    axis.axhline(1, color="tab:red", linewidth=0.8, linestyle="--", label="goal")
    axis.set_xticks(range(len(works)), works)
    axis.set(ylabel="slower than no adapter, %")
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize="small")
