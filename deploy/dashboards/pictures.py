"""The dashboards as pictures, where no Grafana is at hand: the same queries on the same grid.

matplotlib is loaded only when something is drawn.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from deploy.dashboards.panels import WIDTH, Board, Kind, Panel, Place, Row, Scale, placed
from deploy.dashboards.prometheus import Course, Prometheus
from deploy.dashboards.queries import VARIABLES, Window

_COLUMN_INCHES, _LINE_INCHES, _DOTS_PER_INCH = 0.6, 0.36, 80
_POINTS = 240  # of a line, at most
_TICK_SECONDS = (10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600)
_COLOURS = 256  # of a file: a third of the size that true colour takes
_INK, _FAINT, _GREEN, _RED = "#24292e", "#8a9199", "#1a7f37", "#c4162a"
_LINES = (
    "#3274d9",
    "#e0752d",
    "#56a64b",
    "#a352cc",
    "#e02f44",
    "#d9a300",
    "#12939a",
    "#7a5c3e",
    "#8a9199",
    "#f2495c",
)


@dataclass(frozen=True, slots=True)
class Span:
    """The time shown, and what Grafana would make of it."""

    start: float
    end: float
    step_seconds: float
    rate_seconds: int

    @classmethod
    def until(cls, end: float, seconds: float, scrape_seconds: float) -> Span:
        """As Grafana chooses a step, and a window in which every rate has its two scrapes."""
        step = max(math.ceil(seconds / _POINTS), scrape_seconds)
        rate = math.ceil(max(step + scrape_seconds, 4 * scrape_seconds))
        return cls(end - seconds, end, step, rate)

    def window(self, prometheus: Prometheus) -> Window:
        """Every variable on "All": the values that the label had in this time."""
        window = Window(round(self.end - self.start), self.rate_seconds, {})
        for variable in VARIABLES:
            among = window.filled(variable.among)
            values = prometheus.values(variable.label, among, self.start, self.end)
            chosen = {**window.chosen, variable.name: values}
            window = Window(window.range_seconds, window.rate_seconds, chosen)
        return window


@dataclass(frozen=True, slots=True)
class Answer:
    """One series of a panel under its legend."""

    name: str
    course: Course


def answers(panel: Panel, prometheus: Prometheus, span: Span, window: Window) -> list[Answer]:
    """Ask what a panel asks. Raises PrometheusError."""
    found = []
    for query in panel.queries:
        expr = window.filled(query.expr)
        if panel.kind.is_instant:
            courses = prometheus.now(expr, span.end)
        else:
            courses = prometheus.over(expr, span.start, span.end, span.step_seconds)
        found += [Answer(_named(query.legend, course.labels), course) for course in courses]
    return found


def draw(board: Board, prometheus: Prometheus, span: Span) -> bytes:
    """A PNG of the whole dashboard. Raises PrometheusError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    window = span.window(prometheus)

    def is_there(row: Row) -> bool:
        return not row.may_lack or any(
            answer.course.says_something
            for panel in row.panels
            for answer in answers(panel, prometheus, span, window)
        )

    things = list(placed(replace(board, rows=tuple(filter(is_there, board.rows)))))
    lines = max(place.y + place.height for _, place in things) + 2
    size = (WIDTH * _COLUMN_INCHES, lines * _LINE_INCHES)
    style = {"font.size": 8.5, "axes.edgecolor": _FAINT, "text.color": _INK}
    with matplotlib.rc_context(style):
        figure = pyplot.figure(figsize=size, dpi=_DOTS_PER_INCH, facecolor="#f4f5f5")
        canvas = _Canvas(figure, lines)
        canvas.heading(board.title, _when(span))
        for thing, place in things:
            if isinstance(thing, Row):
                canvas.row(thing.title, place)
            else:
                axes = canvas.panel(thing, place)
                _show(axes, thing, answers(thing, prometheus, span, window), span)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
        pyplot.close(figure)
    return _small(drawn)


