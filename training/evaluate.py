"""The report: quality and cost at each capacity, beside baselines at equal cost.

    python -m training evaluate --base BASE --adapter DIR --data DATA --capacities 1.0,0.8,0.6
                                --out REPORT_DIR

Every number is taken through the form that is served, except those of the two baselines that
only pick otherwise (training/baselines.py). Three settings: the prompt routed and its
continuation whole; both routed, which is what a user gets; every token scored. Written are
report.json, report.md and pictures; with --update-adapter the adapter's own table as well.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from elastiformer import AdapterError, Calibration, ElasticModel, Phase
from elastiformer.calibration import DataRecord, Measured
from elastiformer.vlm_weights import is_vlm
from training.baselines import BASELINES, STATIC, measure_baseline
from training.calibrate import CAPACITIES, capacities
from training.data import Corpus, Windows, check_window, pack, read_corpus, tokenizer_of
from training.encoder_calibrate import FOR_ITEMS, add_item_arguments, task_asked
from training.encoder_evaluate import evaluate_items
from training.files import DataError, check_writable
from training.options import refuse_unused, whole
from training.picture_evaluate import evaluate_pictures
from training.progress import track
from training.quality import (
    Quality,
    Setting,
    Window,
    copied,
    measure,
    miss,
    prompt_share,
    windows_of,
)
from training.repaired import REPAIRED, Repaired
from training.reports import Report, write_report
from training.stopwatch import Greedy, Timing, greedy_texts, time_capacities

SIZING_WINDOWS = 4  # texts that static pruning learns its channels from; none is evaluated
PROBE_WINDOWS = 1  # texts that repaired baselines are probed on, beside those they are fitted to

_OF_WINDOWS = ("windows", "window", "prompt_tokens")
_FOR_TEXTS = (
    *(*_OF_WINDOWS, "repair_data", "repair_windows", "repair_window"),
    *("skip_rank", "baseline_seed", "copied", "greedy_tokens"),
    *("time_prompt_tokens", "decode_tokens"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, help="folder, Hub id or embedded name")
    parser.add_argument("--adapter", required=True, help="folder or Hub id")
    parser.add_argument("--data", required=True, help="text that was never seen")
    parser.add_argument("--out", required=True, type=Path, help="folder of the report")
    parser.add_argument("--capacities", type=capacities, default=capacities(CAPACITIES))
    add_item_arguments(parser)
    parser.add_argument(
        "--text", default=None, help="of a vision-language model: text without images, measured too"
    )
    parser.add_argument("--windows", type=whole(1), default=6, help="texts")
    parser.add_argument("--window", type=whole(3), default=192, help="tokens of a text")
    parser.add_argument(
        "--prompt-tokens", type=whole(2), default=None, help="of a text; default: two thirds"
    )
    parser.add_argument(
        "--baselines",
        type=baselines,
        default=list(BASELINES),
        help=f"comma-separated, of: {', '.join(BASELINES)}; or none",
    )
    parser.add_argument(
        "--repair-data",
        default=None,
        help=f"text to fit these to, which then stand beside: {', '.join(REPAIRED)}",
    )
    parser.add_argument("--repair-windows", type=whole(1), default=64, help="texts of it")
    parser.add_argument("--repair-window", type=whole(2), default=256, help="tokens of each")
    parser.add_argument(
        "--skip-rank", type=whole(1), default=64, help="of maps in place of dropped sub-layers"
    )
    parser.add_argument(
        "--baseline-seed", type=int, default=0, help="of random picks and of texts to fit to"
    )
    parser.add_argument(
        "--copied",
        action="store_true",
        help="let every continuation repeat the prompt's first tokens: what must be copied",
    )
    parser.add_argument("--greedy-tokens", type=whole(0), default=64, help="0: none")
    parser.add_argument("--repeats", type=whole(0), default=5, help="of each timing; 0: none")
    parser.add_argument(
        "--time-prompt-tokens", type=whole(1), default=256, help="timed in each repeat"
    )
    parser.add_argument("--decode-tokens", type=whole(1), default=16, help="timed in each repeat")
    parser.add_argument(
        "--update-adapter", action="store_true", help="write the measured rows into the adapter"
    )
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")


def baselines(text: str) -> list[str]:
    names = [] if text == "none" else text.split(",")
    if stray := [name for name in names if name not in BASELINES]:
        raise argparse.ArgumentTypeError(
            f"unknown baseline {', '.join(stray)}; known: {', '.join(BASELINES)}"
        )
    return names


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.update_adapter:
        if not Path(args.adapter).is_dir():
            raise DataError(f"--update-adapter: writes into a folder; {args.adapter} is none")
        check_writable("--adapter", Path(args.adapter))
    if is_vlm(args.base):
        unused = ["task", "seen", "check_items", *_FOR_TEXTS]
        if args.text is not None:
            unused = [name for name in unused if name not in _OF_WINDOWS]
        refuse_unused(args, add_arguments, unused, "a vision-language model")
        return evaluate_pictures(args)
    if (task := task_asked(args)) is not None:
        refuse_unused(args, add_arguments, ("check_items", "text", *_FOR_TEXTS), "an encoder")
        return evaluate_items(args, task)
    refuse_unused(args, add_arguments, (*FOR_ITEMS, "text"), "a language model")
    started = time.monotonic()
    model = ElasticModel.load(args.base, args.adapter, dtype=args.dtype, device=args.device)
    adapter, calibration = model.adapter, model.calibration
    if adapter is None or calibration is None or model.tokenizer is None:
        raise AdapterError(f"{args.adapter}: not calibrated; run python -m training calibrate")
    corpus = read_corpus(args.data, model.tokenizer)
    prompt_tokens = args.prompt_tokens or args.window * 2 // 3
    if not 2 <= prompt_tokens < args.window:
        raise DataError(f"--prompt-tokens: from 2 to below --window; got {prompt_tokens}")
    check_lengths(args, prompt_tokens, model.context)
    served = [each for each in args.capacities if each >= calibration.lowest - 1e-9]
    ids_WT, sizing_WT = texts(corpus, model, args)
    fitted = None if args.repair_data is None else repair_texts(model, args)
    if args.copied:
        ids_WT = copied(ids_WT, prompt_tokens)
    windows = windows_of(model, ids_WT, prompt_tokens)
    args.out.mkdir(parents=True, exist_ok=True)

    pairs = [(capacity, setting) for capacity in served for setting in Setting]
    ours = [
        measure(model, windows, capacity, setting)
        for capacity, setting in track(pairs, label="quality")
    ]
    beside = {
        name: rows for name, rows in beside_ours(model, windows, served, sizing_WT, fitted, args)
    }
    prompts = [window.ids_T[:prompt_tokens].tolist() for window in windows]
    greedy = greedy_texts(model, prompts, served, args.greedy_tokens) if args.greedy_tokens else []
    timed = timings(model, windows, served, args) if args.repeats else []
    report = Report(
        about=describe(model, corpus, args, prompt_tokens),
        ours=ours,
        baselines=beside,
        greedy=greedy,
        timed=timed,
        kept={
            f"{phase}, capacity {capacity:g}": calibration.schedule(
                capacity, phase, model.shape, args.window
            ).nearest
            for phase in Phase
            for capacity in served
            if capacity < 1
        },
        refused=[each for each in args.capacities if each not in served],
    )
    if args.update_adapter:
        adapter.calibration = updated(calibration, report, corpus, args)
        adapter.save(args.adapter)
        # The report names the adapter as it was saved.
        report = replace(report, about={**report.about, "adapter": adapter.identity})
    files = write_report(args.out, report)
    return {
        "report": str(args.out),
        "files": files,
        "adapter": adapter.identity,
        "capacities": served,
        "kl": {f"{row.capacity:g}": row.kl for row in ours if row.setting is Setting.BOTH},
        "worst_miss": worst_miss(ours, greedy, prompt_share(model, args.window)),
        "seconds": round(time.monotonic() - started, 1),
    }


def check_lengths(args: argparse.Namespace, prompt_tokens: int, context: int) -> None:
    """Raises DataError where what is asked for is longer than the context, or than all texts."""
    check_window("--window", args.window, context)
    check_window("--repair-window", 0 if args.repair_data is None else args.repair_window, context)
    if prompt_tokens + args.greedy_tokens > context:
        raise DataError(
            f"--greedy-tokens {args.greedy_tokens}: at most {context - prompt_tokens} after a "
            f"prompt of {prompt_tokens} in a context of {context}"
        )
    room = min(args.windows * args.window, context)
    if args.repeats and args.decode_tokens >= room:
        raise DataError(
            f"--decode-tokens {args.decode_tokens}: below {room}, which all texts and the context "
            "hold, as a prompt comes before them"
        )


def timings(
    model: ElasticModel, windows: list[Window], served: list[float], args: argparse.Namespace
) -> list[Timing]:
    ids_T = torch.cat([window.ids_T for window in windows])
    most = min(len(ids_T), model.context) - args.decode_tokens
    prompt_tokens = min(args.time_prompt_tokens, most)
    return time_capacities(model, ids_T, served, prompt_tokens, args.decode_tokens, args.repeats)


def texts(corpus: Corpus, model: ElasticModel, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The windows to evaluate on, and a few others for the baseline that needs to learn."""
    assert model.tokenizer is not None
    packed_WT = pack(corpus, model.tokenizer, args.window)
    wanted = args.windows + (SIZING_WINDOWS if STATIC in args.baselines else 0)
    if len(packed_WT) < wanted:
        raise DataError(
            f"{corpus.source}: {len(packed_WT)} windows of {args.window} tokens, {wanted} wanted; "
            "give more text, or smaller --windows or --window"
        )
    chosen_WT = Windows(packed_WT, args.seed).take(wanted)
    return chosen_WT[: args.windows], chosen_WT[args.windows :]


