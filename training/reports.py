"""An evaluation on paper: report.json for scripts, report.md and pictures for people.

Each file appears whole or not at all, report.json last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elastiformer.capacity import Plan
from training.files import write_atomically, write_json
from training.pictures import Curve, draw_curves, draw_kept
from training.quality import Quality, Setting
from training.stopwatch import Greedy, Timing

TITLES = {
    Setting.PROMPT: "Prompt routed, continuation whole",
    Setting.BOTH: "Prompt and continuation routed: what a user gets",
    Setting.SCORED: "Every token scored",
}


@dataclass(frozen=True, slots=True)
class Report:
    """All that one evaluation found."""

    about: Mapping[str, Any]
    ours: Sequence[Quality]
    baselines: Mapping[str, Sequence[Quality]]
    greedy: Sequence[Greedy]
    timed: Sequence[Timing]
    kept: Mapping[str, Plan]  # by a title that names phase and capacity
    refused: Sequence[float]  # capacities below the calibrated range

    def as_json(self) -> dict[str, Any]:
        return {
            **self.about,
            "ours": [asdict(row) for row in self.ours],
            "baselines": {
                name: [asdict(row) for row in rows] for name, rows in self.baselines.items()
            },
            "greedy": [asdict(row) for row in self.greedy],
            "timed": [asdict(row) for row in self.timed],
            "refused": list(self.refused),
        }


def write_report(folder: Path, report: Report) -> list[str]:
    """The names of the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["frontier.png"]
    draw_curves(
        folder / names[0],
        {TITLES[setting]: frontier(report, setting) for setting in Setting},
        x="share of block FLOPs spent",
        y="KL to the full model, nats per token",
        log_y=True,
    )
    if report.timed:
        names.append("time.png")
        draw_curves(
            folder / "time.png",
            {
                "prefill": {"measured": [(t.capacity, t.prefill_ratio) for t in report.timed]}
                | {"time = FLOPs": [(t.capacity, t.capacity) for t in report.timed]},
                "decode, one request": {
                    "measured": [(t.capacity, t.decode_ratio) for t in report.timed],
                    "time = FLOPs": [(t.capacity, t.capacity) for t in report.timed],
                },
            },
            x="share of block FLOPs",
            y="time over that at capacity 1.0",
        )
    if report.kept:
        names.append("kept.png")
        draw_kept(folder / "kept.png", report.kept)
    write_atomically(folder / "report.md", markdown(report, names).encode())
    write_json(folder / "report.json", report.as_json())
    return [*names, "report.md", "report.json"]


def frontier(report: Report, setting: Setting) -> dict[str, Curve]:
    """KL against what was spent: ours and each baseline."""
    sets = {"this adapter": report.ours, **report.baselines}
    return {
        name: points
        for name, rows in sets.items()
        if (
            points := [
                (row.spent, row.kl, row.kl_error or 0.0)
                for row in rows
                if row.setting is setting and row.capacity < 1
            ]
        )
    }


def markdown(report: Report, pictures: Sequence[str]) -> str:
    about = report.about
    lines = [
        f"# Evaluation of an elastic adapter for {about['base']['id']}",
        "",
        f"Adapter `{about['adapter']}` ({', '.join(about['units'])}), {about['dtype']} on "
        f"{about['device']}, {about['threads']} threads, torch {about['versions']['torch']}.",
        f"Text: {about['data']['name']} (sha256 `{about['data']['sha256'][:16]}`), "
        f"{about['windows']} windows of {about['window_tokens']} tokens, of which "
        f"{about['prompt_tokens']} are the prompt"
        f"{', whose beginning the rest repeats' if about['copied'] else ''}; "
        f"seed {about['seed']}.",
        "KL to the full model in nats per token, ± its standard error over windows; *spent* is the "
        "share of the dense block FLOPs, "
        "routers and repair included, mean (least to most) over requests. *Cloze* is the share of "
        "words, each the last of the passage before it, whose every token is the likeliest.",
        "",
    ]
    if fitted := about["repaired_on"]:
        lines += [
            "*Repaired* baselines have the adapter's own prompts: only outputs differ. "
            f"They were fitted to {fitted['tokens']} tokens of {fitted['name']}, seed "
            f"{about['baseline_seed']}. What static channels leave out is guessed from what they "
            "keep, which folded into the weights costs nothing; a dropped sub-layer has a map of "
            f"rank {fitted['skip_rank']} in its place, which is paid for.",
            "",
        ]
    if report.refused:
        refused = ", ".join(f"{each:g}" for each in report.refused)
        lines += [f"Below the calibrated range, so not measured: {refused}.", ""]
    for setting in Setting:
        lines += [f"## {TITLES[setting]}", "", *_quality_table(report, setting), ""]
    if report.greedy:
        lines += ["## Greedy text beside the full model's", "", *_greedy_table(report.greedy), ""]
    if report.timed:
        lines += ["## Measured time, one request alone", "", *_time_table(report.timed), ""]
    lines += [f"![{Path(name).stem}]({name})" for name in pictures]
    return "\n".join(lines) + "\n"


def _quality_table(report: Report, setting: Setting) -> list[str]:
    rows = []
    for name, qualities in {"this adapter": report.ours, **report.baselines}.items():
        rows += [
            [
                f"{row.capacity:g}",
                name,
                f"{row.spent:.3f} ({row.spent_least:.3f} to {row.spent_most:.3f})",
                _with_error(row),
                f"{row.kl_p95:.4f}",
                f"{row.same_top:.3f}",
                f"{row.perplexity:.2f}",
                f"{row.perplexity_ratio:.4f}",
                "" if row.cloze is None else f"{row.cloze:.3f} ({row.cloze_whole:.3f})",
            ]
            for row in qualities
            if row.setting is setting
        ]
    rows.sort(key=lambda row: -float(row[0]))  # stable: ours stays first
    heads = ["capacity", "what", "spent", "KL", "KL, 95th percentile"]
    heads += ["same likeliest token", "perplexity", "perplexity / full", "cloze (full)"]
    return table(heads, rows)


def _with_error(row: Quality) -> str:
    kl = f"{abs(row.kl) if abs(row.kl) < 5e-5 else row.kl:.4f}"
    return kl if row.kl_error is None else f"{kl} ± {row.kl_error:.4f}"


def _greedy_table(greedy: Sequence[Greedy]) -> list[str]:
    return table(
        ["capacity", "tokens", "agreement", "tokens until they differ", "spent"],
        [
            [
                f"{row.capacity:g}",
                str(row.tokens),
                f"{row.agreement:.3f}",
                f"{row.same_prefix:.1f}",
                f"{row.spent:.3f} ({row.spent_least:.3f} to {row.spent_most:.3f})",
            ]
            for row in greedy
        ],
    )


def _time_table(timed: Sequence[Timing]) -> list[str]:
    return table(
        ["capacity", "prefill, ms", "over full", "one decoded token, ms", "over full"],
        [
            [
                f"{row.capacity:g}",
                f"{row.prefill_ms:.1f}",
                f"{row.prefill_ratio:.3f}",
                f"{row.decode_ms:.2f}",
                f"{row.decode_ratio:.3f}",
            ]
            for row in timed
        ],
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, line by line."""
    lines = [list(heads), ["---"] * len(heads), *map(list, rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def digits(value: float, most: int = 3) -> str:
    """So many digits, and below a thousandth one or none: never in powers of ten."""
    places = 4 if value < 1e-3 else max(0, most - 1 - math.floor(math.log10(value)))
    return f"{value:.{places}f}"
