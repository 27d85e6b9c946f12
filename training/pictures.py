"""Pictures of what was measured: what matters, what is kept, and what it buys.

matplotlib is loaded only when something is drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastiformer import Phase
from elastiformer.capacity import Plan
from training.allotment import FIELDS, TOKEN_FIELDS
from training.files import write_atomically
from training.sensitivity import LATE, Probe

Curve = Sequence[tuple[float, ...]]  # (x, y), or with the standard error of y behind them


def draw_calibration(
    path: Path,
    answers: Mapping[Probe, float],
    kept: Mapping[Phase, Mapping[float, Plan]],
    layers: int,
) -> None:
    """The sensitivity of each layer and unit, and below it what is kept at a few capacities."""
    pyplot = _pyplot()
    shown = {phase: _some(list(plans), 3) for phase, plans in kept.items()}
    rows = 1 + max((len(each) for each in shown.values()), default=0)
    figure, axes = pyplot.subplots(
        rows, 2, squeeze=False, figsize=(4 + 0.36 * layers, 2.9 * rows), constrained_layout=True
    )
    for column, phase in enumerate(Phase):
        grid, labels = _sensitivity(answers, phase, layers)
        _heatmap(figure, axes[0][column], grid, labels, f"{phase}: log10 KL of a probe", "magma")
        for row, capacity in enumerate(shown.get(phase, ()), start=1):
            kept_grid, kept_labels = kept_grid_of(kept[phase][capacity])
            title = f"{phase}: kept at capacity {capacity:g}"
            _heatmap(figure, axes[row][column], kept_grid, kept_labels, title, "viridis", (0, 1))
    for axis in axes.flat:
        axis.set_visible(bool(axis.has_data()))
    _save(figure, path)


def draw_kept(path: Path, kept: Mapping[str, Plan]) -> None:
    """What each layer keeps of each unit, one panel per name."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        len(kept), 1, squeeze=False, figsize=(10, 2.6 * len(kept)), constrained_layout=True
    )
    for axis, (title, plan) in zip(axes[:, 0], kept.items(), strict=True):
        grid, labels = kept_grid_of(plan)
        _heatmap(figure, axis, grid, labels, title, "viridis", (0, 1))
    _save(figure, path)


def draw_curves(
    path: Path,
    panels: Mapping[str, Mapping[str, Curve]],
    x: str,
    y: str,
    log_y: bool = False,
    across: int | None = None,
) -> None:
    """One panel per title, `across` or all of them side by side; one line per name.

    Points are marked, with their errors if known. Panels share a legend where one of
    them has all names.
    """
    pyplot = _pyplot()
    across = across or len(panels)
    down = math.ceil(len(panels) / across)
    figure, axes = pyplot.subplots(
        down, across, squeeze=False, figsize=(5.2 * across, 4.2 * down), constrained_layout=True
    )
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    alike = len(panels) > 1 and any(len(curves) == len(names) for curves in panels.values())
    drawn: dict[str, Any] = {}
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        colours = names if alike else list(curves)
        for name, curve in curves.items():
            points = sorted(point for point in curve if not log_y or point[1] > 0)
            errors = [point[2] if len(point) > 2 else 0.0 for point in points]
            drawn[name] = axis.errorbar(
                [point[0] for point in points],
                [point[1] for point in points],
                yerr=errors if any(errors) else None,
                fmt="o-",
                color=f"C{colours.index(name)}",
                capsize=2,
                label=name,
            )
        if log_y:
            axis.set_yscale("log")
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
        if not alike:
            axis.legend(fontsize="small")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    if alike:  # below the panels, where it hides no point
        figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=min(5, len(drawn)))
    _save(figure, path)


def draw_spread(path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]], x: str) -> None:
    """One panel per title, one line per name: every value a point, from the least to the most."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        squeeze=False,
        sharex=True,
        figsize=(7.5, 0.7 + sum(0.6 + 0.33 * len(lines) for lines in panels.values())),
        constrained_layout=True,
    )
    for axis, (title, lines) in zip(axes[:, 0], panels.items(), strict=True):
        for at, values in enumerate(lines.values()):
            mean = sum(values) / len(values)
            reach = [[mean - min(values)], [max(values) - mean]]
            axis.errorbar(mean, at, xerr=reach, fmt="|", markersize=12, capsize=4, color="tab:blue")
            axis.plot(values, [at] * len(values), ".", color="black")
        axis.set_xscale("log")
        axis.set(title=title, yticks=range(len(lines)), yticklabels=list(lines))
        axis.invert_yaxis()
        axis.grid(alpha=0.3, which="both", axis="x")
    axes[-1, 0].set_xlabel(x)
    _save(figure, path)


def draw_rows(
    path: Path, panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]], x: str
) -> None:
    """One panel per title, one line per row: (value, its error) of each name, on a log scale."""
    from matplotlib import ticker

    pyplot = _pyplot()
    most = max(len(rows) for rows in panels.values())
    figure, axes = pyplot.subplots(
        1,
        len(panels),
        squeeze=False,
        figsize=(6.6 * len(panels), 1.2 + 0.26 * most),
        constrained_layout=True,
    )
    names = list(
        dict.fromkeys(name for rows in panels.values() for row in rows.values() for name in row)
    )
    for axis, (title, rows) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            here = [(*row[name], at) for at, row in enumerate(rows.values()) if name in row]
            if here:
                values, errors, places = zip(*here, strict=True)
                colour = f"C{names.index(name)}"
                axis.errorbar(values, places, xerr=errors, fmt="o", color=colour, label=name)
        axis.axvline(1.0, color="0.6", linewidth=0.8)
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        steps = (1, 2, 5) if high > 8 * low else (1, 1.1, 1.2, 1.5, 2, 3, 5, 6, 7, 8, 9)
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=steps))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.set_yticks(range(len(rows)), list(rows))
        axis.invert_yaxis()
        axis.set(title=title, xlabel=x)
        axis.grid(axis="x", alpha=0.3)
        axis.legend(fontsize="small")
    _save(figure, path)


def draw_patches(
    path: Path,
    pictures: Sequence[Sequence[Sequence[float]]],
    kept: Mapping[str, Sequence[Sequence[Sequence[float]]]],
) -> None:
    """Each picture in the first column, and beside it what was kept of its patches.

    Args:
        pictures: grey levels in [0, 1], rows of pixels.
        kept: by title, for each picture the kept share of each patch in [0, 1], rows of patches;
            a patch that nothing was kept of is black.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        len(pictures),
        1 + len(kept),
        squeeze=False,
        figsize=(1.5 * (1 + len(kept)), 1.5 * len(pictures) + 0.4),
        constrained_layout=True,
    )
    for row, picture in enumerate(pictures):
        height, width = len(picture), len(picture[0])
        across = (-0.5, width - 0.5, height - 0.5, -0.5)
        for column, title in enumerate(("image", *kept)):
            axis = axes[row][column]
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
            if column:
                # Laid over it: red where all was kept, black where nothing was.
                axis.imshow(kept[title][row], cmap="hot", vmin=0, vmax=2, alpha=0.65, extent=across)
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(title, fontsize="small")
    _save(figure, path)


