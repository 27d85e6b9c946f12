"""A server under load, and what HTTP and scheduling cost.

Starts `python -m service` on a free loopback port. First sixteen streams over HTTP take turns with
the same sixteen sequences driven in this process, step by step: the difference is the cost of HTTP
and scheduling, this client's own reading included. Then requests are sent at random moments (open
loop) at rates up to and past saturation: all at capacity 1.0, all at 0.6, mixed, and all as the
server chooses by its load.

With --guidellm, that load generator also sends those of one capacity, at the same moments, so that
one can be held against the other. GuideLLM lives in an environment of its own:

    python -m venv guidellm && guidellm/bin/pip install guidellm==0.8.1

Takes `--http-seconds`, and `--seconds` for each of four modes and four rates: some nine minutes
in all on two cores with the default model; with --guidellm some ten more.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks import guidellm, machine, models, server
from benchmarks.results import Goal, Report, Table, told, write
from benchmarks.runs import feed_prompts, timed
from benchmarks.sender import Phase, Sender, at_once
from benchmarks.simulation import moments
from benchmarks.timing import Spread, ratios, take_turns
from elastiformer import DENSE, Chunk, ElasticModel
from elastiformer.sampling import GREEDY, Draw, sample
from training.options import real, whole
from training.progress import track

MODES: dict[str, tuple[object, ...]] = {
    "all at 1.0": (1.0,),
    "all at 0.6": (0.6,),
    "mixed 1.0, 0.8, 0.6": (1.0, 0.8, 0.6),
}
SENT: dict[str, tuple[object, ...]] = MODES | {"all auto": ("auto",)}
UNIFORM = [mode for mode, capacities in MODES.items() if len(capacities) == 1]
LOADS = (0.3, 0.6, 0.9, 1.2)  # of the rate at which the server is saturated
PERCENTILES = (50, 95, 99)
IN_PROCESS, OVER_HTTP = "in process", "over HTTP"
OURS, GUIDELLM = "ours", "GuideLLM"  # who sends


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_model_arguments(parser)
    parser.add_argument("--guidellm", help="program that shall send what is of one capacity, too")
    parser.add_argument("--no-load", action="store_true", help="only the cost of HTTP")
    parser.add_argument("--seconds", type=real(above=0), default=25.0, help="at each rate")
    parser.add_argument(
        "--rates", type=_rates, help="requests per second, such as 1,2,4; unset: measured"
    )
    parser.add_argument("--http-seconds", type=real(least=0), default=60.0, help="of taking turns")
    parser.add_argument("--streams", type=whole(1), default=16, help="sequences over HTTP at once")
    parser.add_argument("--prompt", type=whole(2), default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=whole(2), default=32, help="new tokens of each request")
    parser.add_argument(
        "--first-token-ms", type=real(above=0), default=2000.0, help="goodput: at most so long"
    )
    parser.add_argument(
        "--between-tokens-ms", type=real(above=0), default=250.0, help="goodput: at most so long"
    )


@dataclass(frozen=True, slots=True)
class HttpCost:
    """The same sequences, over HTTP and in process."""

    streams: int
    tokens: int  # generated in one turn
    in_process_seconds: Spread
    http_seconds: Spread
    share: Spread  # of the time in process, that HTTP and scheduling add; within a round
    milliseconds_per_token: float


@dataclass(frozen=True, slots=True)
class Point:
    """One mode at one rate; times in milliseconds at 50, 95 and 99 %."""

    sender: str
    mode: str
    asked_per_second: float
    seconds: float
    sent: int
    finished: int
    failed: int
    output_tokens_per_second: float
    goodput_per_second: float
    capacity_spent: float | None  # of finished requests, the mean; None where none tells
    first_token_ms: tuple[float, ...] | None
    between_tokens_ms: tuple[float, ...] | None


def run(args: argparse.Namespace) -> dict[str, Any]:
    program = guidellm.find(args.guidellm) if args.guidellm else None
    model = models.load(args)
    if program and model.tokenizer is None:
        raise guidellm.LoadError(f"guidellm sends texts; {args.base} has no tokenizer to make them")
    adapter = models.adapter_of(args)
    with server.running(args.base, adapter, args.dtype, args.device, args.threads) as place:
        cost = _http_cost(args, model, place.address)
        points = [] if args.no_load else _loaded(args, model, place.address, program)
    return write(_report(args, model, cost, points), args.out)


def _rates(text: str) -> list[float]:
    return [real(above=0)(each) for each in text.split(",")]


# HTTP and scheduling.


def _http_cost(args: argparse.Namespace, model: ElasticModel, address: str) -> HttpCost:
    ids = models.text_ids(model, 4096 + args.prompt)
    rounds = {IN_PROCESS: 0, OVER_HTTP: 0}

    def prompts(way: str) -> list[list[int]]:
        """Of each round others, so that no prefix is known to the server; of both ways the same."""
        first = args.streams * rounds[way]
        rounds[way] += 1
        starts = [(first + at) * 3 % 4096 for at in range(args.streams)]
        return [ids[start : start + args.prompt] for start in starts]

    taken = take_turns(
        {
            IN_PROCESS: lambda: _in_process(model, prompts(IN_PROCESS), args.tokens),
            OVER_HTTP: lambda: asyncio.run(
                at_once(address, prompts(OVER_HTTP), args.tokens, (1.0,))
            ),
        },
        args.http_seconds,
        least=2,
        label="HTTP against in process",
    )
    tokens = args.streams * args.tokens
    over, inside = Spread.of(taken[OVER_HTTP]), Spread.of(taken[IN_PROCESS])
    return HttpCost(
        streams=args.streams,
        tokens=tokens,
        in_process_seconds=inside,
        http_seconds=over,
        share=Spread.of([ratio - 1 for ratio in ratios(taken[OVER_HTTP], taken[IN_PROCESS])]),
        milliseconds_per_token=1000 * (over.median - inside.median) / tokens,
    )


def _in_process(model: ElasticModel, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    requests = [model.sequence(DENSE, len(ids), len(ids) + tokens) for ids in prompts]
    draws = [Draw(GREEDY, GREEDY.generator()) for _ in prompts]

    def work() -> None:
        last = feed_prompts(model, requests, prompts)
        for _ in range(tokens - 1):
            drawn = sample(torch.stack(last), draws)
            chunks = [Chunk(r, [each.token]) for r, each in zip(requests, drawn, strict=True)]
            last = [rows_RV[-1] for rows_RV in model.step(chunks)]
        sample(torch.stack(last), draws)

    seconds = timed(model, work)
    for request in requests:
        request.release()
    return seconds


# Load.


def _loaded(
    args: argparse.Namespace, model: ElasticModel, address: str, program: str | None
) -> list[Point]:
    ids = models.text_ids(model, 4096 + args.prompt)
    sender = Sender(address, ids, count(1, 3), args.prompt, args.tokens)
    rates = args.rates
    if rates is None:
        streams = 4 * args.streams  # most of the time as many as run at once
        most = streams / sender.at_once(streams, (1.0,))
        rates = [round(most * part, 2) for part in LOADS]
    points = []
    for mode, rate in track([(mode, rate) for mode in SENT for rate in rates], label="load"):
        at = moments(rate, args.seconds, rates.index(rate))
        points.append(_point(args, OURS, mode, rate, sender.at(at, SENT[mode], args.seconds)))
    if program is None:
        return points
    assert model.tokenizer is not None, "checked before"
    plans = [(mode, rate) for mode in UNIFORM for rate in rates]
    with tempfile.TemporaryDirectory() as folder:
        for mode, rate in track(plans, label=GUIDELLM):
            at = moments(rate, args.seconds, rates.index(rate))
            dues = sender.dues(at, MODES[mode])
            phase = guidellm.replay(
                program, address, model.tokenizer, dues, args.tokens, args.seconds, Path(folder)
            )
            points.append(_point(args, GUIDELLM, mode, rate, phase))
    return points


def _point(args: argparse.Namespace, sender: str, mode: str, rate: float, phase: Phase) -> Point:
    finished = phase.finished
    first = [1000 * s for each in phase.requests if (s := each.to_first_token) is not None]
    spent = [each.spent for each in finished if each.spent is not None]
    between = [1000 * s for each in finished if (s := each.between_tokens) is not None]
    good = [
        each
        for each in finished
        if 1000 * (each.to_first_token or 0) <= args.first_token_ms
        and 1000 * (each.between_tokens or 0) <= args.between_tokens_ms
    ]
    seconds = max(phase.seconds, 1e-9)
    return Point(
        sender=sender,
        mode=mode,
        asked_per_second=rate,
        seconds=phase.seconds,
        sent=len(phase.requests),
        finished=len(finished),
        failed=sum(each.failed for each in phase.requests),
        output_tokens_per_second=sum(each.output_tokens for each in finished) / seconds,
        goodput_per_second=len(good) / seconds,
        capacity_spent=fmean(spent) if spent else None,
        first_token_ms=percentiles(first),
        between_tokens_ms=percentiles(between),
    )


def percentiles(values: Sequence[float]) -> tuple[float, ...] | None:
    """By nearest rank, so that each is one that was seen."""
    if not values:
        return None
    ordered = sorted(values)
    return tuple(ordered[max(0, -(-len(ordered) * p // 100) - 1)] for p in PERCENTILES)


# On paper.


def _report(
    args: argparse.Namespace, model: ElasticModel, cost: HttpCost, points: Sequence[Point]
) -> Report:
    shares = f"{cost.share.median:.1%} [{cost.share.lower:.1%}, {cost.share.upper:.1%}]"
    tables = [
        Table(
            f"HTTP and scheduling, {cost.streams} streams",
            ("in process, s", "over HTTP, s", "added", "ms per token"),
            [
                [
                    told(cost.in_process_seconds),
                    told(cost.http_seconds),
                    shares,
                    f"{cost.milliseconds_per_token:.3f}",
                ]
            ],
        )
    ]
    if points:
        columns = (
            "requests",
            "asked /s",
            "sent",
            "finished",
            "failed",
            "tokens/s",
            "goodput /s",
            "spent",
            "first token, ms: p50 / p95 / p99",
            "between tokens, ms: p50 / p95 / p99",
        )
        rows = [_row(point) for point in points if point.sender == OURS]
        tables.append(Table("Under load", columns, rows))
        if args.guidellm:
            columns = ("sent by", *columns[1:])
            for mode in UNIFORM:
                rows = [[point.sender, *_row(point)[1:]] for point in _sent_by_both(points, mode)]
                tables.append(Table(f"By both, {mode}", columns, rows))
    return Report(
        name="serving",
        title=f"A server under load: {models.name_of(args)}",
        setting=machine.setting(model, args.command_line),
        parameters={
            "model": models.name_of(args),
            "seconds": args.seconds,
            "prompt_tokens": args.prompt,
            "new_tokens": args.tokens,
            "first_token_ms": args.first_token_ms,
            "between_tokens_ms": args.between_tokens_ms,
        },
        results={"http": asdict(cost), "load": [asdict(point) for point in points]},
        tables=tables,
        notes=(
            f"Each request: {args.prompt} prompt tokens, {args.tokens} new ones, streamed. "
            "Arrivals are random and do not wait for answers. Goodput counts requests whose first "
            f"token came within {args.first_token_ms:g} ms and whose tokens followed each other "
            f"within {args.between_tokens_ms:g} ms on average. Times between tokens are means of "
            "a request. What is not answered when the time is over is cut off. Who sends shares "
            "the machine with the server."
        ),
        draw=lambda figure: _draw(figure, cost, points),
        goals=[
            Goal(
                f"HTTP and scheduling over engine time, {cost.streams} streams",
                0.05,
                cost.share.median,
                at_most=True,
            )
        ],
        size=(13, 4),
    )


def _sent_by_both(points: Sequence[Point], mode: str) -> list[Point]:
    """At each rate one beside the other."""
    mine = [point for point in points if point.mode == mode]
    return sorted(mine, key=lambda point: point.asked_per_second)


def _row(point: Point) -> list[str]:
    return [
        point.mode,
        f"{point.asked_per_second:.2f}",
        str(point.sent),
        str(point.finished),
        str(point.failed),
        f"{point.output_tokens_per_second:.1f}",
        f"{point.goodput_per_second:.2f}",
        "" if point.capacity_spent is None else f"{point.capacity_spent:.2f}",
        _three(point.first_token_ms),
        _three(point.between_tokens_ms),
    ]


def _three(values: Sequence[float] | None) -> str:
    return "" if values is None else " / ".join(f"{value:.0f}" for value in values)


def _draw(figure: Any, cost: HttpCost, points: Sequence[Point]) -> None:
    left, *others = figure.subplots(1, 4)
    seconds = [cost.in_process_seconds.median, cost.http_seconds.median]
    bars = left.bar([IN_PROCESS, OVER_HTTP], seconds, color=["0.7", "tab:blue"])
    left.bar_label(bars, fmt="%.2f s")
    left.set(title=f"{cost.streams} streams, the same work", ylabel="seconds")
    panels: dict[str, list[float | None]] = {
        "goodput, requests/s": [point.goodput_per_second for point in points],
        "p95 to the first token, ms": [_p95(point.first_token_ms) for point in points],
        "p95 between tokens, ms": [_p95(point.between_tokens_ms) for point in points],
    }
    for axis, (title, values) in zip(others, panels.items(), strict=True):
        for mode in SENT:
            mine = [
                (point.asked_per_second, value)
                for point, value in zip(points, values, strict=True)
                if (point.sender, point.mode) == (OURS, mode) and value is not None
            ]
            axis.plot([at for at, _ in mine], [value for _, value in mine], "o-", label=mode)
        axis.set(title=title, xlabel="requests asked per second")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    if points:
        others[0].legend(fontsize="small")


def _p95(values: Sequence[float] | None) -> float | None:
    return None if values is None else values[PERCENTILES.index(95)]
