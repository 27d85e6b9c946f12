"""One training step of an encoder: the student's losses against its teacher, item by item.

What is compared is what the model is for: a head's labels by KL (by binary KL where several may
hold, by squares where it is a regression), features by their cosine.

Shape letters: B items   T tokens   N judged outputs   O labels   D width
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from elastiformer.capacity import dense_plan
from elastiformer.encoder import Batch, ElasticEncoder
from elastiformer.tasks import Task
from training.data import seed_of
from training.examples import Examples
from training.lessons import LEAST_EVERY, Lesson, Teacher
from training.losses import Losses
from training.student import NumberedStudent, Objective, Whole, summed


def judged(model: ElasticEncoder, outputs: Tensor, batch: Batch) -> Tensor:
    """What of a batch's outputs is compared: labels [N, O], or features [N, D]."""
    if outputs.ndim == 2:
        return outputs
    # Of features, what is pooled away is not judged.
    of_class = model.task == Task.FEATURES and model.reads_class
    return outputs[batch.output_BT if of_class else batch.mask_BT]


def distances(model: ElasticEncoder, teacher_NO: Tensor, student_NO: Tensor) -> Tensor:
    """How far each judged output is from the teacher's, [N]; 0 where the two agree.

    In nats for labels, 1 - cosine for features, squares for a regression.
    """
    teacher_NO, student_NO = teacher_NO.float(), student_NO.float()
    if model.task == Task.FEATURES:
        return 1 - F.cosine_similarity(teacher_NO, student_NO, -1)
    problem = model.config.problem_type
    if problem == "regression" and model.task == Task.TEXT_CLASSIFICATION:
        return (teacher_NO - student_NO).square().sum(-1)
    several = problem == "multi_label_classification" or model.config.num_labels == 1
    if several and model.task != Task.TOKEN_CLASSIFICATION:
        yes_NO = teacher_NO.sigmoid()
        apart_NO = F.logsigmoid(teacher_NO) - F.logsigmoid(student_NO)
        apart_not_NO = F.logsigmoid(-teacher_NO) - F.logsigmoid(-student_NO)
        return (yes_NO * apart_NO + (1 - yes_NO) * apart_not_NO).sum(-1)
    teacher_NO, student_NO = teacher_NO.log_softmax(-1), student_NO.log_softmax(-1)
    return (teacher_NO.exp() * (teacher_NO - student_NO)).sum(-1)


@dataclass(frozen=True, slots=True)
class ItemStudent(NumberedStudent):
    """Learns from examples, which are named by their numbers, [B, 1]."""

    model: ElasticEncoder
    train: Examples
    held: Examples | None
    measure: str = "held_out_distance"

    def lesson(self, teacher: Teacher, step: int, row: int, rows: int) -> Lesson:
        """The plans of one example: of its class tokens none, where they alone are read."""
        rng = random.Random(seed_of("lesson", teacher.seed, step, row))
        lowest = (step * rows + row) % LEAST_EVERY == 0
        if self.model.reads_class:
            dense = dense_plan(len(teacher.shape.layers))
            return Lesson(teacher.window, teacher.prompt_plan(rng, lowest), dense)
        plan = teacher.output_plan(rng, lowest)
        return Lesson(1, plan, plan)

    def learn(
        self,
        numbers_R1: Tensor,
        lessons: Sequence[Lesson],
        objective: Objective,
        whole: Whole,
        rows_at_once: int,
    ) -> Tensor:
        """As of any examples; texts of like length run together, so that little is padded."""
        if not self.model.encoder.reads_images:
            lengths = [len(item.ids) for item in self.train.items(numbers_R1[:, 0])]
            order = sorted(range(len(lengths)), key=lengths.__getitem__)
            numbers_R1, lessons = numbers_R1[order], [lessons[row] for row in order]
        return NumberedStudent.learn(self, numbers_R1, lessons, objective, whole, rows_at_once)

    def losses(
        self,
        examples: Examples,
        numbers_B1: Tensor,
        lessons: Sequence[Lesson],
        objective: Objective,
        whole: Whole,
    ) -> Losses:
        model = self.model
        batch = model.collate(examples.items(numbers_B1[:, 0]))
        with torch.no_grad():
            teacher = model.teacher(batch)
        result = model.masked(batch, [(each.prompt, each.output) for each in lessons])
        teacher_NO, student_NO = (
            judged(model, outputs, batch) for outputs in (teacher, result.outputs)
        )
        apart_N = distances(model, teacher_NO, student_NO)
        # Each example weighs alike, however many outputs it has.
        distil = apart_N.mean() * len(lessons) / whole.rows
        return summed(distil, result.routes, objective, whole)
