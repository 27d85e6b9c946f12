"""What a benchmark leaves behind: one JSON, one page with tables, one picture.

All are written beside their place and renamed, so a reader never sees half of one.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import Setting
from training.files import write_atomically, write_json

FOLDER = Path("benchmarks") / "results"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Goal:
    """What was hoped for, and what came of it; `got` is None where it could not be measured."""

    what: str
    wanted: float
    got: float | None
    at_most: bool = False  # else at least

    @property
    def reached(self) -> bool | None:
        if self.got is None:
            return None
        return self.got <= self.wanted if self.at_most else self.got >= self.wanted

    @property
    def told(self) -> list[str]:
        bound = f"{'<=' if self.at_most else '>='} {self.wanted:g}"
        verdict = {True: "reached", False: "missed", None: "not measured"}[self.reached]
        return [self.what, bound, "" if self.got is None else f"{self.got:.3f}", verdict]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts under their headings."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def markdown(self) -> str:
        lines = [
            f"| {' | '.join(self.columns)} |",
            f"|{'|'.join('---' for _ in self.columns)}|",
            *(f"| {' | '.join(row)} |" for row in self.rows),
        ]
        return f"## {self.title}\n\n" + "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class Report:
    """One benchmark's outcome, ready to be written."""

    name: str
    title: str
    setting: Setting
    parameters: Mapping[str, Any]
    results: Any  # of dataclasses and plain values
    tables: Sequence[Table]
    notes: str
    draw: Callable[[Any], None]  # onto an empty figure of matplotlib
    goals: Sequence[Goal] = field(default=())
    size: tuple[float, float] = (9.0, 4.5)


def write(report: Report, folder: Path) -> dict[str, Any]:
    """Write the three files; returns what goes to stdout."""
    folder.mkdir(parents=True, exist_ok=True)
    goals = [asdict(goal) | {"reached": goal.reached} for goal in report.goals]
    paths = [folder / f"{report.name}.{kind}" for kind in ("json", "md", "svg")]
    write_json(
        paths[0],
        {
            "format": FORMAT,
            "benchmark": report.name,
            "setting": asdict(report.setting),
            "parameters": dict(report.parameters),
            "goals": goals,
            "results": report.results,
        },
    )
    write_atomically(paths[2], _picture(report))
    write_atomically(paths[1], _page(report).encode())
    return {
        "benchmark": report.name,
        "goals": goals,
        "files": [str(path) for path in paths],
    }


def told(spread_ms: Any) -> str:
    """A spread in a table's cell: the median, and the quartiles in brackets."""
    return f"{spread_ms.median:.2f} [{spread_ms.lower:.2f}, {spread_ms.upper:.2f}]"


def _page(report: Report) -> str:
    where = report.setting
    place = where.accelerator or f"{where.processor}, {where.threads} of {where.cores} cores"
    sets = f" ({', '.join(where.instruction_sets)})" if where.instruction_sets else ""
    versions = ", ".join(f"{name} {release}" for name, release in where.versions.items())
    goals = [goal.told for goal in report.goals]
    parts = [
        f"# {report.title}\n",
        f"{place}{sets}; {where.dtype}; attention: {where.attention}; {versions}; {where.date}.\n",
        f"```bash\n{where.command}\n```\n",
        report.notes.strip() + "\n",
        *(table.markdown for table in report.tables),
        Table("Goals", ("goal", "wanted", "got", ""), goals).markdown if goals else "",
        f"![{report.title}]({report.name}.svg)\n",
    ]
    return "\n".join(part for part in parts if part)


def _picture(report: Report) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Without a salt of its own, every run would name the same shapes anew.
    with matplotlib.rc_context({"svg.hashsalt": report.name}):
        figure = pyplot.figure(figsize=report.size, layout="constrained")
        report.draw(figure)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return drawn.getvalue()
