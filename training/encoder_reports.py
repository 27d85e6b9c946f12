"""An encoder's evaluation on paper: report.md, its pictures, and report.json last.

For images a picture shows which patches were worked on: red where all was kept, dark where little.

Shape letters: B items   T tokens   C channels   H rows   W columns
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastiformer import Capacity
from elastiformer.encoder import ElasticEncoder
from elastiformer.plan_grid import PlanGrid
from elastiformer.routers import TOKEN_UNITS
from elastiformer.sequence import Item
from elastiformer.tasks import Task
from training.encoder_quality import ITEMS_AT_ONCE, ItemQuality
from training.files import write_atomically, write_json
from training.pictures import Curve, draw_curves, draw_patches
from training.reports import table

SHOWN_IMAGES, SHOWN_CAPACITIES = 8, 6


@dataclass(frozen=True, slots=True)
class ItemReport:
    """All that one evaluation of an encoder found."""

    about: Mapping[str, Any]
    ours: Sequence[ItemQuality]
    times: Mapping[str, float]  # over that at 1.0, by capacity as it is written
    baselines: Mapping[str, Sequence[ItemQuality]]
    refused: Sequence[float]  # capacities below the calibrated range

    def as_json(self) -> dict[str, Any]:
        return {
            "about": self.about,
            "ours": [asdict(row) for row in self.ours],
            "time_ratio": self.times,
            "baselines": {
                name: [asdict(row) for row in rows] for name, rows in self.baselines.items()
            },
            "refused": list(self.refused),
        }

    @property
    def judged_by(self) -> str:
        """The word for the number by which quality is drawn: the plainest one that is known."""
        return "accuracy" if self.ours[0].accuracy is not None else "distance"


def write_items(
    folder: Path, report: ItemReport, model: ElasticEncoder, items: Sequence[Item]
) -> list[str]:
    """The names of the files written; `items` are those that may be drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["frontier.png"]
    draw_curves(folder / names[0], _panels(report), x="", y=report.judged_by)
    shown = [row.capacity for row in report.ours if row.capacity < 1][:SHOWN_CAPACITIES]
    if model.encoder.reads_images and shown:
        names.append("patches.png")
        some = items[:SHOWN_IMAGES]
        kept = {f"{c:g}": kept_patches(model, some, Capacity(c, c)) for c in shown}
        draw_patches(folder / "patches.png", [_grey(item) for item in some], kept)
    write_atomically(folder / "report.md", _markdown(report, model.task, names).encode())
    write_json(folder / "report.json", report.as_json())
    return [*names, "report.md", "report.json"]


@torch.inference_mode()
def kept_patches(
    model: ElasticEncoder, items: Sequence[Item], capacity: Capacity
) -> list[list[list[float]]]:
    """For each image and patch, of how many sub-layers it kept its work: rows of shares, 0 to 1.

    The last layer does not count where a head reads class tokens alone: there nobody's is owed.
    """
    batch = model.collate(items)
    planned = [model.sequence(capacity, item) for item in items]
    plans = [each.plan_at(at).plan for each in planned for at in range(len(each.item.ids))]
    known = list(dict.fromkeys(plans))
    number = {plan: at for at, plan in enumerate(known)}
    plan_BT = torch.tensor([number[plan] for plan in plans], device=model.device).view(
        batch.mask_BT.shape
    )
    routes = model.masked(batch, PlanGrid(known, plan_BT)).routes
    decided = {(route.layer, route.unit): route.kept for route in routes}
    layers = len(model.shape.layers) - model.reads_class
    total_BT = torch.zeros(plan_BT.shape, device=model.device)
    for layer in range(layers):
        for unit in TOKEN_UNITS:
            planned_P = torch.tensor(
                [getattr(plan[layer], unit.value) > 0 for plan in known], device=model.device
            )
            total_BT += decided.get((layer, unit), planned_P[plan_BT]).float()
    share_BT = total_BT[:, model.encoder.class_tokens :] / (layers * len(TOKEN_UNITS))
    _, height, width = _pixels(items[0]).shape
    (patch,) = model.encoder.patches
    grid = (-1, height // int(patch.stride[0]), width // int(patch.stride[1]))
    found: list[list[list[float]]] = share_BT.view(grid).tolist()
    return found


def _pixels(item: Item) -> Tensor:
    assert item.pixels_CHW is not None, "an image"
    return item.pixels_CHW


def _grey(item: Item) -> list[list[float]]:
    """The image as it is read, its darkest point 0 and its lightest 1."""
    grey_HW = _pixels(item).mean(0)
    spread = (grey_HW.max() - grey_HW.min()).clamp(min=1e-6)
    levels: list[list[float]] = ((grey_HW - grey_HW.min()) / spread).tolist()
    return levels


def _panels(report: ItemReport) -> dict[str, dict[str, Curve]]:
    def of(row: ItemQuality) -> float:
        value: float = getattr(row, report.judged_by)
        return value

    sets = {"this adapter": report.ours, **report.baselines}
    panels: dict[str, dict[str, Curve]] = {
        "share of block FLOPs spent": {
            name: [(row.spent, of(row)) for row in rows] for name, rows in sets.items() if rows
        }
    }
    if report.times:
        panels["time over that at capacity 1.0"] = {
            "this adapter": [(report.times[f"{row.capacity:g}"], of(row)) for row in report.ours]
        }
    return panels


def _markdown(report: ItemReport, task: str, pictures: Sequence[str]) -> str:
    about = report.about
    distance = "1 - cosine" if task == Task.FEATURES else "distance"
    heads = ["capacity", "spent", "worst miss", distance, "same label", "accuracy", "time / full"]
    heads += [f"{name}: {distance}" for name in report.baselines]
    heads += [f"{name}: accuracy" for name in report.baselines]
    rows = []
    for row in report.ours:
        others = [
            next((each for each in beside if each.capacity == row.capacity), None)
            for beside in report.baselines.values()
        ]
        numbers = [row.spent, row.missed, row.distance, row.same_label, row.accuracy]
        numbers.append(report.times.get(f"{row.capacity:g}"))
        numbers += [None if each is None else each.distance for each in others]
        numbers += [None if each is None else each.accuracy for each in others]
        rows.append([f"{row.capacity:g}", *map(cell_of, numbers)])
    lines = [
        f"# Quality and cost of an elastic adapter for {about['base']['id']}",
        "",
        f"Adapter `{about['adapter']}` ({', '.join(about['units'])}), {about['dtype']} on "
        f"{about['device']}, {about['threads']} threads, torch {about['versions']['torch']}.",
        f"Data: {about['data']['name']} (sha256 `{about['data']['sha256'][:16]}`), "
        f"{about['items']} items, seed {about['seed']}.",
        "*Spent*: share of the dense block FLOPs, the mean over items; *worst miss*: of the item "
        "farthest from its capacity, beyond one token's worth. *Time*: of a batch of "
        f"{ITEMS_AT_ONCE}, over that of the same batch at 1.0 just before or after; the median.",
        "",
        *table(heads, rows),
        "",
    ]
    if report.baselines:
        lines += [
            "Baselines spend as much: `uniform` lowers all layers alike, `random` has the "
            "calibrated plans with routers that know nothing.",
            "",
        ]
    if report.refused:
        refused = ", ".join(f"{each:g}" for each in report.refused)
        lines += [f"Below the calibrated range, so not measured: {refused}.", ""]
    return "\n".join([*lines, *(f"![{Path(name).stem}]({name})" for name in pictures)]) + "\n"


def cell_of(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
