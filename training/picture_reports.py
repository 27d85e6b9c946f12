"""A vision-language model's evaluation on paper: report.md, its pictures, and report.json last.

One picture shows which patches stay of each image, chosen by the router and by the others: red
where one stays, dark where it is dropped.

Shape letters: B exchanges   P image tokens
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastiformer.sight import keep
from elastiformer.vlm import ElasticVlm
from training.choosers import CHOOSERS
from training.encoder_reports import cell_of
from training.exchanges import Exchange, collated
from training.files import write_atomically, write_json
from training.lent_paths import TextRow
from training.picture_quality import PictureQuality, prompt_at
from training.pictures import Curve, draw_curves, draw_patches
from training.reports import table

SHOWN_IMAGES, SHOWN_CAPACITIES = 6, 4


@dataclass(frozen=True, slots=True)
class Prefill:
    """What running the prompts alone costs at a capacity, over what it costs at 1.0."""

    time_ratio: float
    flops_ratio: float

    @property
    def realised(self) -> float | None:
        """The share of the saved FLOPs that became saved time."""
        saved = 1 - self.flops_ratio
        return (1 - self.time_ratio) / saved if saved > 0 else None


@dataclass(frozen=True, slots=True)
class PictureReport:
    """All that one evaluation found."""

    about: Mapping[str, Any]
    ours: Sequence[PictureQuality]
    texts: Mapping[float, TextRow]  # of text without an image; may be empty
    choosers: Mapping[str, Sequence[PictureQuality]]
    alone: Mapping[str, Sequence[PictureQuality]]  # image tokens or layers, without the other
    prefill: Mapping[float, Prefill]
    refused: Sequence[float]  # capacities below the calibrated range

    def as_json(self) -> dict[str, Any]:
        return {
            "about": self.about,
            "ours": [asdict(row) for row in self.ours],
            "text": {f"{capacity:g}": asdict(row) for capacity, row in self.texts.items()},
            "choosers": {name: [asdict(r) for r in rows] for name, rows in self.choosers.items()},
            "alone": {name: [asdict(r) for r in rows] for name, rows in self.alone.items()},
            "prefill": {
                f"{capacity:g}": {**asdict(each), "realised": each.realised}
                for capacity, each in self.prefill.items()
            },
            "refused": list(self.refused),
        }


def write_pictures(
    folder: Path, report: PictureReport, model: ElasticVlm, exchanges: Sequence[Exchange], seed: int
) -> list[str]:
    """The names of the files written; the first images of `exchanges` are drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["frontier.png"]
    draw_curves(folder / names[0], _panels(report), x="", y="answers right")
    some = list({each.digest[:32]: each for each in exchanges}.values())[:SHOWN_IMAGES]
    shown = [row.capacity for row in report.ours if row.kept < 1][:SHOWN_CAPACITIES]
    if shown and math.isqrt(model.sight.tokens) ** 2 == model.sight.tokens:
        names.append("patches.png")
        grey_BHW = collated(some, model).pixels_NCHW.float().mean(1)
        grey_BHW = grey_BHW - grey_BHW.amin((1, 2), keepdim=True)
        grey_BHW = grey_BHW / grey_BHW.amax((1, 2), keepdim=True).clamp(min=1e-6)
        draw_patches(
            folder / "patches.png",
            grey_BHW.tolist(),
            kept_patches(model, some, shown, report.choosers, seed),
        )
    write_atomically(folder / "report.md", _markdown(report, names).encode())
    write_json(folder / "report.json", report.as_json())
    return [*names, "report.md", "report.json"]


