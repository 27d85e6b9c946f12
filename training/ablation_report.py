"""An ablation on paper: what each row loses beside the one it differs from, window by window.

The same windows stand under every row, so a difference is judged by its own standard error over
windows, which is far smaller than that of either loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from training.ablation_rows import (
    AS_MANY_FOR_EACH,
    AS_SHIPPED,
    ENDING_AS_SHIPPED,
    EndingRow,
    LeavingRow,
    OutputRow,
    Row,
)
from training.files import write_atomically, write_json
from training.pictures import draw_rows
from training.reports import digits, table

FAR = 2.0  # times the loss
CLEAR = 2.0  # standard errors between two rows, to be called different
REFERENCES: dict[type[Row], str] = {OutputRow: AS_MANY_FOR_EACH, EndingRow: ENDING_AS_SHIPPED}


@dataclass(frozen=True, slots=True)
class Point:
    """What one row loses on one text; KL in nats per token, of each window."""

    text: str
    capacity: float | None  # None: the row is a plan by itself
    spent: float  # of the block FLOPs of a window
    kl_by_window: tuple[float, ...]

    @property
    def kl(self) -> float:
        return fmean(self.kl_by_window)

    @property
    def kl_error(self) -> float | None:
        return error(self.kl_by_window)

    @property
    def place(self) -> tuple[str, float | None]:
        return self.text, self.capacity


@dataclass(frozen=True, slots=True)
class Ablation:
    """All that one study found: of each row that was measured, its points."""

    about: Mapping[str, Any]
    rows: Sequence[tuple[Row, tuple[Point, ...]]]

    def kind(self, kind: type[Row]) -> list[tuple[Row, dict[tuple[str, float | None], Point]]]:
        """The rows of one kind, with their points by (text, capacity)."""
        return [
            (row, {point.place: point for point in points})
            for row, points in self.rows
            if isinstance(row, kind)
        ]

    def reference(self, row: Row) -> dict[tuple[str, float | None], Point]:
        """The points of the row that a row differs from in one decision; none of a plan."""
        name = REFERENCES.get(type(row))
        return {
            point.place: point
            for other, points in self.rows
            if other.name == name
            for point in points
        }


def error(values: Sequence[float]) -> float | None:
    """The standard error of their mean; None of one value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def beyond(point: Point, reference: Point) -> tuple[float, float | None]:
    """The mean of what a row loses beyond the other on the same windows, and its error."""
    pairs = zip(point.kl_by_window, reference.kl_by_window, strict=True)
    differences = [here - there for here, there in pairs]
    return fmean(differences), error(differences)


def sentences(found: Ablation) -> Iterator[str]:
    """Which rows clearly lose less, or more, than the one they differ from."""
    for kind, title in ((OutputRow, "Every token scored"), (EndingRow, "Prompt routed")):
        rows = found.kind(kind)
        for place in dict.fromkeys(place for _, points in rows for place in points):
            less: list[Row] = []
            more: list[Row] = []
            alike: list[Row] = []
            for row, points in rows:
                there = found.reference(row).get(place)
                if place not in points or there is None or row.name == REFERENCES[kind]:
                    continue
                by, of = beyond(points[place], there)
                clear = of is not None and abs(by) > CLEAR * of
                (alike if not clear else less if by < 0 else more).append(row)
            if less or more or alike:
                said = ", ".join(f"`{row.name}`" for row in less) or "none"
                yield (
                    f"{title}, {place[0]}, {place[1]:g}: clearly less than `{REFERENCES[kind]}` "
                    f"lose {said}; rows that lose clearly more: {len(more)}, neither: {len(alike)}."
                )