@dataclass(frozen=True, slots=True)
class Matrix:
    """Numbers with a name for each row and column; None where there is none."""

    title: str
    values: Sequence[Sequence[float | None]]
    rows: Sequence[str]
    columns: Sequence[str]


def draw_matrices(path: Path, matrices: Sequence[Matrix], across: int = 3) -> None:
    """One panel per matrix, `across` of them side by side, every number written into its cell."""
    pyplot = _pyplot()
    down = math.ceil(len(matrices) / across)
    figure, axes = pyplot.subplots(
        down, across, squeeze=False, figsize=(5.4 * across, 3.8 * down), constrained_layout=True
    )
    for axis, matrix in zip(axes.flat, matrices, strict=False):
        grid = [[math.nan if each is None else each for each in row] for row in matrix.values]
        _heatmap(figure, axis, grid, list(matrix.rows), matrix.title, "viridis")
        axis.set(xlabel="", xticks=range(len(matrix.columns)), xticklabels=matrix.columns)
        axis.tick_params(axis="x", labelrotation=20)
        for at, row in enumerate(matrix.values):
            for place, value in enumerate(row):
                if value is not None:
                    box = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1}
                    axis.text(place, at, f"{value:.3f}", ha="center", va="center", bbox=box)
    for axis in axes.flat:
        axis.set_visible(bool(axis.has_data()))
    _save(figure, path)


def draw_images(path: Path, columns: Mapping[str, Sequence[Tensor]]) -> None:
    """A column of images [C, H, W] for each title; what is not a number stays white."""
    pyplot = _pyplot()
    truth = torch.stack(list(next(iter(columns.values()))))  # whose range is everybody's
    lowest, highest = float(truth.min()), float(truth.max())
    down = max(map(len, columns.values()))
    figure, axes = pyplot.subplots(
        down,
        len(columns),
        squeeze=False,
        figsize=(1.3 * len(columns), 1.3 * down + 0.4),
        constrained_layout=True,
    )
    for place, (title, images) in enumerate(columns.items()):
        axes[0][place].set_title(title, fontsize="small")
        for at, image in enumerate(images):
            shown = ((image - lowest) / (highest - lowest)).clamp(0, 1).permute(1, 2, 0)
            axes[at][place].imshow(shown.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    for axis in axes.flat:
        axis.set_axis_off()
    _save(figure, path)


def kept_grid_of(plan: Plan) -> tuple[list[list[float]], list[str]]:
    """Rows of units, columns of layers; units that every layer keeps whole are left out."""
    labels = [name for name in FIELDS if any(getattr(layer, name) < 1 for layer in plan)]
    labels = labels or list(TOKEN_FIELDS)
    return [[getattr(layer, name) for layer in plan] for name in labels], labels


def _sensitivity(
    answers: Mapping[Probe, float], phase: Phase, layers: int
) -> tuple[list[list[float]], list[str]]:
    rows: dict[str, list[float]] = {}
    for probe, kl in answers.items():
        if probe.phase is phase and probe.field != LATE:
            label = f"{probe.field} {probe.share:g}"
            rows.setdefault(label, [math.nan] * layers)[probe.layer] = math.log10(max(kl, 1e-6))
    late = [math.nan] * layers
    for probe, kl in answers.items():
        if probe.phase is phase and probe.field == LATE:
            late[probe.layer] = math.log10(max(kl, 1e-6))
    if not all(map(math.isnan, late)):
        rows["all from here on"] = late
    return list(rows.values()), list(rows)


def _heatmap(
    figure: Any,
    axis: Any,
    grid: list[list[float]],
    labels: list[str],
    title: str,
    colours: str,
    limits: tuple[float | None, float | None] = (None, None),
) -> None:
    if not grid:
        return
    image = axis.imshow(grid, aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1])
    axis.set(title=title, xlabel="layer", yticks=range(len(labels)), yticklabels=labels)
    figure.colorbar(image, ax=axis)


def _some(values: Sequence[float], most: int) -> list[float]:
    """At most so many of them, the first and the last included."""
    if len(values) <= most:
        return list(values)
    return [values[round(at * (len(values) - 1) / (most - 1))] for at in range(most)]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100, metadata={"Software": None})
    pyplot.close(figure)
    write_atomically(path, drawn.getvalue())
