"""One training step: the student's losses against its teacher, and the gradient of a whole batch.

The teacher is the same model with nothing left out; no second copy of the weights exists. Every
row is cut into prompt and output and runs under its lesson's plans; the loss is taken on output
tokens, where a user would see it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from elastiformer import ElasticModel
from elastiformer.elastic import Elastic
from elastiformer.plan_grid import Route, Selection
from elastiformer.routers import TOKEN_UNITS
from training.lessons import Lesson, Teacher
from training.losses import Divergence, Losses, Weights, kl_divergence, router_losses
from training.quality import copied

LEAST_ROW_KL = 1e-3  # nats: what a row loses less than that is rounding, and no logarithm's matter


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised, and how tokens are chosen while it is."""

    divergence: Divergence
    weights: Weights
    selection: Selection
    image_draws: int = 0  # sets of image tokens that are tried for each image; 0: the best ones
    even_rows: bool = False  # a row counts by the logarithm of its KL, not by its tokens'


class Student(Protocol):
    """What a run trains: what its rows are, and what they lose. A row is named by its numbers."""

    @property
    def model(self) -> Elastic:
        """The model whose adapter learns."""

    @property
    def measure(self) -> str:
        """What is measured on held-out rows."""

    def lesson(self, teacher: Teacher, step: int, row: int, rows: int) -> Lesson:
        """How one row of the whole batch of `rows` runs."""

    def learn(
        self,
        ids_RT: Tensor,
        lessons: Sequence[Lesson],
        objective: Objective,
        whole: Whole,
        rows_at_once: int,
    ) -> Tensor:
        """Add these rows' part of the gradient; the parts of the losses, [4], not yet summed."""

    def held_out(self, ids_WT: Tensor, lessons: Sequence[Lesson], rows_at_once: int) -> float:
        """What is lost on held-out rows under lessons of their own."""


@dataclass(frozen=True, slots=True)
class Whole:
    """The whole batch, of which a pass or a process holds a part: what losses are divided by."""

    rows: int
    output_tokens: int
    token_routers: int
    part_routers: int

    @classmethod
    def of(cls, model: Elastic, lessons: Sequence[Lesson], window: int) -> Whole:
        adapter = model.adapter
        assert adapter is not None, "a student without an adapter"
        layers, units = len(model.shape.layers), adapter.routers.units
        of_tokens = sum(unit in TOKEN_UNITS for unit in units)
        return cls(
            rows=len(lessons),
            output_tokens=sum(each.output_tokens(window) for each in lessons),
            token_routers=layers * of_tokens,
            part_routers=layers * (len(units) - of_tokens),
        )

    def times(self, runs: int) -> Whole:
        """Every row run so many times over."""
        return replace(self, rows=self.rows * runs)


def student_losses(
    model: ElasticModel,
    ids_BT: Tensor,
    lessons: Sequence[Lesson],
    objective: Objective,
    whole: Whole,
) -> Losses:
    """The part of the whole batch's losses that these rows make."""
    ids_BT = as_taught(ids_BT, lessons).to(model.device)
    first_B1 = torch.tensor([[each.first_output] for each in lessons], device=model.device)
    output_BT = torch.arange(ids_BT.shape[1], device=model.device) >= first_B1
    with torch.no_grad():
        teacher_BTV = model.teacher(ids_BT)
    plans = [(each.prompt, each.output) for each in lessons]
    result = model.masked(ids_BT, plans, output_BT, selection=objective.selection)
    if objective.even_rows:
        rows = zip(teacher_BTV, result.logits_BTV, output_BT, strict=True)
        kls = [kl_divergence(*row, objective.divergence) for row in rows]
        distil = torch.stack([(kl + LEAST_ROW_KL).log() for kl in kls]).sum() / whole.rows
    else:
        distil = kl_divergence(
            teacher_BTV, result.logits_BTV, output_BT, objective.divergence, whole.output_tokens
        )
    return summed(distil, result.routes, objective, whole)


def as_taught(ids_BT: Tensor, lessons: Sequence[Lesson]) -> Tensor:
    """The rows as their lessons have them: in some, what follows the prompt repeats it."""
    rows = [
        copied(ids_T[None], lesson.prompt_tokens)[0] if lesson.copied else ids_T
        for ids_T, lesson in zip(ids_BT, lessons, strict=True)
    ]
    return torch.stack(rows)


