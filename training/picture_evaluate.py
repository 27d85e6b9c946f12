"""Report of a vision-language model: what a number leaves out, against answers known.

Baselines keep as many image tokens and choose them otherwise. Where the layers' own units give as
well, image tokens alone and layers alone are measured beside both together.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from elastiformer import AdapterError, Calibration, Phase
from elastiformer.calibration import DataRecord
from elastiformer.vlm import ElasticVlm
from training.choosers import CHOOSERS
from training.data import Windows, check_window, pack, read_corpus, tokenizer_of
from training.exchanges import Exchange, Exchanges, read_exchanges
from training.files import DataError
from training.lent_paths import beside_text, text_row
from training.picture_quality import (
    Answers,
    PictureQuality,
    answers_at,
    chosen_by,
    loaded,
    prefill_flops,
    prefill_times,
    quality,
    reached,
    scores_by,
    some_of,
)
from training.picture_reports import PictureReport, Prefill, write_pictures
from training.progress import track
from training.quality import Window, recalibrate, windows_of

TIMED = 16  # exchanges
TOLERANCE = 0.02  # what an exchange spends lies so near to what it asked


def evaluate_pictures(args: argparse.Namespace) -> dict[str, Any]:
    """One report, from the data to its files.

    Raises:
        AdapterError, DataError: see their messages.
    """
    started = time.monotonic()
    model = loaded(args)
    calibration = model.calibration
    if calibration is None:
        raise AdapterError(f"{args.adapter}: not calibrated; run python -m training calibrate")
    exchanges = read_exchanges(args.data, model)
    some = some_of(exchanges, args.items)
    windows = [] if args.text is None else _windows(model, args)
    served = [each for each in args.capacities if reached(model, some, each)]
    dense = answers_at(model, some, 1.0)
    ours = [quality(model, some, capacity, dense) for capacity in track(served, label="quality")]
    beside = {}
    for name in CHOOSERS if args.baselines else ():
        scores_BP = scores_by(model, name, some, args.seed)
        beside[name] = [
            chosen_by(model, scores_BP, some, capacity, dense)
            for capacity in track([each for each in served if each < 1], label=name)
        ]
    lost = track(served, label="text") if windows else ()
    texts = {each: text_row(model, windows, each) for each in lost}
    lowered = args.capacities if args.baselines else []
    alone = _alone(model, calibration, some, lowered, dense)
    timed = some[:TIMED]
    times = prefill_times(model, timed, served, args.repeats) if args.repeats else {}
    flops = {capacity: prefill_flops(model, timed, capacity) for capacity in times}
    prefill = {
        capacity: Prefill(ratio, flops[capacity] / flops[1.0]) for capacity, ratio in times.items()
    }
    if args.update_adapter:
        assert model.adapter is not None
        of_text = {row.capacity: row for row in calibration.measured}
        rows = tuple(
            texts[row.capacity].measured(row.measured(times.get(row.capacity)))
            if texts
            else beside_text(row.measured(times.get(row.capacity)), of_text.get(row.capacity))
            for row in ours
        )
        data = DataRecord(
            Path(exchanges.source).name,
            exchanges.sha256,
            len(some),
            calibration.context,
            args.seed,
        )
        model.adapter.calibration = replace(calibration, measured=rows, data=data)
        model.adapter.save(args.adapter)
    # After that: the report names the adapter as it was saved.
    report = PictureReport(
        about=_about(model, calibration, exchanges, len(some), args),
        ours=ours,
        texts=texts,
        choosers=beside,
        alone=alone,
        prefill=prefill,
        refused=[each for each in args.capacities if each not in served],
    )
    files = write_pictures(args.out, report, model, some, args.seed)
    return {
        "report": str(args.out),
        "files": files,
        "capacities": served,
        "right": {f"{row.capacity:g}": row.right for row in ours},
        "kept": {f"{row.capacity:g}": row.kept for row in ours},
        "time_ratio": {f"{capacity:g}": ratio for capacity, ratio in times.items()},
        "seconds": round(time.monotonic() - started, 1),
    }


def _windows(model: ElasticVlm, args: argparse.Namespace) -> list[Window]:
    """Text without an image, to measure on."""
    check_window("--window", args.window, model.context)
    prompt_tokens = args.prompt_tokens or args.window * 2 // 3
    if not 2 <= prompt_tokens < args.window:
        raise DataError(f"--prompt-tokens: from 2 to below --window; got {prompt_tokens}")
    corpus = read_corpus(args.text, tokenizer_of(model))
    packed_WT = pack(corpus, tokenizer_of(model), args.window)
    if len(packed_WT) < args.windows:
        raise DataError(
            f"{corpus.source}: {len(packed_WT)} windows of {args.window} tokens, {args.windows} "
            "wanted; give more text, or smaller --windows or --window"
        )
    return windows_of(model, Windows(packed_WT, args.seed).take(args.windows), prompt_tokens)


def _about(
    model: ElasticVlm,
    calibration: Calibration,
    exchanges: Exchanges,
    measured: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    return {
        "adapter": model.adapter.identity if model.adapter else None,
        "base": asdict(model.identity),
        "data": {"name": Path(exchanges.source).name, "sha256": exchanges.sha256},
        "exchanges": measured,
        "text": None
        if args.text is None
        else {"name": Path(args.text).name, "windows": args.windows, "window_tokens": args.window},
        "seed": args.seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "runs_whole": [str(phase) for phase, path in calibration.paths.items() if not path],
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _alone(
    model: ElasticVlm,
    calibration: Calibration,
    exchanges: Sequence[Exchange],
    capacities: Sequence[float],
    dense: Answers,
) -> dict[str, list[PictureQuality]]:
    """Each of the two that give without the other, at the capacities that it reaches."""
    if not capacities or not any(calibration.paths.values()):
        return {}
    only = {
        "image tokens alone": replace(
            calibration, paths=dict.fromkeys(Phase, ()), image_floors=(), lowest=0.01
        ),
        "layers alone": replace(calibration, image_tokens=1.0, image_floors=()),
    }
    found: dict[str, list[PictureQuality]] = {}
    for name, each in only.items():
        recalibrate(model, each)
        given = [c for c in capacities if c < 1 and reached(model, exchanges, c)]
        found[name] = [quality(model, exchanges, c, dense) for c in track(given, label=name)]
    recalibrate(model, calibration)
    return found
