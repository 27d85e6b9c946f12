"""Held-out data -> calibration.json: the table capacity -> plan, and what it cost and lost.

    python -m training calibrate --base BASE --adapter DIR --data DATA [--capacities 1.0,0.8,0.6]

Measures how much each layer and unit matters in each phase, finds the order in which to give them
up, sets the routers' thresholds, then checks on other data, through the form that is served, that
a capacity is kept and what it loses. Every answer is remembered in DIR/sensitivity.jsonl: a run
that was stopped continues where it was. Writes calibration.json, calibration.png and the model
card into DIR.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastiformer import AdapterError, Calibration, CapacityError, ElasticModel, Phase, Unit
from elastiformer.accounting import ModelShape
from elastiformer.calibration import QUANTILES, DataRecord, Measured, Step, walk
from elastiformer.vlm_weights import is_vlm
from training.allotment import LEAST_KL, Allotment, Curves, fields_of, late_layers, uniform
from training.data import Corpus, Windows, pack, read_corpus
from training.encoder_calibrate import FOR_ITEMS, add_item_arguments, calibrate_items, task_asked
from training.files import DataError
from training.options import refuse_unused, units
from training.picture_evaluate import calibrate_pictures
from training.progress import track
from training.quality import Setting, Window, measure, miss, prompt_share, recalibrate, windows_of
from training.sensitivity import (
    Meter,
    Notebook,
    about,
    ask,
    curves,
    late_losses,
    probes,
)
from training.tuning import Score, tune

LATE_LAYERS, UNIFORM = "late layers", "uniform"
TOLERANCE = 0.02  # what a request spends lies so near to what it asked
# Of the time allowed, when a phase's probes end, and when the tuning of its path does.
PROBING = {Phase.OUTPUT: 0.35, Phase.PROMPT: 0.6}
TUNING = {Phase.OUTPUT: 0.75, Phase.PROMPT: 0.85}
COMPARED = 3  # capacities at which candidate paths are compared
CAPACITIES = "1.0,0.9,0.8,0.7,0.65,0.6,0.5"

Paths = dict[Phase, tuple[Step, ...]]
Maker = Callable[[Curves], tuple[Step, ...]]
Thresholds = dict[Phase, dict[Unit, dict[int, tuple[float, ...]]]]

_FOR_TEXTS = ("windows", "check_windows", "window", "prompt_tokens")
# Images are given up first, all layers keep the rest: there is no path to find.
_FOR_PATHS = (
    *("task", "items", "seen", "one_by_one", *_FOR_TEXTS),
    *("prompt_units", "output_units", "sweeps", "max_minutes"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, help="folder, Hub id or embedded name")
    parser.add_argument("--adapter", required=True, type=Path, help="folder; written into")
    parser.add_argument("--data", required=True, help="held-out text that no training saw")
    parser.add_argument("--capacities", type=capacities, default=capacities(CAPACITIES))
    add_item_arguments(parser)
    parser.add_argument("--windows", type=int, default=4, help="texts that every probe runs on")
    parser.add_argument("--check-windows", type=int, default=6, help="other texts, for the table")
    parser.add_argument("--window", type=int, default=192, help="tokens of a text")
    parser.add_argument(
        "--prompt-tokens", type=int, default=None, help="of a text; default: two thirds"
    )
    parser.add_argument(
        "--prompt-units",
        type=units,
        default=None,
        help="what may be lowered in prompts, comma-separated (default: all units of the adapter; "
        "none: whole sub-layers only)",
    )
    parser.add_argument("--output-units", type=units, default=None, help="the same for outputs")
    parser.add_argument("--sweeps", type=int, default=1, help="of tuning, at most; 0: none")
    parser.add_argument(
        "--one-by-one",
        action="store_true",
        help="leave out an encoder's sub-layers one after the other, each without its router where "
        "that loses little: then also small savings are saved time",
    )
    parser.add_argument("--max-minutes", type=float, default=math.inf)
    parser.add_argument("--seed", type=int, default=0)
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


def run(args: argparse.Namespace) -> dict[str, Any]:
    if is_vlm(args.base):
        refuse_unused(args, add_arguments, _FOR_PATHS, "a vision-language model")
        return calibrate_pictures(args)
    if (task := task_asked(args)) is not None:
        refuse_unused(args, add_arguments, _FOR_TEXTS, "an encoder")
        return calibrate_items(args, task)
    refuse_unused(args, add_arguments, (*FOR_ITEMS, "one_by_one"), "a language model")
    started = time.monotonic()
    model = ElasticModel.load(args.base, args.adapter, dtype=args.dtype, device=args.device)
    if model.adapter is None or model.tokenizer is None:
        raise AdapterError(f"{args.adapter}: calibration needs an adapter and a tokenizer")
    for asked in (args.prompt_units or (), args.output_units or ()):
        for unit in asked:
            if unit in (Unit.HEADS, Unit.EXPERTS) and unit not in model.adapter.units:
                raise AdapterError(f"{args.adapter}: has no routers for {unit}")
    corpus = read_corpus(args.data, model.tokenizer)
    prompt_tokens = args.prompt_tokens or args.window * 2 // 3
    if not 2 <= prompt_tokens < args.window:
        raise DataError(f"--prompt-tokens: from 2 to below --window; got {prompt_tokens}")
    probe_WT, check_WT = two_sets(corpus, model, args)
    recalibrate(model, None)  # what an earlier one said must not count
    job = _Job(model, args, probe_WT, prompt_tokens, until=started + 60 * args.max_minutes)
    paths = job.find_paths()
    least = lowest(paths, model.shape, args.window, args.capacities)
    draft = Calibration(
        lowest=least,
        context=args.window,
        paths={
            phase: trimmed(path, model.shape, least, (1, args.window, model.context))
            for phase, path in paths.items()
        },
        thresholds=job.thresholds(),
        measured=(),
        data=DataRecord(
            name=Path(corpus.source).name,
            sha256=corpus.sha256,
            windows=len(check_WT),
            window_tokens=args.window,
            seed=args.seed,
        ),
    )
    recalibrate(model, draft)
    served = [each for each in args.capacities if each >= draft.lowest - 1e-9]
    checked = windows_of(model, check_WT, prompt_tokens)
    rows, worst = check(model, checked, served)
    recalibrate(model, replace(draft, measured=tuple(rows)))
    model.adapter.save(args.adapter)
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
        "worst_miss": worst,
        "promise_kept": worst <= TOLERANCE,
        "measured": [asdict(row) for row in rows],
        "seconds": round(time.monotonic() - started, 1),
    }


def two_sets(
    corpus: Corpus, model: ElasticModel, args: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """Windows to probe with and others to check on, from different documents."""
    assert model.tokenizer is not None
    chosen = []
    for part, wanted in zip(corpus.split(0.5), (args.windows, args.check_windows), strict=True):
        ids_WT = pack(part, model.tokenizer, args.window)
        if len(ids_WT) < wanted:
            raise DataError(
                f"{corpus.source}: {len(ids_WT)} windows of {args.window} tokens in one half of "
                f"it, {wanted} wanted; give more text or a smaller --window"
            )
        chosen.append(Windows(ids_WT, args.seed).take(wanted))
    return chosen[0], chosen[1]


class _Job:
    """One calibration under way: its questions, its answers, its deadlines."""

    def __init__(
        self,
        model: ElasticModel,
        args: argparse.Namespace,
        ids_WT: Tensor,
        prompt_tokens: int,
        until: float,
    ) -> None:
        assert model.adapter is not None
        self._model, self._shape = model, model.shape
        self._layers = len(self._shape.layers)
        self._context = args.window
        self._capacities = args.capacities
        self._started, self._until = time.monotonic(), until
        self._units = {
            phase: model.adapter.units if asked is None else asked
            for phase, asked in (
                (Phase.PROMPT, args.prompt_units),
                (Phase.OUTPUT, args.output_units),
            )
        }
        self._meter = Meter(model, ids_WT, prompt_tokens)
        self.notebook = Notebook(
            args.adapter / "sensitivity.jsonl", about(model.adapter, ids_WT, prompt_tokens)
        )
        self.chosen: dict[Phase, str] = {}
        self.compared: dict[str, dict[str, dict[str, float]]] = {}
        self.knobs: dict[str, dict[str, Any]] = {}
        self.unanswered = 0
        self._sweeps = args.sweeps

    def find_paths(self) -> Paths:
        """Probe both phases, make candidate paths from the answers, keep the best of each."""
        for phase in (Phase.OUTPUT, Phase.PROMPT):
            until = self._deadline(PROBING[phase])
            fields = fields_of(self._units[phase])
            asked = list(probes(phase, self._layers, fields))
            label = f"probing {phase} tokens"
            self.unanswered += ask(self._meter, self.notebook, asked, self._layers, until, label)
        return {phase: self._path(phase) for phase in (Phase.OUTPUT, Phase.PROMPT)}

    def thresholds(self) -> Thresholds:
        """Those of the probed texts."""
        assert self._model.adapter is not None
        return thresholds(self._meter, self._model.adapter.units)

    def draw(self, picture: Path, calibration: Calibration, served: Sequence[float]) -> None:
        from training.pictures import draw_calibration

        kept = {
            phase: {
                capacity: calibration.schedule(capacity, phase, self._shape, self._context).nearest
                for capacity in served
                if capacity < 1
            }
            for phase in Phase
        }
        draw_calibration(picture, self.notebook.answers, kept, self._layers)

    def _deadline(self, part: float) -> float:
        # Without an end in time, a part of it is without an end as well.
        return self._started + part * (self._until - self._started)

    def _path(self, phase: Phase) -> tuple[Step, ...]:
        """The best of the candidates, tuned."""
        fields = fields_of(self._units[phase])
        known = curves(self.notebook.answers, phase, self._layers)
        makers = self._makers(phase, fields, late_losses(self.notebook.answers))
        judged = {
            name: (self._score(phase, name, path), path)
            for name, make in track(
                list(makers.items()), label=f"comparing paths for {phase} tokens"
            )
            if (path := make(known))
        }
        if not judged:
            raise AdapterError(f"nothing that can be left out was measured for {phase} tokens")
        best = min(judged, key=lambda name: judged[name][0])
        self.chosen[phase] = best
        if best in (LATE_LAYERS, UNIFORM) or not fields:  # no curve shaped it: nothing to turn
            return judged[best][1]
        path, _, knobs = tune(
            known,
            fields,
            makers[best],
            lambda path: self._score(phase, f"{best}, tuned", path),
            self._deadline(TUNING[phase]),
            self._sweeps,
        )
        self.knobs[phase.value] = asdict(knobs)
        self._score(phase, f"{best}, tuned", path)
        return path

    def _makers(
        self, phase: Phase, fields: Sequence[str], late: Mapping[int, float]
    ) -> dict[str, Maker]:
        """Ways to make a path from loss curves, by name."""

        def greedy(
            late: Mapping[int, float] | None = None, whole: bool = True
        ) -> Callable[[Curves], tuple[Step, ...]]:
            return lambda known: Allotment(
                self._shape, self._context, known, fields, late=late, whole=whole
            ).path()

        makers: dict[str, Maker] = {"greedy": greedy()}
        if fields:
            makers[UNIFORM] = lambda _: uniform(self._shape, fields)
        if phase is Phase.PROMPT:
            makers[LATE_LAYERS] = lambda _: late_layers(self._layers)
            if fields and late:
                makers["late layers and greedy"] = greedy(late=late)
        elif fields:
            makers["greedy, no whole sub-layers"] = greedy(whole=False)
        return makers

    def _score(self, phase: Phase, name: str, path: tuple[Step, ...]) -> Score:
        """A path's loss over a few capacities, each weighed alike; the less, the better."""
        asked = [each for each in self._capacities if each < 1]
        asked = asked[len(asked) // 4 :]  # near 1 all paths are good
        asked = asked[:: -max(1, math.ceil(len(asked) / COMPARED))]
        draft = _draft({phase: path}, self._context)
        found: dict[str, float] = {}
        for capacity in asked:
            try:
                schedule = draft.schedule(capacity, phase, self._shape, self._context)
            except CapacityError:
                continue
            found[f"{capacity:g}"] = self._meter.scheduled_kl(phase, schedule)
        self.compared.setdefault(phase.value, {})[name] = found
        mean = sum(math.log(max(kl, LEAST_KL)) for kl in found.values()) / max(1, len(found))
        return len(asked) - len(found), mean


def _draft(paths: Paths, context: int) -> Calibration:
    """A calibration that promises nothing yet: only to walk its paths."""
    return Calibration(lowest=0.0, context=context, paths=paths, thresholds={}, measured=())


def lowest(paths: Paths, shape: ModelShape, context: int, asked: Sequence[float]) -> float:
    """The lowest of the asked capacities that both phases can reach."""
    draft = _draft(paths, context)

    def reached(capacity: float) -> bool:
        try:
            for phase in Phase:
                # A short text and a long one weigh attention differently: both must be in reach.
                for length in (1, context):
                    draft.schedule(capacity, phase, shape, length)
        except CapacityError:
            return False
        return True

    return min(capacity for capacity in asked if reached(capacity))


def thresholds(meter: Meter, units: Sequence[Unit]) -> Thresholds:
    """Quantiles of every token router's scores on a meter's texts, all tokens kept."""
    at = torch.linspace(0, 1, QUANTILES)
    found: Thresholds = {phase: {} for phase in Phase}
    for phase, unit, layer, scores_N in meter.scores(units):
        values = tuple(torch.quantile(scores_N, at).tolist())
        found[phase].setdefault(unit, {})[layer] = values
    return found


def trimmed(
    path: Sequence[Step], shape: ModelShape, least: float, lengths: Sequence[int]
) -> tuple[Step, ...]:
    """The path as far as it is needed to spend `least` at each of these lengths of text."""
    for taken, plan in enumerate(walk(path, len(shape.layers))):
        if all(shape.planned_share(plan, length) <= least for length in lengths):
            return tuple(path[:taken])
    return tuple(path)


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
