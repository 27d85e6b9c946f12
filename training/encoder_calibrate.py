"""Calibration of an encoder: the order in which its tokens' shares are given up, and the table.

Where a head reads class tokens alone, those run whole and the path is that of the other tokens,
which owe keys and values; else it is that of all tokens. Probes, curves and allotment are those
of causal models. No threshold is needed: of tokens the best are kept, exactly as many as due.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from elastiformer import AdapterError, Calibration, CapacityError, Phase, SavedAdapter
from elastiformer.calibration import DataRecord, Step
from elastiformer.capacity import dense_plan
from elastiformer.elastic import Elastic
from elastiformer.encoder import ElasticEncoder
from elastiformer.encoder_weights import task_of
from elastiformer.tasks import Task
from training.allotment import (
    LEAST_KL,
    Allotment,
    Curves,
    fields_of,
    gradually,
    late_layers,
    uniform,
)
from training.encoder_quality import ItemMeter, Judged, measure_items
from training.examples import Examples, read_examples
from training.files import DataError
from training.options import real, whole
from training.progress import track
from training.quality import recalibrate
from training.sensitivity import Notebook, ask, curves, late_losses, probes
from training.tuning import Score, reorder, tune

TOLERANCE = 0.02  # what an item spends lies so near to what it asked, beyond a token's worth
PROBING, TUNING = 0.5, 0.8  # of the time allowed, when the probes and the tuning end
SEEN = "share of an image's patches that a masked autoencoder is shown"
WORTH = 0.8  # of an even spread's loss, at most, is a router's that is worth its time
_LATE = "late layers"
COMPARED = 3  # capacities at which candidate paths are compared

Path_ = tuple[Step, ...]


FOR_ITEMS = ("items", "check_items", "seen")  # what a language model has no use for


def add_item_arguments(parser: argparse.ArgumentParser) -> None:
    """What data of items or exchanges is, beside the options that causal models have, too."""
    parser.add_argument(
        "--task", choices=list(Task), help="of an encoder (default: what its config says)"
    )
    parser.add_argument(
        "--items", type=whole(1), default=64, help="texts, images or exchanges that are run"
    )
    parser.add_argument(
        "--check-items", type=whole(1), default=256, help="others of them, for the table"
    )
    parser.add_argument("--seen", type=real(above=0, most=1), default=1.0, help=SEEN)


def task_asked(args: argparse.Namespace) -> Task | None:
    """The task of an encoder, as asked or as its config says; None for a causal model."""
    return Task(args.task) if args.task is not None else task_of(args.base)


def load(args: argparse.Namespace, task: Task) -> ElasticEncoder:
    return ElasticEncoder.load(
        args.base, args.adapter, dtype=args.dtype, device=args.device, task=task
    )


def calibrate_items(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    """One calibration, from the data to the adapter's table.

    Raises:
        AdapterError, DataError: see their messages.
    """
    started = time.monotonic()
    model = load(args, task)
    adapter = model.adapter
    if adapter is None:
        raise AdapterError(f"{args.adapter}: calibration needs an adapter")
    examples = read_examples(args.data, model, args.seen)
    probe, check = (
        some(part, wanted)
        for part, wanted in zip(examples.split(0.5), (args.items, args.check_items), strict=True)
    )
    kept = kept_calibration(args, model)
    recalibrate(model, None)  # what an earlier one said must not count
    job = ItemJob(model, args, probe, until=started + 60 * args.max_minutes)
    if kept is None:
        path = job.find_path()
    else:
        path, job.chosen = kept.paths[job.phase], "kept"
    least = job.lowest(path)
    draft = Calibration(
        lowest=least,
        context=job.context,
        # Of class tokens nothing is given up: their path is empty.
        paths={phase: path if phase is job.phase else () for phase in Phase},
        thresholds={},
        measured=(),
        data=DataRecord(
            name=Path(examples.source).name,
            sha256=examples.sha256,
            windows=len(check.each),
            window_tokens=job.context,
            seed=args.seed,
        ),
    )
    recalibrate(model, draft)
    served = [each for each in args.capacities if each >= least - 1e-9]
    given = Judged.of(model, check.items(range(len(check.each))), labels_of(check))
    rows = [
        measure_items(model, given, capacity)
        for capacity in track(served, label="checking on other data")
    ]
    problem = model.config.problem_type
    measured = tuple(row.measured(model.task, problem) for row in rows)
    recalibrate(model, replace(draft, measured=measured))
    adapter.save(args.adapter)
    worst = max(row.missed for row in rows)
    if worst > TOLERANCE:
        print(f"warning: an item missed its capacity by {worst:.3f}", file=sys.stderr)
    return {
        "adapter": str(args.adapter),
        "lowest": least,
        "not_reached": [each for each in args.capacities if each < least - 1e-9],
        "phase": job.phase.value,
        "chosen": job.chosen,
        "candidates": job.compared,
        "worst_miss": worst,
        "promise_kept": worst <= TOLERANCE,
        "measured": [asdict(row) for row in measured],
        "seconds": round(time.monotonic() - started, 1),
    }


def some(examples: Examples, wanted: int) -> Examples:
    """So many of the examples, as they come; they are in no order that matters."""
    if len(examples.each) < 2:
        raise DataError(f"{examples.source}: {len(examples.each)} examples; at least 2 are needed")
    ordered = sorted(examples.each, key=lambda each: each.digest)
    return Examples(examples.source, tuple(ordered[:wanted]))


def labels_of(examples: Examples) -> list[int | None]:
    return [each.label for each in examples.each]


def routed_phase(model: ElasticEncoder) -> Phase:
    """The phase of the tokens that give something up: all, or those that are not class tokens."""
    return Phase.PROMPT if model.reads_class else Phase.OUTPUT


def kept_calibration(args: argparse.Namespace, model: Elastic) -> Calibration | None:
    """Whose paths `--keep-paths` asks for, of this adapter or another; None: look for some.

    Raises:
        AdapterError: there are none, or they are of another kind of model.
    """
    if args.keep_paths is None:
        return None
    asked = args.keep_paths or args.adapter
    calibration = SavedAdapter.load(asked).calibration
    if calibration is None:
        raise AdapterError(f"{asked}: --keep-paths: this adapter is not calibrated")
    assert model.adapter is not None
    if misfits := calibration.misfits(len(model.shape.layers), model.adapter.units):
        raise AdapterError("\n  ".join([f"{asked}: --keep-paths:", *misfits]))
    return calibration


def uniform_calibration(model: ElasticEncoder, context: int) -> Calibration:
    """Every share lowered alike in all layers, which is the paper's recipe; nothing is measured."""
    assert model.adapter is not None
    path = uniform(model.shape, fields_of(model.adapter.units))
    routed = routed_phase(model)
    paths = {phase: path if phase is routed else () for phase in Phase}
    return Calibration(lowest=0.01, context=context, paths=paths, thresholds={}, measured=())