class _Canvas:
    """A figure on which places of the grid become boxes."""

    def __init__(self, figure: Any, lines: int) -> None:
        self._figure, self._lines = figure, lines

    def heading(self, title: str, when: str) -> None:
        y = 1 - 1.1 / self._lines
        self._figure.text(0.008, y, title, fontsize=15, weight="bold", va="center")
        self._figure.text(0.992, y, when, fontsize=9, color=_FAINT, va="center", ha="right")

    def row(self, title: str, place: Place) -> None:
        left, bottom, _, height = self._box(place)
        self._figure.text(
            left + 0.003, bottom + 0.4 * height, title, fontsize=11, weight="bold", va="center"
        )

    def panel(self, panel: Panel, place: Place) -> Any:
        """White ground, the title on top, and axes in what is left."""
        left, bottom, width, height = self._box(place)
        gap_x, gap_y = 0.004, 0.12 / self._lines
        ground = self._figure.add_axes(
            (left + gap_x, bottom + gap_y, width - 2 * gap_x, height - 2 * gap_y)
        )
        ground.set(xticks=[], yticks=[], facecolor="white")
        for side in ground.spines.values():
            side.set_color("#dcdfe2")
        self._figure.text(
            left + 2.5 * gap_x,
            bottom + height - 0.75 / self._lines,
            panel.title,
            fontsize=9.5,
            va="center",
        )
        if panel.kind is Kind.STAT:
            inner = (left, bottom, width, height - 1 / self._lines)
        elif panel.kind is Kind.TABLE:
            inner = (left + 0.015, bottom, width - 0.03, height - 1.6 / self._lines)
        else:
            inner = (
                left + 0.055,
                bottom + 1.95 / self._lines,
                width - 0.07,
                height - 3.3 / self._lines,
            )
        return self._figure.add_axes(inner)

    def _box(self, place: Place) -> tuple[float, float, float, float]:
        left, width = place.x / WIDTH, place.width / WIDTH
        bottom = 1 - (2 + place.y + place.height) / self._lines
        return left, bottom, width, place.height / self._lines


def _show(axes: Any, panel: Panel, found: Sequence[Answer], span: Span) -> None:
    if not any(answer.course.says_something for answer in found):
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no data", color=_FAINT, ha="center", va="center")
    elif panel.kind is Kind.STAT:
        _number(axes, panel, found)
    elif panel.kind is Kind.TABLE:
        _table(axes, [answer.course.labels for answer in found])
    elif panel.kind is Kind.HEATMAP:
        _heatmap(axes, panel, found, span)
    else:
        _curves(axes, panel, found, span)


def _number(axes: Any, panel: Panel, found: Sequence[Answer]) -> None:
    (answer,) = found
    value = answer.course.values[-1]
    alarmed = panel.alarm is not None and value >= panel.alarm
    axes.set_axis_off()
    axes.text(
        0.5,
        0.5,
        shown(value, panel.scale),
        fontsize=19,
        weight="bold",
        color=_RED if alarmed else _GREEN,
        ha="center",
        va="center",
    )


def _curves(axes: Any, panel: Panel, found: Sequence[Answer], span: Span) -> None:
    shown_ones = sorted(
        (answer for answer in found if answer.course.says_something), key=lambda each: each.name
    )
    times = _times(span)
    columns = [_on(times, answer.course) for answer in shown_ones]
    hours = [datetime.fromtimestamp(time) for time in times]
    if panel.kind is Kind.AREAS:
        # Nothing to stack is nothing at all; a gap in one would be a gap in every other.
        whole = [[0.0 if math.isnan(value) else value for value in each] for each in columns]
        labels = [answer.name for answer in shown_ones]
        axes.stackplot(hours, *whole, labels=labels, colors=_LINES, alpha=0.75)
    else:
        for place, (answer, column) in enumerate(zip(shown_ones, columns, strict=True)):
            colour = _LINES[place % len(_LINES)]
            axes.plot(hours, column, label=answer.name, color=colour, linewidth=1.3)
    highest = max((value for each in columns for value in each if math.isfinite(value)), default=0)
    lowest = min((value for each in columns for value in each if math.isfinite(value)), default=0)
    if panel.logarithmic and highest > 0:
        axes.set_yscale("symlog", linthresh=1)
        axes.set_yticks([0, *(10.0**power for power in range(math.ceil(math.log10(highest)) + 1))])
    axes.set_ylim(bottom=min(0.0, 1.05 * lowest))
    if highest <= 0:
        axes.set_ylim(top=1)
    axes.yaxis.set_major_formatter(lambda value, _: shown(value, panel.scale))
    axes.grid(alpha=0.25, linewidth=0.6)
    _frame(axes, span)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(-0.08, -0.1),
        ncols=_columns([answer.name for answer in shown_ones]),
        frameon=False,
        fontsize=7.5,
        handlelength=1.2,
        columnspacing=1.0,
        handletextpad=0.4,
        borderaxespad=0.2,
    )