@torch.inference_mode()
def kept_patches(
    model: ElasticVlm,
    exchanges: Sequence[Exchange],
    capacities: Sequence[float],
    choosers: Sequence[str] | Mapping[str, object],
    seed: int,
) -> dict[str, list[list[list[float]]]]:
    """By title, for each image rows of patches, 1 where one stays.

    The router at each capacity; the others at the middle one of them.
    """
    assert model.adapter is not None and model.adapter.routers.image is not None
    features_BPD = model.vlm.features(collated(exchanges, model).pixels_NCHW)
    router = model.adapter.routers.image
    ranks_BP = router.spaced(router(features_BPD))
    counts = {
        capacity: sum(each.kept for each in prompt_at(model, exchanges[0], capacity).pictures)
        for capacity in capacities
    }
    found = {f"{c:g}: {n} stay": _grids(ranks_BP, n) for c, n in counts.items()}
    middle = counts[capacities[len(capacities) // 2]]
    for name in choosers:
        found[f"{name}: {middle}"] = _grids(CHOOSERS[name](model, exchanges, seed), middle)
    return found


def _grids(scores_BP: Tensor, count: int) -> list[list[list[float]]]:
    side = math.isqrt(scores_BP.shape[1])
    rows: list[list[list[float]]] = keep(scores_BP, count).float().view(-1, side, side).tolist()
    return rows


def _panels(report: PictureReport) -> dict[str, dict[str, Curve]]:
    sets = {"this adapter": report.ours, **report.choosers}
    panels: dict[str, dict[str, Curve]] = {
        "share of the image tokens that stay": {
            name: [(row.kept, row.right) for row in rows] for name, rows in sets.items()
        }
    }
    if report.prefill:
        right = {row.capacity: row.right for row in report.ours}
        panels["prefill over that at capacity 1.0"] = {
            "time": [(each.time_ratio, right[c]) for c, each in report.prefill.items()],
            "FLOPs": [(each.flops_ratio, right[c]) for c, each in report.prefill.items()],
        }
    return panels


def _markdown(report: PictureReport, pictures: Sequence[str]) -> str:
    about = report.about
    heads = ["capacity", "image tokens kept", "spent", "KL", "answers right", "as full"]
    heads += ["prefill time / full", "prefill FLOPs / full", "time saved / FLOPs saved"]
    heads += [f"{name}: right" for name in report.choosers]
    rows = []
    for row in report.ours:
        others = [
            next((each.right for each in those if each.capacity == row.capacity), None)
            for those in report.choosers.values()
        ]
        paid = report.prefill.get(row.capacity)
        costs = [paid.time_ratio, paid.flops_ratio, paid.realised] if paid else [None] * 3
        numbers = [row.kept, row.spent, row.kl, row.right, row.same, *costs, *others]
        rows.append([f"{row.capacity:g}", *map(cell_of, numbers)])
    lines = [
        f"# Image tokens left out: {about['base']['id']}",
        "",
        f"Adapter `{about['adapter']}`, {about['dtype']} on {about['device']}, "
        f"{about['threads']} threads, torch {about['versions']['torch']}.",
        f"Data: {about['data']['name']} (sha256 `{about['data']['sha256'][:16]}`), "
        f"{about['exchanges']} exchanges, seed {about['seed']}.",
        "*Right*: answers written word for word. *Spent*: share of the dense block FLOPs of prompt "
        "and answer. *Prefill*: of the prompts one by one, tower and head among it; the median of "
        "ratios to the same prompt at 1.0, capacities taking turns.",
        "",
        *table(heads, rows),
        "",
    ]
    whole = about["runs_whole"]
    if "prompt" in whole:
        lines += [
            "The language model's own units have no plan for prompts here: what a number asks of "
            "one is had from image tokens alone.",
            "",
        ]
    if "output" in whole:
        lines += ["What is generated runs whole.", ""]
    if report.texts:
        text = about["text"]
        lines += [
            f"Text without an image: {text['windows']} windows of {text['window_tokens']} tokens "
            f"of {text['name']}, KL to the full model in nats per token.",
            "",
            *table(
                ["capacity", "KL, prompt and rest routed", "KL, every token scored", "worst miss"],
                [
                    [f"{capacity:g}", *map(cell_of, (row.kl, row.kl_scored, row.missed))]
                    for capacity, row in report.texts.items()
                ],
            ),
            "",
        ]
    if report.alone:
        heads = ["what gives", "capacity", "image tokens kept", "spent", "KL", "answers right"]
        each = [
            [name, f"{row.capacity:g}", *map(cell_of, (row.kept, row.spent, row.kl, row.right))]
            for name, rows in {"both": report.ours, **report.alone}.items()
            for row in rows
            if row.capacity < 1
        ]
        lines += ["Image tokens and the layers' own units, together and each alone:", ""]
        lines += [*table(heads, each), ""]
    if report.choosers:
        lines += ["The others keep as many tokens of each image and choose them otherwise.", ""]
    if report.refused:
        refused = ", ".join(f"{each:g}" for each in report.refused)
        lines += [f"Below the calibrated range, so not measured: {refused}.", ""]
    return "\n".join([*lines, *(f"![{Path(name).stem}]({name})" for name in pictures)]) + "\n"
