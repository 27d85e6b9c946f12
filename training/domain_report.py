"""Are routers robust to what they were trained on? The matrix on paper, and what it says.

Each cell is the mean over seeds: routers trained on one domain, measured on another, beside
routers that know nothing. What training on a domain itself gains over those, training on another
one keeps in part: that share is the answer.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elastiformer.routers import TOKEN_UNITS
from elastiformer.tasks import TEXT_GENERATION
from training.files import write_atomically, write_json
from training.pictures import Matrix, draw_matrices
from training.reports import table

UNTRAINED = "untrained"
HOLDS, HOLDS_IN_PART = 0.9, 0.5  # of the gain, kept on the mean


@dataclass(frozen=True, slots=True)
class Cell:
    """Routers of one domain and seed, on the test data of another at one capacity."""

    trained_on: str
    seed: int
    measured_on: str
    capacity: float
    distance: float
    same: float | None  # share of items, or tokens, with the full model's likeliest label, or next
    accuracy: float | None
    spent: float


@dataclass(frozen=True, slots=True)
class Overlap:
    """How alike two adapters choose: Jaccard, the mean over layers, units and items."""

    one: str
    one_seed: int
    other: str
    other_seed: int
    capacity: float
    jaccard: float
    by_chance: float  # of two that choose as much, at random


@dataclass(frozen=True, slots=True)
class Kept:
    """What routers trained elsewhere keep of what training on a domain itself gains there."""

    trained_on: str
    measured_on: str
    capacity: float
    share: float  # 1: nothing is lost by the other domain; 0: as good as untrained
    accuracy_lost: float | None  # less than routers trained there have; the next one alike
    same_lost: float | None


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
        gain = untrained - own
        return Kept(
            trained,
            measured,
            capacity,
            (untrained - other) / gain if gain > 0 else 0.0,
            self._lost(trained, measured, capacity, "accuracy"),
            self._lost(trained, measured, capacity, "same"),
        )

    def _lost(self, trained: str, measured: str, capacity: float, field: str) -> float | None:
        right = self.mean(measured, measured, capacity, field)
        wrong = self.mean(trained, measured, capacity, field)
        return None if right is None or wrong is None else right - wrong

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

    def alike(self, capacity: float) -> str:
        """How alike routers choose that share a domain, do not, or know nothing."""
        pairs = {
            "of one domain": [(each, each) for each in self.domains],
            "of two": list(itertools.combinations(self.domains, 2)),
            "trained and untrained": [(each, UNTRAINED) for each in self.domains],
        }
        found = {
            what: [share for pair in of if (share := self.jaccard(*pair, capacity)) is not None]
            for what, of in pairs.items()
        }
        said = [f"{what} {statistics.fmean(of):.3f}" for what, of in found.items() if of]
        chance = [each.by_chance for each in self.overlaps if each.capacity == capacity]
        return ", ".join([*said, f"by chance {statistics.fmean(chance):.3f}"])

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
        at = [(c, [each.share for each in kept if each.capacity == c]) for c in self.capacities]
        by_capacity = ", ".join(f"{statistics.fmean(of):.0%} at {c:g}" for c, of in at)
        together = statistics.fmean(
            self._kept(self.everything, here, capacity).share
            for here in self.domains
            for capacity in self.capacities
        )
        holds = "holds" if mean >= HOLDS else "holds in part" if mean >= HOLDS_IN_PART else "fails"
        of_accuracy = [each.accuracy_lost for each in kept if each.accuracy_lost is not None]
        of_same = [each.same_lost for each in kept if each.same_lost is not None]
        what = "accuracy" if of_accuracy else f"the share of {_of_what(self.about)}"
        lost = of_accuracy or of_same
        lower = f"; {what} is at most {100 * max(lost):.1f} points lower" if lost else ""
        return (
            f"The claim {holds} here: of what training on a domain itself gains over untrained "
            f"routers, training on another one keeps {mean:.0%} on the mean ({by_capacity}) and "
            f"{worst.share:.0%} at worst (trained on {worst.trained_on}, measured on "
            f"{worst.measured_on}, capacity {worst.capacity:g}){lower}. Training on all together "
            f"keeps {together:.0%} on the mean."
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
            f"{_distance(found.about)}, capacity {capacity:g}",
            [[found.mean(row, at, capacity, "distance") for at in measured] for row in trained],
            [f"trained on {row}" if row != UNTRAINED else row for row in trained],
            [f"on {at}" for at in measured],
        )
        for capacity in found.capacities
    ]
    overlaps = [
        Matrix(
            f"kept by both / by either, capacity {capacity:g}",
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
    lines += [_about(found), "", "```bash", found.about["command"], "```", ""]
    for field, title in (
        ("distance", f"{_distance(found.about)} (± deviation over seeds)"),
        ("accuracy", "Accuracy"),
        ("same", f"Share of {_of_what(found.about)}"),
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
    lines += [f"## {_kept(found.about)} kept by both, over those kept by either", ""]
    lines += [*table(["capacity", "", *trained], rows), ""]
    lines += ["All between routers of different seeds, the mean over pairs:", ""]
    lines += [f"- at {capacity:g}: {found.alike(capacity)}" for capacity in found.capacities]
    lines.append("")
    return "\n".join(lines)


def _about(found: Robustness) -> str:
    about = found.about
    each, tests = ("items", "items") if "items" in about else ("tokens", "windows")
    counts = ", ".join(f"{count} {name}" for name, count in about[tests].items())
    sizes = ", ".join(f"{count:,} {name}" for name, count in about["trained_on"].items())
    of = "; ".join(f"{name}: {', '.join(labels)}" for name, labels in about["domains"].items())
    lines = [
        f"{about['base']}, {', '.join(about['units'])}, {about['steps']} steps of "
        f"{about[f'batch_{each}']} {each} with {about['lessons']} lessons, {about['seeds']} seeds, "
        f"{counts} test {tests}. Every router runs under the same plan: all layers lowered alike. "
        f"Domains by {about['by']}: {of}. Trained on (of each domain as much): {sizes} "
        f"{'items' if each == 'items' else 'characters'}."
    ]
    if each == "tokens":
        lines.append(
            f"Rows of {about['window']} tokens in training; test windows have "
            f"{about['held_out_window']}, every token scored."
        )
    return " ".join(lines)


def _distance(about: Mapping[str, Any]) -> str:
    if about["task"] == TEXT_GENERATION:
        return "KL to the full model, nats per token"
    return "Distance to the full model"


def _of_what(about: Mapping[str, Any]) -> str:
    if about["task"] == TEXT_GENERATION:
        return "tokens with the full model's likeliest next one"
    return "items with the full model's label"


def _kept(about: Mapping[str, Any]) -> str:
    """What the units choose among."""
    of_tokens = {unit.value for unit in TOKEN_UNITS}
    kinds = dict.fromkeys("tokens" if unit in of_tokens else unit for unit in about["units"])
    return " and ".join(kinds).capitalize()


def _cell(found: Robustness, row: str, at: str, capacity: float, field: str) -> str:
    mean = found.mean(row, at, capacity, field)
    if mean is None:
        return ""
    spread = found.spread(row, at, capacity, field) if field == "distance" else 0.0
    return f"{mean:.4f}" + (f" ± {spread:.4f}" if spread else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
