"""What a capacity loses and spends of an encoder, measured through the form that is served.

Shape letters: O labels or features   N judged outputs
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from elastiformer import DENSE, Capacity
from elastiformer.calibration import Measured
from elastiformer.capacity import Phase, Plan, dense_plan
from elastiformer.encoder import ElasticEncoder
from elastiformer.plan_grid import PlanGrid
from elastiformer.sequence import Chunk, Item
from elastiformer.tasks import Task
from training.encoder_student import distances, judged
from training.progress import track

ITEMS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Judged:
    """Held-out items, what the pretrained model makes of them, and their labels if known.

    `most`: the share of the block FLOPs that each spends at 1.0; what nobody reads is not run.
    """

    items: tuple[Item, ...]
    teacher: tuple[Tensor, ...]
    most: tuple[float, ...]
    labels: tuple[int | None, ...]

    @classmethod
    def of(
        cls, model: ElasticEncoder, items: Sequence[Item], labels: Sequence[int | None]
    ) -> Judged:
        outputs, spent = _run(model, items, DENSE)
        return cls(tuple(items), tuple(outputs), tuple(spent), tuple(labels))


@dataclass(frozen=True, slots=True)
class ItemQuality:
    """One capacity over a set of items; what does not apply to the task is None."""

    capacity: float
    items: int
    distance: float  # nats for labels, 1 - cosine for features, squares for a regression
    same_label: float | None
    accuracy: float | None
    spent: float  # the mean over items of their spent share
    missed: float  # by how much the worst item missed its capacity, beyond one token's worth

    def measured(self, task: str, problem: str | None) -> Measured:
        """The row of a calibration's table."""
        features = task == Task.FEATURES
        return Measured(
            capacity=self.capacity,
            spent=self.spent,
            kl=None if features or problem == "regression" else self.distance,
            cosine=1 - self.distance if features else None,
            same_label=self.same_label,
            accuracy=self.accuracy,
        )


@torch.inference_mode()
def measure_items(model: ElasticEncoder, given: Judged, capacity: float) -> ItemQuality:
    """Run every item at a capacity and compare with the pretrained model.

    Raises:
        CapacityError: when the adapter cannot be run at this capacity.
    """
    outputs, spent = _run(model, given.items, Capacity(capacity, capacity))
    width = outputs[0].shape[-1]
    teacher_NO = torch.cat([each.reshape(-1, width) for each in given.teacher])
    student_NO = torch.cat([each.reshape(-1, width) for each in outputs])
    missed = 0.0
    for item, share, most in zip(given.items, spent, given.most, strict=True):
        off = max(share - capacity, min(capacity, most) - share)
        missed = max(missed, off - 1 / len(item.ids))
    return ItemQuality(
        capacity=capacity,
        items=len(given.items),
        distance=float(distances(model, teacher_NO, student_NO).mean()),
        same_label=_same(model, teacher_NO, student_NO),
        accuracy=_accuracy(model, outputs, given.labels),
        spent=sum(spent) / len(spent),
        missed=missed,
    )


@torch.inference_mode()
def time_items(
    model: ElasticEncoder, given: Judged, capacities: Sequence[float], repeats: int
) -> dict[float, float]:
    """Each capacity's time over that at 1.0, the median over batches; `capacities` hold 1.0.

    Capacities take turns on every batch, so that whatever else runs here falls on all of them.
    """
    assert 1.0 in capacities, "ratios are over capacity 1.0"
    ratios: dict[float, list[float]] = {capacity: [] for capacity in capacities}
    starts = range(0, len(given.items), ITEMS_AT_ONCE)
    for turn, start in enumerate(track([*starts] * repeats, label="timing")):
        items = given.items[start : start + ITEMS_AT_ONCE]
        taken: dict[float, float] = {}
        first = turn % len(capacities)
        for capacity in [*capacities[first:], *capacities[:first]]:
            begun = time.perf_counter()
            _run(model, items, Capacity(capacity, capacity))
            taken[capacity] = time.perf_counter() - begun
        for capacity, seconds in taken.items():
            ratios[capacity].append(seconds / taken[1.0])
    return {capacity: median(each) for capacity, each in ratios.items()}


def _run(
    model: ElasticEncoder, items: Sequence[Item], capacity: Capacity
) -> tuple[list[Tensor], list[float]]:
    """What is read of each item, and the share of the block FLOPs that it spent."""
    outputs: list[Tensor] = []
    spent: list[float] = []
    for start in range(0, len(items), ITEMS_AT_ONCE):
        sequences = [
            model.sequence(capacity, item) for item in items[start : start + ITEMS_AT_ONCE]
        ]
        stepped = model.step([Chunk(each, list(each.item.ids)) for each in sequences])
        outputs += [each.cpu() for each in stepped]  # waits for the device, too
        spent += [each.usage.capacity_spent for each in sequences]
    return outputs, spent


def _same(model: ElasticEncoder, teacher_NO: Tensor, student_NO: Tensor) -> float | None:
    if model.task == Task.FEATURES or model.config.num_labels < 2:
        return None
    same_N = teacher_NO.argmax(-1) == student_NO.argmax(-1)
    return float(same_N.float().mean())


def _accuracy(
    model: ElasticEncoder, outputs: Sequence[Tensor], labels: Sequence[int | None]
) -> float | None:
    known = [
        (each, label) for each, label in zip(outputs, labels, strict=True) if label is not None
    ]
    one_label = model.task in (Task.TEXT_CLASSIFICATION, Task.IMAGE_CLASSIFICATION)
    if not known or not one_label or model.config.num_labels < 2:
        return None
    return sum(int(each.argmax()) == label for each, label in known) / len(known)


class ItemMeter:
    """Runs plans through the masked form on a fixed set of items, and says what they lose."""

    def __init__(self, model: ElasticEncoder, items: Sequence[Item], phase: Phase) -> None:
        self._model, self._phase = model, phase
        # Items of like length side by side, so that little is padded.
        ordered = sorted(items, key=lambda item: len(item.ids))
        starts = range(0, len(ordered), ITEMS_AT_ONCE)
        self._batches = [model.collate(ordered[at : at + ITEMS_AT_ONCE]) for at in starts]
        with torch.inference_mode():
            self._teacher = [judged(model, model.teacher(batch), batch) for batch in self._batches]

    def kl(self, phase: Phase, plan: Plan, first_layer: int = 0) -> float:
        """The mean distance when the tokens of `phase` run under `plan`, the others whole."""
        return self._mean([plan], lambda at: 1)

    def scheduled(self, fuller: Plan, leaner: Plan, is_fuller: Sequence[bool]) -> float:
        """The same when positions take turns between two plans."""
        return self._mean([fuller, leaner], lambda at: 1 if is_fuller[at] else 2)

    @torch.inference_mode()
    def _mean(self, plans: Sequence[Plan], number: Callable[[int], int]) -> float:
        dense = dense_plan(len(plans[0]))
        total, count = 0.0, 0
        for batch, teacher_NO in zip(self._batches, self._teacher, strict=True):
            tokens = batch.mask_BT.shape[1]
            plan_T = torch.tensor([number(at) for at in range(tokens)], device=teacher_NO.device)
            routed_BT = batch.output_BT == (self._phase is Phase.OUTPUT)
            plan_BT = torch.where(routed_BT, plan_T, 0)
            outputs = self._model.masked(batch, PlanGrid([dense, *plans], plan_BT)).outputs
            student_NO = judged(self._model, outputs, batch)
            total += float(distances(self._model, teacher_NO, student_NO).sum())
            count += len(student_NO)
        return total / count
