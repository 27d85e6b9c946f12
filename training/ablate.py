"""What each open choice of an adapter is worth: rows that differ from it in one decision.

    python -m training ablate --base BASE --adapter DIR --data TRAIN --held-out TEST --out DIR

Outputs keep channels at the adapter's own plans: by its thresholds, or each token as many, chosen
by one rule or another or under other shares. Prompts leave layers with and without the repair, keep
some of them, or run other last tokens whole. Each row runs through the masked form, on the windows
that `evaluate` takes, and must spend what the adapter spends. Prompts are measured where the
continuation repeats them, too.

DIR holds report.json, report.md and ablation.png; beside it, DIR.run a file for each row that is
done. A run that was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from training.ablation import EQUAL, Study
from training.ablation_report import Ablation, Point, write_ablation
from training.ablation_rows import kept
from training.calibrate import capacities
from training.data import read_corpus, tokenizer_of
from training.files import RunError, run_beside, same_run, write_json
from training.loop import VERSIONS
from training.options import command_line, names, whole
from training.progress import track
from training.ranks import numbers
from training.signals import GOES_ON, Stop

FREE = {"out", "rows", "device"}  # what may differ when a study goes on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", required=True, help="folder, Hub id or embedded name")
    add("--adapter", required=True, help="folder or Hub id, calibrated, of channels")
    add("--data", required=True, help="text that rows learn from, where they learn")
    add("--held-out", required=True, help="other text, to measure on")
    add("--out", required=True, type=Path, help="folder of the report")
    add("--rows", default="all", help="comma-separated names; an unknown one lists them all")
    add("--capacities", type=capacities, default=capacities("0.8,0.65,0.5"))
    add(
        "--leave-at", type=numbers, default=[], help="layers that prompts leave at, comma-separated"
    )
    add(
        "--keep",
        type=sub_layers,
        default=[],
        help="what they keep all the same, leaving at the first of these: 17,16+17,attention:13-17",
    )
    add("--windows", type=whole(1), default=4, help="texts to measure on")
    add("--held-out-window", type=whole(3), default=192, help="tokens of each")
    add("--learn-windows", type=whole(1), default=4, help="texts to learn from")
    add("--learn-window", type=whole(2), default=256, help="tokens of each")
    add("--seed", type=int, default=0, help="of which texts, and of tokens drawn for gradients")
    add("--dtype", default="float32", choices=["auto", "float32", "bfloat16"], help="of the base")
    add("--device", default="auto")


def sub_layers(text: str) -> list[str]:
    """Comma-separated names of sub-layers, each once, as `kept` reads them."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for part in found:
        list(kept(part))
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what is missing, write the report.

    Raises:
        DataError, RunError, BaseModelError, AdapterError: see their messages.
    """
    started = time.monotonic()
    study = Study(args)
    known = study.rows
    try:
        wanted = list(known) if args.rows == "all" else names(args.rows, "row", known)
    except argparse.ArgumentTypeError as error:
        raise RunError(f"--rows: {error}") from None
    folder = run_beside(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    same_run(folder / "options.json", vars(args), FREE)
    with Stop("row") as stop:
        for name in track(wanted, label="rows"):
            path = folder / f"{name}.json"
            if not path.exists():
                if stop.asked:
                    print(f"stopped before {name}; {GOES_ON}", file=sys.stderr)
                    return {"finished": False, "run": str(folder)}
                write_json(path, [asdict(point) for point in study.measured(known[name])])
    done = [
        (row, tuple(_point(each) for each in json.loads(path.read_text())))
        for name, row in known.items()
        if (path := folder / f"{name}.json").exists()
    ]
    files = write_ablation(args.out, Ablation(about(study, args), done))
    measured = {row.name for row, _ in done}
    return {
        "finished": True,
        "report": str(args.out),
        "files": files,
        "rows": len(done),
        "missing": [name for name in known if name not in measured],
        "seconds": round(time.monotonic() - started, 1),
    }


def _point(said: dict[str, Any]) -> Point:
    return Point(**{**said, "kl_by_window": tuple(said["kl_by_window"])})


def about(study: Study, args: argparse.Namespace) -> dict[str, Any]:
    tokenizer = tokenizer_of(study.model)
    held, learnt = read_corpus(args.held_out, tokenizer), read_corpus(args.data, tokenizer)
    return {
        "base": asdict(study.model.identity),
        "adapter": study.adapter.identity,
        "command": command_line("ablate", args, add_arguments, FREE),
        "measured_on": {
            "name": Path(args.held_out).name,
            "sha256": held.sha256,
            "windows": args.windows,
            "window_tokens": args.held_out_window,
            "prompt_tokens": study.prompt_tokens,
        },
        "learnt_on": {
            "name": Path(args.data).name,
            "sha256": learnt.sha256,
            "windows": args.learn_windows,
            "window_tokens": args.learn_window,
        },
        "equal": EQUAL,
        "seed": args.seed,
        "dtype": str(study.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
    }
