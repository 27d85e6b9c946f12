"""Held-out data -> calibration.json: the table capacity -> plan, and what it cost and lost.

    python -m training calibrate --base BASE --adapter DIR --data DATA [--capacities 1.0,0.8,0.6]

Measures how much each layer and unit matters in each phase, finds the order in which to give them
up, sets the thresholds of routers and of channels, then checks on other data, through the form that
is served, that a capacity is kept and what it loses. Every answer is remembered in
DIR/sensitivity.jsonl: a run that was stopped continues where it was. Writes calibration.json,
calibration.png and the model card into DIR.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from elastiformer import AdapterError, Calibration, ElasticModel, Phase
from elastiformer.calibration import DataRecord, Measured
from elastiformer.vlm_weights import is_vlm
from training.allotment import fields_of, uniform
from training.channel_sizes import channel_quantiles
from training.data import check_window, read_corpus, two_sets
from training.encoder_calibrate import (
    FOR_ITEMS,
    add_item_arguments,
    calibrate_items,
    kept_calibration,
    task_asked,
)
from training.files import DataError, check_writable
from training.options import SPREAD, real, refuse_unused, units, whole
from training.path_search import PathSearch, lowest, thresholds, trimmed, units_asked
from training.picture_calibrate import calibrate_pictures
from training.progress import track
from training.quality import Setting, Window, measure, miss, prompt_share, recalibrate, windows_of
from training.sensitivity import (
    Meter,
    Notebook,
    about,
)

TOLERANCE = 0.02  # what a request spends lies so near to what it asked
CAPACITIES = "1.0,0.9,0.8,0.7,0.65,0.6,0.5"


_FOR_TEXTS = ("windows", "check_windows", "window", "prompt_tokens", "uniform")
_FOR_PROBES = (
    *("prompt_units", "output_units", "sweeps", "one_by_one", "late_layers"),
    *("probes", "max_minutes"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, help="folder, Hub id or embedded name")
    parser.add_argument("--adapter", required=True, type=Path, help="folder; written into")
    parser.add_argument("--data", required=True, help="held-out text that no training saw")
    parser.add_argument(
        "--text",
        help="held-out text beside the exchanges of a vision-language model, on which its layers "
        "are calibrated along --keep-paths: image tokens give first, and they what is left",
    )
    parser.add_argument("--capacities", type=capacities, default=capacities(CAPACITIES))
    add_item_arguments(parser)
    parser.add_argument(
        "--image-spread", type=real(least=0), help=f"{SPREAD} (default: as the adapter has it)"
    )
    parser.add_argument(
        "--windows", type=whole(1), default=4, help="texts that every probe runs on"
    )
    parser.add_argument(
        "--check-windows", type=whole(1), default=6, help="other texts, for the table"
    )
    parser.add_argument("--window", type=whole(3), default=192, help="tokens of a text")
    parser.add_argument(
        "--prompt-tokens", type=whole(2), default=None, help="of a text; default: two thirds"
    )
    parser.add_argument(
        "--prompt-units",
        type=units,
        default=None,
        help="what may be lowered in prompts, comma-separated (default: all units of the adapter; "
        "none: whole sub-layers only)",
    )
    parser.add_argument("--output-units", type=units, default=None, help="the same for outputs")
    parser.add_argument("--sweeps", type=whole(0), default=1, help="of tuning, at most; 0: none")
    parser.add_argument(
        "--late-layers",
        action="store_true",
        help="of an encoder whose class token is read: leave out whole layers, the last one first, "
        "and in no other order, which saves the most time",
    )
    parser.add_argument(
        "--one-by-one",
        action="store_true",
        help="leave out an encoder's sub-layers one after the other, each without its router where "
        "that loses little: then also small savings are saved time",
    )
    parser.add_argument(
        "--keep-paths",
        nargs="?",
        const="",
        metavar="ADAPTER",
        help="probe nothing: give up units in the order that the adapter has, or that this other "
        "one has, along which it was trained; set thresholds and the table anew",
    )
    parser.add_argument(
        "--uniform",
        action="store_true",
        help="probe nothing: give up every unit alike in all layers, as the paper does",
    )
    parser.add_argument(
        "--probes",
        type=whole(1),
        help="in each phase, at most (default: all there are); the same number ends the same",
    )
    parser.add_argument(
        "--max-minutes",
        type=real(above=0),
        default=math.inf,
        help="where they end the search, it depends on the machine",
    )
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")


def capacities(text: str) -> list[float]:
    """Comma-separated fractions in (0, 1], largest first, 1.0 always among them."""
    try:
        values = {float(part) for part in text.split(",")}
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers parted by commas; got {text!r}") from None
    if not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"each above 0 and at most 1; got {text!r}")
    return sorted(values | {1.0}, reverse=True)


def check_lowered(option: str, asked: Sequence[float]) -> None:
    """Raises DataError where nothing is left out at any of these: nothing could be compared."""
    if min(asked) == 1:
        raise DataError(f"{option}: at least one below 1; got 1 alone")


def run(args: argparse.Namespace) -> dict[str, Any]:
    check_writable("--adapter", args.adapter)
    if is_vlm(args.base):
        refuse_unused(
            args,
            add_arguments,
            ("task", "seen", "one_by_one", "late_layers", "uniform"),
            "a vision-language model",
        )
        if args.keep_paths is None:
            refuse_unused(args, add_arguments, _FOR_TEXTS, "it without --keep-paths")
        else:
            refuse_unused(args, add_arguments, _FOR_PROBES, "an adapter that keeps its paths")
        return calibrate_pictures(args)
    if args.keep_paths is not None:
        refuse_unused(
            args, add_arguments, (*_FOR_PROBES, "uniform"), "an adapter that keeps its paths"
        )
    if args.uniform:
        refuse_unused(
            args, add_arguments, ("sweeps", "probes", "max_minutes", "late_layers"), "--uniform"
        )
    refuse_unused(args, add_arguments, ("image_spread", "text"), "what routes no image tokens")
    if (task := task_asked(args)) is not None:
        refuse_unused(args, add_arguments, _FOR_TEXTS, "an encoder")
        return calibrate_items(args, task)
    refuse_unused(
        args, add_arguments, (*FOR_ITEMS, "one_by_one", "late_layers"), "a language model"
    )
    started = time.monotonic()
    model = ElasticModel.load(args.base, args.adapter, dtype=args.dtype, device=args.device)
    if model.adapter is None or model.tokenizer is None:
        raise AdapterError(f"{args.adapter}: calibration needs an adapter and a tokenizer")
    asked = units_asked(args, model.adapter.units)
    check_window("--window", args.window, model.context)
    corpus = read_corpus(args.data, model.tokenizer)
    prompt_tokens = args.prompt_tokens or args.window * 2 // 3
    if not 2 <= prompt_tokens < args.window:
        raise DataError(f"--prompt-tokens: from 2 to below --window; got {prompt_tokens}")
    probe_WT, check_WT = two_sets(
        corpus, model.tokenizer, args.window, args.windows, args.check_windows, args.seed
    )
    kept = kept_calibration(args, model)
    recalibrate(model, None)  # what an earlier one said must not count
    meter = Meter(model, probe_WT, prompt_tokens)
    adapter = model.adapter
    job = PathSearch(
        meter,
        Notebook(args.adapter / "sensitivity.jsonl", about(adapter, probe_WT, prompt_tokens)),
        model.shape,
        args.window,
        asked,
        args.capacities,
        until=started + 60 * args.max_minutes,
        sweeps=args.sweeps,
        most=args.probes,
    )
    if args.uniform:
        paths = {phase: uniform(model.shape, fields_of(asked[phase])) for phase in Phase}
    else:
        paths = job.find_paths() if kept is None else dict(kept.paths)
    searched = kept is None and not args.uniform
    least = lowest(paths, model.shape, args.window, args.capacities)
    draft = Calibration(
        lowest=least,
        context=args.window,
        paths={
            phase: trimmed(path, model.shape, least, (1, args.window, model.context))
            for phase, path in paths.items()
        },
        thresholds=thresholds(meter.scores(adapter.units)),
        measured=(),
        data=DataRecord(
            name=Path(corpus.source).name,
            sha256=corpus.sha256,
            windows=len(check_WT),
            window_tokens=args.window,
            seed=args.seed,
        ),
        search=job.record if searched else None if kept is None else kept.search,
    )
    draft = replace(draft, channel_quantiles=channel_quantiles(model, draft, probe_WT))
    recalibrate(model, draft)
    served = [each for each in args.capacities if each >= draft.lowest - 1e-9]
    checked = windows_of(model, check_WT, prompt_tokens)
    rows, worst = check(model, checked, served)
    recalibrate(model, replace(draft, measured=tuple(rows)))
    adapter.save(args.adapter)
    if searched:
        job.draw(args.adapter / "calibration.png", draft, served)
    if worst > TOLERANCE:
        print(
            f"warning: a request missed its capacity by {worst:.3f}, more than {TOLERANCE}",
            file=sys.stderr,
        )
    return {
        "adapter": str(args.adapter),
        "lowest": draft.lowest,
        "not_reached": [each for each in args.capacities if each < draft.lowest - 1e-9],
        "chosen": {phase.value: name for phase, name in job.chosen.items()},
        "candidates": job.compared,
        "knobs": job.knobs,
        "probes_unanswered": job.unanswered,
        "search": None if draft.search is None else asdict(draft.search),
        "worst_miss": worst,
        "promise_kept": worst <= TOLERANCE,
        "measured": [asdict(row) for row in rows],
        "seconds": round(time.monotonic() - started, 1),
    }


def check(
    model: ElasticModel, windows: Sequence[Window], served: Sequence[float]
) -> tuple[list[Measured], float]:
    """The table's rows, and by how much the worst request missed its capacity."""
    rows: list[Measured] = []
    worst = 0.0
    pairs = [(capacity, setting) for capacity in served for setting in Setting]
    found = {
        (capacity, setting): measure(model, windows, capacity, setting)
        for capacity, setting in track(pairs, label="checking on other data")
    }
    for capacity in served:
        both, scored = found[capacity, Setting.BOTH], found[capacity, Setting.SCORED]
        for quality in (both, scored):
            whole = found[1.0, quality.setting].spent_least
            prompt = prompt_share(model, len(windows[0].ids_T))
            missed = miss(capacity, quality.spent_least, quality.spent_most, whole, prompt)
            worst = max(worst, missed)
        rows.append(
            Measured(
                capacity=capacity,
                spent=both.spent,
                kl=both.kl,
                kl_prompt=found[capacity, Setting.PROMPT].kl,
                kl_scored=scored.kl,
                kl_p95=scored.kl_p95,
                perplexity=scored.perplexity,
                perplexity_ratio=scored.perplexity_ratio,
            )
        )
    return rows, worst