def _heatmap(axes: Any, panel: Panel, found: Sequence[Answer], span: Span) -> None:
    """Each bucket less the one below it; rows of buckets that stay empty are left away."""
    times = _times(span)
    by_bound = sorted(
        (float(answer.course.labels["le"]), _on(times, answer.course)) for answer in found
    )
    below = [0.0] * len(times)
    rows: list[tuple[float, list[float]]] = []
    for bound, counted in by_bound:
        filled = [0.0 if math.isnan(value) else value for value in counted]
        rows.append((bound, [max(a - b, 0.0) for a, b in zip(filled, below, strict=True)]))
        below = filled
    used = [place for place, (_, row) in enumerate(rows) if any(value > 1e-9 for value in row)]
    if not used:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing in this time", color=_FAINT, ha="center", va="center")
        return
    rows = rows[max(used[0] - 1, 0) : used[-1] + 1]
    hours = [datetime.fromtimestamp(time) for time in times]
    cells = [[math.nan if value <= 1e-9 else value**0.5 for value in row] for _, row in rows]
    axes.pcolormesh(hours, range(len(rows)), cells, cmap="Blues", vmin=0, shading="nearest")
    names = [shown(bound, panel.scale) for bound, _ in rows]
    every = math.ceil(len(names) / 9)
    first = (len(names) - 1) % every  # counted from the top: there stands 1.0
    axes.set_yticks(range(first, len(names), every), names[first::every])
    axes.set_ylim(-0.5, len(rows) - 0.5)
    _frame(axes, span)


def _table(axes: Any, rows: Sequence[Mapping[str, str]]) -> None:
    axes.set_axis_off()
    names = sorted({name for row in rows for name in row if name != "__name__"})
    text = [[row.get(name, "") for name in names] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(names, *text, strict=True)]
    whole = sum(max(width, 6) for width in widths) * 1.05  # the table begins inside its axes
    shares = [max(width, 6) / whole for width in widths]
    drawn = axes.table(
        cellText=text,
        colLabels=names,
        colWidths=shares,
        cellLoc="left",
        colLoc="left",
        loc="upper left",
        edges="horizontal",
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)
    drawn.scale(1, 1.4)


def _frame(axes: Any, span: Span) -> None:
    every = next((each for each in _TICK_SECONDS if (span.end - span.start) / each <= 7), 86400)
    first = math.ceil(span.start / every) * every
    ticks = [datetime.fromtimestamp(time) for time in range(first, int(span.end) + 1, every)]
    axes.set_xlim(datetime.fromtimestamp(span.start), datetime.fromtimestamp(span.end))
    axes.set_xticks(ticks, [f"{tick:%H:%M:%S}".removesuffix(":00") for tick in ticks])
    axes.tick_params(labelsize=7.5, colors=_FAINT, length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _columns(names: Sequence[str]) -> int:
    """How many legends fit side by side, in at most two lines."""
    if sum(len(name) + 6 for name in names) <= 72:
        return len(names)
    return math.ceil(len(names) / 2)


def _times(span: Span) -> list[float]:
    count = int((span.end - span.start) / span.step_seconds + 1e-6) + 1
    return [span.start + place * span.step_seconds for place in range(count)]


def _on(times: Sequence[float], course: Course) -> list[float]:
    """A course's value at each of the times; NaN where it has none."""
    known = {round(time, 1): value for time, value in zip(course.times, course.values, strict=True)}
    return [known.get(round(time, 1), math.nan) for time in times]


def _named(legend: str, labels: Mapping[str, str]) -> str:
    """A legend as Grafana fills it."""
    return re.sub(r"{{\s*(\w+)\s*}}", lambda found: labels.get(found[1], ""), legend)


def shown(value: float, scale: Scale) -> str:
    """A number with its unit, in three digits."""
    if math.isinf(value):
        return "+Inf"
    if scale is Scale.SHARE:
        return f"{100 * value:.3g} %"
    if scale is Scale.SECONDS:
        return f"{1000 * value:.3g} ms" if 0 < value < 1 else f"{value:.3g} s"
    if scale is Scale.CAPACITY:
        return f"{value:.3g}"
    if scale is Scale.MONEY:
        return f"{value:,.6g}" if abs(value) >= 1000 else f"{value:.3g}"
    unit = {
        Scale.FLOPS: "FLOP",
        Scale.FLOPS_PER_SECOND: "FLOP/s",
        Scale.PER_SECOND: "/s",
        Scale.JOULES: "J",
        Scale.WATTS: "W",
    }
    thousands = 0
    while abs(value) >= 999.5 and thousands < 6:
        value, thousands = value / 1000, thousands + 1
    named = " kMGTPE"[thousands].strip() + unit.get(scale, "")
    number = f"{value:.3g}"
    return f"{number} {named}".rstrip()


def _when(span: Span) -> str:
    start, end = datetime.fromtimestamp(span.start), datetime.fromtimestamp(span.end)
    return f"{start:%Y-%m-%d %H:%M} to {end:%H:%M}; every job, model and instance"


def _small(drawn: io.BytesIO) -> bytes:
    from PIL import Image

    small = io.BytesIO()
    with Image.open(drawn) as picture:
        few = picture.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
        few.save(small, format="png", optimize=True)
    return small.getvalue()
