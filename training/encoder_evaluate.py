"""The report of an encoder: quality, cost and time at each capacity, beside baselines.

Baselines spend the same: `uniform` lowers every share alike in all layers (the paper's recipe),
`random` runs the calibrated plans with routers that know nothing. All are measured through the
form that is served; for times, capacities take turns on every batch.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from elastiformer import AdapterError, CapacityError
from elastiformer.calibration import DataRecord
from elastiformer.elastic import Elastic
from elastiformer.encoder import ElasticEncoder
from elastiformer.tasks import Task
from training.data import seed_of
from training.encoder_calibrate import labels_of, load, some, uniform_calibration
from training.encoder_quality import ItemQuality, Judged, measure_items, time_items
from training.encoder_reports import ItemReport, write_items
from training.examples import Examples, read_examples
from training.progress import track
from training.quality import recalibrate

ITEM_BASELINES = ("uniform", "random")


def evaluate_items(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    """One report, from the data to its files."""
    started = time.monotonic()
    model = load(args, task)
    adapter, calibration = model.adapter, model.calibration
    if adapter is None or calibration is None:
        raise AdapterError(f"{args.adapter}: not calibrated; run python -m training calibrate")
    examples = some(read_examples(args.data, model, args.seen), args.items)
    given = Judged.of(model, examples.items(range(len(examples.each))), labels_of(examples))
    served = [each for each in args.capacities if each >= calibration.lowest - 1e-9]
    ours = [measure_items(model, given, capacity) for capacity in track(served, label="quality")]
    timed = time_items(model, given, served, args.repeats) if args.repeats else {}
    times = {f"{capacity:g}": round(ratio, 4) for capacity, ratio in timed.items()}
    names = ITEM_BASELINES if args.baselines else ()
    beside = {name: _baseline(model, name, given, served, args.seed) for name in names}
    if args.update_adapter:
        problem = model.config.problem_type
        rows = [(row.measured(model.task, problem), times.get(f"{row.capacity:g}")) for row in ours]
        adapter.calibration = replace(
            calibration,
            measured=tuple(replace(row, time_ratio=ratio) for row, ratio in rows),
            data=DataRecord(
                Path(examples.source).name,
                examples.sha256,
                len(examples.each),
                calibration.context,
                args.seed,
            ),
        )
        adapter.save(args.adapter)
    # After that: the report names the adapter as it was saved.
    report = ItemReport(
        about=_about(model, examples, args),
        ours=ours,
        times=times,
        baselines=beside,
        refused=[each for each in args.capacities if each not in served],
    )
    files = write_items(args.out, report, model, given.items)
    return {
        "report": str(args.out),
        "files": files,
        "adapter": adapter.identity,
        "capacities": served,
        "distance": {f"{row.capacity:g}": row.distance for row in ours},
        "accuracy": {f"{row.capacity:g}": row.accuracy for row in ours},
        "time_ratio": times,
        "worst_miss": max(row.missed for row in ours),
        "seconds": round(time.monotonic() - started, 1),
    }


def _baseline(
    model: ElasticEncoder, name: str, given: Judged, served: Sequence[float], seed: int
) -> list[ItemQuality]:
    """A baseline's rows; a capacity that it cannot reach has none."""
    rows = []
    context = _uniform(model) if name == "uniform" else random_routers(model, seed)
    with context:
        for capacity in track([each for each in served if each < 1], label=f"baseline {name}"):
            try:
                rows.append(measure_items(model, given, capacity))
            except CapacityError:
                continue
    return rows


@contextmanager
def _uniform(model: ElasticEncoder) -> Iterator[None]:
    own = model.calibration
    assert own is not None
    recalibrate(model, uniform_calibration(model, own.context))
    try:
        yield
    finally:
        recalibrate(model, own)


@contextmanager
def random_routers(model: Elastic, seed: int) -> Iterator[None]:
    """The model with routers that know nothing; its own come back afterwards."""
    adapter = model.adapter
    assert adapter is not None
    own = {name: tensor.clone() for name, tensor in adapter.routers.state_dict().items()}
    draw = torch.Generator().manual_seed(seed_of("random routers", seed))
    try:
        for parameter in adapter.routers.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.data.copy_(noise.to(parameter.device))
        model.attach(adapter)
        yield
    finally:
        adapter.routers.load_state_dict(own)
        model.attach(adapter)


def _about(model: ElasticEncoder, examples: Examples, args: argparse.Namespace) -> dict[str, Any]:
    assert model.adapter is not None and model.calibration is not None
    return {
        "base": asdict(model.adapter.base),
        "adapter": model.adapter.identity,
        "task": model.task,
        "units": [unit.value for unit in model.adapter.units],
        "lowest": model.calibration.lowest,
        "data": {"name": Path(examples.source).name, "sha256": examples.sha256},
        "items": len(examples.each),
        "seed": args.seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
