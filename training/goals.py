"""What was wanted of an adapter beside what a report found, written into documents.

    python -m training goals --report DIR --goals FILE.json --into FILE.md FILE.md

Reads DIR/report.json as `evaluate` wrote it. In each document, what stands between the lines
`<!-- report: begin -->` and `<!-- report: end -->`, and between those of `goals`, is written anew;
all else stays. No number in these tables is typed by hand.

FILE.json is a list of objects: `what`, in words; `setting` and `value`, as in the report's rows;
`at_most`, the bound for each capacity; and perhaps `over`, names of baselines, the best of which
the value is divided by.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.baselines import DROP, LAST, STATIC
from training.files import DataError, write_atomically
from training.quality import Setting
from training.reports import table
from training.summarize import OURS, Json, of, read, sets

STATIC_ONES = (DROP, LAST, STATIC)  # they keep the same for every token


@dataclass(frozen=True, slots=True)
class Goal:
    """One thing that was wanted at some capacities."""

    what: str
    setting: Setting
    value: str
    at_most: Mapping[float, float]
    over: tuple[str, ...] = ()  # baselines; none: the value itself counts

    def got(self, report: Json, capacity: float) -> float | None:
        """None where the report lacks it."""
        row = of(report, OURS, capacity, self.setting)
        if row is None or not self.over:
            return None if row is None else _number(row, self.value)
        best = best_of(report, self.over, capacity, self.setting, self.value)
        return None if best is None else _number(row, self.value) / _number(best[1], self.value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--report", required=True, type=Path, help="folder that `evaluate` wrote")
    add("--goals", required=True, type=Path, help="FILE.json")
    add("--into", required=True, nargs="+", type=Path, help="documents")


def run(args: argparse.Namespace) -> dict[str, Any]:
    report, goals = read(args.report), goals_in(args.goals)
    parts = {"report": report_table(report), "goals": goals_table(report, goals)}
    texts = {path: rewritten(path, parts) for path in args.into}
    for path, text in texts.items():
        write_atomically(path, text.encode())
    verdicts = [reached for goal in goals for _, _, reached in _verdicts(report, goal)]
    return {
        "into": [str(path) for path in args.into],
        "reached": sum(each is True for each in verdicts),
        "missed": sum(each is False for each in verdicts),
        "not_measured": sum(each is None for each in verdicts),
    }


def goals_in(path: Path) -> list[Goal]:
    """Read the goals.

    Raises:
        DataError: it is no such file, or what it holds is none.
    """
    try:
        return [
            Goal(
                what=str(each["what"]),
                setting=Setting(each["setting"]),
                value=str(each["value"]),
                at_most={float(at): float(bound) for at, bound in each["at_most"].items()},
                over=tuple(each.get("over", ())),
            )
            for each in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: holds no goals: {type(error).__name__}: {error}") from error


def rewritten(path: Path, parts: Mapping[str, Sequence[str]]) -> str:
    """A document with its marked parts made anew.

    Raises:
        DataError: it marks none of them.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    marked = 0
    for name, lines in parts.items():
        begin, end = (f"<!-- {name}: {which} -->\n" for which in ("begin", "end"))
        before, found, rest = text.partition(begin)
        if found:
            _, closed, after = rest.partition(end)
            if not closed:
                raise DataError(f"{path}: {begin.strip()} has no end")
            text = before + begin + "\n".join(lines) + "\n" + end + after
            marked += 1
    if not marked:
        raise DataError(f"{path}: marks no part: <!-- report: begin --> or <!-- goals: begin -->")
    return text


def report_table(report: Json) -> list[str]:
    """One line for each capacity: the few numbers that stand for the report."""
    capacities = [row["capacity"] for row in report["ours"] if row["setting"] == Setting.BOTH]
    greedy = {row["capacity"]: row for row in report["greedy"]}
    beside = [name for name in sets(report) if name != OURS]
    static = [name for name in beside if name.removeprefix("repaired ") in STATIC_ONES]
    rows = []
    for capacity in capacities:
        prompt, both, scored = (_row(report, capacity, setting) for setting in Setting)
        guessed = (both["cloze"], both["cloze_whole"])
        agreeing = greedy.get(capacity)
        rows.append(
            [
                f"{capacity:g}",
                f"{both['spent']:.3f}",
                *(f"{abs(row['kl']):.3f}" for row in (prompt, both, scored)),
                f"{scored['perplexity_ratio']:.3f}",
                f"{both['same_top']:.3f}",
                "" if None in guessed else "{:.3f} ({:.3f})".format(*guessed),
                "" if agreeing is None else f"{agreeing['agreement']:.2f}",
                *(_best(report, names, capacity) for names in (beside, static)),
            ]
        )
    tokens = {row["tokens"] for row in report["greedy"]}
    heads = ["capacity", "spent", "KL, prompt routed", "KL, both routed", "KL, every token scored"]
    heads += ["perplexity / full", "same likeliest token, both routed", "cloze (full), both routed"]
    heads += [f"greedy tokens agreeing, of {max(tokens)}" if tokens else "greedy tokens agreeing"]
    heads += ["best baseline's KL, both routed", "best static baseline's"]
    return table(heads, rows)


def goals_table(report: Json, goals: Sequence[Goal]) -> list[str]:
    """One line for each goal, one column for each capacity."""
    capacities = list(dict.fromkeys(at for goal in goals for at in goal.at_most))
    rows = []
    for goal in goals:
        cells = {
            capacity: f"{'not measured' if got is None else _shown(got, reached)}, "
            f"{goal.at_most[capacity]:g}"
            for capacity, got, reached in _verdicts(report, goal)
        }
        rows.append([goal.what, *(cells.get(capacity, "") for capacity in capacities)])
    heads = ["got (bold: reached), at most", *(f"{each:g}" for each in capacities)]
    return table(heads, rows)


def best_of(
    report: Json, names: Sequence[str], capacity: float, setting: Setting, value: str
) -> tuple[str, Json] | None:
    """The baseline of the least value, and its row."""
    found = [
        (name, row) for name in names if (row := of(report, name, capacity, setting)) is not None
    ]
    return min(found, key=lambda each: _number(each[1], value), default=None)


def _best(report: Json, names: Sequence[str], capacity: float) -> str:
    best = best_of(report, names, capacity, Setting.BOTH, "kl")
    return "" if best is None else f"{best[1]['kl']:.3f} ({best[0]})"


def _row(report: Json, capacity: float, setting: Setting) -> Json:
    row = of(report, OURS, capacity, setting)
    if row is None:
        raise DataError(f"the report has no row of capacity {capacity:g}, {setting}")
    return row


def _verdicts(report: Json, goal: Goal) -> Iterator[tuple[float, float | None, bool | None]]:
    """Capacity, what was got there, and whether that is enough."""
    for capacity, bound in goal.at_most.items():
        got = goal.got(report, capacity)
        yield capacity, got, None if got is None else got <= bound


def _number(row: Json, name: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"a goal's value: a number in the report's rows; {name!r} is {value!r}")
    return float(value)


def _shown(got: float, reached: bool | None) -> str:
    return f"**{got:.3f}**" if reached else f"{got:.3f}"
