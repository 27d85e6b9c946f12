"""What a person sees of a long run: a bar on stderr, a log, TensorBoard, a picture at the end.

`progress.jsonl` holds one object per step and is what the picture is drawn from. A resumed run
first drops the lines past its checkpoint, so no step stands there twice.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from training.files import write_atomically

Each = TypeVar("Each")


def bar(label: str, total: int, done: int = 0, unit: str = "it", show: bool = True) -> tqdm[Any]:
    """A bar on stderr with the time left, to be updated by hand."""
    return tqdm(desc=label, total=total, initial=done, unit=unit, file=sys.stderr, disable=not show)


def track(each: Sequence[Each], label: str, show: bool = True) -> Iterable[Each]:
    """Pass things on, with a bar and the time left on stderr."""
    return tqdm(each, desc=label, file=sys.stderr, disable=not show)


class Log:
    """The record of one run in `folder`, from step `done` on; `show=False` records nothing."""

    def __init__(self, folder: Path, label: str, steps: int, done: int, show: bool = True) -> None:
        self._path = folder / "progress.jsonl"
        self._show = show
        self._board: Any = None
        self._bar = bar(label, steps, done, "step", show)
        if not show:
            return
        folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._lines() if line["step"] <= done]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._board = _tensorboard(folder / "tensorboard", done)

    def step(self, number: int, values: Mapping[str, float]) -> None:
        """Record step `number`, counted from 1; `distil` and the like go under the bar too."""
        if not self._show:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": number, **values}) + "\n")
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()})
        self._bar.update()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, number)

    def close(self) -> None:
        self._bar.close()
        if self._board is not None:
            self._board.close()

    def draw(self, picture: Path, names: Iterable[str]) -> None:
        """The curves of these values over the steps, each with its running mean, as a PNG."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        lines = self._lines()
        names = [name for name in names if any(name in line for line in lines)]
        figure, axes = pyplot.subplots(
            len(names), 1, squeeze=False, sharex=True, figsize=(8, 2.4 * len(names))
        )
        for axis, name in zip(axes[:, 0], names, strict=True):
            steps = [line["step"] for line in lines if name in line]
            values = [line[name] for line in lines if name in line]
            axis.plot(steps, values, color="0.75", linewidth=0.8)
            axis.plot(steps, _running_mean(values), color="tab:blue")
            axis.set_ylabel(name)
            axis.grid(alpha=0.3)
        axes[-1, 0].set_xlabel("step")
        figure.tight_layout()
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=110)
        pyplot.close(figure)
        write_atomically(picture, drawn.getvalue())

    def _lines(self) -> list[dict[str, float]]:
        """The whole lines of the log: a run killed while writing leaves half a one."""
        if not self._path.exists():
            return []
        whole, _, _ = self._path.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]


def _running_mean(values: list[float]) -> list[float]:
    width = max(1, len(values) // 20)
    spans = [values[max(0, at + 1 - width) : at + 1] for at in range(len(values))]
    return [sum(span) / len(span) for span in spans]


def _tensorboard(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=done + 1)
