"""Calibration and report of a vision-language model: image tokens, against answers known.

A number leaves out image tokens first (elastiformer/vlm.py), and how far that goes is what
calibration sets; the language model's own units are asked for by their shares. Baselines keep as
many image tokens and choose them otherwise.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from elastiformer import AdapterError, Calibration, CapacityError, Phase, Unit
from elastiformer.calibration import DataRecord
from elastiformer.vlm import ElasticVlm
from training.choosers import CHOOSERS
from training.exchanges import Exchange, Exchanges, read_exchanges
from training.picture_quality import (
    answers_at,
    chosen_by,
    prefill_flops,
    prefill_times,
    prompt_at,
    quality,
    scores_by,
)
from training.picture_reports import PictureReport, Prefill, write_pictures
from training.picture_student import LEAST_IMAGE_SHARE
from training.progress import track

TIMED = 16  # exchanges
TOLERANCE = 0.02  # what an exchange spends lies so near to what it asked


def calibrate_pictures(args: argparse.Namespace) -> dict[str, Any]:
    """One calibration, from the data to the adapter's table.

    Raises:
        AdapterError, DataError: see their messages.
    """
    started = time.monotonic()
    model = _loaded(args)
    assert model.adapter is not None
    if args.image_spread is not None:
        model.adapter.spread_images(args.image_spread)
    exchanges = read_exchanges(args.data, model)
    some = _some(exchanges, args.check_items)
    mean = round(sum(len(each.prompt) for each in some) / len(some))
    draft = Calibration(
        lowest=min(args.capacities),
        context=mean,
        paths={phase: () for phase in Phase},
        thresholds={phase: {} for phase in Phase},
        measured=(),
        data=DataRecord(Path(exchanges.source).name, exchanges.sha256, len(some), mean, args.seed),
        image_tokens=LEAST_IMAGE_SHARE,
    )
    _recalibrate(model, draft)
    served = [each for each in args.capacities if _reached(model, some, each)]
    dense = answers_at(model, some, 1.0)
    rows = [quality(model, some, capacity, dense) for capacity in track(served, label="measuring")]
    measured = tuple(row.measured() for row in rows)
    _recalibrate(model, replace(draft, lowest=min(served), measured=measured))
    model.adapter.save(args.adapter)
    worst = max(row.missed or 0.0 for row in rows)
    if worst > TOLERANCE:
        told = f"warning: a prompt with its answer, which runs whole, missed by {worst:.3f}"
        print(told, file=sys.stderr)
    return {
        "adapter": str(args.adapter),
        "lowest": min(served),
        "not_reached": [each for each in args.capacities if each not in served],
        "worst_miss": worst,
        "promise_kept": worst <= TOLERANCE,
        "runs_whole": [str(phase) for phase, path in draft.paths.items() if not path],
        "measured": [asdict(row) for row in measured],
        "seconds": round(time.monotonic() - started, 1),
    }


def evaluate_pictures(args: argparse.Namespace) -> dict[str, Any]:
    """One report, from the data to its files.

    Raises:
        AdapterError, DataError: see their messages.
    """
    started = time.monotonic()
    model = _loaded(args)
    calibration = model.calibration
    if calibration is None:
        raise AdapterError(f"{args.adapter}: not calibrated; run python -m training calibrate")
    exchanges = read_exchanges(args.data, model)
    some = _some(exchanges, args.items)
    served = [each for each in args.capacities if _reached(model, some, each)]
    dense = answers_at(model, some, 1.0)
    ours = [quality(model, some, capacity, dense) for capacity in track(served, label="quality")]
    beside = {}
    for name in CHOOSERS if args.baselines else ():
        scores_BP = scores_by(model, name, some, args.seed)
        beside[name] = [
            chosen_by(model, scores_BP, some, capacity, dense)
            for capacity in track([each for each in served if each < 1], label=name)
        ]
    timed = some[:TIMED]
    times = prefill_times(model, timed, served, args.repeats) if args.repeats else {}
    flops = {capacity: prefill_flops(model, timed, capacity) for capacity in times}
    prefill = {
        capacity: Prefill(ratio, flops[capacity] / flops[1.0]) for capacity, ratio in times.items()
    }
    report = PictureReport(
        about=_about(model, calibration, exchanges, len(some), args),
        ours=ours,
        choosers=beside,
        prefill=prefill,
        refused=[each for each in args.capacities if each not in served],
    )
    files = write_pictures(args.out, report, model, some, args.seed)
    if args.update_adapter:
        assert model.adapter is not None
        rows = tuple(row.measured(times.get(row.capacity)) for row in ours)
        data = DataRecord(
            Path(exchanges.source).name,
            exchanges.sha256,
            len(some),
            calibration.context,
            args.seed,
        )
        model.adapter.calibration = replace(calibration, measured=rows, data=data)
        model.adapter.save(args.adapter)
    return {
        "report": str(args.out),
        "files": files,
        "capacities": served,
        "right": {f"{row.capacity:g}": row.right for row in ours},
        "kept": {f"{row.capacity:g}": row.kept for row in ours},
        "time_ratio": {f"{capacity:g}": ratio for capacity, ratio in times.items()},
        "seconds": round(time.monotonic() - started, 1),
    }


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


def _loaded(args: argparse.Namespace) -> ElasticVlm:
    model = ElasticVlm.load(args.base, args.adapter, dtype=args.dtype, device=args.device)
    if model.adapter is None or Unit.IMAGE_TOKENS not in model.adapter.units:
        raise AdapterError(f"{args.adapter}: has no router for {Unit.IMAGE_TOKENS}")
    return model


def _some(exchanges: Exchanges, wanted: int) -> tuple[Exchange, ...]:
    """So many exchanges, by their content: in no order that matters."""
    return tuple(sorted(exchanges.each, key=lambda each: each.digest)[:wanted])


def _recalibrate(model: ElasticVlm, calibration: Calibration) -> None:
    assert model.adapter is not None
    model.adapter.calibration = calibration
    model.attach(model.adapter)


def _reached(model: ElasticVlm, exchanges: Sequence[Exchange], capacity: float) -> bool:
    """Whether every one of these prompts can be run at a capacity."""
    try:
        for each in exchanges:
            prompt_at(model, each, capacity)
    except CapacityError:
        return False
    return True
