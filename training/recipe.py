"""The paper's recipe as a study: each unit alone, and the choices that the paper leaves open.

    python -m training recipe --base BASE --data TRAIN --held-out TEST --out DIR

Every row is a training of its own, by `distill` with uniform lessons: one unit, the same keep share
in every layer, every token scored. It is measured on other text at fixed keep shares, through the
form that is served, beside routers that nobody trained and beside `channels`, which need none.
Then, at one unit each, what a choice changes: the divergence, the gates, how an MLP is divided,
what skipped tokens leave behind, the load-balancing loss.

DIR holds report.json, report.md and recipe.png; beside it, DIR.run the adapters and a file for
each row that is done. A run that was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from elastiformer import Adapter, Calibration, Capacity, ElasticModel, Phase, Unit, UnitShares
from training import distill
from training.calibrate import capacities
from training.data import Windows, some_windows, tokenizer_of
from training.files import RunError, run_beside, same_run, write_json
from training.learners import read_text, sample_of
from training.loop import VERSIONS, Text
from training.options import command_line, names, real, whole
from training.path_search import thresholds
from training.processes import World
from training.progress import track
from training.quality import Setting, Window, compare, recalibrate, routed, windows_of
from training.recipe_report import Choice, Point, Recipe, Row, Training, write_recipe
from training.sensitivity import Meter
from training.signals import GOES_ON, Stop
from training.start import blank_adapter
from training.student import TextStudent

ROUTED = (Unit.ATTENTION_TOKENS, Unit.MLP_TOKENS, Unit.HEADS, Unit.EXPERTS)
THRESHOLD_WINDOWS = 2  # of the training text, on which token routers get their thresholds
FREE = {"out", "rows", "device"}  # what may differ when a study goes on


def _alone() -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for unit in ROUTED:
        rows[unit] = Row(unit, unit)
        rows[f"{unit}+lora"] = Row(f"{unit}+lora", unit, {"lora-rank": "1"})
    for unit in (*ROUTED, Unit.CHANNELS):
        name = unit.value if unit is Unit.CHANNELS else f"{unit}-untrained"
        rows[name] = Row(name, unit, trained=False)
    return rows


CHOICES = (
    Choice(
        "divergence",
        "heads",
        "forward, full vocabulary",
        {
            "forward, top 50": {"top-k": "50"},
            "reverse, full vocabulary": {"kl": "reverse"},
            "reverse, top 50": {"kl": "reverse", "top-k": "50"},
        },
    ),
    Choice(
        "head gate",
        "heads",
        "hard",
        {form: {"part-gate": form} for form in ("softmax", "renormalised", "mean")},
    ),
    Choice(
        "expert gate",
        "experts",
        "hard",
        {form: {"part-gate": form} for form in ("softmax", "renormalised", "mean")},
    ),
    Choice(
        "expert split", "experts", "coactivation", {"contiguous": {"expert-split": "contiguous"}}
    ),
    Choice(
        "token gate",
        "attention_tokens",
        "hard",
        {form: {"token-gate": form} for form in ("sigmoid", "raw")},
    ),
    Choice("keys of skipped tokens", "attention_tokens", "complete", {"kept": {"kv": "kept"}}),
    Choice("load balance", "experts", "0.1", {"0": {"balance": "0"}}),
)

ALONE = _alone()
ROWS: dict[str, Row] = ALONE | {
    choice.row(form): Row(choice.row(form), Unit(choice.reference), options)
    for choice in CHOICES
    for form, options in choice.others.items()
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", required=True, help="folder, Hub id or embedded name")
    add("--data", required=True, help="text to train on")
    add("--held-out", required=True, help="other text, to measure on")
    add("--out", required=True, type=Path, help="folder of the report")
    add("--rows", type=rows, default=list(ROWS), help="comma-separated (default: all)")
    add("--steps", type=whole(1), default=400, help="of each training")
    add("--batch-tokens", type=whole(1), default=1024, help="of a step")
    add("--window", type=whole(2), default=256, help="tokens of a row in training")
    add("--lr", type=real(above=0), default=1e-3, help="the highest learning rate")
    add("--experts", type=whole(2), default=16, help="blocks that each MLP is divided into")
    add("--shares", type=capacities, default=capacities("1.0,0.9,0.8,0.7,0.6,0.5,0.4,0.3"))
    add(
        "--choice-shares",
        type=capacities,
        default=capacities("0.9,0.7,0.5"),
        help="the same of the open choices, which are compared at them",
    )
    add("--windows", type=whole(1), default=6, help="texts to measure on")
    add("--held-out-window", type=whole(3), default=192, help="tokens of a text to measure on")
    add("--seed", type=int, default=0)
    add("--dtype", default="float32", choices=["auto", "float32", "bfloat16"], help="of the base")
    add("--device", default="auto")


def rows(text: str) -> list[str]:
    """Comma-separated names of rows, each once."""
    return names(text, "row", ROWS)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train and measure what is missing, write the report.

    Raises:
        DataError, RunError, BaseModelError, AdapterError: see their messages.
    """
    started = time.monotonic()
    if stray := [share for share in args.choice_shares if share not in args.shares]:
        raise RunError(f"--choice-shares: {stray[0]:g} is not among --shares")
    folder = run_beside(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    same_run(folder / "options.json", vars(args), FREE)
    with Stop("row, or this step of its training") as stop:
        study = Study(args, folder, stop)
        for name in track(args.rows, label="rows"):
            if stop.asked or not study.settled(ROWS[name]):
                print(f"stopped; {name} is not done, and {GOES_ON}", file=sys.stderr)
                return {"finished": False, "run": str(folder)}
    done = {
        name: row.measured(json.loads(path.read_text()))
        for name, row in ROWS.items()
        if (path := folder / f"{name}.json").exists()
    }
    files = write_recipe(args.out, Recipe(study.about(), list(done.values()), CHOICES))
    return {
        "finished": True,
        "report": str(args.out),
        "files": files,
        "rows": len(done),
        "missing": [name for name in ROWS if name not in done],
        "seconds": round(time.monotonic() - started, 1),
    }


class Study:
    """One base, its texts, and the rows that are done."""

    def __init__(self, args: argparse.Namespace, folder: Path, stop: Stop) -> None:
        self._args, self._folder, self._stop = args, folder, stop
        self._model = ElasticModel.load(args.base, dtype=args.dtype, device=args.device)
        self._world = World(0, 1, args.device)
        if (longest := max(args.window, args.held_out_window)) > self._model.context:
            raise RunError(
                f"a window of {longest}: the context of this model is {self._model.context}"
            )

        if Unit.EXPERTS in {ROWS[name].unit for name in args.rows}:
            split = {"experts": args.experts, "expert_split": "contiguous"}
            self._model.blank_adapter([Unit.EXPERTS], **split)  # refuses what does not fit
        assert self._text and self._held, "read now: what is wrong with them must not come late"

    def settled(self, row: Row) -> bool:
        """Whether this row is done, by now; False when told to stop."""
        path = self._folder / f"{row.name}.json"
        if path.exists():
            return True
        print(f"\n{row.name}", file=sys.stderr)
        training = None
        if row.trained:
            training = self._train(row)
            if training is None:
                return False
        else:
            self._model.attach(self._untrained(row))
        points = self._measure(row)
        write_json(
            path,
            {
                "training": None if training is None else asdict(training),
                "points": [asdict(point) for point in points],
            },
        )
        return True

    def about(self) -> dict[str, Any]:
        args = self._args
        return {
            "base": asdict(self._model.identity),
            "command": command_line("recipe", args, add_arguments, FREE),
            "trained_on": {"name": Path(args.data).name, "sha256": self._text.sha256},
            "measured_on": {
                "name": Path(args.held_out).name,
                "sha256": self._held[1],
                "windows": args.windows,
                "window_tokens": args.held_out_window,
            },
            "steps": args.steps,
            "batch_tokens": args.batch_tokens,
            "window": args.window,
            "lr": args.lr,
            "experts": args.experts,
            "least_share": min(args.shares),
            "seed": args.seed,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }

    # The texts, read once.

    @cached_property
    def _text(self) -> Text:
        return read_text(self._options(ALONE["heads"]), tokenizer_of(self._model))

    @cached_property
    def _sample(self) -> Tensor:
        return sample_of(self._text, self._args.seed)

    @cached_property
    def _held(self) -> tuple[list[Window], str]:
        """The windows to measure on, and the hash of their text."""
        args, tokens = self._args, self._args.held_out_window
        chosen_WT, sha256 = some_windows(
            args.held_out, tokenizer_of(self._model), args.windows, tokens, args.seed
        )
        return windows_of(self._model, chosen_WT, tokens * 2 // 3), sha256

    @cached_property
    def _meter(self) -> Meter:
        ids_WT = self._text.train_WT[-THRESHOLD_WINDOWS:]
        return Meter(self._model, ids_WT, ids_WT.shape[1] * 2 // 3)

    # One row.

    def _options(self, row: Row) -> argparse.Namespace:
        """What `distill` would be told for this row."""
        args, parser = self._args, argparse.ArgumentParser()
        distill.add_arguments(parser)
        given = {
            "base": args.base,
            "data": args.data,
            "out": self._folder / row.name,
            "units": row.unit,
            "lessons": "uniform",
            "min-capacity": min(args.shares),
            "experts": args.experts,
            "lora-rank": "0",
            "steps": args.steps,
            "batch-tokens": args.batch_tokens,
            "window": args.window,
            "lr": args.lr,
            "seed": args.seed,
            "dtype": args.dtype,
            "held-out": 0,
            "probe-windows": 0,
            **row.options,
        }
        words = [word for option, value in given.items() for word in (f"--{option}", str(value))]
        return parser.parse_args([*words, "--resume"])

    def _train(self, row: Row) -> Training | None:
        """Train a row's routers, or find them trained; None when told to stop."""
        options = self._options(row)
        log = self._folder / f"{row.name}.run" / "progress.jsonl"
        if not (options.out / "adapter.json").exists():
            distill.settle(options, self._world)
            # Its windows go on from where the last row stopped; each row begins anew.
            text = Text(
                self._text.sha256,
                self._text.train_WT,
                None,
                Windows(self._text.train_WT, self._args.seed),
            )
            student = TextStudent(self._model)
            begun = distill.prepared(options, self._world, student, text, self._sample)
            report = begun.go(self._stop)
            if report is None or not report["finished"]:
                return None
        self._model.attach_saved(options.out)
        adapter = self._model.adapter
        assert adapter is not None, "an adapter was attached"
        losses = [json.loads(line)["distil"] for line in log.read_text().splitlines()]
        quarter = max(1, len(losses) // 4)  # each step drew keep shares of its own
        return Training(
            steps=len(losses),
            tokens=len(losses) * options.batch_tokens,
            seed=options.seed,
            data_sha256=adapter.training["data_sha256"],
            parameters=sum(each.numel() for each in adapter.parameters().values()),
            first_loss=fmean(losses[:quarter]),
            last_loss=fmean(losses[-quarter:]),
            versions={name: adapter.training["versions"][name] for name in VERSIONS},
        )

    def _untrained(self, row: Row) -> Adapter:
        return blank_adapter(self._options(row), self._model, self._sample)

    def _measure(self, row: Row) -> list[Point]:
        """What is lost and spent at each keep share, by the adapter that is attached."""
        args, model, (windows, _) = self._args, self._model, self._held
        recalibrate(model, None)
        levels = thresholds(self._meter.scores((row.unit,)))
        paths: dict[Phase, tuple[Any, ...]] = dict.fromkeys(Phase, ())
        recalibrate(model, Calibration(1.0, args.held_out_window, paths, levels, ()))
        shares = args.shares if row.name in ALONE else [s for s in args.choice_shares if s < 1]
        return [self._point(row.unit, share, windows) for share in track(shares, row.name)]

    @torch.inference_mode()
    def _point(self, unit: Unit, share: float, windows: Sequence[Window]) -> Point:
        kept = UnitShares(**{unit.value: share})
        found = (
            routed(self._model, window, Capacity(kept, kept), Setting.SCORED) for window in windows
        )
        of = compare(windows, found, share, Setting.SCORED)
        return Point(share, of.spent, of.kl, of.kl_p95, of.perplexity_ratio, of.same_top)
