"""Are routers robust to what they were trained on? The matrix on paper, and what it says.

Each cell is the mean over seeds: routers trained on one domain, measured on another, beside
routers that know nothing. What training on a domain itself gains over those, training on another
one keeps in part: that share is the answer.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.files import write_atomically, write_json
from training.pictures import Matrix, draw_matrices
from training.reports import table

UNTRAINED = "untrained"
HOLDS, HOLDS_IN_PART = 0.9, 0.5  # of the gain, kept on the mean


@dataclass(frozen=True, slots=True)
class Cell:
    """Routers of one domain and seed, on the test items of another at one capacity."""

    trained_on: str
    seed: int
    measured_on: str
    capacity: float
    distance: float
    same_label: float | None
    accuracy: float | None
    spent: float


@dataclass(frozen=True, slots=True)
class Overlap:
    """How alike two adapters choose tokens: Jaccard, the mean over layers, units and items."""

    one: str
    one_seed: int
    other: str
    other_seed: int
    capacity: float
    jaccard: float
    by_chance: float  # of two that choose as many, at random


@dataclass(frozen=True, slots=True)
class Kept:
    """What routers trained elsewhere keep of what training on a domain itself gains there."""

    trained_on: str
    measured_on: str
    capacity: float
    share: float  # 1: nothing is lost by the other domain; 0: as good as untrained
    accuracy_lost: float | None  # points of accuracy less than routers trained there


@dataclass(frozen=True, slots=True)
class Robustness:
    """All that one run found."""

    about: Mapping[str, Any]
    domains: Sequence[str]
    everything: str  # the name of all domains together
    cells: Sequence[Cell]
    overlaps: Sequence[Overlap]

    def mean(self, trained_on: str, measured_on: str, capacity: float, field: str) -> float | None:
        """The mean of a field over seeds; None where the task has no such number."""
        values = list(self._values(trained_on, measured_on, capacity, field))
        return statistics.fmean(values) if values else None

    def spread(self, trained_on: str, measured_on: str, capacity: float, field: str) -> float:
        values = list(self._values(trained_on, measured_on, capacity, field))
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def _values(self, trained: str, measured: str, capacity: float, field: str) -> Iterator[float]:
        """By seed; of everything the mean over the domains, each of which weighs alike."""
        where = self.domains if measured == self.everything else (measured,)
        by_seed: dict[int, list[float]] = {}
        for cell in self.cells:
            if cell.trained_on == trained and cell.measured_on in where:
                value = getattr(cell, field)
                if cell.capacity == capacity and value is not None:
                    by_seed.setdefault(cell.seed, []).append(value)
        yield from map(statistics.fmean, by_seed.values())

    @property
    def capacities(self) -> list[float]:
        return sorted({cell.capacity for cell in self.cells}, reverse=True)

    def kept(self) -> list[Kept]:
        """For every domain and every other one, at every capacity."""
        found = []
        for capacity in self.capacities:
            for here in self.domains:
                for there in self.domains:
                    if here != there:
                        found.append(self._kept(there, here, capacity))
        return found

    def _kept(self, trained: str, measured: str, capacity: float) -> Kept:
        untrained, own, other = (
            self.mean(each, measured, capacity, "distance") or 0.0
            for each in (UNTRAINED, measured, trained)
        )
        right = self.mean(measured, measured, capacity, "accuracy")
        wrong = self.mean(trained, measured, capacity, "accuracy")
        gain = untrained - own
        return Kept(
            trained,
            measured,
            capacity,
            (untrained - other) / gain if gain > 0 else 0.0,
            None if right is None or wrong is None else right - wrong,
        )

    def jaccard(self, one: str, other: str, capacity: float) -> float | None:
        """The mean over pairs of adapters; of one seed they began alike, so those do not count."""
        values = [
            each.jaccard
            for each in self.overlaps
            if each.capacity == capacity
            and {each.one, each.other} == {one, other}
            and each.one_seed != each.other_seed
        ]
        return statistics.fmean(values) if values else None

    def sentence(self) -> str:
        """Whether the claim holds here, with the numbers that say so."""
        kept = self.kept()
        gains = [
            (self.mean(UNTRAINED, here, capacity, "distance") or 0.0)
            - (self.mean(here, here, capacity, "distance") or 0.0)
            for here in self.domains
            for capacity in self.capacities
        ]
        if min(gains) <= 0:
            return (
                "Not decided: somewhere routers gained nothing by being trained, so there is "
                "nothing that another domain could lose."
            )
        shares = [each.share for each in kept]
        mean, worst = statistics.fmean(shares), min(kept, key=lambda each: each.share)
        holds = "holds" if mean >= HOLDS else "holds in part" if mean >= HOLDS_IN_PART else "fails"
        lost = [each.accuracy_lost for each in kept if each.accuracy_lost is not None]
        accuracy = f"; accuracy is at most {100 * max(lost):.1f} points lower" if lost else ""
        return (
            f"The claim {holds} here: of what training on a domain itself gains over untrained "
            f"routers, training on another one keeps {mean:.0%} on the mean and {worst.share:.0%} "
            f"at worst (trained on {worst.trained_on}, measured on {worst.measured_on}, capacity "
            f"{worst.capacity:g}){accuracy}."
        )


def write_robustness(folder: Path, found: Robustness) -> list[str]:
    """The names of the files written, report.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_matrices(folder / "domains.png", _matrices(found))
    write_atomically(folder / "report.md", _markdown(found).encode())
    write_json(
        folder / "report.json",
        {
            "about": dict(found.about),
            "sentence": found.sentence(),
            "kept": [asdict(each) for each in found.kept()],
            "cells": [asdict(each) for each in found.cells],
            "overlaps": [asdict(each) for each in found.overlaps],
        },
    )
    return ["domains.png", "report.md", "report.json"]


