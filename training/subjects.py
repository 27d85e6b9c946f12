"""What routers of one domain are judged by on another: items of an encoder, or windows of text.

A subject is a model and the test data of every domain. Routers run under the same plan, which
lowers every layer alike; what they lose is measured through the form that is served.

Shape letters: N windows   T tokens
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from elastiformer import Calibration, ElasticModel, Phase, Unit
from elastiformer.elastic import Elastic
from elastiformer.encoder import ElasticEncoder
from elastiformer.routers import TOKEN_UNITS
from elastiformer.sequence import Item
from training.allotment import fields_of, uniform
from training.data import some_windows, tokenizer_of
from training.encoder_calibrate import labels_of, some, uniform_calibration
from training.encoder_quality import Judged, measure_items
from training.examples import read_examples
from training.overlap import Choice, choice_of, choice_of_texts
from training.path_search import Thresholds, thresholds
from training.quality import Setting, Window, measure, recalibrate, windows_of
from training.sensitivity import Meter

OVERLAP_ITEMS, OVERLAP_WINDOWS = 64, 4  # of each domain, on which what is kept is compared
THRESHOLD_WINDOWS = 4  # of the text trained on, where token routers get their thresholds

FOR_ITEMS = ("task", "batch_items", "items")  # what texts of a language model have no use for
FOR_TEXTS = ("batch_tokens", "window", "windows", "held_out_window")


@dataclass(frozen=True, slots=True)
class Loss:
    """What routers lose on a domain at one capacity; what does not apply is None.

    `distance` is the mean over items or tokens; nats where labels or next tokens are judged.
    """

    distance: float
    same: float | None  # share of items or tokens with the full model's likeliest label or token
    accuracy: float | None
    spent: float


class Subject(Protocol):
    """A model, and what its routers are judged by."""

    @property
    def model(self) -> Elastic:
        """The model that routers are attached to."""

    def level(self, learnt_from: Path) -> None:
        """Lower all layers alike from now on, under the adapter that is attached.

        Args:
            learnt_from: the data that it was trained on.
        """

    def loss(self, domain: str, capacity: float) -> Loss:
        """What the attached routers lose on a domain's test data."""

    def choice(self, capacity: float) -> Choice:
        """What the attached routers keep of a little of every domain."""

    def about(self) -> Mapping[str, Any]:
        """What was measured on, for the report."""


class ItemSubject:
    """An encoder and its test items."""

    def __init__(self, args: argparse.Namespace, tests: Mapping[str, Path]) -> None:
        model = ElasticEncoder.load(args.base, dtype=args.dtype, device=args.device, task=args.task)
        self.model = model
        self._examples = {
            name: some(read_examples(str(path), model), args.items) for name, path in tests.items()
        }
        self._judged = {
            name: Judged.of(model, test.items(range(len(test.each))), labels_of(test))
            for name, test in self._examples.items()
        }
        self._few: list[Item] = [
            item for judged in self._judged.values() for item in judged.items[:OVERLAP_ITEMS]
        ]
        self._context = round(sum(len(item.ids) for item in self._few) / len(self._few))
        self._batch_items = args.batch_items

    def level(self, learnt_from: Path) -> None:
        recalibrate(self.model, uniform_calibration(self.model, self._context))

    def loss(self, domain: str, capacity: float) -> Loss:
        row = measure_items(self.model, self._judged[domain], capacity)
        return Loss(row.distance, row.same_label, row.accuracy, row.spent)

    def choice(self, capacity: float) -> Choice:
        return choice_of(self.model, self._few, capacity)

    def about(self) -> Mapping[str, Any]:
        return {
            "batch_items": self._batch_items,
            "items": {name: len(test.each) for name, test in self._examples.items()},
            "test_sha256": {name: test.sha256 for name, test in self._examples.items()},
        }


class TextSubject:
    """A causal model and windows of every domain's test text, each token scored."""

    def __init__(self, args: argparse.Namespace, tests: Mapping[str, Path]) -> None:
        self.model = model = ElasticModel.load(args.base, dtype=args.dtype, device=args.device)
        self._tokens = args.held_out_window
        self._shape_of_step = {"batch_tokens": args.batch_tokens, "window": args.window}
        self._windows: dict[str, list[Window]] = {}
        self._sha256: dict[str, str] = {}
        for name, path in tests.items():
            ids_NT, self._sha256[name] = self._read(path, args.windows)
            self._windows[name] = windows_of(model, ids_NT, self._tokens * 2 // 3)
        few = [each for part in self._windows.values() for each in part[:OVERLAP_WINDOWS]]
        self._few_NT = torch.stack([window.ids_T for window in few])

    def level(self, learnt_from: Path) -> None:
        model = self.model
        assert model.adapter is not None, "nothing to level without an adapter"
        units = model.adapter.units
        paths = dict.fromkeys(Phase, uniform(model.shape, fields_of(units)))
        levels = self._thresholds(units, learnt_from)
        recalibrate(model, Calibration(0.01, self._tokens, paths, levels, ()))

    def loss(self, domain: str, capacity: float) -> Loss:
        row = measure(self.model, self._windows[domain], capacity, Setting.SCORED)
        return Loss(row.kl, row.same_top, None, row.spent)

    def choice(self, capacity: float) -> Choice:
        return choice_of_texts(self.model, self._few_NT, capacity)

    def about(self) -> Mapping[str, Any]:
        return self._shape_of_step | {
            "windows": {name: len(each) for name, each in self._windows.items()},
            "held_out_window": self._tokens,
            "test_sha256": self._sha256,
        }

    def _thresholds(self, units: Sequence[Unit], learnt_from: Path) -> Thresholds:
        """Of token routers, on text that they were trained on."""
        asked = [unit for unit in units if unit in TOKEN_UNITS]
        if not asked:
            return {}
        ids_NT, _ = self._read(learnt_from, THRESHOLD_WINDOWS)
        return thresholds(Meter(self.model, ids_NT, self._tokens * 2 // 3).scores(asked))

    def _read(self, path: Path, wanted: int) -> tuple[Tensor, str]:
        """So many windows of a file, and the hash of its texts."""
        return some_windows(str(path), tokenizer_of(self.model), wanted, self._tokens, seed=0)