def beside_ours(
    model: ElasticModel,
    windows: list[Window],
    served: list[float],
    sizing_WT: Tensor,
    fitted: tuple[Tensor, Tensor] | None,
    args: argparse.Namespace,
) -> Iterator[tuple[str, list[Quality]]]:
    """Each baseline that was asked for, with its rows."""
    lowered = [each for each in served if each < 1]
    probed = Path(args.adapter) / "sensitivity.jsonl"
    for name in args.baselines:
        rows = measure_baseline(
            model, name, windows, lowered, sizing_WT, probed, args.window, args.baseline_seed
        )
        if rows:
            yield name, rows
    if fitted is None:
        return
    fit_WT, probe_WT = fitted
    notes = args.out / "probes.jsonl"
    repaired = Repaired(model, fit_WT, probe_WT, notes, args.skip_rank, args.baseline_seed)
    for name in REPAIRED:
        yield name, repaired.rows(name, windows, lowered)


def repair_texts(model: ElasticModel, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The windows to fit repaired baselines to, and a few others to probe them on."""
    tokenizer = tokenizer_of(model)
    packed_WT = pack(read_corpus(args.repair_data, tokenizer), tokenizer, args.repair_window)
    wanted = args.repair_windows + PROBE_WINDOWS
    if len(packed_WT) < wanted:
        raise DataError(
            f"{args.repair_data}: {len(packed_WT)} windows of {args.repair_window} tokens, "
            f"{wanted} wanted; give more text, or smaller --repair-windows or --repair-window"
        )
    chosen_WT = Windows(packed_WT, args.baseline_seed).take(wanted)
    return chosen_WT[: args.repair_windows], chosen_WT[args.repair_windows :, : args.window]


def describe(
    model: ElasticModel, corpus: Corpus, args: argparse.Namespace, prompt_tokens: int
) -> dict[str, Any]:
    assert model.adapter is not None and model.calibration is not None
    return {
        "base": asdict(model.adapter.base),
        "adapter": model.adapter.identity,
        "units": [unit.value for unit in model.adapter.units],
        "lowest": model.calibration.lowest,
        "data": {"name": Path(corpus.source).name, "sha256": corpus.sha256},
        "windows": args.windows,
        "window_tokens": args.window,
        "prompt_tokens": prompt_tokens,
        "copied": args.copied,
        "seed": args.seed,
        "baseline_seed": args.baseline_seed,
        "repaired_on": None
        if args.repair_data is None
        else {
            "name": Path(args.repair_data).name,
            "tokens": args.repair_windows * args.repair_window,
            "skip_rank": args.skip_rank,
        },
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def updated(
    calibration: Calibration, report: Report, corpus: Corpus, args: argparse.Namespace
) -> Calibration:
    """The calibration with this report's rows for its table."""
    by_setting = {(row.capacity, row.setting): row for row in report.ours}
    greedy = {row.capacity: row for row in report.greedy}
    timed = {row.capacity: row for row in report.timed}
    rows = []
    for capacity in sorted({row.capacity for row in report.ours}, reverse=True):
        both = by_setting[capacity, Setting.BOTH]
        scored = by_setting[capacity, Setting.SCORED]
        rows.append(
            Measured(
                capacity=capacity,
                spent=both.spent,
                kl=both.kl,
                kl_prompt=by_setting[capacity, Setting.PROMPT].kl,
                kl_scored=scored.kl,
                kl_p95=scored.kl_p95,
                perplexity=scored.perplexity,
                perplexity_ratio=scored.perplexity_ratio,
                greedy_agreement=_of(greedy, capacity, "agreement"),
                prefill_time_ratio=_of(timed, capacity, "prefill_ratio"),
                decode_time_ratio=_of(timed, capacity, "decode_ratio"),
            )
        )
    data = DataRecord(Path(corpus.source).name, corpus.sha256, args.windows, args.window, args.seed)
    return replace(calibration, measured=tuple(rows), data=data)


def worst_miss(ours: list[Quality], greedy: list[Greedy], prompt: float) -> float:
    """By how much the worst request missed its capacity, where all its tokens were routed."""
    groups: list[list[Quality] | list[Greedy]] = [greedy] if greedy else []
    for setting in (Setting.BOTH, Setting.SCORED):
        groups.append([row for row in ours if row.setting is setting])
    worst = 0.0
    for rows in groups:
        whole = next(row.spent_least for row in rows if row.capacity == 1.0)
        for row in rows:
            worst = max(worst, miss(row.capacity, row.spent_least, row.spent_most, whole, prompt))
    return worst


def _of(rows: Mapping[float, Greedy | Timing], capacity: float, name: str) -> float | None:
    return float(getattr(rows[capacity], name)) if capacity in rows else None