def _trained(found: Robustness) -> list[str]:
    return [*found.domains, found.everything, UNTRAINED]


def _matrices(found: Robustness) -> list[Matrix]:
    measured, trained = [*found.domains, found.everything], _trained(found)
    distances = [
        Matrix(
            f"distance to the full model, capacity {capacity:g}",
            [[found.mean(row, at, capacity, "distance") for at in measured] for row in trained],
            [f"trained on {row}" if row != UNTRAINED else row for row in trained],
            [f"on {at}" for at in measured],
        )
        for capacity in found.capacities
    ]
    overlaps = [
        Matrix(
            f"tokens kept by both / by either, capacity {capacity:g}",
            [[found.jaccard(row, at, capacity) for at in trained] for row in trained],
            trained,
            trained,
        )
        for capacity in found.capacities
    ]
    return [*distances, *overlaps]


def _markdown(found: Robustness) -> str:
    measured, trained = [*found.domains, found.everything], _trained(found)
    lines = ["# Robustness to the training domain", "", found.sentence(), ""]
    lines += [_about(found), ""]
    for field, title in (
        ("distance", "Distance to the full model (± deviation over seeds)"),
        ("accuracy", "Accuracy"),
        ("same_label", "Share of items with the full model's label"),
    ):
        rows = [
            [f"{capacity:g}", row, *(_cell(found, row, at, capacity, field) for at in measured)]
            for capacity in found.capacities
            for row in trained
        ]
        if any(any(cells[2:]) for cells in rows):
            heads = ["capacity", "trained on", *(f"measured on {at}" for at in measured)]
            lines += [f"## {title}", "", *table(heads, rows), ""]
    rows = [
        [f"{capacity:g}", row, *(_number(found.jaccard(row, at, capacity)) for at in trained)]
        for capacity in found.capacities
        for row in trained
    ]
    chance = {each.capacity: each.by_chance for each in found.overlaps}
    lines += ["## Tokens kept by both, over those kept by either", ""]
    lines += [*table(["capacity", "", *trained], rows), ""]
    by_chance = ", ".join(f"{share:.3f} at {at:g}" for at, share in sorted(chance.items()))
    lines += [
        f"All between routers of different seeds. By chance: {by_chance}.",
        "",
    ]
    return "\n".join(lines)


def _about(found: Robustness) -> str:
    about = found.about
    items = ", ".join(f"{count} {name}" for name, count in about["items"].items())
    of = "; ".join(f"{name}: {', '.join(labels)}" for name, labels in about["domains"].items())
    return (
        f"{about['base']}, {', '.join(about['units'])}, {about['steps']} steps of "
        f"{about['batch_items']} items, {about['seeds']} seeds, {items} test items. Every router "
        f"runs under the same plan: all layers lowered alike. Domains by {about['by']}: {of}."
    )


def _cell(found: Robustness, row: str, at: str, capacity: float, field: str) -> str:
    mean = found.mean(row, at, capacity, field)
    if mean is None:
        return ""
    spread = found.spread(row, at, capacity, field) if field == "distance" else 0.0
    return f"{mean:.4f}" + (f" ± {spread:.4f}" if spread else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
