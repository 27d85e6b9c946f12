"""One training step of a vision-language model: its losses on the tokens of answers.

Teacher and student differ in length, as the student's image tokens are fewer: they are compared
token by token of the answer, found by where each stood in what was sent.

Through the answers a router hears only of tokens that stay. Of all of them it hears by draws
(image_draws.py), and by its agreement: its scores are to say which image tokens the teacher looks
at while it answers.

Shape letters: B exchanges   T tokens as sent   S tokens that stay   V vocabulary
    P image tokens   D width   M draws
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastiformer.capacity import Unit, dense_plan
from elastiformer.sight import kept_count
from elastiformer.vlm import ElasticVlm, ImagedBatch, ImagedResult
from training.choosers import answer_attention
from training.data import seed_of
from training.exchanges import Exchange, Exchanges, collated, judged
from training.image_draws import drawn, lesson_of
from training.lessons import LEAST_EVERY, Lesson, Teacher
from training.losses import Losses, kl_divergence
from training.student import NumberedStudent, Objective, Whole, summed

LEAST_IMAGE_SHARE = 0.1  # of an image's tokens, that stay
WHOLE_LAYERS = 0.5  # of the rows leave out image tokens only


@dataclass(frozen=True, slots=True)
class ImageLesson(Lesson):
    """A lesson, the share of the image's tokens that stay, and what sets of them are drawn by."""

    image_share: float
    seed: int

    def output_tokens(self, window: int) -> int:
        return 1  # each exchange weighs alike, however long its answer is


def aligned(batch: ImagedBatch, result: ImagedResult, teacher_BTV: Tensor) -> tuple[Tensor, ...]:
    """Teacher's logits where the student's tokens stood, the student's, and which are judged."""
    at_BSV = result.original_BS[..., None].expand(-1, -1, teacher_BTV.shape[2])
    mask_BS = judged(batch).gather(1, result.original_BS) & result.mask_BS
    return teacher_BTV.gather(1, at_BSV), result.logits_BSV, mask_BS


@dataclass(frozen=True, slots=True)
class PictureStudent(NumberedStudent):
    """Learns from exchanges, which are named by their numbers, [B, 1]."""

    model: ElasticVlm
    train: Exchanges
    held: Exchanges | None
    most: float = 1.0  # share of an image's tokens that stay, of those drawn
    measure: str = "held_out_kl"

    def lesson(self, teacher: Teacher, step: int, row: int, rows: int) -> ImageLesson:
        rng = random.Random(seed_of("lesson", teacher.seed, step, row))
        lowest = (step * rows + row) % LEAST_EVERY == 0
        adapter = self.model.adapter
        assert adapter is not None, "a student without an adapter"
        share = 1.0
        if Unit.IMAGE_TOKENS in adapter.units:
            share = LEAST_IMAGE_SHARE if lowest else rng.uniform(LEAST_IMAGE_SHARE, self.most)
        prompt = output = dense_plan(len(teacher.shape.layers))
        in_layers = [unit for unit in adapter.units if unit is not Unit.IMAGE_TOKENS]
        if in_layers and (share == 1 or rng.random() >= WHOLE_LAYERS):
            prompt = teacher.prompt_plan(rng, lowest)
            output = teacher.output_plan(rng, lowest)
        return ImageLesson(1, prompt, output, share, rng.getrandbits(63))

    def losses(
        self,
        exchanges: Exchanges,
        numbers_B1: Tensor,
        lessons: Sequence[Lesson],
        objective: Objective,
        whole: Whole,
    ) -> Losses:
        model = self.model
        imaged = [each for each in lessons if isinstance(each, ImageLesson)]
        if objective.image_draws and model.adapter and model.adapter.routers.image is not None:
            return self._drawn(exchanges.at(numbers_B1[:, 0]), imaged, objective, whole)
        batch = collated(exchanges.at(numbers_B1[:, 0]), model)
        with torch.no_grad():
            teacher_BTV = model.teacher_images(batch)
        result = model.masked_images(
            batch,
            [(each.prompt, each.output) for each in lessons],
            [each.image_share for each in imaged],
            objective.selection,
        )
        teacher_BSV, student_BSV, mask_BS = aligned(batch, result, teacher_BTV)
        distil = torch.stack(
            [
                kl_divergence(*row, objective.divergence)
                for row in zip(teacher_BSV, student_BSV, mask_BS, strict=True)
            ]
        ).sum()
        distil = distil / whole.rows
        losses = summed(distil, result.routes, objective, whole)
        return self._agreeing(losses, batch, objective, whole)

    def _drawn(
        self,
        exchanges: Sequence[Exchange],
        lessons: Sequence[ImageLesson],
        objective: Objective,
        whole: Whole,
    ) -> Losses:
        """The same, each exchange under several sets of image tokens that its router draws."""
        model, many = self.model, objective.image_draws
        adapter = model.adapter
        assert adapter is not None and adapter.routers.image is not None, "what draws"
        router = adapter.routers.image
        in_layers = adapter.units != (Unit.IMAGE_TOKENS,)
        total: Losses | None = None
        for exchange, lesson in zip(exchanges, lessons, strict=True):
            batch = collated([exchange], model)
            with torch.no_grad():
                teacher_1TV = model.teacher_images(batch)
                features_1PD = model.vlm.features(batch.pixels_NCHW)
            scores_P = router.spaced(router(features_1PD))[0]
            chance = torch.Generator().manual_seed(lesson.seed)
            count = kept_count(lesson.image_share, len(scores_P))
            draws = drawn(scores_P, count, many, chance)
            with torch.set_grad_enabled(in_layers):
                tried = batch.repeated(many)
                result = model.masked_images(
                    tried,
                    [(lesson.prompt, lesson.output)] * many,
                    selection=objective.selection,
                    chosen_NP=draws.chosen_MP,
                )
                teacher_MTV = teacher_1TV.expand(many, -1, -1)
                teacher_MSV, student_MSV, mask_MS = aligned(tried, result, teacher_MTV)
                lost_M = torch.stack(
                    [
                        kl_divergence(*row, objective.divergence)
                        for row in zip(teacher_MSV, student_MSV, mask_MS, strict=True)
                    ]
                )
            distil = (lost_M.mean() + lesson_of(draws, lost_M)) / whole.rows
            each = summed(distil, result.routes, objective, whole.times(many))
            each = self._agreeing(each, batch, objective, whole)
            total = each if total is None else total + each
        assert total is not None, "a pass without rows"
        return total

    def _agreeing(
        self, losses: Losses, batch: ImagedBatch, objective: Objective, whole: Whole
    ) -> Losses:
        """These losses, and what the image router's agreement adds."""
        if objective.weights.agreement == 0:
            return losses
        agreement = losses.agreement + self._image_agreement(batch) / whole.rows
        total = losses.total + objective.weights.agreement * (agreement - losses.agreement)
        return Losses(losses.distil, losses.balance, agreement, total)

    def _image_agreement(self, batch: ImagedBatch) -> Tensor:
        """How badly the router's scores foretell where the teacher looks, in nats, summed."""
        adapter = self.model.adapter
        assert adapter is not None, "a student without an adapter"
        if adapter.routers.image is None:
            return torch.zeros((), device=self.model.device)
        with torch.no_grad():
            features_BPD = self.model.vlm.features(batch.pixels_NCHW)
        looked_BP = answer_attention(self.model, batch, features_BPD)
        scores_BP = adapter.routers.image(features_BPD)
        told: Tensor = (looked_BP * scores_BP.log_softmax(-1)).sum()
        return -told
