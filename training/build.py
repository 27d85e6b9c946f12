"""Build a base model from public packages: its data, its training, its folder.

sentiment      MiniLM with a classification head, on rated reviews; only what changed is written
fashion-mnist  a vision transformer, from nothing, taught by a small convolutional network
fashion-mae    a masked autoencoder of the same images, from nothing
fashion-vlm    a vision-language model on canvases of clothes: the tower of fashion-mnist, a
               projector, SmolLM2 with low-rank changes; only what is not SmolLM2's is written

DIR is the model; beside it, DIR.run holds checkpoints, progress.jsonl and the fetched packages. A
run that was stopped, or killed at any moment, goes on with the same command and --resume.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
from pathlib import Path
from typing import Any

from training.files import RunError, run_beside
from training.fitting import Stopped
from training.options import real, whole

MODELS = {
    "sentiment": "sentiment",
    "fashion-mnist": "vision",
    "fashion-mae": "masked_images",
    "fashion-vlm": "canvas_model",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", choices=MODELS, help="which one")
    add("--out", type=Path, required=True, help="folder of the model to write")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--packages", type=Path, help="folder that keeps what is fetched (default: DIR.run)")
    add("--epochs", type=real(above=0), help="over the data")
    add("--teacher-epochs", type=real(above=0), help="of the convolutional network (fashion-mnist)")
    add("--batch", type=whole(1), help="texts or images of a step")
    add("--lr", type=real(above=0), help="the highest learning rate")
    add("--rank", type=whole(1), help="of the low-rank changes (sentiment, fashion-vlm)")
    add("--tower", help="a vision transformer: folder or name (fashion-vlm; default: ours)")
    add("--canvases", type=whole(1), help="to train on (fashion-vlm)")
    add("--set-steps", type=whole(1), help="on sets of image tokens of every kind (fashion-vlm)")
    add("--seed", type=int, default=0, help="of everything random")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Build; what came of it.

    Raises:
        DataError, RunError, BaseModelError: see their messages.
    """
    module: Any = importlib.import_module(f"training.{MODELS[args.model]}")
    given = {
        name: value
        for name in (
            "epochs",
            "teacher_epochs",
            "batch",
            "lr",
            "rank",
            "tower",
            "canvases",
            "set_steps",
        )
        if (value := getattr(args, name)) is not None
    }
    if stray := [name for name in given if name not in module.OPTIONS]:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in stray)
        raise RunError(f"{args.model} has no {names}")
    options = {**module.OPTIONS, **given, "seed": args.seed}
    folder = run_beside(args.out)
    if (args.out / "config.json").exists():
        raise RunError(f"{args.out}: holds a model already; choose another --out")
    if not args.resume:
        if any(folder.glob("*/step-*")):
            raise RunError(f"{folder}: holds a run; --resume goes on with it")
        for left in folder.glob("*/progress.jsonl"):
            shutil.rmtree(left.parent)
    try:
        report = module.build(args.out, folder, args.packages or folder, options)
    except Stopped as stopped:
        return {"finished": False, "step": stopped.done.steps, "run": str(folder)}
    return {"finished": True, "model": args.model, "folder": str(args.out), **report}