class ItemJob:
    """One calibration under way: its questions, its answers, its deadlines."""

    def __init__(
        self, model: ElasticEncoder, args: argparse.Namespace, probe: Examples, until: float
    ) -> None:
        adapter = model.adapter
        assert adapter is not None
        self._shape, self._layers = model.shape, len(model.shape.layers)
        self._capacities, self._sweeps = args.capacities, args.sweeps
        self._started, self._until = time.monotonic(), until
        items = probe.items(range(len(probe.each)))
        lengths = [len(item.ids) for item in items]
        self.context, self._shortest = round(sum(lengths) / len(lengths)), min(lengths)
        self._longest = model.context
        self.phase = routed_phase(model)
        asked = args.prompt_units if model.reads_class else args.output_units
        self._units = adapter.units if asked is None else asked
        self._one_by_one, self._most = args.one_by_one, args.probes
        self._late_layers = args.late_layers
        if self._late_layers and self.phase is not Phase.PROMPT:
            raise AdapterError(
                f"--late-layers: every token of {args.base} is read, so none can leave early"
            )
        self._meter = ItemMeter(model, items, self.phase)
        about = hashlib.sha256(f"{adapter.identity_in(self.phase)}/{probe.sha256}".encode())
        self._notebook = Notebook(
            args.adapter / "sensitivity.jsonl", dict.fromkeys(Phase, about.hexdigest()[:16])
        )
        self.chosen = ""
        self.compared: dict[str, dict[str, float]] = {}

    def find_path(self) -> Path_:
        """Probe, make candidate paths from the answers, keep the best and tune it."""
        fields = fields_of(self._units)
        asked = list(probes(self.phase, self._layers, fields))[: self._most]
        until = self._deadline(PROBING)
        ask(self._meter, self._notebook, asked, self._layers, until, "probing")
        said = self._notebook.answers
        # What an earlier search asked beyond these must not count: it would not end the same.
        answers = {probe: said[probe] for probe in asked if probe in said}
        known = curves(answers, self.phase, self._layers)
        makers = self._makers(fields, late_losses(answers))
        if self._late_layers:
            makers = {_LATE: makers[_LATE]}
        judged = {
            name: (self._score(name, path), path)
            for name, make in track(list(makers.items()), label="comparing paths")
            if (path := make(known))
        }
        if not judged:
            raise AdapterError("nothing that can be left out was measured")
        self.chosen = min(judged, key=lambda name: judged[name][0])
        if self._late_layers:
            return self._routed(judged[_LATE][1])
        if self._one_by_one:
            name = f"{self.chosen}, reordered"
            order, _ = reorder(
                judged[self.chosen][1],
                lambda order: self._score(name, order),
                self._deadline(TUNING),
                self._sweeps,
            )
            path = self._routed(order)
            self._score(name, path)
            return path
        if not fields or "greedy" not in self.chosen:  # no curve shaped it: nothing to turn
            return judged[self.chosen][1]
        path, _, _ = tune(
            known,
            fields,
            makers[self.chosen],
            lambda path: self._score(f"{self.chosen}, tuned", path),
            self._deadline(TUNING),
            self._sweeps,
        )
        self._score(f"{self.chosen}, tuned", path)
        return path

    def lowest(self, path: Path_) -> float:
        """The lowest of the asked capacities that this path reaches, whatever the length."""

        def reached(capacity: float) -> bool:
            return all(
                self._schedule(path, capacity, length) is not None
                for length in (self._shortest, self.context, self._longest)
            )

        least: float = min(capacity for capacity in self._capacities if reached(capacity))
        return least

    def _makers(
        self, fields: Sequence[str], late: Mapping[int, float]
    ) -> dict[str, Callable[[Curves], Path_]]:
        """Ways to make a path from loss curves, by name."""
        if self._one_by_one:
            return self._makers_one_by_one()

        def greedy(late: Mapping[int, float] | None = None, whole: bool = True) -> Any:
            return lambda known: Allotment(
                self._shape, self.context, known, fields, late=late, whole=whole
            ).path()

        makers: dict[str, Callable[[Curves], Path_]] = {"greedy": greedy()}
        if fields:
            makers["uniform"] = lambda _: uniform(self._shape, fields)
            makers["greedy, no whole sub-layers"] = greedy(whole=False)
        if self.phase is Phase.PROMPT:
            makers[_LATE] = lambda _: late_layers(self._layers)
            if fields and late:
                makers["late layers and greedy"] = greedy(late=late)
        return makers

    def _makers_one_by_one(self) -> dict[str, Callable[[Curves], Path_]]:
        makers: dict[str, Callable[[Curves], Path_]] = {
            "greedy": lambda known: Allotment(self._shape, self.context, known, fields=()).path()
        }
        if self.phase is Phase.PROMPT:
            makers[_LATE] = lambda _: late_layers(self._layers)
        return makers

    def _routed(self, order: Path_) -> Path_:
        """Whole sub-layers in this order, each at once or by its router.

        Left out at once, a part of a sub-layer's tokens is spread evenly over an item, and known
        before it runs. A router has to lose clearly less to be worth its time.
        """
        evenly = [at % 2 == 1 for at in range(self._longest)]
        path: list[Step] = []
        before = dense_plan(self._layers)
        for step in track(order, label="routers against an even spread"):
            half, after = (
                (*before[: step.layer], changed, *before[step.layer + 1 :])
                for share in (0.5, 0.0)
                if (changed := replace(before[step.layer], **{step.field: share}))
            )
            spread = self._meter.scheduled(before, after, evenly)
            routed = self._meter.scheduled(half, half, evenly)
            path += gradually(step) if max(routed, LEAST_KL) < WORTH * spread else [step]
            before = after
        return tuple(path)

    def _score(self, name: str, path: Path_) -> Score:
        """A path's loss over a few capacities, each weighed alike; the less, the better."""
        asked = [each for each in self._capacities if each < 1]
        asked = asked[len(asked) // 4 :]  # near 1 all paths are good
        asked = asked[:: -max(1, math.ceil(len(asked) / COMPARED))]
        found: dict[str, float] = {}
        for capacity in asked:
            schedule = self._schedule(path, capacity, self.context)
            if schedule is None:
                continue
            turns = [schedule.is_fuller(at) for at in range(self._longest)]
            found[f"{capacity:g}"] = self._meter.scheduled(schedule.fuller, schedule.leaner, turns)
        self.compared[name] = found
        mean = sum(math.log(max(each, LEAST_KL)) for each in found.values()) / max(1, len(found))
        return len(asked) - len(found), mean

    def _schedule(self, path: Path_, capacity: float, length: int) -> Any:
        draft = Calibration(0.0, self.context, dict.fromkeys(Phase, path), {}, ())
        try:
            return draft.schedule(capacity, self.phase, self._shape, length)
        except CapacityError:
            return None

    def _deadline(self, part: float) -> float:
        # Without an end in time, a part of it is without an end as well.
        return self._started + part * (self._until - self._started)
