"""The distillation loop: one run between two steps, how it goes on, and what it leaves.

All that is random in a step is a function of the seed and the step, and the learning rate is one
of the step: a run's state is its weights, the optimizer's memory and a position in the data.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastiformer import Calibration, Selection
from training.checkpoint import (
    Checkpoint,
    copy_weights,
    read_moments,
    save_checkpoint,
    write_moments,
)
from training.data import Windows, seed_of, shard
from training.files import RunError
from training.lessons import Teacher
from training.losses import Direction, Divergence, Weights
from training.processes import World, sum_gradients
from training.progress import Log
from training.signals import GOES_ON, Stop
from training.stream import StreamedWindows
from training.student import Objective, Student, Whole

PARTS = ("distil", "balance", "agreement", "total")  # of the losses
VERSIONS = ("torch", "transformers")


@dataclass(frozen=True, slots=True)
class Text:
    """What is trained on, and what is held out to measure on; the hash is of both.

    `train_WT` is all of it, or of a stream what was read at first.
    """

    sha256: str
    train_WT: Tensor
    held_WT: Tensor | None
    windows: Windows | StreamedWindows


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Of the step after `step` steps: up in a straight line, then down a cosine to a tenth."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return peak * (step + 1) / rising
    gone = (step - rising) / max(1, steps - rising)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * gone)))


class Distillation:
    """A run between two steps: what it is made of, and how it goes on."""

    def __init__(
        self,
        args: argparse.Namespace,
        world: World,
        folder: Path,
        student: Student,
        text: Text,
        options: Mapping[str, object],
        tolerance: Mapping[tuple[int, str], float],
        calibration: Calibration | None = None,
    ) -> None:
        model = student.model
        self._args, self._world, self._folder, self._model = args, world, folder, model
        self._student = student
        self._text, self._options = text, options
        self._parameters: dict[str, nn.Parameter] = dict(model.trainable())
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=args.lr, weight_decay=args.weight_decay
        )
        self._windows = text.windows
        self._teacher = Teacher(
            model.shape,
            args.prompt_units,
            args.output_units,
            args.min_capacity,
            args.window,
            args.seed,
            tolerance,
            args.lessons == "uniform",
            calibration,
            args.max_capacity,
            args.copied,
        )
        self._objective = Objective(
            Divergence(Direction(args.kl), args.top_k, args.temperature),
            Weights(args.balance, args.agreement),
            Selection(args.selection),
            args.image_draws,
            args.even_rows,
        )
        self._rows = args.batch_tokens // args.window
        self._rows_at_once = max(1, args.pass_tokens // args.window)
        self._done = 0
        self._held_out: list[float] = []  # at the beginning, and at every checkpoint

    def restore(self, checkpoint: Checkpoint) -> None:
        copy_weights(self._parameters, checkpoint.weights)
        write_moments(self._optimizer, self._parameters, checkpoint.moments)
        self._windows.go_on(checkpoint.state["position"])
        self._held_out = list(checkpoint.state["held_out"])
        self._done = checkpoint.step

    def go(self, stop: Stop) -> dict[str, Any] | None:
        """Run the steps that are left, or until told to stop."""
        args, leads = self._args, self._world.leads
        log = Log(self._folder, "distill", args.steps, self._done, show=leads)
        began, done_before = time.monotonic(), self._done
        if not self._held_out:
            self._measure()
        stopped = False
        while self._done < args.steps and not stopped:
            values = self._step()
            stopped = self._world.any(stop.asked)
            last = self._done == args.steps
            saving = stopped or last or self._done % args.checkpoint_every == 0
            if saving and self._measure():
                values["held_out"] = self._held_out[-1]
            log.step(self._done, values)
            if saving:
                self._save()
        log.close()
        if not leads:
            return None
        seconds = time.monotonic() - began
        speed = (self._done - done_before) * args.batch_tokens / seconds
        if self._done < args.steps:
            how = GOES_ON if args.resume else "go on with --resume"
            print(f"stopped after step {self._done}; {how}", file=sys.stderr)
            return {"finished": False, "step": self._done, "run": str(self._folder)}
        return self._finish(log) | {"tokens_per_second": round(speed, 1)}

    def _step(self) -> dict[str, float]:
        args, world = self._args, self._world
        ids_BT = self._windows.take(self._rows)
        lessons = [
            self._student.lesson(self._teacher, self._done, row, self._rows)
            for row in range(self._rows)
        ]
        whole = Whole.of(self._model, lessons, args.window)
        mine = shard(range(self._rows), world.rank, world.size)
        self._optimizer.zero_grad()
        parts_4 = self._student.learn(
            ids_BT[mine],
            [lessons[row] for row in mine],
            self._objective,
            whole,
            self._rows_at_once,
        )
        parts: list[float] = world.sum(parts_4).tolist()
        norm = sum_gradients(world, self._parameters)
        if not math.isfinite(float(norm)):
            raise RunError(
                f"the gradient of step {self._done + 1} is not finite: try a lower --lr; "
                "the last checkpoint is untouched"
            )
        scale = (args.clip / (norm + 1e-6)).clamp(max=1.0)
        for parameter in self._parameters.values():
            assert parameter.grad is not None, "a trained parameter without a gradient"
            parameter.grad.mul_(scale)
        rate = learning_rate(self._done, args.steps, args.lr, args.warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._done += 1
        return dict(zip(PARTS, parts, strict=True)) | {"gradient_norm": float(norm), "lr": rate}

    def _measure(self) -> bool:
        """Note the KL on held-out text, under the same lessons every time."""
        held_WT = self._text.held_WT
        if held_WT is None:
            return False
        rows = len(held_WT)
        teacher = replace(self._teacher, seed=seed_of("held out", self._args.seed))
        lessons = [self._student.lesson(teacher, 0, row, rows) for row in range(rows)]
        self._held_out.append(self._student.held_out(held_WT, lessons, self._rows_at_once))
        return True

    def _save(self) -> None:
        if self._world.leads:
            state = {
                "position": self._windows.state(),
                "held_out": self._held_out,
                "options": self._options,
            }
            moments = read_moments(self._optimizer, self._parameters)
            save_checkpoint(self._folder, Checkpoint(self._done, state, self._parameters, moments))

    def _finish(self, log: Log) -> dict[str, Any]:
        """Write the adapter, and draw what happened."""
        args, adapter = self._args, self._model.adapter
        assert adapter is not None, "a student without an adapter"
        log.draw(self._folder / "curve.png", [*PARTS[:3], "held_out", "lr"])
        measured = (
            {"before": self._held_out[0], "after": self._held_out[-1]} if (self._held_out) else None
        )
        start = self._options["start"]
        if start is not None:
            start = {"identity": start, "training": adapter.training}
        adapter.training = {
            "data": Path(args.data).name,
            "tokens": args.steps * args.batch_tokens,
            self._student.measure: measured,
            **self._options,
            "start": start,
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        }
        adapter.save(args.out)
        return {
            "finished": True,
            "base": args.base,
            "adapter": str(args.out),
            "identity": adapter.identity,
            "steps": args.steps,
            "tokens": args.steps * args.batch_tokens,
            "parameters": sum(p.numel() for p in self._parameters.values()),
            self._student.measure: measured,
            "data_sha256": self._text.sha256,
            "run": str(self._folder),
        }
