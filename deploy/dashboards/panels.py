"""What a dashboard is made of: rows of panels, each a question and the queries that answer it.

Neither Grafana nor a picture is known here; both are drawn from this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum

WIDTH = 24  # of a dashboard, in Grafana's columns


class Kind(StrEnum):
    """How an answer is shown."""

    STAT = "stat"  # one number over the whole time shown
    LINES = "lines"
    AREAS = "areas"  # lines on top of each other: parts of a whole
    HEATMAP = "heatmap"  # a histogram's buckets over time
    TABLE = "table"  # labels, as they are now

    @property
    def is_instant(self) -> bool:
        """Whether it shows one moment, not a course of time."""
        return self in (Kind.STAT, Kind.TABLE)


class Scale(Enum):
    """What a number counts, in Grafana's word for it."""

    SHARE = "percentunit"
    SECONDS = "s"
    COUNT = "sishort"
    FLOPS = "si:FLOP"
    FLOPS_PER_SECOND = "si:FLOP/s"
    PER_SECOND = "cps"
    JOULES = "joule"
    WATTS = "watt"
    CAPACITY = "none"
    MONEY = "locale"  # of whichever currency


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL with a dashboard's variables in it, and how its series are called."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One question."""

    title: str
    question: str
    kind: Kind
    scale: Scale
    queries: tuple[Query, ...]
    width: int = 8
    alarm: float | None = None  # from here on it is shown in red
    logarithmic: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading.

    What `may_lack` its metrics is shut in Grafana until somebody opens it, and left out of a
    picture without them; it stands last on its board.
    """

    title: str
    panels: tuple[Panel, ...]
    may_lack: bool = False


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard; its name is that of its file too."""

    name: str
    title: str
    question: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands on the grid, from the upper left."""

    x: int
    y: int
    width: int
    height: int


def placed(board: Board) -> Iterator[tuple[Row | Panel, Place]]:
    """Rows and panels from top to bottom; a line of panels is as high as its highest."""
    y = 0
    for row in board.rows:
        yield row, Place(0, y, WIDTH, 1)
        x, y, highest = 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > WIDTH:
                x, y, highest = 0, y + highest, 0
            height = 4 if panel.kind is Kind.STAT else 8
            yield panel, Place(x, y, panel.width, height)
            x, highest = x + panel.width, max(highest, height)
        y += highest
