"""What a plan looks like on paper: its tables, its notes and its picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks import machine, models
from benchmarks.check import Checked, Planned
from benchmarks.hold import ABOVE, BELOW
from benchmarks.results import Goal, Report, Table
from elastiformer import ElasticModel


def report(args: argparse.Namespace, model: ElasticModel, planned: Sequence[Planned]) -> Report:
    tables = [_step_table(each) for each in planned]
    tables.append(
        Table(
            "What this machine holds",
            ("requests", "HTTP and threads, factor", "requests/s with the promise", "at most"),
            [
                [each.mode, f"{each.overhead:.2f}", f"{each.rate:.2f}", f"{each.saturated:.2f}"]
                for each in planned
            ],
        )
    )
    if args.check:
        columns = (
            "requests",
            "sent /s",
            "sent",
            "finished",
            "on paper",
            "failed",
            "promise kept",
            "on paper",
            "first token, ms: median",
            "on paper",
        )
        rows = [_row(each.mode, point) for each in planned for point in each.checked]
        tables.append(Table(f"{args.check_seconds:g} seconds at each rate", columns, rows))
        headings = ("requests", "promise breaks at, /s", "on paper", "error")
        breaks = [
            [each.mode, *map(_told, (each.checked_rate, each.checked_rate_on_paper, each.error))]
            for each in planned
        ]
        tables.append(Table("Where the promise breaks", headings, breaks))
    if args.hold:
        tables += _held_tables(args, planned)
    return Report(
        name="planning",
        title=f"Requests per second, planned: {models.name_of(args)}",
        setting=machine.setting(model, args.command_line),
        parameters={
            "model": models.name_of(args),
            "seconds": args.seconds,
            "prompt_tokens": args.prompt,
            "new_tokens": args.tokens,
            "first_token_ms": args.first_token_ms,
            "between_tokens_ms": args.between_tokens_ms,
            "share": args.share,
            "check_seconds": args.check_seconds if args.check else None,
            "hold_seconds": args.hold_seconds if args.hold else None,
            "hold_warm_up_seconds": args.hold_warm_up if args.hold else None,
        },
        results={"planned": [asdict(each) for each in planned]},
        tables=tables,
        notes=(
            f"Each request: {args.prompt} prompt tokens, {args.tokens} new ones. The promise: for "
            f"{args.share:.0%} of the requests the first token within {args.first_token_ms:g} ms, "
            f"the others {args.between_tokens_ms:g} ms apart or less on average. Steps are medians "
            "in this process; HTTP and threads make each longer by the factor of its mix"
            + (
                f", {args.overhead:g}."
                if args.overhead
                else ", fitted to requests over HTTP at half the rate of the last column."
            )
            + " Arrivals are random and wait for nobody."
            + (
                " Held for long: counted are requests that come after the warm-up; who has no "
                "answer when it could no longer be in time was not served in time. What is held "
                "lies between the two rates of its row."
                if args.hold
                else ""
            )
        ),
        draw=lambda figure: _draw(figure, planned, args.share),
        goals=_goals(args, planned),
        size=(13, 3.6),
    )


def _goals(args: argparse.Namespace, planned: Sequence[Planned]) -> list[Goal]:
    goals = []
    if args.check:
        goals += [
            Goal(f"planned over measured rate, error, {each.mode}", 0.15, each.error, at_most=True)
            for each in planned
        ]
    for each in planned:
        for held in each.held:
            if held.part not in (BELOW, ABOVE):
                continue
            above = held.part > 1
            what = f"{held.part:g} of the planned rate for long, share in time, {each.mode}"
            # To break it, the share must be below: as near as a bound that may be reached gets.
            wanted = args.share - 0.001 if above else args.share
            goals.append(Goal(what, wanted, held.kept, at_most=above))
    return goals


def _held_tables(args: argparse.Namespace, planned: Sequence[Planned]) -> list[Table]:
    columns = (
        "requests",
        "of the plan",
        "sent /s",
        "sent",
        "finished",
        "failed",
        "promise kept",
        "on paper",
        "first token, ms: median",
    )
    rows = [
        [
            each.mode,
            f"{held.part:.3g}",
            f"{held.rate:.2f}",
            str(held.sent),
            str(held.finished),
            str(held.failed),
            f"{held.kept:.2f}",
            f"{held.kept_on_paper:.2f}",
            "" if held.first_token_ms is None else f"{held.first_token_ms:.0f}",
        ]
        for each in planned
        for held in each.held
    ]
    title = f"For long: {args.hold_seconds:g} seconds after {args.hold_warm_up:g} at each rate"
    headings = ("requests", "planned, /s", "held at, of it", "not held at, of it", "within 15 %")
    verdicts = []
    for each in planned:
        most, least = each.held_parts(args.share)
        right = most is not None and most >= BELOW and least is not None and least <= ABOVE
        verdicts.append(
            [each.mode, f"{each.rate:.2f}", _told(most), _told(least), "yes" if right else "no"]
        )
    return [Table(title, columns, rows), Table("What is held for long", headings, verdicts)]


def _step_table(planned: Planned) -> Table:
    times = planned.times
    return Table(
        f"Steps, {planned.mode}, ms",
        ("rows that decode", *(f"{each} prompt tokens" for each in times.tokens)),
        [
            [str(rows), *(f"{1000 * seconds:.1f}" for seconds in line)]
            for rows, line in zip(times.rows, times.seconds, strict=True)
        ],
    )


def _row(mode: str, point: Checked) -> list[str]:
    return [
        mode,
        f"{point.rate:.2f}",
        str(point.sent),
        str(point.finished),
        str(point.finished_on_paper),
        str(point.failed),
        f"{point.kept:.2f}",
        f"{point.kept_on_paper:.2f}",
        "" if point.first_token_ms is None else f"{point.first_token_ms:.0f}",
        "" if point.first_token_ms_on_paper is None else f"{point.first_token_ms_on_paper:.0f}",
    ]


def _told(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _draw(figure: Any, planned: Sequence[Planned], share: float) -> None:
    axes = figure.subplots(1, len(planned), sharey=True, squeeze=False)[0]
    for axis, each in zip(axes, planned, strict=True):
        at = [point.rate for point in each.checked]
        axis.plot(at, [point.kept for point in each.checked], "o-", label="measured")
        axis.plot(at, [point.kept_on_paper for point in each.checked], "x--", label="on paper")
        if each.held:
            axis.plot(
                [held.rate for held in each.held],
                [held.kept for held in each.held],
                "s",
                color="tab:green",
                label="measured, for long",
            )
        axis.axvline(each.rate, color="0.6", label="planned for good")
        axis.axhline(share, color="0.85")
        axis.set(title=each.mode, xlabel="requests per second", ylim=(0, 1.05))
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share that gets the promise")
    figure.axes[0].legend(fontsize="small")
