"""The paper's recipe on paper: what each unit loses for what it saves, and what choices change.

A choice is judged at the keep shares that all its forms were measured at, by the geometric mean of
KL over the reference's: below 1 it loses less.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from elastiformer import Unit
from training.files import write_atomically, write_json
from training.pictures import Curve, draw_curves
from training.reports import digits, table


@dataclass(frozen=True, slots=True)
class Point:
    """What one keep share loses, every token scored; KL in nats per token."""

    share: float
    spent: float  # of the block FLOPs, routers and LoRA included
    kl: float
    kl_p95: float
    perplexity_ratio: float
    same_top: float  # share of tokens whose likeliest next token is the full model's


@dataclass(frozen=True, slots=True)
class Training:
    """The record of one row's training; losses: distillation, over a quarter."""

    steps: int
    tokens: int
    seed: int
    data_sha256: str
    parameters: int
    first_loss: float
    last_loss: float
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Row:
    """One unit and how its routers were trained: options of `distill` beside the common ones."""

    name: str
    unit: Unit
    options: Mapping[str, str] = field(default_factory=dict)
    trained: bool = True
    training: Training | None = None
    points: tuple[Point, ...] = ()

    def measured(self, done: Mapping[str, Any]) -> Row:
        """This row with what its file says."""
        training = done["training"]
        return replace(
            self,
            training=None if training is None else Training(**training),
            points=tuple(Point(**point) for point in done["points"]),
        )

    @property
    def by_share(self) -> dict[float, Point]:
        return {point.share: point for point in self.points}

    @property
    def curve(self) -> Curve:
        return [(point.spent, point.kl) for point in self.points if point.share < 1]


@dataclass(frozen=True, slots=True)
class Choice:
    """One thing that the paper leaves open: a row of every other form, beside a reference row."""

    title: str
    reference: str  # the row
    form: str  # of the reference
    others: Mapping[str, Mapping[str, str]]  # options of the others, by form

    def row(self, form: str) -> str:
        """The name of another form's row."""
        return f"{self.title}: {form}".replace(",", "").replace(": ", "-").replace(" ", "-")


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that one study found."""

    about: Mapping[str, Any]
    rows: Sequence[Row]
    choices: Sequence[Choice]

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    @property
    def alone(self) -> list[Row]:
        """The rows of each unit by itself, unit by unit, those that nobody trained first."""
        others = {choice.row(form) for choice in self.choices for form in choice.others}
        found = [row for row in self.rows if row.name not in others]
        return sorted(found, key=lambda row: (list(Unit).index(row.unit), row.trained))

    @property
    def judged(self) -> list[tuple[Choice, dict[str, Row]]]:
        """Every choice of which more than the reference was measured, with its rows by form."""
        each = ((choice, self._forms(choice)) for choice in self.choices)
        return [(choice, forms) for choice, forms in each if len(forms) > 1]

    def _forms(self, choice: Choice) -> dict[str, Row]:
        """The rows of a choice that were measured, the reference first; none without it."""
        names = {choice.form: choice.reference}
        names |= {form: choice.row(form) for form in choice.others}
        found = {form: row for form, name in names.items() if (row := self.row(name)) is not None}
        return found if choice.form in found else {}


def common(rows: Iterable[Row]) -> list[float]:
    """The keep shares below 1 that all of them were measured at, largest first."""
    shares = set.intersection(*(set(row.by_share) for row in rows))
    return sorted((share for share in shares if share < 1), reverse=True)


def ratio(row: Row, reference: Row) -> float | None:
    """KL over the reference's, geometric mean of the keep shares below 1 that both have."""
    pairs = [
        (row.by_share[share].kl, reference.by_share[share].kl) for share in common((row, reference))
    ]
    ratios = [kl / of for kl, of in pairs if kl > 0 and of > 0]
    return statistics.geometric_mean(ratios) if ratios else None


def sentences(recipe: Recipe) -> Iterator[str]:
    """What the numbers say, unit by unit and choice by choice."""
    for unit in dict.fromkeys(row.unit for row in recipe.rows):
        before, after, repaired = (recipe.row(f"{unit}{of}") for of in ("-untrained", "", "+lora"))
        if before is None or after is None or repaired is None:
            continue
        gains = [ratio(after, before), ratio(repaired, before)]
        if None not in gains:
            yield (
                f"`{unit}`: trained routers lose {gains[0]:.2f} times what untrained ones lose, "
                f"with rank-1 LoRA {gains[1]:.2f} times."
            )
    for choice, forms in recipe.judged:
        ratios = {form: ratio(row, forms[choice.form]) for form, row in forms.items()}
        found = {form: of for form, of in ratios.items() if of is not None}
        if len(found) > 1:
            best = min(found, key=lambda form: found[form])
            others = ", ".join(f"{form} {of:.2f}" for form, of in found.items())
            title = choice.title.capitalize()
            yield f"{title} (`{choice.reference}`): {best} loses least: {others}."


