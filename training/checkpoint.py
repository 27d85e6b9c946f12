"""Where a run stands, on disk: enough to go on to the same bits. Only safetensors and JSON.

A checkpoint is a folder `step-N` that appears under its name when every byte of it is on disk.
The one before it is removed only then, so a run killed at any moment leaves a whole one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from training.files import RunError, sync_folder, write_atomically, write_json

NAME = re.compile(r"step-(\d+)")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One moment of a run, between two steps."""

    step: int  # steps done
    state: Mapping[str, Any]  # plain JSON: position in the data, and what the run was asked to do
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]  # the optimizer's, as "parameter name:moment"


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint into `folder`, then remove those before it."""
    final = folder / f"step-{checkpoint.step:07d}"
    beside = folder / f".{final.name}.part"
    if final.exists():  # the same step of the same run holds the same bits
        return final
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for name, tensors in (("weights", checkpoint.weights), ("moments", checkpoint.moments)):
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        write_atomically(beside / f"{name}.safetensors", save(plain))
    write_json(beside / "state.json", {"step": checkpoint.step, **checkpoint.state})
    beside.rename(final)
    sync_folder(folder)
    for other in _all(folder):
        if other != final:
            shutil.rmtree(other)
    return final


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The furthest whole checkpoint in `folder`, if there is one.

    Raises:
        RunError: when it cannot be read.
    """
    found = _all(folder)
    if not found:
        return None
    path = found[-1]
    try:
        state = json.loads((path / "state.json").read_text())
        weights, moments = (
            load((path / f"{name}.safetensors").read_bytes()) for name in ("weights", "moments")
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"checkpoint {path} cannot be read: {error}") from error
    return Checkpoint(state.pop("step"), state, weights, moments)


def remove_checkpoints(folder: Path) -> None:
    for path in [*_all(folder), *folder.glob(".step-*.part")]:
        shutil.rmtree(path)


def _all(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(each for each in folder.iterdir() if NAME.fullmatch(each.name))


def read_moments(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """An AdamW's memory as flat tensors; empty before its first step."""
    return {
        f"{name}:{moment}": optimizer.state[parameter][moment]
        for name, parameter in parameters.items()
        for moment in MOMENTS
        if parameter in optimizer.state
    }


def write_moments(
    optimizer: torch.optim.AdamW,
    parameters: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
) -> None:
    """Give an AdamW the memory that `read_moments` read."""
    for name, parameter in parameters.items():
        if f"{name}:step" in moments:
            optimizer.state[parameter] = {
                # The step count stays where AdamW keeps it: on the CPU.
                moment: moments[f"{name}:{moment}"].to(
                    "cpu" if moment == "step" else parameter.device
                )
                for moment in MOMENTS
            }


def copy_weights(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Set parameters to saved weights.

    Raises:
        RunError: naming every misfit at once.
    """
    wrong = [
        f"  {name}: {'missing' if name not in weights else f'saved {tuple(weights[name].shape)}'}"
        for name, parameter in parameters.items()
        if name not in weights or weights[name].shape != parameter.shape
    ]
    wrong += [f"  {name}: not of this run" for name in weights if name not in parameters]
    if wrong:
        raise RunError("\n".join(["the checkpoint does not fit this run:", *wrong]))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
