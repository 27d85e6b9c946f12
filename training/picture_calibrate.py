"""Calibration of a vision-language model: image tokens and the layers' own units, as one table.

A number asks two things that give: fewer image tokens, and less in the language model for those
that stay. The paths of the layers' units are found as those of a language model, on exchanges. How
few image tokens stay before the layers give anything is measured at each capacity, through the
form that is served: of several floors the one whose answers are nearest to the pretrained model's.

With the paths of another adapter (lent_paths.py) image tokens give first at every capacity, and the
layers what is left, which is all of it where a prompt holds no image. An adapter for image tokens
alone has no paths: they give all that a number asks for.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from elastiformer import Calibration, Phase, Unit
from elastiformer.calibration import DataRecord, ImageFloor
from elastiformer.vlm import ElasticVlm
from training.allotment import LEAST_KL
from training.exchanges import Exchange, Exchanges, read_exchanges
from training.files import DataError
from training.lent_paths import LentPaths
from training.path_search import PathSearch, thresholds, trimmed, units_asked
from training.picture_meter import PictureMeter
from training.picture_quality import answers_at, loaded, prompt_at, quality, reached, some_of
from training.picture_student import LEAST_IMAGE_SHARE
from training.progress import track
from training.quality import recalibrate
from training.sensitivity import Notebook

TOLERANCE = 0.02  # what an exchange spends lies so near to what it asked
FLOORS = (1.0, 0.8, 0.6, 0.45, 0.3, 0.2, LEAST_IMAGE_SHARE)  # shares of the image tokens


def calibrate_pictures(args: argparse.Namespace) -> dict[str, Any]:
    """One calibration, from the data to the adapter's table.

    Raises:
        AdapterError, DataError: see their messages.
    """
    started = time.monotonic()
    model = loaded(args)
    adapter = model.adapter
    assert adapter is not None
    if args.image_spread is not None:
        adapter.spread_images(args.image_spread)
    exchanges = read_exchanges(args.data, model)
    units = _of_layers(units_asked(args, adapter.units))
    lent = LentPaths(model, args) if args.keep_paths is not None or args.text else None
    asked_of_layers = lent is None and (any(units.values()) or args.prompt_units == ())
    probe, check = exchanges, exchanges
    if asked_of_layers:
        probe, check = exchanges.split(0.5)
    some = some_of(check, args.check_items)
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
    told: dict[str, Any] = {}
    if asked_of_layers:
        recalibrate(model, None)  # what an earlier one said must not count
        job = _Joint(model, args, some_of(probe, args.items), units, started)
        draft = job.joined(draft)
        told = job.told()
    asked = args.capacities
    if lent is not None:
        lowest = lent.lowest(asked)
        asked = [each for each in asked if each >= lowest]
        draft = lent.calibrated(replace(draft, lowest=lowest))
    recalibrate(model, draft)
    served = [each for each in asked if reached(model, some, each)]
    least = min(served)
    if asked_of_layers:
        draft = replace(
            draft,
            paths={
                phase: trimmed(path, model.shape, least, (1, mean, model.context))
                for phase, path in draft.paths.items()
            },
        )
    draft = replace(
        draft,
        lowest=least,
        image_floors=tuple(each for each in draft.image_floors if each.capacity >= least),
    )
    recalibrate(model, draft)
    dense = answers_at(model, some, 1.0)
    rows = [quality(model, some, capacity, dense) for capacity in track(served, label="measuring")]
    measured = tuple(row.measured() for row in rows)
    worst = max(row.missed or 0.0 for row in rows)
    if lent is not None:
        windows = lent.windows()
        texts = [lent.row(windows, each) for each in track(served, label="measuring on text")]
        measured = tuple(text.measured(row) for text, row in zip(texts, measured, strict=True))
        worst = max(worst, *(text.missed for text in texts))
    recalibrate(model, replace(draft, measured=measured))
    adapter.save(args.adapter)
    if worst > TOLERANCE:
        print(f"warning: a request missed its capacity by {worst:.3f}", file=sys.stderr)
    return {
        "adapter": str(args.adapter),
        "lowest": least,
        "not_reached": [each for each in args.capacities if each not in served],
        "worst_miss": worst,
        "promise_kept": worst <= TOLERANCE,
        "runs_whole": [str(phase) for phase, path in draft.paths.items() if not path],
        "image_floors": {f"{each.capacity:g}": each.share for each in draft.image_floors},
        **told,
        "measured": [asdict(row) for row in measured],
        "seconds": round(time.monotonic() - started, 1),
    }


def _of_layers(units: Mapping[Phase, Sequence[Unit]]) -> dict[Phase, tuple[Unit, ...]]:
    return {
        phase: tuple(unit for unit in each if unit is not Unit.IMAGE_TOKENS)
        for phase, each in units.items()
    }


class _Joint:
    """Image tokens and the layers' units together, measured on some exchanges."""

    def __init__(
        self,
        model: ElasticVlm,
        args: argparse.Namespace,
        exchanges: Sequence[Exchange],
        units: Mapping[Phase, Sequence[Unit]],
        started: float,
    ) -> None:
        adapter = model.adapter
        assert adapter is not None
        if not exchanges:
            raise DataError(f"{args.data}: asked about one image only; at least 2 are needed")
        self._model, self._exchanges, self._units = model, exchanges, units
        self._asked = sorted(each for each in args.capacities if each < 1)
        self._meter = PictureMeter(model, exchanges)
        seen = Exchanges("", tuple(exchanges)).sha256
        about = {
            phase: hashlib.sha256(f"{adapter.identity_in(phase)}/{seen}".encode()).hexdigest()[:16]
            for phase in Phase
        }
        lengths = [len(each.prompt + each.answer) for each in exchanges]
        self._search = PathSearch(
            self._meter,
            Notebook(args.adapter / "sensitivity.jsonl", about),
            model.shape,
            round(sum(lengths) / len(lengths)),
            units,
            # Paths are compared at what is asked of them where image tokens give as much.
            [math.sqrt(each) for each in args.capacities],
            until=started + 60 * args.max_minutes,
            sweeps=args.sweeps,
            most=args.probes,
        )
        self._losses: dict[float, dict[float, float]] = {}

    def joined(self, draft: Calibration) -> Calibration:
        """This calibration with the layers' paths, and with the floors of image tokens."""
        phases = [Phase.OUTPUT, Phase.PROMPT] if self._units[Phase.OUTPUT] else [Phase.PROMPT]
        paths = self._search.find_paths(phases)
        draft = replace(
            draft,
            paths={phase: paths.get(phase, ()) for phase in Phase},
            lowest=0.01,
            search=self._search.record,
        )
        adapter = self._model.adapter
        assert adapter is not None
        draft = replace(draft, thresholds=thresholds(self._meter.scores(adapter.units, 1.0)))
        self._losses = self._measured(draft)
        floors = floors_of(self._losses)
        if not floors:
            return draft
        # Which tokens stay shifts the routers' scores: they are read where most requests are.
        middle = floors[len(floors) // 2].share
        levels = thresholds(self._meter.scores(adapter.units, middle))
        return replace(draft, thresholds=levels, image_floors=floors)

    def told(self) -> dict[str, Any]:
        return {
            "chosen": {phase.value: name for phase, name in self._search.chosen.items()},
            "candidates": self._search.compared,
            "probes_unanswered": self._search.unanswered,
            "floors": {
                f"{capacity:g}": {f"{share:g}": kl for share, kl in losses.items()}
                for capacity, losses in self._losses.items()
            },
        }

    def _measured(self, draft: Calibration) -> dict[float, dict[float, float]]:
        """By capacity and floor, the KL of the answers, of those that can be run."""
        recalibrate(self._model, draft)
        dense = answers_at(self._model, self._exchanges, 1.0)
        found: dict[float, dict[float, float]] = {}
        for capacity in track(self._asked, label="how few image tokens stay"):
            for floor in FLOORS:
                recalibrate(self._model, replace(draft, image_tokens=floor))
                if not reached(self._model, self._exchanges, capacity):
                    continue
                kl = quality(self._model, self._exchanges, capacity, dense).kl
                found.setdefault(capacity, {})[floor] = kl
                if self._images_give_all(capacity):
                    break  # a lower floor would change nothing
        return found

    def _images_give_all(self, capacity: float) -> bool:
        """Whether nothing is left to ask of the layers for any prompt."""
        prompts = [prompt_at(self._model, each, capacity) for each in self._exchanges]
        return all(prompt.capacity.prompt == 1.0 for prompt in prompts)


def floors_of(losses: Mapping[float, Mapping[float, float]]) -> tuple[ImageFloor, ...]:
    """At each capacity the floor that loses least, none above that of a higher capacity.

    Args:
        losses: by capacity and floor, in nats per token; what is not there cannot be run.
    """
    best: dict[float, tuple[float, tuple[ImageFloor, ...]]] = {0.0: (0.0, ())}
    for capacity in sorted(losses):
        reached: dict[float, tuple[float, tuple[ImageFloor, ...]]] = {}
        for floor, kl in losses[capacity].items():
            below = [each for share, each in best.items() if share <= floor]
            if below:
                loss, floors = min(below)
                loss += math.log(max(kl, LEAST_KL))
                reached[floor] = (loss, (*floors, ImageFloor(capacity, floor)))
        best = reached or best
    return min(best.values())[1]