def write_ablation(folder: Path, found: Ablation) -> list[str]:
    """The names of the files written, report.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    files = ["report.md", "report.json"]
    if panels := _panels(found):
        draw_rows(folder / "ablation.png", panels, "KL over that of the row they differ from")
        files.insert(0, "ablation.png")
    write_atomically(folder / "report.md", _markdown(found, files[0] == "ablation.png").encode())
    write_json(
        folder / "report.json",
        {
            "about": dict(found.about),
            "sentences": list(sentences(found)),
            "rows": [
                {
                    "name": row.name,
                    "decision": row.decision,
                    "says": row.says,
                    "points": [_as_json(point, found.reference(row)) for point in points],
                }
                for row, points in found.rows
            ],
        },
    )
    return files


def _as_json(point: Point, reference: Mapping[Any, Point]) -> dict[str, Any]:
    said = asdict(point) | {"kl": point.kl, "kl_error": point.kl_error}
    if point.place in reference:
        by, of = beyond(point, reference[point.place])
        said |= {"beyond_reference": by, "beyond_reference_error": of}
    return said


def _panels(found: Ablation) -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
    """KL over the reference's, with the error of the difference, by panel, row and place.

    Rows that lose far more have a panel of their own: near 1 small differences are to be seen.
    """
    panels: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for kind, title in ((OutputRow, "every token scored"), (EndingRow, "prompt routed")):
        for row, points in found.kind(kind):
            cells: dict[str, tuple[float, float]] = {}
            for place, there in found.reference(row).items():
                if place in points and there.kl > 0 and points[place].kl > 0:
                    _, of = beyond(points[place], there)
                    ratio = points[place].kl / there.kl
                    cells[f"{place[0]}, {place[1]:g}"] = ratio, (of or 0.0) / there.kl
            if cells:
                far = max(ratio for ratio, _ in cells.values()) > FAR
                panel = f"{title}: far more" if far and kind is OutputRow else title
                panels.setdefault(panel, {})[row.name] = cells
    return panels


def _markdown(found: Ablation, drawn: bool) -> str:
    about = found.about
    lines = [f"# What each choice is worth: {about['base']['id']}", "", *_prose(about), ""]
    lines += [*(f"- {sentence}" for sentence in sentences(found)), ""]
    if drawn:
        lines += ["![KL over that of the row they differ from](ablation.png)", ""]
    lines += tables(found)
    return "\n".join([*lines, ""])


def tables(found: Ablation) -> list[str]:
    """One section for each kind of row that was measured."""
    lines: list[str] = []
    for kind, title in (
        (OutputRow, "Outputs: every token scored"),
        (EndingRow, "Prompts: how many of the last tokens run whole"),
    ):
        rows = found.kind(kind)
        places = list(dict.fromkeys(place for _, points in rows for place in points))
        if not rows:
            continue
        heads = ["decision", "row", "", *(f"{text}, {capacity:g}" for text, capacity in places)]
        cells = [
            [row.decision, f"`{row.name}`", row.says]
            + [_beside(points.get(place), found.reference(row).get(place)) for place in places]
            for row, points in rows
        ]
        lines += [f"## {title}", "", *table(heads, cells), ""]
    plans = [(row, points) for row, points in found.rows if isinstance(row, LeavingRow)]
    if plans:
        texts = list(dict.fromkeys(point.text for _, points in plans for point in points))
        cells = [
            [row.decision, f"`{row.name}`", row.says, f"{points[0].spent:.3f}"]
            + [_with_error(point.kl, point.kl_error) for point in points]
            for row, points in plans
        ]
        heads = ["plan", "row", "", "share spent", *texts]
        lines += ["## Prompts: what is left out", "", *table(heads, cells), ""]
    return lines


def _prose(about: Mapping[str, Any]) -> list[str]:
    on, learnt = about["measured_on"], about["learnt_on"]
    return [
        f"{about['base']['id']} with the adapter {about['adapter'][:12]}, {about['dtype']}, in "
        f"the masked form. {on['windows']} windows of {on['window_tokens']} tokens of {on['name']} "
        f"(sha256 {on['sha256'][:12]}), {on['prompt_tokens']} of them prompt; *copied*: the "
        "continuation repeats the prompt's beginning. What rows learn, they learn from "
        f"{learnt['windows']} windows of {learnt['window_tokens']} tokens of {learnt['name']} "
        f"(sha256 {learnt['sha256'][:12]}), seed {about['seed']}. KL to the full model in nats per "
        "token; in brackets the standard error over windows; behind the slash what a row loses "
        "beyond the one it differs from in one decision, on the same windows, with the error of "
        f"that. *Clearly*: by more than {CLEAR:g} of those. Of outputs that is "
        f"`{AS_MANY_FOR_EACH}`, of prompts' last tokens `{ENDING_AS_SHIPPED}`. Rows that are "
        f"compared spend the same block FLOPs, to {about['equal']:g}: counted from what each token "
        "kept; *out of reach*: this row cannot leave out so much. "
        f"Only `{AS_SHIPPED}` spends as nearly the same as debts are paid back.",
        "",
        "```bash",
        str(about["command"]),
        "```",
    ]


def _beside(point: Point | None, reference: Point | None) -> str:
    if point is None:
        return "out of reach"
    cell = _with_error(point.kl, point.kl_error)
    if reference is None or reference is point:
        return cell
    by, of = beyond(point, reference)
    return f"{cell} / {'+' if by >= 0 else '-'}{_with_error(abs(by), of)}"


def _with_error(value: float, of: float | None) -> str:
    return digits(value) + ("" if of is None else f" ({digits(of, 2)})")
