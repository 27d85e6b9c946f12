"""Fit a small model from nothing: steps, a learning rate that falls to zero, and resumption.

Everything random in a step is a function of the seed and the step, so a run's state is its
weights, its optimizers' memory and the number of steps done. What a step computes, the loss, is
handed in.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from training.checkpoint import Checkpoint, copy_weights, latest_checkpoint, save_checkpoint
from training.files import RunError
from training.progress import Log
from training.signals import Stop


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long, and how fast over time: up in a straight line, then down to zero in one."""

    steps: int
    warmup: float = 0.1  # share of the steps
    checkpoint_every: int = 100  # steps

    def share(self, step: int) -> float:
        """Of the highest rate, in the step after `step` steps."""
        rising = max(1, round(self.steps * self.warmup))
        if step < rising:
            return (step + 1) / rising
        return (self.steps - step) / max(1, self.steps - rising)


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a run came to."""

    steps: int
    seconds: float  # of this process; a resumed run's earlier part is not in it


class Stopped(Exception):
    """A run was told to stop; what is done lies in its folder."""

    def __init__(self, done: Fitted) -> None:
        super().__init__(done)
        self.done = done


def optimizers_of(
    named: Mapping[str, nn.Parameter], matrices: float, others: float, decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for what is no matrix, an embedding, or an output head.

    Args:
        matrices, others: the highest learning rate of each.
        decay: weight decay of both, relative to their rates.

    Source: Muon as in torch.optim.Muon, with its rate matched to AdamW's size of update.
    """
    outer = ("embed", "head", "classifier", "first", "token", "position")
    inner = {
        name: parameter
        for name, parameter in named.items()
        if parameter.ndim == 2 and not any(word in name for word in outer)
    }
    rest = [parameter for name, parameter in named.items() if name not in inner]
    made: list[torch.optim.Optimizer] = []
    if inner:
        # Newton-Schulz on a matrix costs little beside a step over hundreds of images.
        made.append(
            torch.optim.Muon(
                inner.values(),
                lr=matrices,
                weight_decay=decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    if rest:
        made.append(torch.optim.AdamW(rest, lr=others, weight_decay=decay, betas=(0.9, 0.98)))
    return made


def fit(
    label: str,
    modules: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    loss: Callable[[int], Mapping[str, Tensor]],
    schedule: Schedule,
    folder: Path,
    options: Mapping[str, object],
    clip: float = 1.0,
) -> Fitted:
    """Run the steps that are left of a run in `folder`, until the last or until told to stop.

    Args:
        modules: what is trained, with the buffers that training changes.
        loss: of one step, by name; the one called "total" is descended.
        options: plain JSON that decides what is learnt; a resumed run must have the same.

    Raises:
        Stopped: before the last step.
        RunError: the folder holds another run, or a gradient is not finite.
    """
    names = {parameter: name for name, parameter in modules.named_parameters()}
    peaks = [[group["lr"] for group in each.param_groups] for each in optimizers]
    done = 0
    if (found := latest_checkpoint(folder)) is not None:
        if found.state["options"] != dict(options):
            raise RunError(f"{folder}: holds a run with other options: {found.state['options']}")
        copy_weights(modules.state_dict(keep_vars=True), found.weights)
        _write_memory(optimizers, names, found.moments)
        done = found.step
    began = time.monotonic()
    log = Log(folder, label, schedule.steps, done)
    with Stop("step") as stop:
        while done < schedule.steps and not stop.asked:
            parts = loss(done)
            for optimizer in optimizers:
                optimizer.zero_grad()
            parts["total"].backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(list(names), clip)
            if not math.isfinite(float(norm)):
                raise RunError(f"the gradient of step {done + 1} is not finite")
            share = schedule.share(done)
            for optimizer, rates in zip(optimizers, peaks, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * share
                optimizer.step()
            done += 1
            log.step(done, {name: float(value.detach()) for name, value in parts.items()})
            if stop.asked or done == schedule.steps or done % schedule.checkpoint_every == 0:
                memory = _read_memory(optimizers, names)
                state = {"options": dict(options)}
                save_checkpoint(folder, Checkpoint(done, state, modules.state_dict(), memory))
    log.close()
    fitted = Fitted(done, time.monotonic() - began)
    if done < schedule.steps:
        print(f"{label}: stopped after step {done}; go on with --resume", file=sys.stderr)
        raise Stopped(fitted)
    return fitted


def _read_memory(
    optimizers: Sequence[torch.optim.Optimizer], names: Mapping[nn.Parameter, str]
) -> dict[str, Tensor]:
    return {
        f"{names[parameter]}:{moment}": value
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        for moment, value in optimizer.state[parameter].items()
    }


def _write_memory(
    optimizers: Sequence[torch.optim.Optimizer],
    names: Mapping[nn.Parameter, str],
    memory: Mapping[str, Tensor],
) -> None:
    of_name: dict[str, dict[str, Tensor]] = {}
    for key, value in memory.items():
        name, _, moment = key.rpartition(":")
        of_name.setdefault(name, {})[moment] = value
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (state := of_name.get(names[parameter])) is not None:
                    optimizer.state[parameter] = {
                        # AdamW's count of steps stays where it keeps it: on the CPU.
                        moment: value.to("cpu" if moment == "step" else parameter.device)
                        for moment, value in state.items()
                    }
