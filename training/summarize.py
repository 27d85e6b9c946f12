"""Several evaluations side by side: other texts, other seeds; and how far apart they lie.

    python -m training summarize --reports DIR DIR … --out FILE.md

Reads each DIR/report.json that `evaluate` wrote. One column for each, in the order given; the
spread is the least and the most of a row. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.files import DataError, write_atomically
from training.quality import Setting
from training.reports import TITLES, table

OURS = "this adapter"
# Of what `evaluate` writes of a language model; encoders and images have reports of their own.
NEEDED = ("ours", "baselines", "greedy")
Json = Mapping[str, Any]
Cell = Callable[[Json], str]
COLUMNS: dict[str, Cell] = {
    "KL (95th percentile)": lambda row: f"{abs(row['kl']):.4f} ({row['kl_p95']:.4f})",
    "perplexity / full": lambda row: f"{row['perplexity_ratio']:.4f}",
    "cloze (full)": lambda row: (
        "" if row.get("cloze") is None else f"{row['cloze']:.3f} ({row['cloze_whole']:.3f})"
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reports", nargs="+", type=Path, required=True, help="folders")
    parser.add_argument("--out", type=Path, required=True, help="FILE.md")


def run(args: argparse.Namespace) -> dict[str, Any]:
    reports = [read(folder) for folder in args.reports]
    adapters = {report["adapter"] for report in reports}
    if len(adapters) > 1:
        raise DataError(f"reports of different adapters: {', '.join(sorted(adapters))}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, markdown(reports).encode())
    return {"out": str(args.out), "reports": len(reports), "adapter": adapters.pop()}


def read(folder: Path) -> Json:
    """One report.

    Raises:
        DataError: there is none, or it is not one that `evaluate` wrote of a language model.
    """
    path = folder / "report.json"
    try:
        report: Json = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not isinstance(report, dict):
        raise DataError(f"{path}: an object is expected; got {type(report).__name__}")
    lacking = [name for name in NEEDED if name not in report]
    if not lacking and any("setting" not in row for row in report["ours"]):
        lacking = ["settings"]
    if lacking:
        raise DataError(
            f"{path}: not the report of a language model, as `evaluate` writes it: has no "
            f"{', '.join(lacking)}"
        )
    return report


def title(report: Json) -> str:
    """What a report was measured on, short enough for a column."""
    copied = ", copied" if report.get("copied") else ""
    name = Path(report["data"]["name"]).stem
    return f"{name}{copied}, seed {report['seed']}, {report['windows']} windows"


def markdown(reports: Sequence[Json]) -> str:
    titles = [title(report) for report in reports]
    lines = [
        f"# Evaluations of adapter `{reports[0]['adapter']}` side by side",
        "",
        "KL to the full model in nats per token; in brackets its 95th percentile over tokens, or "
        "what the full model gets. Empty: not measured.",
        "",
    ]
    for setting in Setting:
        tables = [text for name in COLUMNS if (text := _table_of(reports, setting, name))]
        if tables:
            lines += [f"## {TITLES[setting]}", "", *(line for text in tables for line in text)]
    agreeing = [
        [f"{capacity:g}", *(agreement(report, capacity) for report in reports)]
        for capacity in sorted({g["capacity"] for r in reports for g in r["greedy"]}, reverse=True)
    ]
    if agreeing:
        heads = ["capacity", *titles]
        lines += ["## Greedy tokens that agree with the full model's", "", *table(heads, agreeing)]
    missed = max(miss(report) for report in reports)
    lines += ["", f"Below 1, no request spent a share further than {missed:.4f} from its capacity."]
    return "\n".join(lines) + "\n"


def _table_of(reports: Sequence[Json], setting: Setting, name: str) -> list[str]:
    """One column of COLUMNS for every report; nothing where none has it."""
    rows = []
    for what, capacity in asked(reports, setting):
        found = [of(report, what, capacity, setting) for report in reports]
        cells = ["" if row is None else COLUMNS[name](row) for row in found]
        if any(cells):
            rows.append([f"{capacity:g}", what, *cells, spread(found)])
    if not rows:
        return []
    heads = ["capacity", "what", *(title(report) for report in reports), "KL, least to most"]
    return [f"{name}:", "", *table(heads, rows), ""]


def asked(reports: Sequence[Json], setting: Setting) -> list[tuple[str, float]]:
    """Every (baseline or ours, capacity) below 1 of any report, dear ones first, ours first."""
    found: dict[tuple[str, float], None] = {}
    for report in reports:
        for what, rows in sets(report).items():
            for row in rows:
                if row["setting"] == setting and row["capacity"] < 1:
                    found[what, row["capacity"]] = None
    return sorted(found, key=lambda each: (-each[1], each[0] != OURS, each[0]))


def sets(report: Json) -> dict[str, Sequence[Json]]:
    return {OURS: report["ours"], **report["baselines"]}


def of(report: Json, what: str, capacity: float, setting: Setting) -> Json | None:
    for row in sets(report).get(what, ()):
        if row["setting"] == setting and row["capacity"] == capacity:
            return row
    return None


def spread(rows: Sequence[Json | None]) -> str:
    kls = [row["kl"] for row in rows if row is not None]
    return f"{min(kls):.4f} to {max(kls):.4f}" if len(kls) > 1 else ""


def agreement(report: Json, capacity: float) -> str:
    for row in report["greedy"]:
        if row["capacity"] == capacity:
            return f"{row['agreement']:.3f} of {row['tokens']}"
    return ""


def miss(report: Json) -> float:
    """How far from its capacity the worst request of ours spent, all of its tokens routed."""
    routed = [row for row in report["ours"] if row["setting"] != Setting.PROMPT]
    shares = [
        abs(float(row[spent]) - float(row["capacity"]))
        for row in (*routed, *report["greedy"])
        if row["capacity"] < 1
        for spent in ("spent_least", "spent_most")
    ]
    return max(shares, default=0.0)