def summed(distil: Tensor, routes: Sequence[Route], objective: Objective, whole: Whole) -> Losses:
    """The distillation loss of some rows with what their routes lose."""
    balance, agreement = router_losses(routes, whole.rows, whole.token_routers, whole.part_routers)
    weights = objective.weights
    total = distil + weights.balance * balance + weights.agreement * agreement
    return Losses(distil, balance, agreement, total)


def learn(
    model: ElasticModel,
    ids_RT: Tensor,
    lessons: Sequence[Lesson],
    objective: Objective,
    whole: Whole,
    rows_at_once: int,
) -> Tensor:
    """Add this process's part of the gradient; the parts of the losses, [4], not yet summed.

    Args:
        ids_RT: the windows of this process, R of them; `lessons` are theirs.
        rows_at_once: of one forward and backward: bounds the memory, changes only rounding.
    """
    parts = torch.zeros(4, device=model.device)
    for start in range(0, len(lessons), rows_at_once):
        rows = slice(start, start + rows_at_once)
        losses = student_losses(model, ids_RT[rows], lessons[rows], objective, whole)
        if losses.total.requires_grad:  # plans of whole sub-layers only, and no LoRA: no router ran
            losses.total.backward()  # type: ignore[no-untyped-call]
        parts += torch.stack([part.detach().float() for part in losses.parts])
    return parts


@dataclass(frozen=True, slots=True)
class TextStudent:
    """A causal model, which learns from windows of text."""

    model: ElasticModel
    measure: str = "held_out_kl"

    def lesson(self, teacher: Teacher, step: int, row: int, rows: int) -> Lesson:
        return teacher.lesson(step, row, rows)

    def learn(
        self,
        ids_RT: Tensor,
        lessons: Sequence[Lesson],
        objective: Objective,
        whole: Whole,
        rows_at_once: int,
    ) -> Tensor:
        return learn(self.model, ids_RT, lessons, objective, whole, rows_at_once)

    def held_out(self, ids_WT: Tensor, lessons: Sequence[Lesson], rows_at_once: int) -> float:
        return held_out_kl(self.model, ids_WT, lessons, rows_at_once)


class NumberedStudent(ABC):
    """Learns from examples that are named by their numbers, [B, 1]."""

    model: Elastic
    train: Any
    held: Any

    @abstractmethod
    def losses(
        self,
        examples: Any,
        numbers_B1: Tensor,
        lessons: Sequence[Lesson],
        objective: Objective,
        whole: Whole,
    ) -> Losses:
        """The part of the whole batch's losses that these of the examples make."""

    def learn(
        self,
        numbers_R1: Tensor,
        lessons: Sequence[Lesson],
        objective: Objective,
        whole: Whole,
        rows_at_once: int,
    ) -> Tensor:
        """Add the gradient of these examples; the parts of the losses, [4], not yet summed."""
        parts = torch.zeros(4, device=self.model.device)
        for start in range(0, len(lessons), rows_at_once):
            rows = slice(start, start + rows_at_once)
            losses = self.losses(self.train, numbers_R1[rows], lessons[rows], objective, whole)
            if losses.total.requires_grad:
                losses.total.backward()  # type: ignore[no-untyped-call]
            parts += torch.stack([part.detach().float() for part in losses.parts])
        return parts

    @torch.no_grad()
    def held_out(self, numbers_W1: Tensor, lessons: Sequence[Lesson], rows_at_once: int) -> float:
        """What is lost on held-out examples under lessons of their own, the mean over them."""
        assert self.held is not None, "nothing was held out"
        whole = Whole.of(self.model, lessons, 1)
        plain = Objective(Divergence(), Weights(0.0, 0.0), Selection.RANK)
        total = 0.0
        for start in range(0, len(lessons), rows_at_once):
            rows = slice(start, start + rows_at_once)
            losses = self.losses(self.held, numbers_W1[rows], lessons[rows], plain, whole)
            total += float(losses.distil)
        return total


@torch.no_grad()
def held_out_kl(
    model: ElasticModel, ids_WT: Tensor, lessons: Sequence[Lesson], rows_at_once: int
) -> float:
    """KL on held-out windows under lessons of their own, in nats per output token."""
    objective = Objective(Divergence(), Weights(0.0, 0.0), Selection.RANK)
    whole = Whole.of(model, lessons, ids_WT.shape[1])
    total = 0.0
    for start in range(0, len(lessons), rows_at_once):
        rows = slice(start, start + rows_at_once)
        losses = student_losses(model, ids_WT[rows], lessons[rows], objective, whole)
        total += float(losses.distil)
    return total