def write_recipe(folder: Path, recipe: Recipe) -> list[str]:
    """The names of the files written, report.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    files = ["report.md", "report.json"]
    if panels := _panels(recipe):
        draw_curves(
            folder / "recipe.png",
            panels,
            "share of the block FLOPs spent",
            "KL to the full model",
            log_y=True,
            across=min(4, len(panels)),
        )
        files.insert(0, "recipe.png")
    write_atomically(folder / "report.md", _markdown(recipe, files[0] == "recipe.png").encode())
    write_json(
        folder / "report.json",
        {
            "about": dict(recipe.about),
            "sentences": list(sentences(recipe)),
            "rows": [asdict(row) for row in recipe.rows],
            "choices": [
                {
                    "title": choice.title,
                    "reference": choice.form,
                    "rows": {form: row.name for form, row in forms.items()},
                    "kl_over_reference": {
                        form: ratio(row, forms[choice.form]) for form, row in forms.items()
                    },
                }
                for choice, forms in recipe.judged
            ],
        },
    )
    return files


def _panels(recipe: Recipe) -> dict[str, dict[str, Curve]]:
    """A panel for each unit that was measured alone, and one for each choice."""
    everywhere = {row.name: row.curve for row in recipe.alone if row.unit is Unit.CHANNELS}
    panels: dict[str, dict[str, Curve]] = {}
    for row in recipe.alone:
        if row.unit is not Unit.CHANNELS:
            panels.setdefault(row.unit.value, {})[row.name] = row.curve
    panels = {unit: curves | everywhere for unit, curves in panels.items()}
    for choice, forms in recipe.judged:
        at = common(forms.values())  # of the reference there are more
        panels[f"{choice.title} ({choice.reference})"] = {
            form: [(row.by_share[share].spent, row.by_share[share].kl) for share in at]
            for form, row in forms.items()
        }
    return panels


def _markdown(recipe: Recipe, drawn: bool) -> str:
    about = recipe.about
    lines = ["# The paper's recipe, unit by unit", "", *_prose(about), ""]
    lines += [*(f"- {sentence}" for sentence in sentences(recipe)), ""]
    if drawn:
        lines += ["![KL against what is spent](recipe.png)", ""]
    shares = sorted({p.share for row in recipe.alone for p in row.points}, reverse=True)
    heads = ["row", *(f"keep {share:g}" for share in shares)]
    for title, cell in (
        ("KL, in nats per token / share of the block FLOPs spent", _kl),
        ("95th percentile of KL / perplexity over the full model's", _tail),
    ):
        lines += [f"## Each unit alone: {title}", ""]
        rows = [[f"`{row.name}`", *(cell(row, s) for s in shares)] for row in recipe.alone]
        lines += [*table(heads, rows), ""]
    lines += ["## The open choices", ""]
    lines += [
        "The first form of each is the row above. *Ratio*: KL over that row's, the geometric mean "
        "of the shares; what is spent may differ.",
        "",
    ]
    lines += _choices(recipe)
    lines += ["", "## Trainings", ""]
    lines += ["A loss is of the row's own divergence. Hashes, seeds and versions: report.json.", ""]
    lines += table(
        ["row", "options", "steps", "tokens", "parameters", "loss, first quarter", "last quarter"],
        list(map(_training, recipe.rows)),
    )
    return "\n".join([*lines, ""])


def _prose(about: Mapping[str, Any]) -> list[str]:
    on, held = about["trained_on"], about["measured_on"]
    tokens = about["steps"] * about["batch_tokens"]
    return [
        f"{about['base']['id']}, {about['dtype']}. Every row is a training of its own, on "
        f"{on['name']} (sha256 {on['sha256'][:12]}): {about['steps']} steps of "
        f"{about['batch_tokens']} tokens ({tokens} in all) in windows of {about['window']}, "
        f"learning rate {about['lr']:g}, seed {about['seed']}; the same texts and the "
        "same keep shares, drawn anew for "
        f"each window from {about['least_share']:g} to 1, in every row, and one router for all of "
        f"them. Measured on {held['windows']} windows of {held['window_tokens']} tokens of "
        f"{held['name']} (sha256 {held['sha256'][:12]}), every token scored, in the form that is "
        "served. All layers keep the same share. Other options as `distill` has them. At a share "
        "of 1 no router and no LoRA runs, whatever the gate: that is the full model. One training "
        "each, so small differences may be chance.",
        "",
        "```bash",
        str(about["command"]),
        "```",
    ]


def _choices(recipe: Recipe) -> list[str]:
    judged = recipe.judged
    shares = sorted({s for _, forms in judged for s in common(forms.values())}, reverse=True)
    rows = []
    for choice, forms in judged:
        for form, row in forms.items():
            of = ratio(row, forms[choice.form]) if form != choice.form else 1.0
            cells = [choice.title, f"`{row.unit}`", form, *(_kl(row, share) for share in shares)]
            rows.append([*cells, "" if of is None else f"{of:.2f}"])
    return table(["choice", "unit", "form", *(f"keep {s:g}" for s in shares), "ratio"], rows)


def _kl(row: Row, share: float) -> str:
    point = row.by_share.get(share)
    return "" if point is None else f"{digits(point.kl)} / {point.spent:.3f}"


def _tail(row: Row, share: float) -> str:
    point = row.by_share.get(share)
    if point is None:
        return ""
    return f"{digits(point.kl_p95)} / {digits(point.perplexity_ratio)}"


def _training(row: Row) -> list[str]:
    options = " ".join(f"--{name} {value}" for name, value in row.options.items())
    done = row.training
    if done is None:
        return [f"`{row.name}`", options, "0", "0", "0", "", ""]
    return [
        f"`{row.name}`",
        f"`{options}`" if options else "",
        str(done.steps),
        str(done.tokens),
        str(done.parameters),
        f"{done.first_loss:.3f}",
        f"{done.last_loss:.3f}",
    ]
